"""The scan engine's custom ops: schemas, shapes without data, gradients."""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import load, wide_dtype
from attnspec.fast.engines.operation import Operation, operation


@cache
def _kernels(backend: str) -> ModuleType:
    """The implementation on `backend`, imported on first use."""
    module = "numba_cpu" if backend == "numba" else "triton_host"
    return load(f"attnspec.fast.engines.scan.{module}")


def run_scan(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, log_decay: Tensor | None,
    reads: Tensor | None, writes: Tensor | None, state: Tensor | None, offsets: Tensor | None,
    scale: float, block: int, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    with torch.cuda.device_of(q):
        return _kernels(backend).forward(
            q, k, v, slopes, log_decay, reads, writes, state, offsets, scale, block
        )


scan_op = Operation("attnspec::scan", run_scan)


@scan_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, log_decay: Tensor | None,
    reads: Tensor | None, writes: Tensor | None, state: Tensor | None, offsets: Tensor | None,
    scale: float, block: int, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, heads, tokens, d = q.shape
    sequences = batch if offsets is None else offsets.shape[0] - 1
    return (
        q.new_empty(batch, heads, tokens, v.shape[3]),
        q.new_empty(sequences, heads, d, v.shape[3], dtype=wide_dtype(q)),
    )


Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@operation("attnspec::scan_backward")
def scan_backward_op(
    do: Tensor, dfinal: Tensor, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None,
    log_decay: Tensor | None, reads: Tensor | None, writes: Tensor | None, state: Tensor | None,
    offsets: Tensor | None, final: Tensor, scale: float, block: int, decay_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    with torch.cuda.device_of(q):
        gradients: Gradients = _kernels(backend).backward(
            do, dfinal, q, k, v, slopes, log_decay, reads, writes, state, offsets, final, scale,
            block, decay_gradient,
        )  # fmt: skip
    return gradients


@scan_backward_op.register_fake
def _(
    do: Tensor, dfinal: Tensor, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None,
    log_decay: Tensor | None, reads: Tensor | None, writes: Tensor | None, state: Tensor | None,
    offsets: Tensor | None, final: Tensor, scale: float, block: int, decay_gradient: bool,
    backend: str,
) -> Gradients:  # fmt: skip
    given = slopes if slopes is not None else log_decay
    ddecay = q.new_empty(0)
    if decay_gradient and given is not None:
        ddecay = given.new_empty(given.shape)
    dreads = q.new_empty(0) if reads is None else reads.new_empty(reads.shape)
    dwrites = q.new_empty(0) if writes is None else writes.new_empty(writes.shape)
    return (
        q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), ddecay, dreads, dwrites,
        final.new_empty(final.shape),
    )  # fmt: skip


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.block, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[1])


def _gradient(ctx: Any, do: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, slopes, log_decay, reads, writes, state, offsets, final = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    dq, dk, dv, ddecay, dreads, dwrites, dstate = scan_backward_op(
        do.to(q.dtype), dfinal, q, k, v, slopes, log_decay, reads, writes, state, offsets, final,
        ctx.scale, ctx.block, wanted[3] or wanted[4], ctx.backend,
    )  # fmt: skip
    return (
        dq, dk, dv,
        ddecay if wanted[3] else None,
        ddecay if wanted[4] else None,
        dreads if wanted[5] else None,
        dwrites if wanted[6] else None,
        dstate if wanted[7] else None,
        None, None, None, None,
    )  # fmt: skip


scan_op.register_autograd(_gradient, setup_context=_setup)


@operation("attnspec::scan_states")
def states_op(
    k: Tensor, v: Tensor, slopes: Tensor | None, log_decay: Tensor | None, state: Tensor | None,
    heads: int, segment: int, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    with torch.cuda.device_of(k):
        return _kernels(backend).segment_states(k, v, slopes, log_decay, state, heads, segment)


@states_op.register_fake
def _(
    k: Tensor, v: Tensor, slopes: Tensor | None, log_decay: Tensor | None, state: Tensor | None,
    heads: int, segment: int, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, _, tokens, d = k.shape
    many, dtype = (tokens + segment - 1) // segment, wide_dtype(k)
    return (
        k.new_empty(batch, heads, many, d, v.shape[3], dtype=dtype),
        k.new_empty(batch, heads, d, v.shape[3], dtype=dtype),
    )


@operation("attnspec::scan_outputs")
def outputs_op(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, log_decay: Tensor | None,
    entering: Tensor, scale: float, segment: int, backend: str,
) -> Tensor:  # fmt: skip
    with torch.cuda.device_of(q):
        return _kernels(backend).segment_outputs(
            q, k, v, slopes, log_decay, entering, scale, segment
        )


@outputs_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, log_decay: Tensor | None,
    entering: Tensor, scale: float, segment: int, backend: str,
) -> Tensor:  # fmt: skip
    return q.new_empty(*q.shape[:3], v.shape[3])


def run_step(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None,
    log_decay: Tensor | None, scale: float, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    with torch.cuda.device_of(q):
        return _kernels(backend).step(state, q, k, v, slopes, log_decay, scale)


step_op = Operation("attnspec::scan_step", run_step)


@step_op.register_fake
def _(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None,
    log_decay: Tensor | None, scale: float, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return q.new_empty(*q.shape[:3], v.shape[3]), state.new_empty(state.shape)
