"""The gate of a feed-forward network, silu(g) u, in one pass over memory."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from attnspec.fast.backend import choose_backend, load, wide
from attnspec.fast.engines.operation import operation


def silu_gate(g: Tensor, u: Tensor, *, backend: str | None = None) -> Tensor:
    """silu(g) u of g and u of one shape and dtype, computed in float32 at least and rounded once.

    Differentiable, once. A mechanism has checked the arguments.
    """
    if choose_backend(backend, g) == "triton" and g.dtype != torch.float64:
        made: Tensor = _gate(g, u)
        return made
    return (functional.silu(wide(g)) * wide(u)).to(g.dtype)


def _kernels() -> ModuleType:
    """The Triton kernels, imported on first use."""
    return load("attnspec.fast.engines.rows.triton_gate")


@operation("attnspec::silu_gate")
def _gate(g: Tensor, u: Tensor) -> Tensor:
    with torch.cuda.device_of(g):
        y: Tensor = _kernels().gate(g, u)
    return y


@_gate.register_fake
def _(g: Tensor, u: Tensor) -> Tensor:
    return g.new_empty(g.shape)


@operation("attnspec::silu_gate_backward")
def _backward(dy: Tensor, g: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    with torch.cuda.device_of(g):
        dg, du = _kernels().gate_backward(dy, g, u)
    return dg, du


@_backward.register_fake
def _(dy: Tensor, g: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    return g.new_empty(g.shape), u.new_empty(u.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    dg, du = _backward(dy, *ctx.saved_tensors)
    return dg, du


def _refuse(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError("a gate is differentiable once: its gradient has none")


_gate.register_autograd(_gradient, setup_context=_setup)
_backward.register_autograd(_refuse)
