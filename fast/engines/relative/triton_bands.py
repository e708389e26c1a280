"""What the relative kernels share: chunks of the table, their products, and who sees whom."""

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.fast.engines.relative.triton_rotate import rotate

VARYING = [
    "q_stride_b", "q_stride_h", "k_stride_b", "k_stride_h", "v_stride_b", "v_stride_h",
    "table_stride_b", "table_stride_h", "dout_stride_b", "dout_stride_h",
    "batches", "q_tokens", "k_tokens", "table_rows", "tiles", "sequences", "section", "zero",
    "slack", "scale",
]  # fmt: skip
"""Arguments of the kernels whose values never lead to another compilation."""


@triton.jit
def load_within(
    source, first, ROWS: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
    ACCESS: tl.constexpr,
):  # fmt: skip
    """Rows [first, first + ROWS) as a tile (ROWS, WIDTH), zero outside [0, stop) and CHANNELS.

    `source` is (x, batch, head, stop, the four strides of x); ACCESS as in the flash engine's
    `load_rows`. Unlike there, `first` may be negative.
    """
    x, b, h, stop, stride_b, stride_h, stride_t, stride_d = source
    if ACCESS == 2:
        tile = x.load([b, h, first, 0]).reshape(ROWS, WIDTH)
    else:
        unit: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth if ACCESS == 1 else 1
        row = first + tl.arange(0, ROWS)
        channel = tl.arange(0, WIDTH)
        base = x + (b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h) * unit
        at = (row.to(tl.int64) * stride_t * unit)[:, None]
        at += channel.to(tl.int64)[None, :] * stride_d
        inside = ((row >= 0) & (row < stop))[:, None] & (channel < CHANNELS)[None, :]
        tile = tl.load(base + at, mask=inside, other=0.0)
    return tile


@triton.jit
def with_bias(products, bias, base, first, stop):
    """Products with the entries [first, first + 64) as columns, plus the numbers of these at `base`
    in `bias`, if there is one; entries outside [0, stop) have none.
    """
    if bias is not None:
        at = first + tl.arange(0, 64)
        number = tl.load(bias + base + at, mask=(at >= 0) & (at < stop), other=0.0)
        # Not a plain sum, which would become the start of the product and make it wait.
        products = tl.fma(products, 1.0, number[None, :] + tl.zeros_like(products))
    return products


@triton.jit
def sum_columns(x, sums, ROWS: tl.constexpr, PRECISION: tl.constexpr):
    """`sums` (64, 16) plus, in its first column, the sums of the columns of x (ROWS, 64)."""
    first = (tl.arange(0, 16)[None, :] + tl.zeros([ROWS, 1], tl.int32)) == 0
    return tl.dot(x.T, first.to(x.dtype), sums, input_precision=PRECISION)


@triton.jit
def chunk_of(slant, ROWS: tl.constexpr):
    """Which of a tile's chunks of 64 table rows holds what ring column c of row r needs, from 0.

    Column c of row r is entry c + slant[r] of the chunks side by side, so column (c + slant) % 64
    of one of them; `rotate` by slant % 64 then moves it to its place.
    """
    column = tl.arange(0, 64)[None, :]
    return (slant >> 6)[:, None] + (column < (slant & 63)[:, None]).to(tl.int32)


@triton.jit
def unsheared(x, slant, ROWS: tl.constexpr):
    """For up to 64 rows, what each element of a tile adds to its first and to its second chunk."""
    column = tl.arange(0, 64)[None, :]
    ring = rotate(x, (64 - slant) & 63, ROWS)
    is_old = column >= slant[:, None]
    return tl.where(is_old, ring, 0.0), tl.where(is_old, 0.0, ring)


@triton.jit
def seen_pairs(row, key, low, row_stop, key_stop, shift, CAUSAL: tl.constexpr):
    """Who sees whom, bool; the arguments broadcast. `low` is the lowest key of each row."""
    seen = (row < row_stop) & (key < key_stop) & (key >= low)
    if CAUSAL:
        seen &= key <= row + shift
    return seen


@triton.jit
def lowest(row, row_start, row_stop):
    """The first key that `row_start` leaves to each of `row`."""
    low = row * 0
    if row_start is not None:
        low = tl.load(row_start + row, mask=row < row_stop, other=2147483647).to(tl.int32)
        low = tl.maximum(low, 0)
    return low


@triton.jit
def key_walk(first, stop, low_first, low_last, k_tokens, shift, CAUSAL: tl.constexpr):
    """Key tiles of rows [first, stop): where they begin, how many, and the full ones among them.

    They begin at a multiple of four, as what the specialised kernel brings with them has to.
    """
    end, full_end = k_tokens, k_tokens
    if CAUSAL:
        end = tl.minimum(k_tokens, tl.maximum(stop + shift, 0))
        full_end = tl.minimum(k_tokens, tl.maximum(first + shift + 1, 0))
    base = tl.minimum(low_first, end) // 4 * 4
    count = tl.cdiv(end - base, 64)
    full_from = tl.minimum(tl.cdiv(tl.maximum(low_last - base, 0), 64), count)
    full_to = tl.maximum(tl.minimum(tl.maximum(full_end - base, 0) // 64, count), full_from)
    return base, count, full_from, full_to
