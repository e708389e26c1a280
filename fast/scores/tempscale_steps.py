"""TempScale's steps as matrices: torch, in float32 for 16-bit inputs and rounded once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import (
    FLOATS,
    check_broadcast,
    check_mask,
    check_positive,
    check_same,
    check_size,
    check_tensor,
    product,
    wide,
)
from attnspec.fast.engines.flash.checks import check_heads
from attnspec.fast.growing import checkable

MATRIX = ("batch", "heads", "q_tokens", "k_tokens")


def scores(q: Tensor, k: Tensor, scale: float | None = None, bias: Tensor | None = None) -> Tensor:
    """Scores (batch, heads, q_tokens, k_tokens) before tempering.

    q (batch, heads, q_tokens, d), k (batch, kv_heads, k_tokens, d); `bias` broadcasts to the scores
    and is added unscaled. Differentiable in q, k and bias.
    """
    check_tensor("q", q, ("batch", "heads", "q_tokens", "d"), FLOATS)
    check_tensor("k", k, ("batch", "kv_heads", "k_tokens", "d"), FLOATS)
    check_same("k", k, "q", q)
    check_size("k", k.shape[0], q.shape[0], "batch, as in q")
    check_size("k", k.shape[3], q.shape[3], "d, as in q")
    group = _group("k", k, q)
    if scale is not None:
        check_positive("scale", scale)
    if bias is not None:
        if not isinstance(bias, Tensor):
            raise TypeError(f"bias: got {type(bias).__name__}, expected torch.Tensor")
        check_same("bias", bias, "q", q)
        check_broadcast("bias", bias, (*q.shape[:3], k.shape[2]))
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    keys = wide(k).repeat_interleave(group, 1)
    z = scale * product(wide(q), keys.transpose(2, 3))
    return (z if bias is None else z + wide(bias)).to(q.dtype)


def temper(scores: Tensor, tau: float | Tensor = 1.0) -> Tensor:
    """Scores (batch, heads, q_tokens, k_tokens) divided by `tau`, a number or (heads,).

    Differentiable in the scores and in a tensor `tau`.
    """
    check_tensor("scores", scores, MATRIX, FLOATS)
    if not isinstance(tau, Tensor):
        check_positive("tau", tau)
        return (wide(scores) / float(tau)).to(scores.dtype)
    check_temperatures(tau, scores)
    check_same("tau", tau, "the scores", scores)
    return _Temper.apply(scores, tau)


def softmax_rows(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """Weights P (batch, heads, q_tokens, k_tokens) of tempered scores.

    `mask` is bool and broadcasts to the scores, True = visible; rows that see nothing are 0.
    """
    check_tensor("scores", scores, MATRIX, FLOATS)
    seen = wide(scores)
    if mask is not None:
        check_mask("mask", mask, "scores", scores, scores.shape)
        seen = torch.where(mask, seen, -torch.inf)
    if not scores.shape[3]:
        return torch.zeros_like(scores)
    blind = seen.amax(-1, keepdim=True) == -torch.inf
    P = seen.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)
    return P.to(scores.dtype)


def attend(P: Tensor, v: Tensor) -> Tensor:
    """Outputs (batch, heads, q_tokens, dv) of weights P (batch, heads, q_tokens, k_tokens).

    v (batch, kv_heads, k_tokens, dv); a value that no query weighs is not read. Differentiable.
    """
    check_tensor("P", P, MATRIX, FLOATS)
    check_tensor("v", v, ("batch", "kv_heads", "k_tokens", "dv"), FLOATS)
    check_same("v", v, "P", P)
    check_size("v", v.shape[0], P.shape[0], "batch, as in P")
    check_size("v", v.shape[2], P.shape[3], "k_tokens, as in P")
    values = v.repeat_interleave(_group("v", v, P), 1)
    unread = (P == 0).all(2)[..., None]
    return product(P, values.masked_fill(unread, 0))


def check_temperatures(tau: Tensor, q: Tensor) -> None:
    """`tau` is one for each head of q (batch, heads, ...): finite numbers above 0, where reading
    them costs nothing.
    """
    check_heads(q, "tau", tau)
    if checkable(tau) and not bool(((tau > 0) & torch.isfinite(tau)).all()):
        raise ValueError(f"tau: got {tau.tolist()}, expected finite numbers > 0")


class _Temper(torch.autograd.Function):
    """Division by a temperature for each head; a score without a gradient, as behind a mask, is
    not read for that of the temperature.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, tau: Tensor) -> Tensor:
        ctx.save_for_backward(scores, tau)
        return (wide(scores) / wide(tau)[:, None, None]).to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        scores, tau = ctx.saved_tensors
        dout, divisor = wide(gradients[0]), wide(tau)[:, None, None]
        terms = torch.where(dout == 0, 0, dout * wide(scores))
        dtau = -(terms / divisor / divisor).sum((0, 2, 3))
        return (dout / divisor).to(scores.dtype), dtau.to(tau.dtype)


def _group(name: str, x: Tensor, rows: Tensor) -> int:
    """How many heads of `rows` share a kv head of x."""
    if x.shape[1] < 1 or rows.shape[1] % x.shape[1]:
        raise ValueError(
            f"{name}: got {x.shape[1]} kv heads, expected a divisor of {rows.shape[1]} (heads)"
        )
    return rows.shape[1] // x.shape[1]
