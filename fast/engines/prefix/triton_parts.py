"""What the Triton kernels of the prefix engine share: rows, features and products.

A 16-bit call multiplies on the matrix units in bfloat16, which has the range of float32; a factor
that bfloat16 does not hold is split in two parts of it, 16 bits together, and the product of the
two small parts is left out. Rounding to one part would be within what the suite allows, but the
passes are bound by memory either way. float32 is multiplied in IEEE float32.

With Triton 3.6 on Hopper an asynchronous product whose first operand is in registers may be wrong:
the assembler gives the registers away while they are read. First operands are therefore tiles as
they are loaded, which go through shared memory: Z is split by a kernel of its own, and what is
computed comes second.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def locate_rows(tile, span, batch, tokens, ROWS: tl.constexpr):
    """Batch entry and token of the rows of a tile, and which of them exist.

    A tile is 2 ** `span` tokens of as many batch entries as make up ROWS rows: a decoded token of
    many entries fills tiles too.
    """
    i = tl.arange(0, ROWS)
    across = tl.cdiv(tokens, 1 << span)
    b = (tile // across) * (ROWS >> span) + (i >> span)
    t = ((tile % across) << span) + (i & ((1 << span) - 1))
    return b.to(tl.int64), t.to(tl.int64), (b < batch) & (t < tokens)


@triton.jit
def load_rows(
    x, at, exists, first, COUNT: tl.constexpr, CHANNELS: tl.constexpr, UNIT: tl.constexpr
):
    """Channels `first` to `first` + COUNT of rows that begin at UNIT * `at`, 0 beyond CHANNELS."""
    channel = first + tl.arange(0, COUNT)
    keep = exists[:, None] & (channel < CHANNELS)[None, :]
    return tl.load(x + ((at * UNIT)[:, None] + channel[None, :]), mask=keep, other=0.0)


@triton.jit
def store_rows(x, at, exists, first, rows, COUNT: tl.constexpr, CHANNELS: tl.constexpr):
    """Store channels `first` to `first` + COUNT of rows, of which `at` are the numbers, of a
    contiguous array with CHANNELS channels.
    """
    channel = first + tl.arange(0, COUNT)
    keep = exists[:, None] & (channel < CHANNELS)[None, :]
    place = (at * CHANNELS)[:, None] + channel[None, :]
    tl.store(x + place, rows.to(x.dtype.element_ty), mask=keep)


@triton.jit
def features(x, INVERSE: tl.constexpr):
    """phi and its derivative divided by INVERSE, which is d ** -1/4; exp, not elu + 1: far below 0
    the features stay positive. NaN stays NaN.
    """
    y = x.to(tl.float32) * INVERSE
    above = y > 0.0
    slope = tl.where(above, 1.0, tl.exp(tl.where(above, 0.0, y)))
    return slope + tl.where(above, y, 0.0), slope


@triton.jit
def positive(k, SOFTPLUS: tl.constexpr):
    """kappa: the absolute value or softplus of k."""
    if SOFTPLUS:
        e = tl.exp(-tl.abs(k))
        # log(1 + e) with the rounding of 1 + e divided out, so that small e stay precise.
        more = 1.0 + e
        log = tl.where(more == 1.0, e, tl.log(more) * (e / tl.where(more == 1.0, 1.0, more - 1.0)))
        kappa = tl.where(k > 0.0, k, 0.0) + log
    else:
        kappa = tl.abs(k)
    return kappa


@triton.jit
def positive_slope(k, SOFTPLUS: tl.constexpr):
    """The derivative of `positive`; that of the absolute value at 0 is 0."""
    if SOFTPLUS:
        e = tl.exp(-tl.abs(k))
        slope = tl.where(k > 0.0, 1.0, e) / (1.0 + e)
    else:
        slope = tl.where(k > 0.0, 1.0, tl.where(k < 0.0, -1.0, 0.0))
    return slope


@triton.jit
def split(x, MATH: tl.constexpr, EXACT: tl.constexpr):
    """x as MATH and, unless that is EXACT, what is missing, as MATH too; an infinity lacks
    nothing.
    """
    high = x.to(MATH)
    low = high
    if not EXACT:
        missing = x.to(tl.float32) - high.to(tl.float32)
        low = tl.where(tl.abs(high.to(tl.float32)) == float("inf"), 0.0, missing).to(MATH)
    return high, low


@triton.jit
def load_matrix(
    Z, first, LOW: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, STRIDE: tl.constexpr, ACROSS: tl.constexpr, MATH: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Rows `first` to `first` + COUNT of Z (ROWS, COLUMNS) or its transpose, WIDTH columns wide, as
    MATH, and what is missing, which begins LOW numbers behind Z unless Z is EXACT. Rows are
    STRIDE apart, columns ACROSS, and there are zeros beyond.
    """
    row, column = first + tl.arange(0, COUNT), tl.arange(0, WIDTH)
    keep = (row < ROWS)[:, None] & (column < COLUMNS)[None, :]
    place = row[:, None] * STRIDE + column[None, :] * ACROSS
    high = tl.load(Z + place, mask=keep, other=0.0).to(MATH)
    missing = high
    if not EXACT:
        missing = tl.load(Z + LOW + place, mask=keep, other=0.0).to(MATH)
    return high, missing


@triton.jit
def add_product(total, x, y, X_EXACT: tl.constexpr, Y_EXACT: tl.constexpr, PRECISION: tl.constexpr):
    """total + x^T y of the split matrices x (n, rows) and y (n, columns)."""
    x_high, x_low = x
    y_high, y_low = y
    total = tl.dot(tl.trans(x_high), y_high, total, input_precision=PRECISION)
    if not X_EXACT:
        total = tl.dot(tl.trans(x_low), y_high, total, input_precision=PRECISION)
    if not Y_EXACT:
        total = tl.dot(tl.trans(x_high), y_low, total, input_precision=PRECISION)
    return total


@triton.jit
def transposed(parts):
    """Both parts of a split matrix, transposed."""
    high, low = parts
    return tl.trans(high), tl.trans(low)


@triton.jit(do_not_specialize=["count"])
def prefix_split_kernel(Z, parts, count, ITEMS: tl.constexpr):
    """parts (2, count) from the numbers of Z."""
    item = tl.program_id(0).to(tl.int64) * ITEMS + tl.arange(0, ITEMS)
    x = tl.load(Z + item, mask=item < count, other=0.0)
    high, low = split(x, parts.dtype.element_ty, False)
    tl.store(parts + item, high, mask=item < count)
    tl.store(parts + count + item, low, mask=item < count)
