"""The CPU's custom ops: unnormalised attention to ranges of near keys, and one decoded token."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import count_launch, load
from attnspec.fast.engines.operation import operation


def _kernels() -> ModuleType:
    """The Numba kernels, imported on first use."""
    return load("attnspec.fast.engines.taylor.numba_kernels")


def _arrays(*tensors: Tensor) -> list[Any]:
    return [x.detach().contiguous().numpy() for x in tensors]


@operation("attnspec::taylor_near")
def near_op(
    q: Tensor, k: Tensor, v: Tensor, real: Tensor, lo: Tensor, hi: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """num (batch, heads, rows, dv) and den (batch, heads, rows) over the keys lo .. hi - 1 of each
    row, those with `real` (batch, keys) 0 left out.
    """
    num = torch.empty(*q.shape[:3], v.shape[3], dtype=q.dtype)
    den = torch.empty(q.shape[:3], dtype=q.dtype)
    arrays = _arrays(q, k.mT, v, real, lo, hi)
    count_launch()
    _kernels().near_forward(*arrays, arrays[0].dtype.type(scale), num.numpy(), den.numpy())
    return num, den


@near_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, real: Tensor, lo: Tensor, hi: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3])


@operation("attnspec::taylor_near_backward")
def near_backward_op(
    dnum: Tensor, dden: Tensor, q: Tensor, k: Tensor, v: Tensor, real: Tensor, lo: Tensor,
    hi: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    places = torch.arange(k.shape[2])
    row_lo, row_hi = (torch.searchsorted(ends, places, right=True) for ends in (hi, lo))
    kernels, number = _kernels(), (_arrays(q)[0].dtype.type(scale),)
    rows, up = _arrays(q, k, v, real), _arrays(dnum, dden)
    count_launch()
    kernels.near_dq(*rows, *_arrays(lo, hi), *number, *up, dq.numpy())
    count_launch()
    kernels.near_dkv(*rows, *_arrays(row_lo, row_hi), *number, *up, dk.numpy(), dv.numpy())
    return dq, dk, dv


@near_backward_op.register_fake
def _(
    dnum: Tensor, dden: Tensor, q: Tensor, k: Tensor, v: Tensor, real: Tensor, lo: Tensor,
    hi: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx: Any, dnum: Tensor, dden: Tensor) -> tuple[Tensor | None, ...]:
    gradients = near_backward_op(dnum, dden, *ctx.saved_tensors, ctx.scale)
    return (*gradients, None, None, None, None)


near_op.register_autograd(_gradient, setup_context=_setup)


@operation("attnspec::taylor_token")
def token_op(
    S: Tensor, zk: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """o (batch, heads, 1, dv) of one token, and the state with it; all in one float dtype."""
    new_S, new_zk = torch.empty(S.shape, dtype=S.dtype), torch.empty(zk.shape, dtype=zk.dtype)
    out = torch.empty(*q.shape[:2], v.shape[3], dtype=q.dtype)
    arrays = _arrays(S, zk, q[:, :, 0], k[:, :, 0], v[:, :, 0])
    number = arrays[0].dtype.type
    count_launch()
    _kernels().token_step(
        *arrays, number(math.sqrt(scale)), number(eps), new_S.numpy(), new_zk.numpy(), out.numpy()
    )
    return out[:, :, None].clone(), new_S, new_zk


@token_op.register_fake
def _(
    S: Tensor, zk: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        q.new_empty(*q.shape[:2], 1, v.shape[3]), S.new_empty(S.shape), zk.new_empty(zk.shape),
    )  # fmt: skip
