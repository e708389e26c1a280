"""StreamingLLM, continued: softmax with a sink of its own in the denominator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import (
    FLOATS,
    check_attention_inputs,
    check_same,
    check_size,
    check_tensor,
)
from attnspec.fast.engines.flash import flash, mask_options


def softmax1(x: Tensor, *, axis: int = -1, backend: str | None = None) -> Tensor:
    """Weights shaped as `x`, which sum to less than one over `axis`; -inf hides an entry.

    Computed in float32 at least. Differentiable; the steps are torch operations.
    """
    _check_axis(x, axis)
    wide = x if x.dtype == torch.float64 else x.float()
    if x.shape[axis] == 0:
        return torch.zeros_like(x)
    top = wide.amax(dim=axis, keepdim=True).clamp(min=0.0).detach()
    weights = torch.exp(wide - top)
    return (weights / (torch.exp(-top) + weights.sum(dim=axis, keepdim=True))).to(x.dtype)


def softmax1_backward(
    x: Tensor, dout: Tensor, *, axis: int = -1, backend: str | None = None
) -> Tensor:
    """The gradient of `x`, from `dout`, that of the weights; both shaped as `x`."""
    _check_axis(x, axis)
    _check_shape("dout", dout, tuple(x.shape))
    weights = softmax1(x if x.dtype == torch.float64 else x.float(), axis=axis)
    inner = (weights * dout).sum(dim=axis, keepdim=True)
    return (weights * (dout - inner)).to(x.dtype)


def attend_with_sink_logit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s_h: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Output (batch, heads, q_tokens, dv) and lse (batch, heads, q_tokens), the sink included.

    q (batch, heads, q_tokens, d), k (batch, kv_heads, k_tokens, d), v (batch, kv_heads, k_tokens,
    dv), `s_h` (heads); `mask` bool, broadcastable to the scores, True = visible. Differentiable.
    """
    check_attention_inputs(q, k, v, FLOATS)
    _check_sink(s_h, q)
    options = mask_options(k, mask)
    return flash(q, k, v, sink_logit=s_h, scale=scale, backend=backend, **options)


def attend_with_sink_logit_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s_h: Tensor,
    mask: Tensor | None,
    dout: Tensor,
    dlse: Tensor | None = None,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients dq, dk, dv and ds, shaped as q, k, v and s_h, without a graph of one's own.

    `dout` (batch, heads, q_tokens, dv) and `dlse` (batch, heads, q_tokens) are the gradients of the
    two outputs of `attend_with_sink_logit`; no `dlse` means lse is not used.
    """
    check_attention_inputs(q, k, v, FLOATS)
    _check_sink(s_h, q)
    _check_shape("dout", dout, (*q.shape[:3], v.shape[3]))
    if dlse is not None:
        _check_shape("dlse", dlse, tuple(q.shape[:3]))
    with torch.enable_grad():
        q, k, v, s_h = (x.detach().requires_grad_() for x in (q, k, v, s_h))
        out, lse = attend_with_sink_logit(q, k, v, s_h, mask, scale=scale, backend=backend)
        dlse = torch.zeros_like(lse) if dlse is None else dlse.to(lse.dtype)
        dq, dk, dv, ds = torch.autograd.grad((out, lse), (q, k, v, s_h), (dout, dlse))
    return dq, dk, dv, ds


def _check_axis(x: Any, axis: Any) -> None:
    axes = ("...",) * max(0, x.dim() - 1) if isinstance(x, Tensor) else ("...",)
    check_tensor("x", x, (*axes, "entries"), FLOATS)
    if isinstance(axis, bool) or not isinstance(axis, int):
        raise TypeError(f"axis: got {axis!r}, expected an integer")
    if not -x.dim() <= axis < x.dim():
        raise ValueError(f"axis: got {axis}, expected one of the {x.dim()} axes of x")


def _check_sink(s_h: Any, q: Tensor) -> None:
    check_tensor("s_h", s_h, ("heads",), FLOATS)
    check_same("s_h", s_h, "q", q)
    check_size("s_h", s_h.shape[0], q.shape[1], "heads, as in q")


def _check_shape(name: str, x: Any, shape: tuple[int, ...]) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, expected torch.Tensor")
    if tuple(x.shape) != shape:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected {shape}")
