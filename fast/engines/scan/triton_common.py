"""What the Triton kernels of the scan share: where a segment lies, tiles, and decays of a block.

A sequence is cut in segments, a segment in blocks of C rows. Packed sequences describe their
segments in a table (see `segments.py`); otherwise every sequence has `segments` segments of
`length` rows. A decay is none, constant for a head, one number a token, or one a token and channel;
its logarithm g is <= 0, and every exponent formed here is <= 0 too.
"""

from __future__ import annotations

import triton
import triton.language as tl

NONE = tl.constexpr(0)
CONSTANT = tl.constexpr(1)
SCALAR = tl.constexpr(2)
VECTOR = tl.constexpr(3)
BITS = tl.constexpr(4)
"""One number a token, whose logarithm is to base 2."""

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-120.0)
"""A log decay below this is taken as this: its float32 exponential is 0 either way, and sums of
log decays stay finite and precise behind a reset of -inf."""
LOWEST_BITS = tl.constexpr(-174.0)
"""The same for logarithms to base 2."""
VANISHED = tl.constexpr(-88.0)
"""Tokens behind a log decay below this carry the weight 0 in float32 and need not be read."""
VANISHED_BITS = tl.constexpr(-127.0)
"""The same for logarithms to base 2."""


@triton.jit
def packed_segment(table, segment):
    """A row of `Segments.table`: sequence, first row and rows of a segment, all int64; whether it
    starts and ends its sequence.
    """
    row = table + segment.to(tl.int64) * 5
    starts, ends = tl.load(row + 3) != 0, tl.load(row + 4) != 0
    return tl.load(row), tl.load(row + 1), tl.load(row + 2), starts, ends


