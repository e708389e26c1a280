"""h_t = a_t h_(t-1) + x_t, number by number: the scan of gated RNNs, with its gradient.

a is any number, also 0, negative or above 1. A custom op; states are float32.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import choose_by_dtype, load, wide_dtype
from attnspec.fast.engines.operation import Operation, operation


@cache
def _kernels(backend: str) -> ModuleType:
    """The implementation on `backend`, imported on first use."""
    module = "numba_elementwise" if backend == "numba" else "triton_elementwise"
    return load(f"attnspec.fast.engines.scan.{module}")


def run(
    a: Tensor, x: Tensor, h0: Tensor | None, offsets: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    with torch.cuda.device_of(x):
        return _kernels(backend).forward(a, x, h0, offsets)


elementwise_op = Operation("attnspec::elementwise", run)


@elementwise_op.register_fake
def _(
    a: Tensor, x: Tensor, h0: Tensor | None, offsets: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    sequences = x.shape[0] if offsets is None else offsets.shape[0] - 1
    return x.new_empty(x.shape), x.new_empty(sequences, x.shape[2], dtype=wide_dtype(x))


@operation("attnspec::elementwise_backward")
def elementwise_backward_op(
    dh: Tensor, dlast: Tensor, a: Tensor, h: Tensor, h0: Tensor | None, offsets: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """da, dx and the gradient of the state before the first token."""
    with torch.cuda.device_of(h):
        return _kernels(backend).backward(dh, dlast, a, h, h0, offsets)


@elementwise_backward_op.register_fake
def _(
    dh: Tensor, dlast: Tensor, a: Tensor, h: Tensor, h0: Tensor | None, offsets: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return a.new_empty(a.shape), h.new_empty(h.shape), dlast.new_empty(dlast.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    a, _, h0, offsets, ctx.backend = inputs
    ctx.save_for_backward(a, output[0], h0, offsets)


def _gradient(ctx: Any, dh: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
    a, h, h0, offsets = ctx.saved_tensors
    da, dx, dh0 = elementwise_backward_op(dh, dlast, a, h, h0, offsets, ctx.backend)
    return da, dx, None if h0 is None else dh0.to(h0.dtype), None, None


elementwise_op.register_autograd(_gradient, setup_context=_setup)


def elementwise(
    a: Tensor,
    x: Tensor,
    h0: Tensor | None = None,
    *,
    offsets: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Every h (batch, tokens, channels) in the dtype of x, and the last in float32.

    a and x (batch, tokens, channels), each in its own float dtype, h0 (batch, channels) likewise.
    `offsets` int (sequences + 1), increasing from 0 to tokens, packs sequences in a batch of one,
    and the states are then (sequences, channels). Differentiable in a, x and h0; the gradient of a
    sees h as it was rounded to the dtype of x.
    """
    y, last = elementwise_op(a, x, h0, offsets, choose_by_dtype(backend, "x", x))
    return y, last
