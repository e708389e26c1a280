"""Tokens in another order: one op, whose gradient is itself with the inverse order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import choose_backend, load
from attnspec.fast.engines.operation import operation


def take_tokens(
    x: Tensor,
    y: Tensor | None,
    order: Tensor,
    place: Tensor,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Token order[i] of x (batch, heads, tokens, d) and y (batch, kv_heads, tokens, dv) as token i.

    `order` (tokens,) is a permutation and `place` its inverse, of int64. The results are
    contiguous; without y the second is empty. Differentiable in x and y. For callers that know
    their numbers to be right.
    """
    return take_op(x, y, order, place, choose_backend(backend, x))


@operation("attnspec::take_tokens")
def take_op(
    x: Tensor, y: Tensor | None, order: Tensor, place: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        with torch.cuda.device_of(x):
            moved: tuple[Tensor, Tensor] = load(
                "attnspec.fast.engines.select.triton_tokens"
            ).take_tokens(x, y, order)
        return moved
    return x.index_select(2, order), x.new_empty(0) if y is None else y.index_select(2, order)


@take_op.register_fake
def _(
    x: Tensor, y: Tensor | None, order: Tensor, place: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0) if y is None else y.new_empty(y.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, y, order, place, ctx.backend = inputs
    ctx.save_for_backward(order, place)
    ctx.paired = y is not None


def _gradient(ctx: Any, dx: Tensor, dy: Tensor) -> tuple[Tensor | None, ...]:
    order, place = ctx.saved_tensors
    dx, dy = take_op(dx, dy if ctx.paired else None, place, order, ctx.backend)
    return dx, dy if ctx.paired else None, None, None, None


take_op.register_autograd(_gradient, setup_context=_setup)
