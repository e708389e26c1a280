"""Rows of unit length in Triton, each multiplied by a number of its own, and their gradient.

x / max(|x|, FLOOR), formed in float32 and rounded once. The gradient may come one row later or
earlier than it belongs, with a first or last row of its own, as a shifted scan leaves it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnspec.fast.engines.prepared import launch
from attnspec.fast.engines.scan.triton_trace import aligned
from attnspec.fast.engines.scan.triton_trace_rows import (
    FLOOR,
    floored,
    head_offset,
    load_numbers,
    real_rows,
)
from attnspec.fast.engines.sizes import tile_width

ITEMS = 2048
"""Numbers of a tile."""


@triton.jit
def tile_of(tokens, heads, valid, valid_b, R: tl.constexpr):
    """A program's head, batch, tokens, and where its valid tokens begin."""
    tiles = (tokens + R - 1) // R
    line = (tl.program_id(0) // tiles).to(tl.int64)
    t = (tl.program_id(0) % tiles).to(tl.int64) * R + tl.arange(0, R)
    return line, line // heads, t, valid + line // heads * valid_b


@triton.jit
def load_rows(
    x, x_b, x_h, x_t, x_d, batch, head, t, real, d, BD: tl.constexpr, ALIGNED: tl.constexpr
):
    """Rows t of a head in float32, zeros where they are not real."""
    channels = tl.arange(0, BD)
    x += head_offset(batch, x_b, head, x_h, ALIGNED)
    at = t[:, None] * x_t + channels.to(tl.int64)[None, :] * x_d
    mask = real[:, None] & (channels < d)[None, :]
    return tl.load(x + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["x_b", "x_h", "valid_b", "valid_t", "tokens", "heads", "factor"])
def units_kernel(
    x, x_b, x_h, x_t, x_d, valid, valid_b, valid_t, weights, out, tokens, heads, d, factor,
    R: tl.constexpr, BD: tl.constexpr, VALID: tl.constexpr, WEIGHTED: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """out (lines, tokens, d) = factor * weights * unit rows of x, 0 at padding."""
    line, batch, t, valid = tile_of(tokens, heads, valid, valid_b, R)
    real = real_rows(valid, valid_t, t, 0, tokens, VALID)
    X = load_rows(x, x_b, x_h, x_t, x_d, batch, line % heads, t, real, d, BD, ALIGNED)
    weight = factor / floored(tl.sqrt(tl.sum(X * X, 1)))
    if WEIGHTED:
        weight *= load_numbers(weights, line, t, real, tokens)
    channels = tl.arange(0, BD)
    at = out + (line * tokens + t[:, None]) * d + channels[None, :]
    mask = (t < tokens)[:, None] & (channels < d)[None, :]
    tl.store(at, (X * weight[:, None]).to(out.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["x_b", "x_h", "valid_b", "valid_t", "tokens", "heads", "factor", "shift",
        "inner_rows",
    ]
)  # fmt: skip
def units_gradient_kernel(
    x, x_b, x_h, x_t, x_d, valid, valid_b, valid_t, weights, inner, edge, dx, dweights, tokens,
    heads, d, factor, shift, inner_rows,
    R: tl.constexpr, BD: tl.constexpr, VALID: tl.constexpr, WEIGHTED: tl.constexpr,
    EDGE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """dx (lines, tokens, d) and the gradient of the weights, from that of the output: row t of it
    is row t - shift of `inner` (lines, inner_rows, d) or, if there is none, `edge` (lines, d).
    """
    line, batch, t, valid = tile_of(tokens, heads, valid, valid_b, R)
    real = real_rows(valid, valid_t, t, 0, tokens, VALID)
    X = load_rows(x, x_b, x_h, x_t, x_d, batch, line % heads, t, real, d, BD, ALIGNED)
    channels = tl.arange(0, BD)
    inside = channels < d
    row = t - shift
    known = real & (row >= 0) & (row < inner_rows)
    at = inner + (line * inner_rows + row[:, None]) * d + channels[None, :]
    G = tl.load(at, mask=known[:, None] & inside[None, :], other=0.0).to(tl.float32)
    if EDGE:
        E = tl.load(edge + line * d + channels, mask=inside, other=0.0)
        G = tl.where((real & ~known)[:, None], E[None, :], G)
    norm = tl.sqrt(tl.sum(X * X, 1))
    inverse = 1.0 / floored(norm)
    radial = tl.sum(G * X, 1) * inverse
    if WEIGHTED:
        weight = factor * load_numbers(weights, line, t, real, tokens)
        tl.store(dweights + line * tokens + t, factor * radial, mask=t < tokens)
    else:
        weight = tl.full((R,), 1.0, tl.float32) * factor
    # Below the floor the norm is a constant.
    radial = tl.where(norm > FLOOR, radial * inverse, 0.0)
    G = (G - X * radial[:, None]) * (weight * inverse)[:, None]
    G = tl.where(real[:, None], G, 0.0)
    mask = (t < tokens)[:, None] & inside[None, :]
    at = dx + (line * tokens + t[:, None]) * d + channels[None, :]
    tl.store(at, G.to(dx.dtype.element_ty), mask=mask)


def rows_of(valid: Tensor | None, like: Tensor) -> tuple[Any, ...]:
    """The valid tokens as kernels take them; `like` stands in for none."""
    return (like, 0, 0) if valid is None else (valid, *valid.stride())


def tile(width: int) -> dict[str, int]:
    """Rows and channels of a tile."""
    channels = tile_width(width)
    return {"R": max(1, ITEMS // channels), "BD": channels}


def programs(lines: int, tokens: int, width: int) -> int:
    """How many tiles there are."""
    return lines * -(-tokens // tile(width)["R"])


def units(x: Tensor, valid: Tensor | None, weights: Tensor | None, factor: float) -> Tensor:
    """The rows (batch, heads, tokens, d); weights (batch, heads, tokens), contiguous."""
    batch, heads, tokens, d = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch(
        units_kernel, programs(batch * heads, tokens, d),
        x, *x.stride(), *rows_of(valid, x), x if weights is None else weights, out, tokens, heads,
        d, factor, VALID=valid is not None, WEIGHTED=weights is not None,
        ALIGNED=aligned(x), num_warps=4, **tile(d),
    )  # fmt: skip
    return out


def units_backward(
    x: Tensor, valid: Tensor | None, weights: Tensor | None, factor: float, inner: Tensor | None,
    edge: Tensor | None, shift: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of x and of the weights; for `inner`, `edge` and `shift` see the kernel."""
    batch, heads, tokens, d = x.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dweights = torch.empty(
        x.shape[:3] if weights is not None else 0, dtype=torch.float32, device=x.device
    )
    launch(
        units_gradient_kernel, programs(batch * heads, tokens, d),
        x, *x.stride(), *rows_of(valid, x), x if weights is None else weights,
        x if inner is None else inner, x if edge is None else edge, dx, dweights, tokens, heads, d,
        factor, shift, 0 if inner is None else inner.shape[2],
        VALID=valid is not None, WEIGHTED=weights is not None, EDGE=edge is not None,
        ALIGNED=aligned(x), num_warps=4, **tile(d),
    )  # fmt: skip
    return dx, dweights
