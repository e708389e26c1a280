"""What flows between two sides: each token's features times the sums of the other side's.

rx_t = (phi(x_t) + eps) . (S_t + eps) with S_t = sy + the sum of wy_s phi(y_s) over s <= t, or over
all s; ry_t alike. Four passes of the tokens at most, forward and back. A custom op on Triton: the
CPU's sums along an axis need none.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import load
from attnspec.fast.engines.operation import Operation, operation

KINDS = {"none": 0, "sigmoid": 1, "relu": 2}


@cache
def _kernels() -> ModuleType:
    """The implementation, imported on first use."""
    return load("attnspec.fast.engines.scan.triton_running")


def run(
    x: Tensor, y: Tensor, wx: Tensor | None, wy: Tensor | None, sx: Tensor | None,
    sy: Tensor | None, eps: float, kind: int, causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    with torch.cuda.device_of(x):
        return _kernels().forward(x, y, wx, wy, sx, sy, eps, kind, causal)


running_op = Operation("attnspec::running_dots", run)


@running_op.register_fake
def _(
    x: Tensor, y: Tensor, wx: Tensor | None, wy: Tensor | None, sx: Tensor | None,
    sy: Tensor | None, eps: float, kind: int, causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dots = (z.new_empty(z.shape[:3], dtype=torch.float32) for z in (x, y))
    sums = (z.new_empty((*z.shape[:2], z.shape[3]), dtype=torch.float32) for z in (x, y))
    return *dots, *sums  # type: ignore[return-value]


@operation("attnspec::running_dots_backward")
def running_backward_op(
    dx: Tensor, dy: Tensor, dsx: Tensor, dsy: Tensor, x: Tensor, y: Tensor, wx: Tensor | None,
    wy: Tensor | None, sx: Tensor | None, sy: Tensor | None, eps: float, kind: int, causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of x, y, their weights and their first sums."""
    with torch.cuda.device_of(x):
        return _kernels().backward(dx, dy, dsx, dsy, x, y, wx, wy, sx, sy, eps, kind, causal)


@running_backward_op.register_fake
def _(
    dx: Tensor, dy: Tensor, dsx: Tensor, dsy: Tensor, x: Tensor, y: Tensor, wx: Tensor | None,
    wy: Tensor | None, sx: Tensor | None, sy: Tensor | None, eps: float, kind: int, causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        x.new_empty(x.shape), y.new_empty(y.shape), dx.new_empty(dx.shape), dy.new_empty(dy.shape),
        dsx.new_empty(dsx.shape), dsy.new_empty(dsy.shape),
    )  # fmt: skip


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.eps, ctx.kind, ctx.causal = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx: Any, dx: Tensor, dy: Tensor, dsx: Tensor, dsy: Tensor) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    grads = running_backward_op(dx, dy, dsx, dsy, *tensors, ctx.eps, ctx.kind, ctx.causal)
    given = (grad if x is not None else None for grad, x in zip(grads, tensors, strict=True))
    return *given, None, None, None


running_op.register_autograd(_gradient, setup_context=_setup)


def running_dots(
    x: Tensor,
    y: Tensor,
    weights: tuple[Tensor, Tensor] | None = None,
    first: tuple[Tensor, Tensor] | None = None,
    *,
    eps: float = 0.0,
    kind: str = "none",
    causal: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """rx (batch, heads, n), ry (batch, heads, m) and the last sums of x and y (batch, heads, d).

    x (batch, heads, n, d) and y (batch, heads, m, d), float32 or 16 bits; n = m with `causal`. The
    pairs of `weights`, shaped as rx and ry, and of `first` sums are float32, like all outputs.
    `kind` names phi, applied in float32. Differentiable in all of them. Triton alone.
    """
    (wx, wy), (sx, sy) = weights or (None, None), first or (None, None)
    return running_op(x, y, wx, wy, sx, sy, float(eps), KINDS[kind], causal)
