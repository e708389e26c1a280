"""Block pooling and its gradient in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnspec.fast.engines.prepared import launch
from attnspec.fast.engines.select.configs import config
from attnspec.fast.engines.sizes import next_power_of_2

LENGTHS = ["tokens", "blocks"]
ITEMS = 64
"""Numbers that a thread may have of a program's running tiles, of which there is one a kind."""


@triton.jit(do_not_specialize=LENGTHS)
def _pool(
    x, out, stride_b, stride_h, stride_t, stride_d, heads, tokens, blocks, block, d,
    KINDS: tl.constexpr, COUNT: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One block. Its tokens meet number by number in a tile of ROWS, whose rows meet at the end."""
    program = tl.program_id(0)
    n, bh = program % blocks, (program // blocks).to(tl.int64)
    x += bh // heads * stride_b + bh % heads * stride_h
    first, stop = n * block, tl.minimum(tokens, n * block + block)
    channel = tl.arange(0, D)
    high = tl.full([ROWS, D], float("-inf"), tl.float32)
    low = tl.full([ROWS, D], float("inf"), tl.float32)
    total = tl.zeros([ROWS, D], tl.float32)
    for start in range(first, stop, ROWS):
        token = start + tl.arange(0, ROWS)
        real = (token < stop)[:, None] & (channel < d)[None, :]
        address = token[:, None].to(tl.int64) * stride_t + channel[None, :] * stride_d
        tile = tl.load(x + address, mask=real, other=0.0).to(tl.float32)
        high = tl.maximum(high, tl.where(real, tile, float("-inf")))
        low = tl.minimum(low, tl.where(real, tile, float("inf")))
        total += tile
    out += program.to(tl.int64) * (COUNT * d)
    for slot in tl.static_range(COUNT):
        if KINDS // 3**slot % 3 == 0:
            value = tl.max(high, axis=0)
        elif KINDS // 3**slot % 3 == 1:
            value = tl.min(low, axis=0)
        else:
            value = tl.sum(total, axis=0) / (stop - first).to(tl.float32)
        tl.store(out + slot * d + channel, value.to(out.dtype.element_ty), mask=channel < d)


@triton.jit(do_not_specialize=LENGTHS)
def _pool_backward(
    dout, x, dx, dout_b, dout_h, dout_n, dout_d, stride_b, stride_h, stride_t, stride_d,
    heads, tokens, blocks, block, d,
    KINDS: tl.constexpr, COUNT: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    n, bh = program % blocks, (program // blocks).to(tl.int64)
    x += bh // heads * stride_b + bh % heads * stride_h
    dout += bh // heads * dout_b + bh % heads * dout_h + n.to(tl.int64) * dout_n
    dx += bh * tokens * d
    first, stop = n * block, tl.minimum(tokens, n * block + block)
    channel = tl.arange(0, D)
    shared = tl.zeros([D], tl.float32)
    at_high = tl.zeros([D], tl.float32)
    at_low = tl.zeros([D], tl.float32)
    for slot in tl.static_range(COUNT):
        upstream = tl.load(dout + (slot * d + channel) * dout_d, mask=channel < d, other=0.0)
        if KINDS // 3**slot % 3 == 0:
            at_high += upstream.to(tl.float32)
        elif KINDS // 3**slot % 3 == 1:
            at_low += upstream.to(tl.float32)
        else:
            shared += upstream.to(tl.float32) / (stop - first).to(tl.float32)

    high = tl.full([D], float("-inf"), tl.float32)
    low = tl.full([D], float("inf"), tl.float32)
    high_token = tl.zeros([D], tl.int32) + first
    low_token = tl.zeros([D], tl.int32) + first
    for start in range(first, stop, ROWS):
        token = start + tl.arange(0, ROWS)
        real = (token < stop)[:, None] & (channel < d)[None, :]
        address = token[:, None].to(tl.int64) * stride_t + channel[None, :] * stride_d
        tile = tl.load(x + address, mask=real, other=0.0).to(tl.float32)
        top = tl.max(tl.where(real, tile, float("-inf")), axis=0)
        bottom = tl.min(tl.where(real, tile, float("inf")), axis=0)
        where_top = tl.min(tl.where(real & (tile == top[None, :]), token[:, None], stop), axis=0)
        where_bottom = tl.min(
            tl.where(real & (tile == bottom[None, :]), token[:, None], stop), axis=0
        )
        # Strict comparison keeps the first of equal extrema.
        high_token = tl.where(top > high, where_top, high_token)
        low_token = tl.where(bottom < low, where_bottom, low_token)
        high, low = tl.maximum(high, top), tl.minimum(low, bottom)

    for start in range(first, stop, ROWS):
        token = start + tl.arange(0, ROWS)
        real = (token < stop)[:, None] & (channel < d)[None, :]
        gradient = tl.zeros([ROWS, D], tl.float32) + shared[None, :]
        gradient += tl.where(token[:, None] == high_token[None, :], at_high[None, :], 0.0)
        gradient += tl.where(token[:, None] == low_token[None, :], at_low[None, :], 0.0)
        address = token[:, None].to(tl.int64) * d + channel[None, :]
        tl.store(dx + address, gradient.to(dx.dtype.element_ty), mask=real)


def _plan(x: Tensor, block: int, kinds: list[int], items: int) -> tuple[int, dict[str, int]]:
    """Grid and compile-time arguments, for tiles of at most so many items a thread.

    `KINDS` is the list of kinds as digits in base 3.
    """
    width = next_power_of_2(x.shape[3])
    largest = 2 ** (max(1, 32 * config().pool_warps * items // width).bit_length() - 1)
    rows = min(config().pool_rows, max(1, next_power_of_2(block)), largest)
    code = sum(kind * 3**slot for slot, kind in enumerate(kinds))
    grid = x.shape[0] * x.shape[1] * -(-x.shape[2] // block)
    return grid, {"KINDS": code, "COUNT": len(kinds), "ROWS": rows, "D": width}


def pool(x: Tensor, block: int, kinds: list[int]) -> Tensor:
    batch, heads, tokens, d = x.shape
    blocks = -(-tokens // block)
    out = torch.empty(batch, heads, blocks, len(kinds) * d, dtype=x.dtype, device=x.device)
    grid, constants = _plan(x, block, kinds, ITEMS // max(1, len(set(kinds))))
    if grid:
        launch(
            _pool, grid,
            x, out, *x.stride(), heads, tokens, blocks, block, d,
            **constants, num_warps=config().pool_warps,
        )  # fmt: skip
    return out


def pool_backward(dout: Tensor, x: Tensor, block: int, kinds: list[int]) -> Tensor:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grid, constants = _plan(x, block, kinds, ITEMS)
    if grid:
        launch(
            _pool_backward, grid,
            dout, x, dx, *dout.stride(), *x.stride(), *x.shape[1:3], dout.shape[2], block,
            x.shape[3], **constants, num_warps=config().pool_warps,
        )  # fmt: skip
    return dx
