"""The summary of all keys and values under a softmax over time, which is where an additive
recurrence ends, and reading it. Custom ops with their gradients.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import (
    choose_backend,
    choose_by_dtype,
    load,
    product,
    wide_dtype,
)
from attnspec.fast.engines.operation import Operation, operation


@cache
def _kernels(backend: str) -> ModuleType:
    """The implementation on `backend`, imported on first use."""
    module = "numba_additive" if backend == "numba" else "triton_summary"
    return load(f"attnspec.fast.engines.scan.{module}")


def run_summary(k: Tensor, v: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    with torch.cuda.device_of(k):
        return _kernels(backend).summary(k, v)


summary_op = Operation("attnspec::time_summary", run_summary)


@summary_op.register_fake
def _(k: Tensor, v: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    batch, heads, _, d = k.shape
    return (
        k.new_empty(batch, heads, d, v.shape[3], dtype=wide_dtype(k)),
        k.new_empty(batch, heads, d, dtype=wide_dtype(k)),
    )


@operation("attnspec::time_summary_backward")
def summary_backward_op(
    dKV: Tensor, KV: Tensor, z: Tensor, k: Tensor, v: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    """dk and dv: products of the whole sequence with small matrices."""
    with torch.cuda.device_of(k):
        made: tuple[Tensor, Tensor] = _kernels(backend).summary_backward(dKV, KV, z, k, v)
    return made


@summary_backward_op.register_fake
def _(
    dKV: Tensor, KV: Tensor, z: Tensor, k: Tensor, v: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    return k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_summary(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    k, v, ctx.backend = inputs
    ctx.save_for_backward(*output, k, v)
    ctx.mark_non_differentiable(output[1])


def _summary_gradient(ctx: Any, dKV: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *summary_backward_op(dKV, *ctx.saved_tensors, ctx.backend), None


summary_op.register_autograd(_summary_gradient, setup_context=_setup_summary)


def time_summary(k: Tensor, v: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """P^T v (batch, heads, d, dv) with P the softmax of k over time, channel by channel, and its
    logsumexp (batch, heads, d); float32. Zeros where a channel has no key. One read of k and v.
    """
    return summary_op(k, v, choose_by_dtype(backend, "k", k))


def run_read(q: Tensor, small: Tensor, backend: str) -> Tensor:
    return product(q, small)


read_op = Operation("attnspec::read_summary", run_read)


@read_op.register_fake
def _(q: Tensor, small: Tensor, backend: str) -> Tensor:
    return q.new_empty(*q.shape[:3], small.shape[3])


@operation("attnspec::read_summary_backward")
def read_backward_op(do: Tensor, q: Tensor, small: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """dq, and the gradient of the small matrices: a sum over all tokens, which a product of
    libraries would give to few processors.
    """
    with torch.cuda.device_of(q):
        dsmall = _kernels(backend).product_over_time(q, do)
    return product(do, small.mT), dsmall.to(small.dtype)


@read_backward_op.register_fake
def _(do: Tensor, q: Tensor, small: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), small.new_empty(small.shape)


def _setup_read(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, small, ctx.backend = inputs
    ctx.save_for_backward(q, small)


def _read_gradient(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
    return *read_backward_op(do, *ctx.saved_tensors, ctx.backend), None


read_op.register_autograd(_read_gradient, setup_context=_setup_read)


def read_summary(q: Tensor, small: Tensor, *, backend: str | None = None) -> Tensor:
    """q (batch, heads, tokens, d) @ small (batch, heads, d, dv), of one dtype. Differentiable."""
    return read_op(q, small, choose_backend(backend, q))
