"""SeerAttention's selection rules on Numba and Triton: a threshold or a ratio of scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import FLOATS, check_integer, check_size, check_tensor
from attnspec.fast.engines.select import top_k_mask
from attnspec.fast.selection.seer_attention_gate import (
    check_kinds,
    gate_scores,
    pool_blocks,
    rope_tables,
)


def select_threshold(
    softmaxed: Tensor,
    tau: float = 2e-3,
    last_dense: bool = True,
    force_diagonal: bool = False,
    *,
    backend: str | None = None,
) -> Tensor:
    """M bool (batch, heads, nb, nb), True where a gate weight of softmax(G) exceeds tau.

    A tau below 0 keeps every block of the past. `force_diagonal` adds a row's own block.
    """
    _check_square("softmaxed", softmaxed)
    check_number("tau", tau)
    return _finish(softmaxed > tau, last_dense, force_diagonal)


def ratio_to_k(rho: float, nb: int, *, backend: str | None = None) -> int:
    """Blocks kept in each row, so that about a share rho of the causal triangle is."""
    check_number("rho", rho)
    check_integer("nb", nb, least=0)
    if not 0 < rho <= 1:
        raise ValueError(f"rho: got {rho}, expected a number in (0, 1]")
    return max(1, int((1 - math.sqrt(1 - rho)) * nb))


def select_ratio(
    G: Tensor,
    rho: float,
    last_dense: bool = True,
    force_diagonal: bool = False,
    *,
    backend: str | None = None,
) -> Tensor:
    """M bool (batch, heads, nb, nb), the `ratio_to_k` best of G in each row, ties to the lower."""
    _check_square("G", G)
    chosen = top_k_mask(G, ratio_to_k(rho, G.shape[3]), backend=backend)
    return _finish(chosen, last_dense, force_diagonal)


def select_blocks(
    q: Tensor,
    k: Tensor,
    Wq: Tensor | None,
    Wk: Tensor,
    *,
    b: int = 64,
    q_kinds: Sequence[str] = ("avg",),
    k_kinds: Sequence[str] = ("max", "min", "avg"),
    base: float = 10000.0,
    tau: float | None = None,
    rho: float | None = None,
    last_dense: bool = True,
    force_diagonal: bool = False,
    backend: str | None = None,
) -> Tensor:
    """M bool (batch, heads, nb, nb) of q (batch, heads, T, d) and k (batch, kv_heads, T, d).

    q and k come before their rotation; Wq and Wk are those of `gate_scores`. Either `tau` or `rho`
    chooses the rule; neither means the authors' tau = 2e-3.
    """
    check_tensor("q", q, ("batch", "heads", "T", "d"), FLOATS)
    check_tensor("k", k, ("batch", "kv_heads", "T", "d"), FLOATS)
    check_size("k", k.shape[2], q.shape[2], "tokens, as in q")
    check_tensor("Wk", Wk, ("heads", "nk * d", "dg"), FLOATS)
    check_kinds(q_kinds, "q_kinds")
    check_kinds(k_kinds, "k_kinds")
    if tau is not None and rho is not None:
        raise ValueError(f"tau: got {tau} beside rho {rho}, expected one of the two")
    pq = pool_blocks(q, b, q_kinds, backend=backend)
    pk = pool_blocks(k, b, k_kinds, backend=backend)
    starts = b * torch.arange(pq.shape[2], device=q.device)
    G = gate_scores(pq, pk, Wq, Wk, *rope_tables(starts, Wk.shape[2], base), backend=backend)
    if rho is not None:
        return select_ratio(G, rho, last_dense, force_diagonal, backend=backend)
    tau = 2e-3 if tau is None else tau
    return select_threshold(torch.softmax(G, -1), tau, last_dense, force_diagonal)


def _finish(chosen: Tensor, last_dense: bool, force_diagonal: bool) -> Tensor:
    """The last two block rows, the diagonal if asked for, and nothing of the future."""
    nb = chosen.shape[3]
    block = torch.arange(nb, device=chosen.device)
    row, column = block[:, None], block[None, :]
    if last_dense:
        chosen = chosen | (row >= nb - 2)
    if force_diagonal:
        chosen = chosen | (row == column)
    return chosen & (column <= row)


def _check_square(name: str, x: Any) -> None:
    check_tensor(name, x, ("batch", "heads", "nb", "nb"), FLOATS)
    check_size(name, x.shape[2], x.shape[3], "as many query blocks as key blocks")


def check_number(name: str, value: Any) -> None:
    """`value` is a number, not a bool and not NaN."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {value!r}, expected a number")
    if math.isnan(value):
        raise ValueError(f"{name}: got {value}, expected a number")
