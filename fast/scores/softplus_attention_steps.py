"""Softplus attention's steps as whole matrices, in torch: counts, logits, scores and weights."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import (
    FLOATS,
    check_bool,
    check_group,
    check_integer,
    check_same,
    check_size,
    check_tensor,
    product,
    wide,
)

MATRIX = ("batch", "heads", "q_tokens", "k_tokens")


def visible_counts(
    visible: bool | Tensor, q_tokens: int = 0, k_tokens: int = 0, offset: int | None = None
) -> Tensor:
    """How many keys each query sees, int64 (q_tokens,) or, of a mask, (..., q_tokens).

    `visible` is True for the causal order with `offset` keys before the first query, False for all
    keys, or a bool mask (..., q_tokens, k_tokens).
    """
    if isinstance(visible, Tensor):
        if visible.dtype != torch.bool:
            raise TypeError(f"visible: got dtype {visible.dtype}, expected bool")
        if visible.dim() < 2:
            raise ValueError(
                f"visible: got shape {tuple(visible.shape)}, expected (..., q_tokens, k_tokens)"
            )
        return visible.sum(-1)
    if not isinstance(visible, bool):
        raise TypeError(f"visible: got {visible!r}, expected True, False or a bool tensor")
    check_integer("q_tokens", q_tokens, least=0)
    check_integer("k_tokens", k_tokens, least=0)
    if offset is not None:
        check_integer("offset", offset, least=0)
    return counts_on(visible, q_tokens, k_tokens, offset, torch.device("cpu"))


def counts_on(
    causal: bool, q_tokens: int, k_tokens: int, offset: int | None, device: torch.device
) -> Tensor:
    """`visible_counts`, made on `device`: a copy would end the capture of a graph."""
    if not causal:
        return torch.full((q_tokens,), k_tokens, device=device)
    offset = k_tokens - q_tokens if offset is None else offset
    return (torch.arange(q_tokens, device=device) + (offset + 1)).clamp(0, k_tokens)


def unit(x: Tensor) -> Tensor:
    """x (batch, heads, tokens, d) over its length, which counts as at least 1e-12.

    Differentiable.
    """
    check_tensor("x", x, ("batch", "heads", "tokens", "d"), FLOATS)
    rows = wide(x)
    return (rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp(min=1e-12)).to(
        x.dtype
    )


def logit_factor(d: int, normalise_qk: bool) -> float:
    """What logits are multiplied by beside the log of the counts."""
    return math.log(d) * (1.0 if normalise_qk else d**-0.5) if d else 0.0


def lssa_logits(q: Tensor, k: Tensor, n: Tensor, *, normalise_qk: bool = True) -> Tensor:
    """Logits (batch, heads, q_tokens, k_tokens); `n` are the counts, (batch, q_tokens)."""
    check_tensor("q", q, ("batch", "heads", "q_tokens", "d"), FLOATS)
    check_tensor("k", k, ("batch", "kv_heads", "k_tokens", "d"), FLOATS)
    check_same("k", k, "q", q)
    check_size("k", k.shape[0], q.shape[0], "batch, as in q")
    check_size("k", k.shape[3], q.shape[3], "d, as in q")
    check_group("k", k, q.shape[1])
    counts = _check_counts(n, (q.shape[0], q.shape[2]))
    check_bool("normalise_qk", normalise_qk)
    a, b = wide(q), wide(k)
    if normalise_qk:
        a, b = unit(a), unit(b)
    lengths = torch.log(counts.to(a.dtype).clamp(min=1.0)) * logit_factor(q.shape[3], normalise_qk)
    b = b.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return (product(a, b.transpose(-1, -2)) * lengths[..., None]).to(q.dtype)


def lssa_scores(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softplus of logits (batch, heads, q_tokens, k_tokens), 0 where `mask` is False."""
    check_tensor("logits", logits, MATRIX, FLOATS)
    x = wide(logits)
    scores = torch.logaddexp(x, torch.zeros_like(x)).to(logits.dtype)
    if mask is None:
        return scores
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask: got {type(mask).__name__}, expected a bool tensor")
    shape = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if len(shape) > 4 or any(a not in (1, b) for a, b in zip(shape, logits.shape, strict=True)):
        raise ValueError(
            f"mask: got shape {tuple(mask.shape)}, expected one that broadcasts to "
            f"{tuple(logits.shape)}"
        )
    return torch.where(mask, scores, 0.0)


def row_sum(scores: Tensor) -> Tensor:
    """Sums (batch, heads, q_tokens) of scores (batch, heads, q_tokens, k_tokens)."""
    check_tensor("scores", scores, MATRIX, FLOATS)
    return wide(scores).sum(-1).to(scores.dtype)