@triton.jit
def locate(table, segment, segments, length, tokens, PACKED: tl.constexpr):
    """Sequence, batch, first row, rows of a segment; whether it starts and ends its sequence."""
    if PACKED:
        sequence, start, count, first, last = packed_segment(table, segment)
        batch = sequence * 0
        count = count.to(tl.int32)
    else:
        sequence = (segment // segments).to(tl.int64)
        batch = sequence
        part = segment % segments
        start = part.to(tl.int64) * length
        count = tl.minimum(tokens - start, length).to(tl.int32)
        first = part == 0
        last = part == segments - 1
    return sequence, batch, start, count, first, last


@triton.jit
def links(bounds, row, segments, heads, PACKED: tl.constexpr):
    """Of a sequence and head `row`: the line its segments lie in, the first of them, how many."""
    line = row
    low = row * 0
    many = segments
    if PACKED:
        line = row % heads
        low = tl.load(bounds + row // heads)
        many = (tl.load(bounds + row // heads + 1) - low).to(tl.int32)
    return line, low, many


@triton.jit
def locate_block(
    program, table, segments, length, tokens, heads, C: tl.constexpr, PACKED: tl.constexpr
):
    """Head, block, batch and first row of the block of C rows that is a program's, and how many
    rows it has; none or fewer if it lies behind its segment.
    """
    head = (program % heads).to(tl.int64)
    block = program // heads
    blocks_per_segment = tl.cdiv(length, C)
    segment = block // blocks_per_segment
    _, batch, start, count, _, _ = locate(table, segment, segments, length, tokens, PACKED)
    skipped = (block % blocks_per_segment) * C
    return head, block, batch, start + skipped, count - skipped


@triton.jit
def offset(batch, stride_b, head, stride_h, start, stride_t, ALIGNED: tl.constexpr):
    """Elements before a row of a head; a multiple of 16 if ALIGNED, as the host found out."""
    elements = batch * stride_b + head * stride_h + start * stride_t
    if ALIGNED:
        elements = tl.multiple_of(elements, 16)
    return elements


@triton.jit
def tile_mask(left, width, C: tl.constexpr, W: tl.constexpr, RAGGED: tl.constexpr):
    """Which of (C, W) elements are among `left` rows and, if RAGGED, `width` channels."""
    inside = (tl.arange(0, C) < left)[:, None]
    if RAGGED:
        inside = inside & (tl.arange(0, W) < width)[None, :]
    return inside


@triton.jit
def load_tile(
    base, stride_t, stride_d, left, width, C: tl.constexpr, W: tl.constexpr, RAGGED: tl.constexpr,
    WIDE: tl.constexpr = False, OTHER: tl.constexpr = 0.0,
):  # fmt: skip
    """Tile (C, W) of the first `left` rows and `width` channels, OTHER beyond; WIDE if the span of
    a tile does not fit 32 bits.
    """
    rows, channels = tl.arange(0, C)[:, None], tl.arange(0, W)[None, :]
    if WIDE:
        at = rows.to(tl.int64) * stride_t + channels.to(tl.int64) * stride_d
    else:
        at = rows * stride_t + channels * stride_d
    return tl.load(base + at, mask=tile_mask(left, width, C, W, RAGGED), other=OTHER)


@triton.jit
def store_tile(
    base, stride_t, x, left, width, C: tl.constexpr, W: tl.constexpr, RAGGED: tl.constexpr
):
    """Store the first `left` rows and `width` channels of x (C, W)."""
    rows, channels = tl.arange(0, C)[:, None], tl.arange(0, W)[None, :]
    at = rows * stride_t + channels
    mask = tile_mask(left, width, C, W, RAGGED)
    tl.store(base + at, x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def open_rows(
    base, count, width, stride_t, C: tl.constexpr, W: tl.constexpr, DESCRIPTORS: tl.constexpr
):
    """A segment's rows for `read_rows`: a tensor descriptor if DESCRIPTORS, else the pointer."""
    if DESCRIPTORS:
        return tl.make_tensor_descriptor(base, [count, width.to(tl.int32)], [stride_t, 1], [C, W])
    else:
        return base


@triton.jit
def read_rows(
    opened, i, stride_t, stride_d, left, width, C: tl.constexpr, W: tl.constexpr,
    RAGGED: tl.constexpr, WIDE: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Block `i` (C, W) of a segment opened by `open_rows`, zeros beyond its rows and channels."""
    if DESCRIPTORS:
        rows = opened.load([i * C, 0])
    else:
        base = opened + tl.cast(i, tl.int64) * C * stride_t
        rows = load_tile(base, stride_t, stride_d, left, width, C, W, RAGGED, WIDE)
    return rows


@triton.jit
def load_decay(gates, stride_t, left, C: tl.constexpr, DECAY: tl.constexpr):
    """Log decays (C,) of rows 0 .. left - 1, zeros beyond; NaN stays NaN."""
    lowest: tl.constexpr = LOWEST_BITS if DECAY == BITS else LOWEST
    rows = tl.arange(0, C)
    g = tl.load(gates + rows.to(tl.int64) * stride_t, mask=rows < left, other=0.0).to(tl.float32)
    return tl.where(g < lowest, lowest, g)


@triton.jit
def load_weights(weights, stride_t, left, C: tl.constexpr):
    """Weights (C,) of rows 0 .. left - 1, zeros beyond."""
    rows = tl.arange(0, C)
    at = weights + rows.to(tl.int64) * stride_t
    return tl.load(at, mask=rows < left, other=0.0).to(tl.float32)


@triton.jit
def among(t, start, stop, mask):
    """`mask` if token `t` is one of start..stop-1, else nothing."""
    t = t + tl.zeros_like(mask).to(tl.int64)
    return mask & (t >= start) & (t < stop)


@triton.jit
def exchanged(x, C: tl.constexpr):
    """x (C,), of which a thread holds few numbers until it gets the others from shared memory.

    Along an axis of one a sum changes nothing, but the compiler does not look behind it: otherwise
    it would have every thread load all numbers that the thread needs for a tile.
    """
    return tl.reshape(tl.cumsum(x[:, None], 1), (C,))


@triton.jit
def block_decay(g, slope, left, C: tl.constexpr, DECAY: tl.constexpr):
    """Inclusive sums (C,) of a block's log decays, constant behind its last row, and their total,
    for `decay_of`.

    `g` are those of its rows if there is one number a token. Zeros for a decay per channel, which
    is already in the rows, and for none.
    """
    if DECAY == CONSTANT:
        rows = tl.minimum(left, C)
        sums = -slope * tl.minimum(tl.arange(0, C) + 1, rows).to(tl.float32)
        total = -slope * rows.to(tl.float32)
    elif (DECAY == SCALAR) | (DECAY == BITS):
        sums = tl.cumsum(g, 0)
        total = tl.sum(g, 0)
    else:
        sums = tl.zeros((C,), tl.float32)
        total = tl.sum(sums, 0)
    return sums, total


@triton.jit
def bits_of(x, DECAY: tl.constexpr):
    """Logarithms to base 2 of decays from sums of log decays as they came in: what is exact there,
    such as multiples of a short slope or of a bit, is not rounded before.
    """
    if DECAY != BITS:
        x *= LOG2E
    return x


@triton.jit
def decay_of(x, DECAY: tl.constexpr):
    """Decays from sums of a block's log decays, or differences of such."""
    return tl.exp2(bits_of(x, DECAY))


@triton.jit
def pair_decay(sums, C: tl.constexpr, DECAY: tl.constexpr, BACKWARD: tl.constexpr):
    """The decay (C, C) between a row that reads (down) and a row that is read (across): 0 unless
    the latter is not later, or not earlier if BACKWARD.
    """
    down, across = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    gap = sums[:, None] - sums[None, :]
    if BACKWARD:
        decay = decay_of(tl.where(down <= across, -gap, float("-inf")), DECAY)
    else:
        decay = decay_of(tl.where(down >= across, gap, float("-inf")), DECAY)
    return decay


@triton.jit
def reciprocal(x, NATIVE: tl.constexpr):
    """1 / x of normal numbers, by the hardware's instruction (an ulp away) if NATIVE: a division
    guards against subnormal ones, ten instructions for each.
    """
    if NATIVE:
        y = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        y = 1.0 / x
    return y


@triton.jit
def log1p(u, NATIVE: tl.constexpr):
    """log(1 + u) for 0 <= u <= 1 to full relative precision, as 2 artanh(u / (2 + u))."""
    s = u * reciprocal(2.0 + u, NATIVE)
    w = s * s
    series = (w * 0.07692307692307693 + 0.09090909090909091) * w + 0.1111111111111111
    series = ((series * w + 0.14285714285714285) * w + 0.2) * w + 0.3333333333333333
    return 2.0 * s * (series * w) + 2.0 * s
