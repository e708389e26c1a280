"""The selective scan: a state of n numbers for every channel, whose decays vary over both.

h_t = e^(-Delta_t A) h_(t-1) + Delta_t u_t b_t and y_t = c_t . h_t + D u_t, with Delta and u per
token and channel, b and c per token and number, A per channel and number. The states of all tokens
are never in memory. A custom op with its gradient; states are float32.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import choose_by_dtype, load, wide, wide_dtype
from attnspec.fast.engines.operation import Operation, operation


@cache
def _kernels(backend: str) -> ModuleType:
    """The implementation on `backend`, imported on first use."""
    module = "numba_selective" if backend == "numba" else "triton_selective"
    return load(f"attnspec.fast.engines.scan.{module}")


def run(
    Delta: Tensor, A: Tensor, b: Tensor, c: Tensor, u: Tensor, D: Tensor | None, h0: Tensor | None,
    offsets: Tensor | None, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    with torch.cuda.device_of(u):
        return _kernels(backend).forward(Delta, A, b, c, u, D, h0, offsets)


selective_op = Operation("attnspec::selective", run)


@selective_op.register_fake
def _(
    Delta: Tensor, A: Tensor, b: Tensor, c: Tensor, u: Tensor, D: Tensor | None, h0: Tensor | None,
    offsets: Tensor | None, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    sequences = u.shape[0] if offsets is None else offsets.shape[0] - 1
    return u.new_empty(u.shape), u.new_empty(sequences, *A.shape, dtype=wide_dtype(u))


@operation("attnspec::selective_backward")
def selective_backward_op(
    dy: Tensor, dlast: Tensor, Delta: Tensor, A: Tensor, b: Tensor, c: Tensor, u: Tensor,
    D: Tensor | None, h0: Tensor | None, offsets: Tensor | None, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dDelta, dA, db, dc, du, dD (empty without D) and the gradient of the state before."""
    with torch.cuda.device_of(u):
        made = _kernels(backend).backward(dy, dlast, Delta, A, b, c, u, D, h0, offsets)
    dDelta, dA, db, dc, du, dh0 = made
    dD = u.new_empty(0)
    if D is not None:
        dD = (wide(dy) * wide(u)).sum((0, 1)).to(D.dtype)
    return dDelta, dA.to(A.dtype), db, dc, du, dD, dh0


@selective_backward_op.register_fake
def _(
    dy: Tensor, dlast: Tensor, Delta: Tensor, A: Tensor, b: Tensor, c: Tensor, u: Tensor,
    D: Tensor | None, h0: Tensor | None, offsets: Tensor | None, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dD = u.new_empty(0) if D is None else D.new_empty(D.shape)
    like = (x.new_empty(x.shape) for x in (Delta, A, b, c, u))
    dDelta, dA, db, dc, du = like
    return dDelta, dA, db, dc, du, dD, dlast.new_empty(dlast.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
    *_, D, h0, _ = ctx.saved_tensors
    *made, dD, dh0 = selective_backward_op(dy, dlast, *ctx.saved_tensors, ctx.backend)
    return (
        *made,
        None if D is None else dD,
        None if h0 is None else dh0.to(h0.dtype),
        None,
        None,
    )


selective_op.register_autograd(_gradient, setup_context=_setup)


def selective(
    Delta: Tensor,
    A: Tensor,
    b: Tensor,
    c: Tensor,
    u: Tensor,
    D: Tensor | None = None,
    h0: Tensor | None = None,
    *,
    offsets: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """y (batch, tokens, channels) in the dtype of u, and the last h, float32 (batch, channels, n).

    Delta and u (batch, tokens, channels), b and c (batch, tokens, n). A (channels, n), D
    (channels,), h0 (batch, channels, n) may have dtypes of their own. `offsets` packs sequences as
    in `elementwise`. Differentiable in all others.
    """
    tensors = (Delta, A, b, c, u, D, h0, offsets)
    y, last = selective_op(*tensors, choose_by_dtype(backend, "u", u))
    return y, last
