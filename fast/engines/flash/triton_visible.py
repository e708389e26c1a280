"""The element rules of the flash kernels: who sees whom, and what is added to a score.

A *row* is a query's index inside its sequence, a *key* a key's; the query of row i stands at
position i + shift with shift = k_tokens - q_tokens (K3). Rows and keys come with axes that
broadcast, so the same rule serves a tile of rows by keys and a tile of keys by rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def lowest_key(row, begin, q_tokens, shift, window, row_start):
    """The first key that the range rule leaves to each of `row`; sinks are exempt from it."""
    low = row * 0
    if window is not None:
        low = tl.maximum(low, row + (shift - window + 1))
    if row_start is not None:
        at = row_start + begin + row
        low = tl.maximum(low, tl.load(at, mask=row < q_tokens, other=2147483647).to(tl.int32))
    return low


@triton.jit
def end_key(row, begin, row_stop, shift, k_tokens, row_end, CAUSAL: tl.constexpr):
    """Where the keys end that each of `row` may see, of `k_tokens`: at 0 from `row_stop` on.

    With all ends in one number a row, a pair of an edge tile costs one comparison for them.
    """
    high = tl.where(row < row_stop, k_tokens, 0)
    if CAUSAL:
        high = tl.minimum(high, row + (shift + 1))
    if row_end is not None:
        at = row_end + begin + row
        high = tl.minimum(high, tl.load(at, mask=row < row_stop, other=0).to(tl.int32))
    return high


@triton.jit
def seen_rows(
    key, stop, begin, rows_begin, shift, q_tokens, sinks, window, started, ended,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """The rows [low, high) that see each of `key` before any mask, none from `stop` on.

    `started` and `ended` hold for each key the number of packed rows whose range starts at or
    before it, and ends there or before.
    """
    low = key * 0
    if CAUSAL:
        low = tl.maximum(low, key - shift)
    high = key * 0 + q_tokens
    if window is not None:
        high = tl.minimum(high, key + (window - shift))
    if started is not None:
        count = tl.load(started + begin + key, mask=key < stop, other=0)
        high = tl.minimum(high, count.to(tl.int32) - rows_begin)
    if sinks is not None:
        high = tl.where(key < sinks, q_tokens, high)
    if ended is not None:
        count = tl.load(ended + begin + key, mask=key < stop, other=0)
        low = tl.maximum(low, count.to(tl.int32) - rows_begin)
    return low, tl.where(key < stop, high, 0)


@triton.jit
def visible(
    row, key, low, high, b, h, key_stop, sinks, masks, RANGED: tl.constexpr, CUT: tl.constexpr
):
    """Who sees whom, bool. `low` and `high` hold the lowest key of each of `row` and where its keys
    end (`end_key`); CUT says that tiles may reach beyond `key_stop`, into a block that is not
    theirs; `masks` are the key mask with its strides, then the mask with its strides.
    """
    seen = key < high
    if CUT:
        seen &= key < key_stop
    if RANGED:
        late = key
        if sinks is not None:
            # A key that every row sees counts as one behind all others: one comparison a pair.
            late = tl.where(key < sinks, 2147483647, key)
        seen &= late >= low
    return unmasked(seen, row, key, b, h, key_stop, masks)


@triton.jit
def visible_to(row, key, low, high, b, h, row_stop, key_stop, masks, CUT: tl.constexpr):
    """As `visible`, but by the rows [low, high) that see each of `key` (`seen_rows`); CUT says that
    tiles may reach beyond `row_stop`.
    """
    seen = (row >= low) & (row < high)
    if CUT:
        seen &= row < row_stop
    return unmasked(seen, row, key, b, h, key_stop, masks)


@triton.jit
def unmasked(seen, row, key, b, h, key_stop, masks):
    """What the masks leave of `seen`."""
    key_mask, key_stride_b, key_stride_k, mask, stride_b, stride_h, stride_q, stride_k = masks
    if key_mask is not None:
        at = key_mask + b.to(tl.int64) * key_stride_b + key.to(tl.int64) * key_stride_k
        seen &= tl.load(at, mask=key < key_stop, other=0) != 0
    if mask is not None:
        at = mask + b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h
        at += row.to(tl.int64) * stride_q + key.to(tl.int64) * stride_k
        seen &= tl.load(at, mask=seen, other=0) != 0
    return seen


@triton.jit
def positions(row, begin, row_stop, shift, slope_positions):
    """Where each of `row` stands for a bias that depends on the distance."""
    position = row + shift
    if slope_positions is not None:
        at = slope_positions + begin + row
        position = tl.load(at, mask=row < row_stop, other=0).to(tl.int32)
    return position


@triton.jit
def add_bias(scores, factor, key, position, h, slopes):
    """Base-2 logits are the returned scores times the returned factor: S = factor * scores + bias.

    `key` and `position` broadcast against each other to the shape of `scores`.
    """
    if slopes is not None:
        slope = tl.load(slopes + h).to(tl.float32) * LOG2E
        scores = scores * factor + slope * (key - position).to(tl.float32)
        factor = 1.0
    return scores, factor


@triton.jit
def nan_flag(x):
    """1 if a tile holds a NaN, else 0."""
    return tl.max(tl.max((x != x).to(tl.int32), axis=1), axis=0)


@triton.jit
def has_nan(x):
    """Whether a tile holds a NaN."""
    return nan_flag(x) > 0


@triton.jit
def finite_rows(x):
    """`x` with zeros for what is not finite, and which of its rows are finite throughout."""
    finite = tl.abs(x) < float("inf")
    return tl.where(finite, x, 0.0), tl.min(finite.to(tl.int32), axis=1) > 0
