"""What kernels of traces and of the memory behind them share: rows, places, decay in bits."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from attnspec.fast.engines.scan.trace import FLOOR as NORM_FLOOR
from attnspec.fast.engines.scan.triton_common import packed_segment

FLOOR = tl.constexpr(NORM_FLOOR)
FORGETS = 1e4
"""Bits of decay that stand for a decay of 0: exp2 of it is 0, and 0 times it is 0."""


def bits_lost(kept: float) -> float:
    """Bits of decay of a state of which a token keeps a share."""
    return min(-math.log2(kept), FORGETS) if kept > 0 else FORGETS


@triton.jit
def floored(norm):
    """A norm, or the floor if that is larger; NaN stays NaN."""
    return tl.where(norm < FLOOR, FLOOR, norm)


@triton.jit
def real_rows(valid, valid_t, t, begin, stop, VALID: tl.constexpr):
    """Which of the tokens t lie in begin .. stop - 1 and are no padding."""
    real = (t >= begin) & (t < stop)
    if VALID:
        real = real & (tl.load(valid + t * valid_t, mask=real, other=0) != 0)
    return real


@triton.jit
def head_offset(batch, stride_b, head, stride_h, ALIGNED: tl.constexpr):
    """Elements before a head; a multiple of 16 if ALIGNED, as the host found out."""
    elements = batch * stride_b + head * stride_h
    if ALIGNED:
        elements = tl.multiple_of(elements, 16)
    return elements


@triton.jit
def place_of(
    k, k_b, k_h, k_d, valid, valid_b, heads, segments, d, BD: tl.constexpr, ALIGNED: tl.constexpr
):
    """A program's head, segment and channels, and where its keys and valid tokens begin."""
    line = (tl.program_id(0) // segments).to(tl.int64)
    segment = tl.program_id(0) % segments
    channels = tl.arange(0, BD)
    k += head_offset(line // heads, k_b, line % heads, k_h, ALIGNED)
    k += channels.to(tl.int64) * k_d
    return line, segment, channels, channels < d, k, valid + line // heads * valid_b


@triton.jit
def span_of(
    line, segment, table, bounds, offsets, tokens, heads, length, segments, ROWS: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """A segment's first row and how many it has, in whole tiles; the first token of its sequence
    and that behind it; the first of the sequence's segments and that behind them, and the place of
    the sequence's trace. The table of packed segments is one of rows.
    """
    if PACKED:
        sequence, start, count, _, _ = packed_segment(table, segment)
        start -= sequence
        height = tl.cdiv(count.to(tl.int32), ROWS) * ROWS
        begin, stop = tl.load(offsets + sequence), tl.load(offsets + sequence + 1)
        low = tl.load(bounds + sequence).to(tl.int32)
        high = tl.load(bounds + sequence + 1).to(tl.int32)
        own = sequence * heads + line
    else:
        start, height = segment.to(tl.int64) * length, length
        begin, stop, low, high, own = 0, tokens, 0, segments, line
    return start, height, begin, stop, low, high, own


@triton.jit
def load_keys(k, k_t, t, real, inside):
    """Keys (rows, channels) of tokens t in float32, 0 where none is real."""
    mask = real[:, None] & inside[None, :]
    return tl.load(k + t[:, None] * k_t, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_numbers(numbers, line, t, real, tokens):
    """A number for each of the tokens t of a head."""
    return tl.load(numbers + line * tokens + t, mask=real, other=0.0)
