"""The rows engine's operations, their custom ops and their gradients.

It is an engine of its own because the scan reads its queries, keys and values as they are and
writes heads apart, while the norm behind it needs all heads of a token together.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import (
    FLOATS,
    check_device,
    check_size,
    check_tensor,
    choose_by_dtype,
    load,
)
from attnspec.fast.engines.operation import Operation, operation


@cache
def _kernels(backend: str) -> ModuleType:
    """The implementation on `backend`, imported on first use."""
    name = "numba_cpu" if backend == "numba" else "triton_rows"
    return load(f"attnspec.fast.engines.rows.{name}")


def run_norm(o: Tensor, u: Tensor | None, eps: float, backend: str) -> Tensor:
    if o.numel() == 0:
        return _merged(o)
    with torch.cuda.device_of(o):
        y: Tensor = _kernels(backend).norm(o, u, eps)
    return y


norm_op = Operation("attnspec::gated_norm", run_norm)


def _merged(o: Tensor) -> Tensor:
    batch, heads, tokens, d = o.shape
    return o.new_empty(batch, tokens, heads * d)


@norm_op.register_fake
def _(o: Tensor, u: Tensor | None, eps: float, backend: str) -> Tensor:
    return _merged(o)


@operation("attnspec::gated_norm_backward")
def norm_backward_op(
    dy: Tensor, o: Tensor, u: Tensor | None, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    """do, contiguous, and du, which is empty without a gate."""
    if o.numel() == 0:
        return o.new_empty(o.shape), dy.new_empty(dy.shape if u is not None else (0,))
    with torch.cuda.device_of(o):
        do, du = _kernels(backend).norm_backward(dy, o, u, eps)
    return do, du


@norm_backward_op.register_fake
def _(dy: Tensor, o: Tensor, u: Tensor | None, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    return o.new_empty(o.shape), dy.new_empty(dy.shape if u is not None else (0,))


def _setup_norm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    o, u, ctx.eps, ctx.backend = inputs
    ctx.save_for_backward(o, u)


def _norm_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    o, u = ctx.saved_tensors
    do, du = norm_backward_op(dy, o, u, ctx.eps, ctx.backend)
    return do, None if u is None else du, None, None


def _refuse(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError("rows kernels are differentiable once: their gradients have none")


norm_op.register_autograd(_norm_gradient, setup_context=_setup_norm)
norm_backward_op.register_autograd(_refuse)


def gated_norm(
    o: Tensor, u: Tensor | None = None, *, eps: float, backend: str | None = None
) -> Tensor:
    """y (batch, tokens, heads * d): o (batch, heads, tokens, d) with its heads merged, over the
    root of the mean square of the row plus `eps`, times u (batch, tokens, heads * d) if there is
    one.

    Statistics are float32. A row of zeros is 0 for eps = 0, and so is its gradient. Differentiable
    in o and u, once.
    """
    check_tensor("o", o, ("batch", "heads", "tokens", "d"), FLOATS)
    if u is not None:
        check_tensor("u", u, ("batch", "tokens", "width"), (o.dtype,))
        check_device("u", u, "o", o)
        batch, heads, tokens, d = o.shape
        expected = (batch, tokens, heads * d)
        for size, wanted, axis in zip(u.shape, expected, ("batch", "tokens", "width"), strict=True):
            check_size("u", size, wanted, f"{axis}, as in o")
    return norm_op(o, u, float(eps), choose_by_dtype(backend, "x", o))


def run_lift(
    x: Tensor,
    theta: Tensor | None,
    positions: Tensor | None,
    offset: int,
    activate: bool,
    backend: str,
) -> Tensor:
    if x.numel() == 0:
        return _lifted(x, theta)
    with torch.cuda.device_of(x):
        y: Tensor = _kernels(backend).lift(x, theta, positions, offset, activate)
    return y


lift_op = Operation("attnspec::lift", run_lift)


def _lifted(x: Tensor, theta: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:3], x.shape[3] * (1 if theta is None else 2))


@lift_op.register_fake
def _(
    x: Tensor,
    theta: Tensor | None,
    positions: Tensor | None,
    offset: int,
    activate: bool,
    backend: str,
) -> Tensor:
    return _lifted(x, theta)


@operation("attnspec::lift_backward")
def lift_backward_op(
    dy: Tensor,
    x: Tensor,
    theta: Tensor | None,
    positions: Tensor | None,
    offset: int,
    activate: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """dx, contiguous, and dtheta, which is empty without theta."""
    if x.numel() == 0:
        return x.new_empty(x.shape), x.new_zeros(0) if theta is None else torch.zeros_like(theta)
    with torch.cuda.device_of(x):
        dx, dtheta = _kernels(backend).lift_backward(dy, x, theta, positions, offset, activate)
    return dx, x.new_empty(0) if theta is None else dtheta.to(theta.dtype)


@lift_backward_op.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    theta: Tensor | None,
    positions: Tensor | None,
    offset: int,
    activate: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0) if theta is None else theta.new_empty(theta.shape)


def _setup_lift(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, theta, positions, *ctx.plain = inputs
    ctx.save_for_backward(x, theta, positions)


def _lift_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, theta, positions = ctx.saved_tensors
    dx, dtheta = lift_backward_op(dy, x, theta, positions, *ctx.plain)
    return dx, None if theta is None else dtheta, None, None, None, None


lift_op.register_autograd(_lift_gradient, setup_context=_setup_lift)
lift_backward_op.register_autograd(_refuse)


def lift(
    x: Tensor,
    theta: Tensor | None = None,
    *,
    positions: Tensor | None = None,
    offset: int = 0,
    activate: bool = False,
    backend: str | None = None,
) -> Tensor:
    """x (batch, heads, tokens, d), through SiLU if `activate`; with theta (heads, d) it becomes
    [x cos a, x sin a] (batch, heads, tokens, 2 d), a = position * theta.

    Positions are int64 (tokens,), or count from `offset`. Angles are formed in float32 (float64
    for such x). theta may have any float dtype. Differentiable in x and theta, once.
    """
    check_tensor("x", x, ("batch", "heads", "tokens", "d"), FLOATS)
    if theta is not None:
        check_tensor("theta", theta, ("heads", "d"), FLOATS)
        check_size("theta", theta.shape[0], x.shape[1], "heads, as in x")
        check_size("theta", theta.shape[1], x.shape[3], "d, as in x")
        check_device("theta", theta, "x", x)
    if positions is not None:
        check_tensor("positions", positions, ("tokens",), (torch.int64,))
        check_size("positions", positions.shape[0], x.shape[2], "tokens, as in x")
        check_device("positions", positions, "x", x)
    return lift_op(x, theta, positions, offset, activate, choose_by_dtype(backend, "x", x))
