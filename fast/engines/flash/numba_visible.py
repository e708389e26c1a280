"""Which keys a tile of queries sees: shared by the forward and the backward CPU kernels.

A query tile is a row (first, last, k_first, k_last, shift) of the tile table: queries first..last-1
look at the keys k_first..k_last-1 of their own sequence, and query i sits at key i + shift. What it
sees is listed as spans of at most `KEYS` keys; a span is skipped, seen in full, or seen in part,
and only the last kind looks at single pairs.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numba import njit, types

from attnspec.fast.engines.flash.numba_lanes import INNER, address, get, put

QUERIES = 64
"""Queries of a tile: the lanes of the kernels, so a multiple of every register width."""
KEYS = 64
"""Most keys of a span."""
SKIPPED, PARTIAL, FULL = 0, 1, 2
KERNEL: dict[str, Any] = {"cache": True, "nogil": True, "error_model": "numpy"}
"""Options of the functions that Python calls."""


class Visible(NamedTuple):
    """The options that decide which pairs are seen; an absent array is empty, an absent size 0."""

    causal: bool
    window: int
    sinks: int
    row_start: np.ndarray
    row_end: np.ndarray
    key_mask: np.ndarray
    mask: np.ndarray
    block_index: np.ndarray
    block_count: np.ndarray
    block_full: np.ndarray
    q_block: int
    k_block: int


def strided(item: types.Type, axes: int) -> types.Type:
    """An array type of any strides, so that no layout compiles a kernel of its own."""
    return types.Array(item, axes, "A")


VISIBLE = (
    types.boolean, types.int64, types.int64, strided(types.int64, 1), strided(types.int64, 1),
    strided(types.boolean, 2), strided(types.boolean, 4), strided(types.int32, 4),
    strided(types.int32, 3), strided(types.int32, 3), types.int64, types.int64,
)  # fmt: skip
"""The types of the fields of `Visible`."""


def work_types(real: types.Type) -> tuple[types.Type, ...]:
    """The types of the tile table, part, parts, and the scratch and span list of the part."""
    return types.int64[:, ::1], types.int64, types.int64, real[::1], types.int64[:, ::1]


@njit(**INNER)
def tile_at(tiles, index):
    """One row of the tile table as a tuple."""
    row = tiles[index]
    return row[0], row[1], row[2], row[3], row[4]


@njit(**INNER)
def list_spans(see, batch, head, tile, spans):
    """Fill `spans` (most, 3) with the key ranges the tile may see, and whether the lists say that
    it sees them whole; returns their number.

    The keys are those of the sinks and of the range from the first row's start to the last row's
    end, cut by the listed blocks; neighbours are joined up to `KEYS` keys.
    """
    first, last, k_first, k_last, shift = tile
    end = max(k_first, min(k_last, last + shift)) if see.causal else k_last
    if see.row_end.size > 0:
        end = max(k_first, min(end, k_first + see.row_end[last - 1]))
    start = k_first
    if see.window > 0:
        start = max(start, first + shift - see.window + 1)
    if see.row_start.size > 0:
        start = max(start, k_first + see.row_start[first])
    exempt = min(k_first + see.sinks, end) if start > k_first else k_first
    start = max(start, exempt)
    listed = see.q_block > 0
    entries = see.block_count[batch, head, first // see.q_block] if listed else 1
    fulls = see.block_full[batch, head, first // see.q_block] if see.block_full.size > 0 else 0
    count = 0
    for entry in range(entries):
        low, high = k_first, k_last
        if listed:
            block = see.block_index[batch, head, first // see.q_block, entry]
            low, high = block * see.k_block, (block + 1) * see.k_block
        whole = 1 if entry < fulls else 0
        for part in range(2):
            at = max(low, k_first if part == 0 else start)
            stop = min(high, exempt if part == 0 else end)
            if whole:
                at, stop = (low, min(high, k_last)) if part == 0 else (0, 0)
            while at < stop:
                size = min(KEYS, stop - at)
                if count > 0 and spans[count - 1, 1] == at and spans[count - 1, 2] == whole:
                    size = min(size, KEYS - (at - spans[count - 1, 0]))
                    if size > 0:
                        spans[count - 1, 1] += size
                        at += size
                        continue
                    size = min(KEYS, stop - at)
                spans[count, 0], spans[count, 1], spans[count, 2] = at, at + size, whole
                count += 1
                at += size
    return count


@njit(**INNER)
def seeing_rows(see, tile, key):
    """Rows [low, high) of the tile to which the causal rule, ranges and ends show `key`."""
    first, last, k_first, _, shift = tile
    low = max(0, key - shift - first) if see.causal else 0
    high = last - first
    if see.row_end.size > 0:
        while low < high and see.row_end[first + low] <= key - k_first:
            low += 1
    if key >= k_first + see.sinks:
        if see.window > 0:
            high = min(high, key - shift + see.window - first)
        if see.row_start.size > 0:
            while high > 0 and see.row_start[first + high - 1] > key - k_first:
                high -= 1
    return low, max(high, 0)


@njit(**INNER)
def span_state(see, batch, head, tile, start, stop):
    """Whether the tile sees all of the keys start..stop-1, some of them, or none."""
    first, last, k_first, _, _ = tile
    rows = last - first
    full = seeing_rows(see, tile, stop - 1)[0] <= 0
    ranged = max(start, k_first + see.sinks)
    if full and ranged < stop:
        full = seeing_rows(see, tile, ranged)[1] >= rows
    if see.key_mask.size > 0:
        some = False
        for key in range(start, stop):
            some |= see.key_mask[batch, key]
            full &= see.key_mask[batch, key]
        if not some:
            return SKIPPED
    if see.mask.size > 0:
        some = False
        for query in range(first, last):
            for key in range(start, stop):
                some |= see.mask[batch, head, query, key]
                full &= see.mask[batch, head, query, key]
            if some and not full:
                break
        if not some:
            return SKIPPED
    return FULL if full else PARTIAL


@njit(**INNER)
def add_bias(scores, head, tile, start, stop, slopes, slope_positions):
    """Add slope * (key - position) to base-2 scores (keys, QUERIES); positions are the rows' own
    unless `slope_positions` gives them.
    """
    first, last, k_first, _, shift = tile
    slope = slopes[head] / math.log(2)
    for row in range(last - first):
        position = first + row + shift
        if slope_positions.size > 0:
            position = k_first + slope_positions[first + row]
        for key in range(start, stop):
            at = (key - start) * QUERIES + row
            put(scores, at, get(scores, at) + slope * (key - position))


@njit(**INNER)
def hide(see, batch, head, tile, start, stop, pairs, value):
    """Write `value` over the unseen entries of pairs (keys, QUERIES)."""
    first, last = tile[0], tile[1]
    rows = last - first
    for key in range(start, stop):
        at = (key - start) * QUERIES
        low, high = seeing_rows(see, tile, key)
        if see.key_mask.size > 0 and not see.key_mask[batch, key]:
            high = low
        for row in range(min(low, rows)):
            put(pairs, at + row, value)
        for row in range(high, rows):
            put(pairs, at + row, value)
    if see.mask.size > 0:
        for row in range(rows):
            for key in range(start, stop):
                if not see.mask[batch, head, first + row, key]:
                    put(pairs, (key - start) * QUERIES + row, value)


@njit(**INNER)
def copy_seen(source, batch, head, start, stop, scores, rows, copy):
    """Copy the rows start..stop-1 of `source` (batch, heads, tokens, width) to `copy`, as zeros
    where no row of the tile has a score; returns whether all that was copied is finite.
    """
    width = source.shape[3]
    finite = True
    for key in range(start, stop):
        at = (key - start) * QUERIES
        seen = False
        for row in range(rows):
            seen |= get(scores, at + row) != -np.inf
        for x in range(width):
            value = source[batch, head, key, x]
            finite &= not seen or np.isfinite(value)
            put(copy, (key - start) * width + x, value if seen else 0.0)
    return finite


@njit(**INNER)
def add_seen(weights, w_row, w_step, values, v_step, v_column, sums, s_row, s_column, rows, depth,
             columns):  # fmt: skip
    """sums[row, column] += sum over depth of weights[row, step] * values[step, column], reading no
    value whose weight is 0: the slow product for a NaN that only some rows of a tile see.
    """
    for row in range(rows):
        for step in range(depth):
            weight = get(weights, row * w_row + step * w_step)
            if weight != 0:
                for column in range(columns):
                    at = row * s_row + column * s_column
                    value = get(values, step * v_step + column * v_column)
                    put(sums, at, get(sums, at) + weight * value)


@njit(**INNER)
def row_address(x, batch, head, token):
    """Pointer to x[batch, head, token, 0], and the strides of a token and of a number."""
    size = x.itemsize
    return (
        address(x[batch, head, token:]),
        x.strides[2] // size,
        x.strides[3] // size,
    )
