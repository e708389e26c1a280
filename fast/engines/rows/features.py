"""Positive features of linear attention, elu(x) + 1, in one pass over memory."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import choose_backend, load, wide
from attnspec.fast.engines.operation import operation


def positive(x: Tensor, dtype: torch.dtype, *, backend: str | None = None) -> Tensor:
    """elu(x) + 1 of x (batch, heads, tokens, d), computed in float32 at least; below 0 it is e^x,
    to full relative precision. Differentiable. A mechanism has checked the arguments.
    """
    if choose_backend(backend, x) == "triton" and x.dtype != torch.float64:
        made: Tensor = _forward(x, dtype)
        return made
    x = wide(x)
    return torch.where(x > 0, x + 1, torch.exp(x.clamp(max=0))).to(dtype)


def _kernels() -> ModuleType:
    """The Triton kernels, imported on first use."""
    return load("attnspec.fast.engines.rows.triton_features")


@operation("attnspec::positive_features")
def _forward(x: Tensor, dtype: torch.dtype) -> Tensor:
    y = x.new_empty(x.shape, dtype=dtype)
    with torch.cuda.device_of(x):
        _kernels().positive(x, None, y)
    return y


@_forward.register_fake
def _(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


@operation("attnspec::positive_features_backward")
def _backward(dy: Tensor, x: Tensor) -> Tensor:
    dx = x.new_empty(x.shape)
    with torch.cuda.device_of(x):
        _kernels().positive(x, dy, dx)
    return dx


@_backward.register_fake
def _(dy: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _gradient(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
    return _backward(dy, *ctx.saved_tensors), None


def _refuse(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError("positive features are differentiable once: their gradient has none")


_forward.register_autograd(_gradient, setup_context=_setup)
_backward.register_autograd(_refuse)