def lssa_weights(scores: Tensor, row_sum: Tensor, eps: float = 1e-8) -> Tensor:
    """The weights a, shaped as scores; rows without any mass are 0."""
    check_tensor("scores", scores, MATRIX, FLOATS)
    check_tensor("row_sum", row_sum, MATRIX[:3], FLOATS)
    if row_sum.shape != scores.shape[:3]:
        raise ValueError(
            f"row_sum: got shape {tuple(row_sum.shape)}, expected {tuple(scores.shape[:3])}"
        )
    total = wide(row_sum) + check_number("eps", eps, 0)
    return (wide(scores) / _divisor(total)[..., None]).to(scores.dtype)


def _divisor(total: Tensor) -> Tensor:
    return torch.where(total > 0, total, 1.0)


def _excess(weights: Tensor, n: Any, warm: Any, dead: float) -> tuple[Tensor, Tensor, Tensor]:
    """Excesses over the largest of each row, the largest (1 if there is none), and dead rows."""
    check_tensor("weights", weights, MATRIX, FLOATS)
    check_integer("warm", warm, least=1)
    counts = _check_counts(n, (weights.shape[0], weights.shape[2])).to(wide(weights).dtype)
    excess = counts[..., None] * wide(weights) - (counts > warm).to(counts.dtype)[..., None]
    if weights.shape[3]:
        most = excess.amax(-1, keepdim=True)
    else:
        most = excess.new_zeros(*excess.shape[:3], 1)
    return excess / _divisor(most), _divisor(most), ~(most > dead)[..., 0]


def reweight(
    weights: Tensor, n: Tensor, p: float = 15, eps: float = 1e-8, warm: int = 3
) -> tuple[Tensor, Tensor]:
    """Sharpened weights, shaped as `weights`, and which rows (batch, heads, q_tokens) are dead.

    `n` are the counts (batch, q_tokens). The powers are taken of the excess over the largest one.
    """
    p, eps = check_number("p", p, 1), check_number("eps", eps, 0)
    excess, most, dead = _excess(weights, n, warm, 0.0)
    powers = torch.where(excess > 0, excess.clamp(min=0) ** p, 0.0)
    total = powers.sum(-1, keepdim=True)
    if eps:
        total = total + torch.exp(math.log(eps) - p * torch.log(most))
    return (powers / _divisor(total)).to(weights.dtype), dead


def log_weights(
    weights: Tensor, n: Tensor, p: float = 15, warm: int = 3, dead_tol: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """The log of sharpened weights without eps, -inf where clipped or dead, and the dead rows."""
    p, tolerance = check_number("p", p, 1), check_number("dead_tol", dead_tol, 0)
    excess, _, dead = _excess(weights, n, warm, tolerance)
    live = (excess > 0) & ~dead[..., None]
    logs = p * torch.log(torch.where(live, excess, 1.0))
    total = torch.where(live, torch.exp(logs), 0.0).sum(-1, keepdim=True)
    return torch.where(live, logs - torch.log(_divisor(total)), -torch.inf).to(weights.dtype), dead


def attend(weights: Tensor, v: Tensor) -> Tensor:
    """Outputs (batch, heads, q_tokens, dv) of weights and v (batch, kv_heads, k_tokens, dv)."""
    check_tensor("weights", weights, MATRIX, FLOATS)
    check_tensor("v", v, ("batch", "kv_heads", "k_tokens", "dv"), FLOATS)
    check_same("v", v, "weights", weights)
    check_size("v", v.shape[0], weights.shape[0], "batch, as in weights")
    check_size("v", v.shape[2], weights.shape[3], "k_tokens, as in weights")
    check_group("v", v, weights.shape[1])
    values = v.repeat_interleave(weights.shape[1] // v.shape[1], 1)
    unread = (weights == 0).all(-2)[..., None]
    return product(weights, torch.where(unread, 0.0, values))


def check_number(name: str, value: Any, least: float) -> float:
    """`value` as a float, once it is a finite number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: got {value!r}, expected a number >= {least}")
    if not (math.isfinite(value) and float(value) >= least):
        raise ValueError(f"{name}: got {value}, expected a finite number >= {least}")
    return float(value)


def _check_counts(n: Any, rows: tuple[int, ...]) -> Tensor:
    """The counts of queries with a head axis, (batch, 1, q_tokens) or broadcastable to it."""
    if not isinstance(n, Tensor):
        raise TypeError(f"n: got {type(n).__name__}, expected torch.Tensor")
    if n.dtype == torch.bool:
        raise TypeError("n: got dtype bool, expected numbers")
    shape = (1,) * (len(rows) - n.dim()) + tuple(n.shape)
    if len(shape) > len(rows) or any(a not in (1, b) for a, b in zip(shape, rows, strict=True)):
        raise ValueError(f"n: got shape {tuple(n.shape)}, expected one that broadcasts to {rows}")
    return n.reshape(shape)[..., None, :] if len(rows) == 2 else n.reshape(shape)
