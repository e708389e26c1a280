"""H2O's choice of heavy tokens, simulated on the scores of a whole prompt, in torch operations.

The local choice of a query needs that of the query before, so that there is a step for each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnspec.fast.backend import FLOATS, check_integer, check_size, check_tensor, wide
from attnspec.fast.engines.select import top_k_mask
from attnspec.fast.patterns.sinklora_h2o import check_budgets


def h2o_local_mask(scores: Tensor, hh: int, *, backend: str | None = None) -> Tensor:
    """bool (batch, H, T, T), the `hh` tokens that are heavy when each query comes.

    `scores` (batch, H, T, T) are scaled; those above the diagonal are not read. The caller adds the
    recent tokens and cuts causally.
    """
    _check_square("scores", scores)
    check_integer("hh", hh, least=0)
    T = scores.shape[3]
    mask = torch.zeros_like(scores, dtype=torch.bool)
    if hh == 0 or T == 0:
        return mask
    u = torch.arange(T, device=scores.device)
    hidden = u > u[:, None]
    P = wide(scores.detach()).masked_fill(hidden, -torch.inf).softmax(dim=3)
    mask[:, :, :hh, :hh] = True
    kept = (u < hh).expand(*scores.shape[:2], T)
    a = P[:, :, :hh].sum(2)
    for t in range(hh, T):
        best = top_k_mask(a.masked_fill(~kept, -torch.inf), hh - 1, backend=backend)
        kept = best | (u == t)
        a = (a + P[:, :, t]).where(kept, 0.0)
        mask[:, :, t] = kept
    return mask


def h2o_global_mask(P: Tensor, hh: int, rec: int, *, backend: str | None = None) -> Tensor:
    """bool (batch, H, T, T), heavy columns and recent tokens for causal weights P, likewise.

    What P holds above the diagonal is not read. Looks ahead: later queries decide as well.
    """
    _check_square("P", P)
    check_budgets(hh, rec)
    u = torch.arange(P.shape[3], device=P.device)
    distance = u[:, None] - u
    seen = distance >= 0
    received = wide(P.detach()).where(seen, 0.0).sum(2)
    heavy = top_k_mask(received, hh, backend=backend)
    return (heavy[:, :, None] | (distance.abs() <= rec)) & seen


def _check_square(name: str, x: Tensor) -> None:
    check_tensor(name, x, ("batch", "H", "T", "T"), FLOATS)
    check_size(name, x.shape[2], x.shape[3], "queries, as many as keys")
