"""Rows by their numbers in Triton."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnspec.fast.engines.prepared import Prepared
from attnspec.fast.engines.sizes import cdiv, next_power_of_2

NUMBERS = 8192
"""Numbers a program moves."""
FLAGS = 4096


@triton.jit(do_not_specialize=["rows"])
def take_rows_kernel(
    x, order, out, rows, x_stride_r, x_stride_c,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (channel < CHANNELS)[None, :]
    source = tl.load(order + row, mask=row < rows, other=0).to(tl.int64)
    at = source[:, None] * x_stride_r + channel[None, :].to(tl.int64) * x_stride_c
    taken = tl.load(x + at, mask=inside, other=0.0)
    place = row.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
    tl.store(out + place, taken, mask=inside)


@triton.jit(do_not_specialize=["size", "count", "stride"])
def last_unflagged_kernel(flags, places, size, count, stride, FLAGS: tl.constexpr):
    """One program: it counts what is not flagged, then numbers it and keeps the last `count`."""
    total = 0
    for start in range(0, size, FLAGS):
        at = start + tl.arange(0, FLAGS)
        flag = tl.load(flags + at.to(tl.int64) * stride, mask=at < size, other=1)
        total += tl.sum((flag == 0).to(tl.int32), 0)
    number = count - total
    for start in range(0, count - total, FLAGS):
        at = start + tl.arange(0, FLAGS)
        tl.store(places + at, tl.full([FLAGS], -1, tl.int32), mask=at < number)
    for start in range(0, size, FLAGS):
        at = start + tl.arange(0, FLAGS)
        flag = tl.load(flags + at.to(tl.int64) * stride, mask=at < size, other=1)
        kept = (flag == 0).to(tl.int32)
        slot = number + tl.cumsum(kept, 0) - 1
        tl.store(places + slot, at, mask=(kept > 0) & (slot >= 0))
        number += tl.sum(kept, 0)


@functools.lru_cache(maxsize=64)
def _take(
    shape: torch.Size, strides: tuple[int, ...], rows: int, dtype: torch.dtype,
    numbers: torch.dtype, device: torch.device,
) -> Prepared:  # fmt: skip
    width = next_power_of_2(shape[1])
    block = max(1, NUMBERS // width)
    arguments = {
        "x": torch.empty(0, dtype=dtype), "order": torch.empty(0, dtype=numbers),
        "out": torch.empty(0, dtype=dtype), "rows": rows, "x_stride_r": strides[0],
        "x_stride_c": strides[1], "CHANNELS": shape[1], "WIDTH": width, "ROWS": block,
    }  # fmt: skip
    programs = cdiv(rows, block)
    return Prepared(take_rows_kernel, programs, arguments, device, num_warps=4)


@functools.lru_cache(maxsize=64)
def _last(size: int, count: int, stride: int, device: torch.device) -> Prepared:
    arguments = {
        "flags": torch.empty(0, dtype=torch.uint8), "places": torch.empty(0, dtype=torch.int32),
        "size": size, "count": count, "stride": stride, "FLAGS": FLAGS,
    }  # fmt: skip
    return Prepared(last_unflagged_kernel, 1, arguments, device, num_warps=8)


def take_rows(x: Tensor, order: Tensor) -> Tensor:
    """As `rows.take_rows`."""
    out = x.new_empty(order.shape[0], x.shape[1])
    order = order.contiguous()
    if out.numel():
        launch = _take(x.shape, x.stride(), order.shape[0], x.dtype, order.dtype, x.device)
        launch(x=x, order=order, out=out)
    return out


def last_unflagged(flags: Tensor, count: int) -> Tensor:
    """As `rows.last_unflagged`."""
    places = flags.new_empty(count, dtype=torch.int32)
    if count:
        launch = _last(flags.shape[0], count, flags.stride(0), flags.device)
        launch(flags=flags.view(torch.uint8), places=places)
    return places
