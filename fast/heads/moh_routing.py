"""MoH's routers in torch, but for the choice of heads, which is the select engine's.

Whatever the dtype of the tokens, probabilities and gates are float32, or float64 for float64:
rounding them would make ties. A router is a thin product; the rest is as wide as there are heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import (
    FLOATS,
    check_device,
    check_integer,
    check_same,
    check_size,
    check_tensor,
    product,
    wide,
)
from attnspec.fast.engines.select import top_k_mask

ROUTED = ("batch", "tokens", "hr")


def routed_probs(x: Tensor, Wr: Tensor, *, backend: str | None = None) -> Tensor:
    """r (batch, tokens, hr), the softmax over the routed heads.

    x (batch, tokens, D) are the tokens that make the queries; Wr (hr, D). Differentiable.
    """
    return _logits(x, "Wr", Wr).softmax(-1)


def topk_mask(p: Tensor, k: int, *, backend: str | None = None) -> Tensor:
    """bool, shaped as p (batch, tokens, hr), True at the `k` largest of each token.

    Ties go to the lower index. ValueError unless 0 <= k <= hr.
    """
    check_tensor("p", p, ROUTED, FLOATS)
    check_count(k, p.shape[2])
    return top_k_mask(p, k, backend=backend)


def routed_gates(
    p: Tensor, mask: Tensor, k: int, *, rescale: bool = True, backend: str | None = None
) -> Tensor:
    """gr (batch, tokens, hr), 0 where `mask` is False; without `rescale`, p itself elsewhere."""
    _check_mask(p, mask)
    check_count(k, p.shape[2])
    kept = torch.where(mask, wide(p), 0.0)
    if not rescale:
        return kept
    return k * kept / kept.sum(-1, keepdim=True).clamp(min=torch.finfo(kept.dtype).eps)


def shared_gates(
    x: Tensor, Ws: Tensor, *, rescale: bool = True, backend: str | None = None
) -> Tensor:
    """gs (batch, tokens, hs), whose sum is hs, or 1 without `rescale`; Ws (hs, D)."""
    gates = _logits(x, "Ws", Ws).softmax(-1)
    return Ws.shape[0] * gates if rescale else gates


def group_weights(
    x: Tensor, W0: Tensor, *, rescale: bool = True, backend: str | None = None
) -> Tensor:
    """a (batch, tokens, 2), the weights of the shared and of the routed group; W0 (2, D).

    Their sum is 2, or 1 without `rescale`.
    """
    logits = _logits(x, "W0", W0)
    check_size("W0", W0.shape[0], 2, "groups, shared and routed")
    weights = logits.softmax(-1)
    return 2 * weights if rescale else weights


def combine_gates(
    gs: Tensor | None, gr: Tensor | None, a: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """gates (batch, tokens, H), the shared heads first.

    gs (batch, tokens, hs), gr (batch, tokens, hr), a (batch, tokens, 2). If one of the groups is
    None, the gates are those of the other, and `a` is ignored.
    """
    groups = [(name, g) for name, g in (("gs", gs), ("gr", gr)) if g is not None]
    if not groups:
        raise ValueError("gs: got None for gs and gr, expected at least one of them")
    for name, g in groups:
        check_tensor(name, g, ("batch", "tokens", "heads"), FLOATS)
    if gs is None or gr is None:
        return groups[0][1].clone()
    check_tensor("a", a, ("batch", "tokens", "2"), FLOATS)
    assert a is not None
    for name, x, heads in (("gr", gr, gr.shape[2]), ("a", a, 2)):
        check_same(name, x, "gs", gs)
        if tuple(x.shape) != (*gs.shape[:2], heads):
            expected = (*gs.shape[:2], heads)
            raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected {expected}")
    weights = wide(a)
    gates = torch.cat([weights[..., :1] * gs, weights[..., 1:] * gr], dim=-1)
    return gates.to(gs.dtype)


def route(
    x: Tensor,
    Wr: Tensor | None,
    Ws: Tensor | None,
    W0: Tensor | None,
    k: int,
    *,
    rescale: bool = True,
    backend: str | None = None,
) -> Tensor:
    """gates (batch, tokens, H) of tokens x (batch, tokens, D), float32 or float64.

    Wr (hr, D), Ws (hs, D), W0 (2, D). No Wr means no routed heads; no Ws means a single shared head
    if there is W0, else none. W0 is not used unless both groups are. Differentiable.
    """
    check_tensor("x", x, ("batch", "tokens", "D"), FLOATS)
    if Wr is None and k != 0:
        raise ValueError(f"k: got {k} without Wr, expected 0 or routed heads")
    gs: Tensor | None = None
    if Ws is not None:
        gs = shared_gates(x, Ws, rescale=rescale)
    elif W0 is not None:
        gs = wide(x.new_ones(*x.shape[:2], 1))
    if gs is None and k == 0:
        raise ValueError("k: got 0 without shared heads, expected at least 1")
    gr = None
    if Wr is not None:
        p = routed_probs(x, Wr)
        gr = routed_gates(p, topk_mask(p, k, backend=backend), k, rescale=rescale)
    if gs is None or gr is None:
        return combine_gates(gs, gr)
    if k == 0:
        return torch.cat([gs, gr], dim=-1)
    if W0 is None:
        raise ValueError("W0: got None, expected (2, D) for two groups of heads")
    return combine_gates(gs, gr, group_weights(x, W0, rescale=rescale))


def norm_probs(q_unrot: Tensor, hs: int, *, backend: str | None = None) -> Tensor:
    """g (batch, tokens, hr), the softmax of the routed queries' norms in units of their spread.

    q_unrot (batch, H, tokens, dh), projected queries before positions. The spread is the unbiased
    standard deviation over the hr heads; without one g is uniform, and has no gradient.
    """
    norms = _norms(q_unrot, hs)
    centred = norms - norms.mean(-1, keepdim=True)
    square = (centred * centred).sum(-1, keepdim=True) / max(norms.shape[-1] - 1, 1)
    # The root of 0 has no derivative, and 0 times that is NaN.
    spread = torch.where(square > 0, square, 1.0).sqrt()
    return torch.where(square > 0, norms / spread, 0.0).softmax(-1)


def norm_router(q_unrot: Tensor, hs: int, k: int, *, backend: str | None = None) -> Tensor:
    """gates (batch, tokens, H), 1 for the `hs` shared heads and for the routed ones chosen.

    q_unrot (batch, H, tokens, dh). Chosen are the `k` largest norms, ties to the lower index; the
    authors' numbers are hs = H // 2 and k = H // 4. ValueError unless hs + k >= 1. No gradient.
    """
    norms = _norms(q_unrot.detach() if isinstance(q_unrot, Tensor) else q_unrot, hs)
    check_count(k, norms.shape[-1])
    if hs + k == 0:
        raise ValueError("k: got 0 without shared heads, expected at least 1")
    chosen = top_k_mask(norms, k, backend=backend)
    shared = chosen.new_ones(*chosen.shape[:2], hs)
    return torch.cat([shared, chosen], dim=-1).to(q_unrot.dtype)


def straight_through(p: Tensor, mask: Tensor, *, backend: str | None = None) -> Tensor:
    """gates (batch, tokens, hr): the 0/1 of `mask`, whose gradient is handed to p as it is."""
    _check_mask(p, mask)
    return mask.to(p.dtype) + (p - p.detach())


def load_balance_loss(
    p: Tensor,
    mask: Tensor,
    *,
    valid: Tensor | None = None,
    rescale: bool = True,
    backend: str | None = None,
) -> Tensor:
    """L, one number for all tokens of p and mask (batch, tokens, hr) together.

    `valid` bool (batch, tokens), True = a real token. Without `rescale` the factor hr is left out.
    No token at all means 0. The authors add 0.01 times the mean over the routed layers.
    """
    _check_mask(p, mask)
    tokens: Tensor | int = max(p.shape[0] * p.shape[1], 1)
    real = wide(p)
    if valid is not None:
        check_tensor("valid", valid, ("batch", "tokens"), (torch.bool,))
        check_device("valid", valid, "p", p)
        if valid.shape != p.shape[:2]:
            expected = tuple(p.shape[:2])
            raise ValueError(f"valid: got shape {tuple(valid.shape)}, expected {expected}, as p")
        counted = valid[..., None]
        real, mask = torch.where(counted, real, 0.0), mask & counted
        tokens = valid.sum().clamp(min=1)
    usage = mask.sum((0, 1)).to(real.dtype) / tokens
    loss = (real.sum((0, 1)) / tokens * usage).sum()
    return loss * p.shape[2] if rescale else loss


def check_count(k: Any, hr: int) -> None:
    """The number of active routed heads is at most the number there is."""
    check_integer("k", k, least=0)
    if k > hr:
        raise ValueError(f"k: got {k}, expected at most the {hr} routed heads")


def _logits(x: Tensor, name: str, W: Tensor) -> Tensor:
    check_tensor("x", x, ("batch", "tokens", "D"), FLOATS)
    check_tensor(name, W, ("heads", "D"), FLOATS)
    check_same(name, W, "x", x)
    check_size(name, W.shape[1], x.shape[2], "D, as in x")
    if W.shape[0] < 1:
        raise ValueError(f"{name}: got shape {tuple(W.shape)}, expected (heads, D)")
    return product(wide(x), wide(W).mT)


def _norms(q_unrot: Tensor, hs: int) -> Tensor:
    """The norms (batch, tokens, hr) of the routed queries."""
    check_tensor("q_unrot", q_unrot, ("batch", "H", "tokens", "dh"), FLOATS)
    check_integer("hs", hs, least=0)
    if hs >= q_unrot.shape[1]:
        raise ValueError(f"hs: got {hs}, expected fewer than the {q_unrot.shape[1]} heads")
    return torch.linalg.vector_norm(wide(q_unrot[:, hs:]), dim=-1).mT


def _check_mask(p: Any, mask: Any) -> None:
    check_tensor("p", p, ROUTED, FLOATS)
    check_tensor("mask", mask, ROUTED, (torch.bool,))
    check_device("mask", mask, "p", p)
    if mask.shape != p.shape:
        raise ValueError(f"mask: got shape {tuple(mask.shape)}, expected {tuple(p.shape)}, as p")
