"""The filter engine's operation, its custom ops and their gradient.

It is an engine of its own because no other one moves along the tokens without a state: the filter
needs each row a few times within a few rows, so one pass over memory does, where sums of shifted
copies take one a tap.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor

from attnspec.fast.backend import (
    FLOATS,
    check_same,
    check_size,
    check_tensor,
    choose_by_dtype,
    load,
)
from attnspec.fast.engines.operation import operation


def causal_filter(
    p: Tensor, w: Tensor, b: Tensor, state: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """y[t, c] = b[c] + sum_m w[c, m] p[t - (K - 1) + m, c] for p (B, H, T, d).

    w (d, K) and b (d,) serve every head. Rows before the first are those of `state`
    (B, H, K - 1, d), zeros without one. Computed in float32, or in float64 for float64, which is
    for the CPU alone. Differentiable in all four, once; the gradients are bitwise repeatable.
    """
    check_tensor("p", p, ("batch", "heads", "T", "d"), FLOATS)
    check_tensor("w", w, ("d", "K"), FLOATS)
    check_tensor("b", b, ("d",), FLOATS)
    check_same("w", w, "p", p)
    check_same("b", b, "p", p)
    check_size("w", w.shape[0], p.shape[3], "d, as in p")
    check_size("b", b.shape[0], p.shape[3], "d, as in p")
    if w.shape[1] < 1:
        raise ValueError("w: got 0 taps, expected at least 1")
    if state is not None:
        check_tensor("state", state, ("batch", "heads", "K - 1", "d"), FLOATS)
        check_same("state", state, "p", p)
        expected = (*p.shape[:2], w.shape[1] - 1, p.shape[3])
        if tuple(state.shape) != expected:
            raise ValueError(f"state: got shape {tuple(state.shape)}, expected {expected}")
    return _forward(p, w, b, state, choose_by_dtype(backend, "p", p))


def _kernels(backend: str) -> ModuleType:
    """The implementation on `backend`, imported on first use."""
    module = "numba_cpu" if backend == "numba" else "triton_gpu"
    return load(f"attnspec.fast.engines.filters.{module}")


@operation("attnspec::filter_forward")
def _forward(p: Tensor, w: Tensor, b: Tensor, state: Tensor | None, backend: str) -> Tensor:
    if not p.numel():
        return p.new_empty(p.shape)
    return _kernels(backend).forward(p, w, b, state)


@_forward.register_fake
def _(p: Tensor, w: Tensor, b: Tensor, state: Tensor | None, backend: str) -> Tensor:
    return p.new_empty(p.shape)


@operation("attnspec::filter_backward")
def _backward(
    dy: Tensor, p: Tensor, w: Tensor, b: Tensor, state: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dp, dw, db and dstate; dstate is empty without a state."""
    if not p.numel():
        dstate = p.new_empty(0) if state is None else state.new_zeros(state.shape)
        return p.new_empty(p.shape), w.new_zeros(w.shape), b.new_zeros(b.shape), dstate
    return _kernels(backend).backward(dy, p, w, b, state)


@_backward.register_fake
def _(
    dy: Tensor, p: Tensor, w: Tensor, b: Tensor, state: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dstate = p.new_empty(0 if state is None else state.shape)
    return p.new_empty(p.shape), w.new_empty(w.shape), b.new_empty(b.shape), dstate


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    p, w, b, state = ctx.saved_tensors
    dp, dw, db, dstate = _backward(dy, p, w, b, state, ctx.backend)
    return dp, dw, db, None if state is None else dstate, None


def _refuse_gradient(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError("a causal filter is differentiable once: its gradient has none")


_forward.register_autograd(_gradient, setup_context=_setup)
_backward.register_autograd(_refuse_gradient)
