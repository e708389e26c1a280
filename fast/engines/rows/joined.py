"""Rows of two arrays as one, each in one pass over memory where no gradient or tracer looks on.

For callers that have checked their arguments and know their numbers to be right. Elsewhere it is
torch's own steps, which torch differentiates.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from attnspec.fast.backend import choose_backend, load, unobserved


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
    if choose_backend(backend, a) == "triton" and unobserved(a, b, gain):
        kernels = load("attnspec.fast.engines.rows.triton_joined")
        if a.shape[2] <= kernels.WIDEST and a.element_size() < 8:
            with torch.cuda.device_of(a):
                made: tuple[Tensor, Tensor, Tensor] = kernels.join_normed(
                    a, b, gain, eps, place, row_place
                )
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
    if choose_backend(backend, v) == "triton" and unobserved(v, out) and v.element_size() < 8:
        with torch.cuda.device_of(v):
            read: Tensor = load("attnspec.fast.engines.rows.triton_joined").join_read(
                v, out, place, row_place
            )
        return read
    own = v.index_select(2, place[: v.shape[2] - out.shape[2]])
    own = own.repeat_interleave(out.shape[1] // v.shape[1], 1)
    every = torch.cat([own, out.index_select(2, row_place)], dim=2)
    return every.transpose(1, 2).flatten(2)
