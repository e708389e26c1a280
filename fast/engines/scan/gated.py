"""The elementwise scan between gates: h_t = a_t h_(t-1) + sigmoid(i_t) z_t, y_t = sigmoid(o_t) h_t.

a is sigmoid(f), or sigmoid(-f)^alpha. On CUDA gates and states are never in memory: f, i, o, z are
read, y is written, and the gradient makes the rest again. A custom op with its gradient.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from attnspec.fast.backend import choose_by_dtype, load, wants_gradient, wide
from attnspec.fast.engines.operation import Operation, operation
from attnspec.fast.engines.scan.configs import lanes
from attnspec.fast.engines.scan.elementwise import elementwise
from attnspec.fast.engines.scan.segments import marked_tiles

MOST_ROWS = 8
"""Rows of a tile of the gradient: those of more do not fit a thread's registers."""


@cache
def _kernels() -> ModuleType:
    """The implementation, imported on first use."""
    return load("attnspec.fast.engines.scan.triton_gated_host")


def run_gated(
    f: Tensor, z: Tensor, i: Tensor, o: Tensor, alpha: Tensor | None, power: float, reversed: bool,
    h0: Tensor | None, offsets: Tensor | None, rows: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    with torch.cuda.device_of(z):
        made: tuple[Tensor, Tensor, Tensor] = _kernels().forward(
            f, z, i, o, alpha, power, reversed, h0, offsets, rows
        )
        return made


gated_op = Operation("attnspec::gated_scan", run_gated)


@gated_op.register_fake
def _(
    f: Tensor, z: Tensor, i: Tensor, o: Tensor, alpha: Tensor | None, power: float, reversed: bool,
    h0: Tensor | None, offsets: Tensor | None, rows: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, tokens, channels = z.shape
    sequences = batch if offsets is None else offsets.shape[0] - 1
    tiles = marked_tiles(tokens, rows, offsets)
    last = z.new_empty(sequences, channels, dtype=torch.float32)
    return z.new_empty(z.shape), last, z.new_empty(batch, tiles, channels, dtype=torch.float32)


@operation("attnspec::gated_scan_backward")
def gated_backward_op(
    dy: Tensor, dlast: Tensor, f: Tensor, z: Tensor, i: Tensor, o: Tensor, alpha: Tensor | None,
    power: float, reversed: bool, marks: Tensor, offsets: Tensor | None, rows: int, slope: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """df, dz, di, do, the gradient of max(alpha, 0), 0 unless `slope`, and that of the state before
    the first token.
    """
    with torch.cuda.device_of(z):
        made: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor] = _kernels().backward(
            dy, dlast, f, z, i, o, alpha, power, reversed, marks, offsets, rows, slope
        )
        return made


@gated_backward_op.register_fake
def _(
    dy: Tensor, dlast: Tensor, f: Tensor, z: Tensor, i: Tensor, o: Tensor, alpha: Tensor | None,
    power: float, reversed: bool, marks: Tensor, offsets: Tensor | None, rows: int, slope: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    df, dz, di, do = (x.new_empty(x.shape) for x in (f, z, i, o))
    return df, dz, di, do, dlast.new_empty(()), dlast.new_empty(dlast.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.power, ctx.reversed, h0, offsets, ctx.rows = inputs
    ctx.save_for_backward(*tensors, h0, offsets, output[2])
    ctx.set_materialize_grads(False)


def _gradient(
    ctx: Any, dy: Tensor | None, dlast: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    *inputs, alpha, h0, offsets, marks = ctx.saved_tensors
    z = inputs[1]
    dy = torch.zeros_like(z) if dy is None else dy
    if dlast is None:
        sequences = z.shape[0] if offsets is None else offsets.shape[0] - 1
        dlast = z.new_zeros(sequences, z.shape[2], dtype=torch.float32)
    slope = alpha is not None and ctx.needs_input_grad[4]
    *made, dalpha, dh0 = gated_backward_op(
        dy, dlast, *inputs, alpha, ctx.power, ctx.reversed, marks, offsets, ctx.rows, slope
    )
    return (
        *made,
        torch.where(alpha < 0, 0.0, dalpha) if slope else None,
        None,
        None,
        None if h0 is None else dh0.to(h0.dtype),
        None,
        None,
    )


gated_op.register_autograd(_gradient, setup_context=_setup)


def gate(x: Tensor) -> Tensor:
    """sigmoid(x) in float32 at least. torch differentiates its own to y (1 - y), of which nothing
    is right where the gate is open.
    """
    return torch.exp(logsigmoid(wide(x)))


def forget_gate(f: Tensor, alpha: float | Tensor = 1.0, reversed: bool = False) -> Tensor:
    """a in float32 at least; a long memory has no room for it in 16 bits."""
    if not reversed:
        return gate(f)
    power = alpha.clamp(min=0) if isinstance(alpha, Tensor) else max(alpha, 0.0)
    return torch.exp(power * logsigmoid(-wide(f)))


def gated_scan(
    f: Tensor,
    i: Tensor,
    o: Tensor,
    z: Tensor,
    alpha: float | Tensor = 1.0,
    reversed: bool = False,
    h0: Tensor | None = None,
    *,
    offsets: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """y (batch, tokens, channels) in the dtype of z, and the last h, float32 (batch, channels).

    f, i, o, z (batch, tokens, channels) of one float dtype, h0 (batch, channels) of any; alpha, a
    number or a tensor of no axes, counts only if `reversed`, and as 0 below. `offsets` packs
    sequences as in `elementwise`. Differentiable.
    """
    if choose_by_dtype(backend, "z", z) == "numba":
        enter = gate(i) * wide(z)
        a = forget_gate(f, alpha, reversed)
        states, last = elementwise(a, enter, h0, offsets=offsets, backend=backend)
        return (gate(o) * states).to(z.dtype), last
    learned = alpha.to(z.device, torch.float32) if isinstance(alpha, Tensor) and reversed else None
    power = 1.0 if isinstance(alpha, Tensor) else max(float(alpha), 0.0)
    rows = 0
    if wants_gradient(f, i, o, z, learned, h0):
        rows = min(lanes("gated gradient").rows, MOST_ROWS)
    y, last, _ = gated_op(f, z, i, o, learned, power, reversed, h0, offsets, rows)
    return y, last
