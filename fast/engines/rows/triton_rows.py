"""The rows kernels in Triton: tiles of rows and channels, every number read once or twice.

The norm of a token goes through its heads one after the other, first for the sum of squares, then
to write; the second reading comes from the cache. Strides are arbitrary and offsets 64 bits wide.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnspec.fast.engines.prepared import launch
from attnspec.fast.engines.rows.configs import config
from attnspec.fast.engines.sizes import cdiv

WIDEST = 1024
"""Channels of a tile at most; wider heads take several."""


@triton.jit
def inverse_rms(total, many, eps):
    rms = tl.sqrt(total / many + eps)
    return tl.where(rms == 0.0, 0.0, 1.0 / tl.where(rms == 0.0, 1.0, rms))


@triton.jit(do_not_specialize=["o_b", "tokens", "rows"])
def norm_kernel(
    o, o_b, o_h, o_t, o_d, u, u_b, u_t, u_d, y, tokens, rows, heads, width, eps,
    R: tl.constexpr, BD: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    real = (row < rows)[:, None]
    batch, token = row // tokens, row % tokens
    o += (batch * o_b + token * o_t)[:, None]
    parts = (width + BD - 1) // BD
    full = width * heads
    total = tl.zeros((R,), tl.float32)
    for part in range(heads * parts):
        head = tl.cast(part // parts, tl.int64)
        channel = tl.cast((part % parts) * BD, tl.int64) + tl.arange(0, BD)
        inside = real & (channel < width)[None, :]
        at = (head * o_h + channel * o_d)[None, :]
        x = tl.load(o + at, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(x * x, 1)
    inverse = inverse_rms(total, full, eps)[:, None]
    y += (row * full)[:, None]
    if GATED:
        u += (batch * u_b + token * u_t)[:, None]
    for part in range(heads * parts):
        head = tl.cast(part // parts, tl.int64)
        channel = tl.cast((part % parts) * BD, tl.int64) + tl.arange(0, BD)
        inside = real & (channel < width)[None, :]
        at = (head * o_h + channel * o_d)[None, :]
        place = head * width + channel
        value = tl.load(o + at, mask=inside, other=0.0).to(tl.float32) * inverse
        if GATED:
            gate = tl.load(u + (place * u_d)[None, :], mask=inside, other=0.0)
            value *= gate.to(tl.float32)
        tl.store(y + place[None, :], value.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["o_b", "tokens", "rows"])
def norm_gradient_kernel(
    dy, dy_b, dy_t, dy_d, o, o_b, o_h, o_t, o_d, u, u_b, u_t, u_d, do, du, tokens, rows, heads,
    width, eps, R: tl.constexpr, BD: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    real = (row < rows)[:, None]
    batch, token = row // tokens, row % tokens
    o += (batch * o_b + token * o_t)[:, None]
    dy += (batch * dy_b + token * dy_t)[:, None]
    if GATED:
        u += (batch * u_b + token * u_t)[:, None]
    parts = (width + BD - 1) // BD
    full = width * heads
    total = tl.zeros((R,), tl.float32)
    along = tl.zeros((R,), tl.float32)
    for part in range(heads * parts):
        head = tl.cast(part // parts, tl.int64)
        channel = tl.cast((part % parts) * BD, tl.int64) + tl.arange(0, BD)
        inside = real & (channel < width)[None, :]
        place = head * width + channel
        x = tl.load(o + (head * o_h + channel * o_d)[None, :], mask=inside, other=0.0)
        x = x.to(tl.float32)
        g = tl.load(dy + (place * dy_d)[None, :], mask=inside, other=0.0).to(tl.float32)
        if GATED:
            gate = tl.load(u + (place * u_d)[None, :], mask=inside, other=0.0)
            g *= gate.to(tl.float32)
        total += tl.sum(x * x, 1)
        along += tl.sum(x * g, 1)
    inverse = inverse_rms(total, full, eps)
    along = (along * inverse / full)[:, None]
    inverse = inverse[:, None]
    do += ((batch * heads * tokens + token) * width)[:, None]
    if GATED:
        du += (row * full)[:, None]
    for part in range(heads * parts):
        head = tl.cast(part // parts, tl.int64)
        channel = tl.cast((part % parts) * BD, tl.int64) + tl.arange(0, BD)
        inside = real & (channel < width)[None, :]
        place = head * width + channel
        x = tl.load(o + (head * o_h + channel * o_d)[None, :], mask=inside, other=0.0)
        normed = x.to(tl.float32) * inverse
        g = tl.load(dy + (place * dy_d)[None, :], mask=inside, other=0.0).to(tl.float32)
        if GATED:
            tl.store(du + place[None, :], (g * normed).to(du.dtype.element_ty), mask=inside)
            gate = tl.load(u + (place * u_d)[None, :], mask=inside, other=0.0)
            g *= gate.to(tl.float32)
        value = (g - normed * along) * inverse
        at = (head * tokens * width + channel)[None, :]
        tl.store(do + at, value.to(do.dtype.element_ty), mask=inside)


@triton.jit
def tile_of(tokens, heads, width, R: tl.constexpr, BD: tl.constexpr):
    """Batch, head, rows and channels of a program, and the number of its tile of rows."""
    parts = (width + BD - 1) // BD
    tiles = (tokens + R - 1) // R
    program = tl.program_id(0)
    channel = tl.cast((program % parts) * BD, tl.int64) + tl.arange(0, BD)
    tile = (program // parts) % tiles
    row = ((program // parts) // tiles).to(tl.int64)
    token = tile.to(tl.int64) * R + tl.arange(0, R)
    return row, row // heads, row % heads, token, channel, tile, tiles


@triton.jit
def place_of(positions, token, tokens, offset, PLACED: tl.constexpr):
    """The positions of tokens, in float32."""
    if PLACED:
        return tl.load(positions + token, mask=token < tokens, other=0).to(tl.float32)
    else:
        return (token + offset).to(tl.float32)


@triton.jit(do_not_specialize=["x_b", "x_h", "tokens", "offset"])
def lift_kernel(
    x, x_b, x_h, x_t, x_d, theta, positions, y, tokens, heads, width, offset, R: tl.constexpr,
    BD: tl.constexpr, LIFTED: tl.constexpr, PLACED: tl.constexpr, ACTIVATE: tl.constexpr,
):  # fmt: skip
    row, batch, head, token, channel, _, _ = tile_of(tokens, heads, width, R, BD)
    within = channel < width
    inside = (token < tokens)[:, None] & within[None, :]
    at = (batch * x_b + head * x_h + token * x_t)[:, None] + (channel * x_d)[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATE:
        value = value / (1.0 + tl.exp(-value))
    line = row * tokens + token
    if LIFTED:
        place = place_of(positions, token, tokens, offset, PLACED)
        frequency = tl.load(theta + head * width + channel, mask=within, other=0.0)
        angle = place[:, None] * frequency[None, :]
        out = y + (line * 2 * width)[:, None] + channel[None, :]
        tl.store(out, (value * tl.cos(angle)).to(y.dtype.element_ty), mask=inside)
        tl.store(out + width, (value * tl.sin(angle)).to(y.dtype.element_ty), mask=inside)
    else:
        out = y + (line * width)[:, None] + channel[None, :]
        tl.store(out, value.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["dy_b", "dy_h", "x_b", "x_h", "tokens", "offset"])
def lift_gradient_kernel(
    dy, dy_b, dy_h, dy_t, dy_d, x, x_b, x_h, x_t, x_d, theta, positions, dx, partial, tokens,
    heads, width, offset, R: tl.constexpr, BD: tl.constexpr, LIFTED: tl.constexpr,
    PLACED: tl.constexpr, ACTIVATE: tl.constexpr,
):  # fmt: skip
    """dx, and what the tile adds to dtheta."""
    row, batch, head, token, channel, tile, tiles = tile_of(tokens, heads, width, R, BD)
    within = channel < width
    inside = (token < tokens)[:, None] & within[None, :]
    at = (batch * x_b + head * x_h + token * x_t)[:, None] + (channel * x_d)[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    above = dy + (batch * dy_b + head * dy_h + token * dy_t)[:, None] + (channel * dy_d)[None, :]
    up = tl.load(above, mask=inside, other=0.0).to(tl.float32)
    slope = tl.full((R, BD), 1.0, tl.float32)
    if ACTIVATE:
        gate = 1.0 / (1.0 + tl.exp(-value))
        slope = gate * (1.0 + value * (1.0 - gate))
        value = value * gate
    if LIFTED:
        place = place_of(positions, token, tokens, offset, PLACED)
        frequency = tl.load(theta + head * width + channel, mask=within, other=0.0)
        angle = place[:, None] * frequency[None, :]
        cos, sin = tl.cos(angle), tl.sin(angle)
        second = tl.load(above + width * dy_d, mask=inside, other=0.0).to(tl.float32)
        turned = tl.sum(place[:, None] * value * (second * cos - up * sin), 0)
        tl.store(partial + (row * tiles + tile) * width + channel, turned, mask=within)
        up = up * cos + second * sin
    out = dx + ((row * tokens + token) * width)[:, None] + channel[None, :]
    tl.store(out, (up * slope).to(dx.dtype.element_ty), mask=inside)


def norm(o: Tensor, u: Tensor | None, eps: float) -> Tensor:
    batch, heads, tokens, d = o.shape
    y = o.new_empty(batch, tokens, heads * d)
    tile = _tile(d)
    launch(
        norm_kernel, cdiv(batch * tokens, tile["R"]),
        o, *o.stride(), u, *_strides(u, 3), y, tokens, batch * tokens, heads, d, eps,
        GATED=u is not None, **tile,
    )  # fmt: skip
    return y


def norm_backward(dy: Tensor, o: Tensor, u: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, d = o.shape
    do = o.new_empty(o.shape)
    du = dy.new_empty(dy.shape if u is not None else (0,))
    tile = _tile(d)
    launch(
        norm_gradient_kernel, cdiv(batch * tokens, tile["R"]),
        dy, *dy.stride(), o, *o.stride(), u, *_strides(u, 3), do, du, tokens, batch * tokens,
        heads, d, eps, GATED=u is not None, **tile,
    )  # fmt: skip
    return do, du


def lift(
    x: Tensor, theta: Tensor | None, positions: Tensor | None, offset: int, activate: bool
) -> Tensor:
    batch, heads, tokens, d = x.shape
    y = x.new_empty(batch, heads, tokens, d * (1 if theta is None else 2))
    tile, programs = _tile(d), _programs(x)
    launch(
        lift_kernel, programs,
        x, *x.stride(), _frequencies(theta), positions, y, tokens, heads, d, offset,
        **_flags(theta, positions, activate), **tile,
    )  # fmt: skip
    return y


def lift_backward(
    dy: Tensor,
    x: Tensor,
    theta: Tensor | None,
    positions: Tensor | None,
    offset: int,
    activate: bool,
) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, d = x.shape
    dx, tile, programs = x.new_empty(x.shape), _tile(d), _programs(x)
    tiles = cdiv(tokens, tile["R"])
    wanted = 0 if theta is None else tiles
    partial = torch.empty(batch, heads, wanted, d, dtype=torch.float32, device=x.device)
    launch(
        lift_gradient_kernel, programs,
        dy, *dy.stride(), x, *x.stride(), _frequencies(theta), positions, dx, partial, tokens,
        heads, d, offset, **_flags(theta, positions, activate), **tile,
    )  # fmt: skip
    return dx, partial.sum((0, 2))


def _tile(d: int) -> dict[str, Any]:
    """Rows and channels of a tile and its warps."""
    chosen = config()
    channels = min(WIDEST, max(16, 1 << (d - 1).bit_length()))
    return {"R": max(1, chosen.elements // channels), "BD": channels, "num_warps": chosen.warps}


def _programs(x: Tensor) -> int:
    batch, heads, tokens, d = x.shape
    tile = _tile(d)
    return batch * heads * cdiv(tokens, tile["R"]) * cdiv(d, tile["BD"])


def _flags(theta: Tensor | None, positions: Tensor | None, activate: bool) -> dict[str, bool]:
    lifted = theta is not None
    return {"LIFTED": lifted, "PLACED": lifted and positions is not None, "ACTIVATE": activate}


def _frequencies(theta: Tensor | None) -> Tensor | None:
    return None if theta is None else theta.detach().float().contiguous()


def _strides(x: Tensor | None, axes: int) -> tuple[int, ...]:
    return (0,) * axes if x is None else x.stride()
