"""The memory engine's custom ops: schemas, shapes without data, gradients."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import wide_dtype
from attnspec.fast.engines.memory import dense, dense_gradients
from attnspec.fast.engines.memory.configs import config, deep_config, least_side
from attnspec.fast.engines.memory.packed import Packed, most_pieces
from attnspec.fast.engines.memory.plan import Pieces, Rates, Scalars
from attnspec.fast.engines.operation import operation

WIDEST = 256
"""Channels of keys and of values that the linear memory's kernels hold."""
WIDEST_OF_TWO = 128
"""Channels of keys and of values that the kernels of a memory of two layers hold."""


def _hopper(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.get_device_properties(x.device).major >= 9


def _linear(widths: list[int], backend: str) -> bool:
    """Whether the linear memory's own kernels run."""
    return backend == "triton" and len(widths) == 2 and max(widths) <= WIDEST


def _two(k: Tensor, widths: list[int], backend: str) -> bool:
    """Whether the kernels of a memory of two layers run."""
    widest = len(widths) == 3 and min(widths) > 0 and max(widths[0], widths[2]) <= WIDEST_OF_TWO
    return backend == "triton" and k.dtype != torch.float64 and widest


def _size(k: Tensor, widths: list[int], b: int, backend: str) -> int:
    """Tokens of a piece at most."""
    needed = max(1, min(b, k.shape[2]))
    linear = _linear(widths, backend)
    if not linear and not _two(k, widths, backend):
        return min(64, needed)
    kind = k.element_size(), _hopper(k)
    widest = max(widths[0], widths[-1])
    size = config(*kind).piece if linear else deep_config(*kind, widest).deep_piece
    least = 16 if linear else least_side(k.element_size())
    return min(size, max(least, 1 << (needed - 1).bit_length()))


def _pieces(k: Tensor, offsets: Tensor | None, widths: list[int], b: int, backend: str) -> Pieces:
    size, tokens = _size(k, widths, b, backend), k.shape[2]
    packed = None if offsets is None else Packed.of(offsets, tokens, b, size)
    return Pieces(tokens, b, size, packed)


def _deep(
    k: Tensor, q: Tensor, widths: list[int], pieces: Pieces, loss_scale: float, before: bool
) -> dense.Deep:
    return dense.Deep(widths, pieces, loss_scale, before, q.shape[1] // k.shape[1])


@operation("attnspec::memory")
def memory_op(
    W: Tensor, S: Tensor, k: Tensor, v: Tensor, q: Tensor, theta: Tensor, eta: Tensor,
    alpha: Tensor, stored: Tensor | None, offsets: Tensor | None, widths: list[int], b: int,
    loss_scale: float, before: bool, keep: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y, the last W and S (batch, heads, numbers), and two tensors for the gradient.

    With `offsets` the states are those of sequences that lie in one entry of the batch.
    """
    with torch.cuda.device_of(k):
        rates = Rates.of(theta, eta, alpha, stored, wide_dtype(k))
        flat = (W.flatten(0, 1), S.flatten(0, 1))
        pieces = _pieces(k, offsets, widths, b, backend)
        errors = W.new_empty(0)
        if _linear(widths, backend):
            kernels = importlib.import_module("attnspec.fast.engines.memory.triton_linear")
            y, last_W, last_S, saved, errors = kernels.forward(
                pieces, *flat, k, v, q, rates, loss_scale, before, keep
            )
        elif _two(k, widths, backend):
            kernels = importlib.import_module("attnspec.fast.engines.memory.triton_deep")
            y, last_W, last_S, saved = kernels.forward(
                widths, pieces, *flat, k, v, q, rates, loss_scale, before, keep
            )
        else:
            call = _deep(k, q, widths, pieces, loss_scale, before)
            y, last_W, last_S, saved = dense.forward(call, *flat, k, v, q, rates, keep, backend)
        return y, last_W.view(W.shape), last_S.view(S.shape), saved, errors


def _saved_shapes(
    W: Tensor, k: Tensor, packed: bool, widths: list[int], b: int, keep: bool, backend: str
) -> tuple[Tensor, Tensor]:
    nothing = W.new_empty(0)
    pieces = _pieces(k, None, widths, b, backend)
    count = most_pieces(pieces.tokens, W.shape[0], b, pieces.size) if packed else pieces.count
    if not keep or not count:
        return nothing, nothing
    memories = k.shape[0] * k.shape[1]
    groups = -(-count // dense.GROUP)
    if _two(k, widths, backend):
        d, hidden, dv = (16 * -(-x // 16) for x in widths)
        numbers = hidden * (d + dv)
        return W.new_empty(groups, 3 if pieces.per > 1 else 2, memories, numbers), nothing
    if not _linear(widths, backend):
        return W.new_empty(groups, 3, memories, W.shape[2]), nothing
    return (
        k.new_empty(memories, count, 2, *widths),
        k.new_empty(memories, count, pieces.size, widths[1]),
    )


@memory_op.register_fake
def _(
    W: Tensor, S: Tensor, k: Tensor, v: Tensor, q: Tensor, theta: Tensor, eta: Tensor,
    alpha: Tensor, stored: Tensor | None, offsets: Tensor | None, widths: list[int], b: int,
    loss_scale: float, before: bool, keep: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    y = q.new_empty(*q.shape[:3], v.shape[3])
    states = W.new_empty(W.shape), S.new_empty(S.shape)
    packed = offsets is not None
    return y, *states, *_saved_shapes(W, k, packed, widths, b, keep, backend)


@operation("attnspec::memory_backward")
def memory_backward_op(
    dy: Tensor, dW: Tensor, dS: Tensor, saved: Tensor, errors: Tensor, W: Tensor | None,
    S: Tensor | None, k: Tensor, v: Tensor, q: Tensor, theta: Tensor, eta: Tensor, alpha: Tensor,
    stored: Tensor | None, offsets: Tensor | None, widths: list[int], b: int, loss_scale: float,
    before: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dW, dS, dk, dv, dq, and drates (3, batch, heads, tokens); W and S are needed with `offsets`
    only.
    """
    with torch.cuda.device_of(k):
        rates = Rates.of(theta, eta, alpha, stored, wide_dtype(k))
        flat = (dW.flatten(0, 1).contiguous(), dS.flatten(0, 1).contiguous())
        first_W, first_S = (dW.flatten(0, 1) if x is None else x.flatten(0, 1) for x in (W, S))
        pieces = _pieces(k, offsets, widths, b, backend)
        if _linear(widths, backend):
            kernels = importlib.import_module("attnspec.fast.engines.memory.triton_linear")
            dW0, dS0, dk, dv, dq, drates = kernels.backward(
                pieces, dy, *flat, saved, errors, k, v, q, rates, loss_scale, before
            )
        elif _two(k, widths, backend):
            kernels = importlib.import_module("attnspec.fast.engines.memory.triton_deep_back")
            dW0, dS0, dk, dv, dq, drates = kernels.backward(
                widths, pieces, dy, *flat, saved, first_W, first_S, k, v, q, rates, loss_scale,
                before,
            )  # fmt: skip
        else:
            call = _deep(k, q, widths, pieces, loss_scale, before)
            dW0, dS0, dk, dv, dq, drates = dense_gradients.backward(
                call, dy, *flat, saved, first_W, first_S, k, v, q, rates, backend
            )
        return dW0.view(dW.shape), dS0.view(dS.shape), dk, dv, dq, drates.view(3, *theta.shape)


@memory_backward_op.register_fake
def _(
    dy: Tensor, dW: Tensor, dS: Tensor, saved: Tensor, errors: Tensor, W: Tensor | None,
    S: Tensor | None, k: Tensor, v: Tensor, q: Tensor, theta: Tensor, eta: Tensor, alpha: Tensor,
    stored: Tensor | None, offsets: Tensor | None, widths: list[int], b: int, loss_scale: float,
    before: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    rates = theta.new_empty(3, *theta.shape, dtype=wide_dtype(k))
    return (
        dW.new_empty(dW.shape), dS.new_empty(dS.shape), k.new_empty(k.shape),
        v.new_empty(v.shape), q.new_empty(q.shape), rates,
    )  # fmt: skip


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    W, S, *tensors, ctx.widths, ctx.b, ctx.loss_scale, ctx.before, ctx.keep, ctx.backend = inputs
    first = (None, None) if tensors[-1] is None else (W, S)
    ctx.save_for_backward(*output[3:], *first, *tensors)
    ctx.set_materialize_grads(True)


def _gradient(ctx: Any, dy: Tensor, dW: Tensor, dS: Tensor, *unused: Any) -> tuple[Any, ...]:
    saved, errors, W, S, k, v, q, theta, eta, alpha, stored, offsets = ctx.saved_tensors
    dW0, dS0, dk, dv, dq, drates = memory_backward_op(
        dy.to(q.dtype), dW, dS, saved, errors, W, S, k, v, q, theta, eta, alpha, stored, offsets,
        ctx.widths, ctx.b, ctx.loss_scale, ctx.before, ctx.backend,
    )  # fmt: skip
    by_rate = (x.to(rate.dtype) for x, rate in zip(drates, (theta, eta, alpha), strict=True))
    return dW0, dS0, dk, dv, dq, *by_rate, *[None] * 8


memory_op.register_autograd(_gradient, setup_context=_setup)


@operation("attnspec::memory_scalars")
def scalars_op(
    theta: Tensor, eta: Tensor, alpha: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """rows (heads, C, 3), n and G (heads, C, C) of rates (heads, C), in their wide dtype."""
    with torch.cuda.device_of(theta):
        rates, pieces = _one_piece(theta, eta, alpha)
        of = dense.scalar_kernels(backend).scalars(rates, pieces, False, with_n=True)
        heads, C = theta.shape
        return of.rows.view(heads, C, 3), of.n.view(heads, C, C), of.G.view(heads, C, C)


@scalars_op.register_fake
def _(theta: Tensor, eta: Tensor, alpha: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    heads, C = theta.shape
    dtype = wide_dtype(theta)
    square = theta.new_empty(heads, C, C, dtype=dtype)
    return theta.new_empty(heads, C, 3, dtype=dtype), square, torch.empty_like(square)


@operation("attnspec::memory_scalars_backward")
def scalars_backward_op(
    drows: Tensor, dn: Tensor, dG: Tensor, theta: Tensor, eta: Tensor, alpha: Tensor, backend: str
) -> Tensor:
    """Gradients (3, heads, C) of the rates."""
    with torch.cuda.device_of(theta):
        rates, pieces = _one_piece(theta, eta, alpha)
        last = drows.new_zeros(drows.shape[0], 1, 3)
        none = drows.new_zeros(drows.shape[0], 1, theta.shape[1])
        d = Scalars(drows[:, None], dn[:, None], dG[:, None], last, none, none)
        return dense.scalar_kernels(backend).scalars_backward(rates, pieces, False, d)


@scalars_backward_op.register_fake
def _(
    drows: Tensor, dn: Tensor, dG: Tensor, theta: Tensor, eta: Tensor, alpha: Tensor, backend: str
) -> Tensor:
    return theta.new_empty(3, *theta.shape, dtype=wide_dtype(theta))


def _one_piece(theta: Tensor, eta: Tensor, alpha: Tensor) -> tuple[Rates, Pieces]:
    rates = Rates.of(theta[None], eta[None], alpha[None], None, wide_dtype(theta))
    C = max(1, theta.shape[1])
    return rates, Pieces(theta.shape[1], C, C)


def _setup_scalars(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *rates, ctx.backend = inputs
    ctx.save_for_backward(*rates)


def _scalars_gradient(ctx: Any, drows: Tensor, dn: Tensor, dG: Tensor) -> tuple[Any, ...]:
    rates = ctx.saved_tensors
    out = scalars_backward_op(
        drows.contiguous(), dn.contiguous(), dG.contiguous(), *rates, ctx.backend
    )
    return *(x.to(rate.dtype) for x, rate in zip(out, rates, strict=True)), None


scalars_op.register_autograd(_scalars_gradient, setup_context=_setup_scalars)


@operation("attnspec::memory_path")
def path_op(
    W: Tensor, S: Tensor, gradients: Tensor, eta: Tensor, alpha: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    """S' = eta S - g and W' = (1 - alpha) W + S' over chunks: W on the way, and the last S."""
    with torch.cuda.device_of(W):
        path, momentum = dense.scalar_kernels(backend).path(W, S, gradients, eta, alpha)
        return path, momentum


@path_op.register_fake
def _(
    W: Tensor, S: Tensor, gradients: Tensor, eta: Tensor, alpha: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    heads, chunks, width = gradients.shape
    return W.new_empty(heads, chunks + 1, width), S.new_empty(S.shape)


@operation("attnspec::memory_path_backward")
def path_backward_op(
    dpath: Tensor, dS: Tensor, S: Tensor, gradients: Tensor, eta: Tensor, alpha: Tensor,
    path: Tensor, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    with torch.cuda.device_of(S):
        dW, dS0, dg, deta, dalpha = dense.scalar_kernels(backend).path_backward(
            dpath, dS, S, gradients, eta, alpha, path
        )
        return dW, dS0, dg, deta, dalpha


@path_backward_op.register_fake
def _(
    dpath: Tensor, dS: Tensor, S: Tensor, gradients: Tensor, eta: Tensor, alpha: Tensor,
    path: Tensor, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        S.new_empty(S.shape), S.new_empty(S.shape), S.new_empty(gradients.shape),
        eta.new_empty(eta.shape), alpha.new_empty(alpha.shape),
    )  # fmt: skip


def _setup_path(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, S, gradients, eta, alpha, ctx.backend = inputs
    ctx.save_for_backward(S, gradients, eta, alpha, output[0])


def _path_gradient(ctx: Any, dpath: Tensor, dS: Tensor) -> tuple[Any, ...]:
    out = path_backward_op(dpath.contiguous(), dS.contiguous(), *ctx.saved_tensors, ctx.backend)
    return *out, None


path_op.register_autograd(_path_gradient, setup_context=_setup_path)
