"""The Taylor engine's custom ops on Triton: schemas, shapes without data, gradients."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import load
from attnspec.fast.engines.operation import Operation, operation
from attnspec.fast.engines.taylor.layout import packed_count


def _host() -> ModuleType:
    """The Triton implementation, imported on first use."""
    return load("attnspec.fast.engines.taylor.triton_host")


@operation("attnspec::taylor")
def taylor_op(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, state: Tensor | None,
    offsets: Tensor | None, causal: bool, scale: float, eps: float, use_norm: bool, want: bool,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    with torch.cuda.device_of(q):
        return _host().forward(
            q, k, v, key_mask, state, offsets, causal, scale, eps, use_norm, want, chunk
        )


@taylor_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, state: Tensor | None,
    offsets: Tensor | None, causal: bool, scale: float, eps: float, use_norm: bool, want: bool,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dv = v.shape[3]
    sequences = q.shape[0] if offsets is None else offsets.shape[0] - 1
    last = (sequences, k.shape[1], packed_count(q.shape[3]) * (dv + 1)) if want else (0,)
    return (
        q.new_empty(*q.shape[:3], dv),
        q.new_empty(q.shape[:3], dtype=torch.float32),
        q.new_empty(last, dtype=torch.float32),
    )


@operation("attnspec::taylor_backward")
def taylor_backward_op(
    do: Tensor, dtotal: Tensor | None, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None,
    state: Tensor | None, offsets: Tensor | None, out: Tensor, z: Tensor, causal: bool,
    scale: float, eps: float, use_norm: bool, chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    with torch.cuda.device_of(q):
        return _host().backward(
            do, dtotal, q, k, v, key_mask, state, offsets, out, z, causal, scale, eps, use_norm,
            chunk,
        )  # fmt: skip


@taylor_backward_op.register_fake
def _(
    do: Tensor, dtotal: Tensor | None, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None,
    state: Tensor | None, offsets: Tensor | None, out: Tensor, z: Tensor, causal: bool,
    scale: float, eps: float, use_norm: bool, chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    first = (0,) if state is None else state.shape
    return (
        q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape),
        q.new_empty(first, dtype=torch.float32),
    )  # fmt: skip


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.causal, ctx.scale, ctx.eps, ctx.use_norm, ctx.want, ctx.chunk = inputs
    ctx.save_for_backward(*tensors, output[0], output[1])


def _gradient(ctx: Any, do: Tensor, dz: Tensor, dtotal: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, key_mask, state, offsets, out, z = ctx.saved_tensors
    dq, dk, dv, dstate = taylor_backward_op(
        do.to(q.dtype), dtotal if ctx.want else None, q, k, v, key_mask, state, offsets, out, z,
        ctx.causal, ctx.scale, ctx.eps, ctx.use_norm, ctx.chunk,
    )  # fmt: skip
    return dq, dk, dv, None, None if state is None else dstate, *(None,) * 7


taylor_op.register_autograd(_gradient, setup_context=_setup)


def run_step(
    S: Tensor, zk: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What the custom op computes, without its dispatch."""
    with torch.cuda.device_of(q):
        o, new_S, new_zk = _host().step(S, zk, q, k, v, scale, eps)
    return o, new_S, new_zk


taylor_step_op = Operation("attnspec::taylor_step", run_step)


@taylor_step_op.register_fake
def _(
    S: Tensor, zk: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        q.new_empty(*q.shape[:3], v.shape[3]),
        S.new_empty(S.shape, dtype=torch.float32),
        zk.new_empty(zk.shape, dtype=torch.float32),
    )
