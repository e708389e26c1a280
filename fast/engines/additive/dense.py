"""What surrounds the additive kernels and is one call of a library: projection and log-softmax.

They are operations of their own because their gradients must not read what has none (K11): a slot
or a step may hold NaN if a mask keeps it out of every result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import wide_dtype


def _widened(x: Tensor) -> Tensor:
    """16-bit floats as float32: large projections cancel inside tanh, so none may be rounded."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


@torch.library.custom_op("attnspec::project", mutates_args=())
def _project(x: Tensor, W: Tensor) -> Tensor:
    return (_widened(W) @ _widened(x).transpose(1, 2)).transpose(1, 2)


@_project.register_fake
def _(x: Tensor, W: Tensor) -> Tensor:
    return (_widened(W) @ _widened(x).transpose(1, 2)).transpose(1, 2)


def _project_setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _project_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    x, W = ctx.saved_tensors
    read = (dy != 0).any(2, keepdim=True)
    dx = dy @ _widened(W)
    dW = dy.flatten(0, 1).T @ torch.where(read, _widened(x), 0).flatten(0, 1)
    return dx.to(x.dtype), dW.to(W.dtype)


_project.register_autograd(_project_gradient, setup_context=_project_setup)


def project(x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (batch, rows, D) times W (A, D), plus `bias` (A): (batch, rows, A).

    In memory the rows are the fastest axis, as the kernels read them. A row without an upstream
    gradient is not read backward.
    """
    y = _project(x, W)
    return y if bias is None else y + bias


@torch.library.custom_op("attnspec::masked_log_softmax", mutates_args=())
def _log_softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    wide = wide_dtype(scores)
    if mask is None:
        return torch.log_softmax(scores, 2, dtype=wide)
    logp = torch.log_softmax(scores.masked_fill(~mask, float("-inf")), 2, dtype=wide)
    return logp.masked_fill_(~mask, float("-inf"))


@_log_softmax.register_fake
def _(scores: Tensor, mask: Tensor | None) -> Tensor:
    wide = wide_dtype(scores)
    return torch.log_softmax(scores, 2, dtype=wide)


def _log_softmax_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    scores, mask = inputs
    ctx.dtype = scores.dtype
    ctx.save_for_backward(output, mask)


def _log_softmax_gradient(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
    logp, mask = ctx.saved_tensors
    if mask is not None:
        dout = dout.masked_fill(~mask, 0)
    read = (dout != 0).any(2, keepdim=True)
    weights = torch.where(read, logp, float("-inf")).exp()
    return (dout - weights * dout.sum(2, keepdim=True)).to(ctx.dtype), None


_log_softmax.register_autograd(_log_softmax_gradient, setup_context=_log_softmax_setup)


def masked_log_softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Log-softmax of scores (batch, steps, slots) over the slots where `mask` is True.

    `mask` bool, broadcastable to the scores. float32 (float64 for float64); a masked slot gets
    -inf, and so does every slot of a row that allows none. A row without an upstream gradient is
    not read backward.
    """
    return _log_softmax(scores, mask)
