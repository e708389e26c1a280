"""Rows of two arrays as one, each in one pass over memory where no gradient can be asked for.

For callers that have checked their arguments and know their numbers to be right. Elsewhere it is
torch's own steps, which torch differentiates.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional

from attnspec.fast.backend import choose_backend, load, underivable
from attnspec.fast.engines.operation import operation

WIDEST = 1 << 14
"""Channels that a kernel takes at most: a row is held in registers."""


def join_normed(
    a: Tensor,
    b: Tensor,
    gain: Tensor,
    eps: float,
    order: Tensor,
    place: Tensor,
    row_order: Tensor,
    row_place: Tensor,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """a (batch, m, D) and b (batch, n, D) one behind the other, X (batch, m + n, D); the norms of
    these rows in another order; and those of b's rows in another order too, (batch, n, D).

    A row is divided by the root of its mean square plus `eps` and multiplied by `gain` (D,).
    Row i of the norms is that of row order[i] of X, `order` (m + n,), and `place` is the inverse
    order; so are `row_order` (n,) and `row_place` for b. Differentiable in a, b and gain.
    """
    if _served(backend, a, b, gain) and a.shape[2] <= WIDEST:
        made: tuple[Tensor, Tensor, Tensor] = _normed(a, b, gain, eps, place, row_place)
        return made
    X = torch.cat([a, b], dim=1)
    h = functional.rms_norm(X, gain.shape, gain, eps)
    return X, h.index_select(1, order), h[:, a.shape[1] :].index_select(1, row_order)


def join_read(
    v: Tensor, out: Tensor, place: Tensor, row_place: Tensor, *, backend: str | None = None
) -> Tensor:
    """(batch, m + n, heads * d): the values of m tokens that see themselves alone, then the outputs
    of the other n, all heads of a token side by side.

    Token i < m is token place[i] of v (batch, kv_heads, m + n, d), whose kv heads serve several
    heads each; token m + i is row row_place[i] of out (batch, heads, n, d). Differentiable in v and
    out.
    """
    if _served(backend, v, out):
        read: Tensor = _read(v, out, place, row_place)
        return read
    own = v.index_select(2, place[: v.shape[2] - out.shape[2]])
    own = own.repeat_interleave(out.shape[1] // v.shape[1], 1)
    every = torch.cat([own, out.index_select(2, row_place)], dim=2)
    return every.transpose(1, 2).flatten(2)


def _served(backend: str | None, *tensors: Tensor) -> bool:
    """Whether the kernels take these tensors."""
    first = tensors[0]
    on_gpu = choose_backend(backend, first) == "triton" and first.dtype != torch.float64
    return on_gpu and underivable(*tensors)


def _kernels() -> ModuleType:
    """The Triton kernels, imported on first use."""
    return load("attnspec.fast.engines.rows.triton_joined")


@operation("attnspec::join_normed")
def _normed(
    a: Tensor, b: Tensor, gain: Tensor, eps: float, place: Tensor, row_place: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.cuda.device_of(a):
        made: tuple[Tensor, Tensor, Tensor] = _kernels().join_normed(
            a, b, gain, eps, place, row_place
        )
    return made


@_normed.register_fake
def _(
    a: Tensor, b: Tensor, gain: Tensor, eps: float, place: Tensor, row_place: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    shape = a.shape[0], a.shape[1] + b.shape[1], a.shape[2]
    return a.new_empty(shape), a.new_empty(shape), b.new_empty(b.shape)


@operation("attnspec::join_read")
def _read(v: Tensor, out: Tensor, place: Tensor, row_place: Tensor) -> Tensor:
    with torch.cuda.device_of(v):
        read: Tensor = _kernels().join_read(v, out, place, row_place)
    return read


@_read.register_fake
def _(v: Tensor, out: Tensor, place: Tensor, row_place: Tensor) -> Tensor:
    return v.new_empty(v.shape[0], v.shape[2], out.shape[1] * out.shape[3])
