"""The relative engine's CPU kernels: flash attention's tiles, with a band added to the scores.

As there, keys run down and queries across. The band of a span is the product of up to 127 table
rows with the tile's queries; query r meets key c at row c + (rows - 1 - r) of it, so adding it is
one shifted read a pair, and its gradient one shifted write.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numba import njit, types

from attnspec.fast.engines.flash.numba_backward import differentiate, load_rows, weigh
from attnspec.fast.engines.flash.numba_forward import add_weights, load_transposed
from attnspec.fast.engines.flash.numba_lanes import (
    INNER,
    address,
    get,
    lane_count,
    multiply,
    offset,
    put,
)
from attnspec.fast.engines.flash.numba_visible import (
    FULL,
    KERNEL,
    KEYS,
    QUERIES,
    VISIBLE,
    Visible,
    hide,
    list_spans,
    row_address,
    span_state,
    strided,
    tile_at,
    work_types,
)

BAND = KEYS + QUERIES
"""Most table rows that a span of keys and a tile of queries need."""


def forward_scratch(d: int, dv: int) -> int:
    """Numbers of scratch one part of `forward` needs."""
    return QUERIES * (d + dv + KEYS + 2 + BAND) + BAND * d


def backward_scratch(d_padded: int, dv_padded: int) -> int:
    """Numbers of scratch one part of `backward` needs."""
    own = QUERIES * (3 * d_padded + 2 * dv_padded + 2 * KEYS + 2)
    return own + BAND * (2 * QUERIES + d_padded)


@njit(**INNER)
def load_band(table, head, first, count, padded, copy):
    """Copy table rows first..first+count-1 of a head to `copy` (count, padded); absent ones are 0.

    Returns whether any of them is there.
    """
    head = head if table.shape[0] > 1 else 0
    some = False
    for n in range(count):
        there = 0 <= first + n < table.shape[1]
        some |= there
        for channel in range(padded):
            value = 0.0
            if there and channel < table.shape[2]:
                value = table[head, first + n, channel]
            put(copy, n * padded + channel, value)
    return some


@njit(**INNER)
def add_band(scores, band, keys, rows):
    """Add to scores (keys, QUERIES) what lies in the band (keys + rows - 1, QUERIES) for them."""
    for key in range(keys):
        for row in range(rows):
            at = key * QUERIES + row
            put(scores, at, get(scores, at) + get(band, (key + rows - 1 - row) * QUERIES + row))


@njit(**INNER)
def band_of(grads, band, keys, rows):
    """The inverse: the band (keys + rows - 1, QUERIES) of gradients of scores, zero elsewhere."""
    for at in range((keys + rows - 1) * QUERIES):
        put(band, at, 0.0)
    for key in range(keys):
        for row in range(rows):
            put(band, (key + rows - 1 - row) * QUERIES + row, get(grads, key * QUERIES + row))


@njit(**INNER)
def add_table_bias(band, bias, head, first, count, columns, factor):
    """Add to row n of the band (count, QUERIES) the bias of table row first + n, if it is there."""
    head = head if bias.shape[0] > 1 else 0
    for n in range(max(0, -first), min(count, bias.shape[1] - first)):
        value = bias[head, first + n] * factor
        for row in range(columns):
            put(band, n * QUERIES + row, get(band, n * QUERIES + row) + value)


@njit(**INNER)
def add_key_bias(scores, bias, batch, head, start, keys, columns, factor):
    """Add to row n of scores (keys, QUERIES) the bias of key start + n."""
    for n in range(keys):
        value = bias[batch, head, start + n] * factor
        for row in range(columns):
            put(scores, n * QUERIES + row, get(scores, n * QUERIES + row) + value)


@njit(**INNER)
def sum_rows(x, count, rows, factor, sums):
    """Add to sums[n] the sum of the `rows` numbers in row n of x (count, QUERIES)."""
    for n in range(count):
        total = 0.0
        for row in range(rows):
            total += get(x, n * QUERIES + row)
        sums[n] += total * factor


@njit(**INNER)
def attend_tile(
    q, k, v, table, table_bias, key_bias, out, lse, zero, scale, see, batch, head, tile, scratch,
    spans,
):  # fmt: skip
    """Output and lse of the queries of one tile of one head."""
    first, last, _, _, shift = tile
    d, dv, rows = q.shape[3], v.shape[3], last - first
    kv_head = head // (q.shape[1] // k.shape[1])
    queries = address(scratch)
    lanes = lane_count(queries)
    columns = (rows + lanes - 1) // lanes * lanes
    sums = offset(queries, QUERIES * d)
    scores = offset(sums, QUERIES * dv)
    most = offset(scores, QUERIES * KEYS)
    total = offset(most, QUERIES)
    band = offset(total, QUERIES)
    entries = offset(band, BAND * QUERIES)
    factor = scale / math.log(2)
    load_transposed(q, batch, head, first, last, factor, columns, queries)
    for row in range(columns):
        put(most, row, -np.inf)
        put(total, row, 0.0)
    for at in range(QUERIES * dv):
        put(sums, at, 0.0)
    for span in range(list_spans(see, batch, head, tile, spans)):
        start, stop = spans[span, 0], spans[span, 1]
        keys = stop - start
        at, row, step = row_address(k, batch, kv_head, start)
        multiply(at, row, step, queries, QUERIES, scores, QUERIES, keys, d, columns, True)
        if key_bias.size:
            add_key_bias(scores, key_bias, batch, head, start, keys, columns, factor)
        low, count = zero + start - (last - 1 + shift), keys + rows - 1
        if load_band(table, head, low, count, d, entries):
            multiply(entries, d, 1, queries, QUERIES, band, QUERIES, count, d, columns, True)
            if table_bias.size:
                add_table_bias(band, table_bias, head, low, count, columns, factor)
            add_band(scores, band, keys, rows)
        if span_state(see, batch, head, tile, start, stop) != FULL:
            hide(see, batch, head, tile, start, stop, scores, -np.inf)
        add_weights(scores, keys, columns, most, total, sums, dv)
        at, row, step = row_address(v, batch, kv_head, start)
        multiply(at, step, row, scores, QUERIES, sums, QUERIES, dv, keys, columns, False)
    for row in range(rows):
        mass = np.float64(get(total, row))
        empty = mass == 0
        lse[batch, head, first + row] = (
            -np.inf if empty else get(most, row) * math.log(2) + math.log(mass)
        )
        for channel in range(dv):
            value = get(sums, channel * QUERIES + row)
            out[batch, head, first + row, channel] = 0.0 if empty else value / mass


@njit(**INNER)
def backward_tile(q, k, v, table, table_bias, key_bias, dout, lse, shifts_of, dq, dk, dv, dtable,
                  dtable_bias, dkey_bias, zero, scale, see, batch, head, tile, scratch,
                  spans):  # fmt: skip
    """Write dq of one tile of one head, and add to the others, the sums of this task."""
    first, last, _, _, shift = tile
    d, d_v, rows = q.shape[3], v.shape[3], last - first
    d_padded, dv_padded = dk.shape[1], dv.shape[1]
    kv_head = head // (q.shape[1] // k.shape[1])
    across = address(scratch)
    lanes = lane_count(across)
    columns = (rows + lanes - 1) // lanes * lanes
    dout_across = offset(across, QUERIES * d_padded)
    dq_across = offset(dout_across, QUERIES * dv_padded)
    q_rows = offset(dq_across, QUERIES * d_padded)
    dout_rows = offset(q_rows, QUERIES * d_padded)
    weights = offset(dout_rows, QUERIES * dv_padded)
    grads = offset(weights, QUERIES * KEYS)
    row_sums = offset(grads, QUERIES * KEYS)
    shifts = offset(row_sums, QUERIES)
    band = offset(shifts, QUERIES)
    entries = offset(band, BAND * QUERIES)
    for row in range(columns):
        there = row < rows
        row_sum = lse[batch, head, first + row] if there else 0.0
        put(row_sums, row, 0.0 if row_sum == -np.inf else row_sum / math.log(2))
        put(shifts, row, shifts_of[batch, head, first + row] if there else 0.0)
    load_rows(q, batch, head, first, rows, scale, d_padded, q_rows)
    load_rows(dout, batch, head, first, rows, 1.0, dv_padded, dout_rows)
    factor = scale / math.log(2)
    load_transposed(q, batch, head, first, last, factor, columns, across)
    load_transposed(dout, batch, head, first, last, 1.0, columns, dout_across)
    for at in range(QUERIES * d):
        put(dq_across, at, 0.0)
    for span in range(list_spans(see, batch, head, tile, spans)):
        start, stop = spans[span, 0], spans[span, 1]
        keys = stop - start
        k_at, k_row, k_step = row_address(k, batch, kv_head, start)
        v_at, v_row, v_step = row_address(v, batch, kv_head, start)
        multiply(k_at, k_row, k_step, across, QUERIES, weights, QUERIES, keys, d, columns, True)
        if key_bias.size:
            add_key_bias(weights, key_bias, batch, head, start, keys, columns, factor)
        low, count = zero + start - (last - 1 + shift), keys + rows - 1
        banded = load_band(table, head, low, count, d_padded, entries)
        if banded:
            multiply(entries, d_padded, 1, across, QUERIES, band, QUERIES, count, d, columns, True)
            if table_bias.size:
                add_table_bias(band, table_bias, head, low, count, columns, factor)
            add_band(weights, band, keys, rows)
        full = span_state(see, batch, head, tile, start, stop) == FULL
        if not full:
            hide(see, batch, head, tile, start, stop, weights, -np.inf)
        weigh(weights, keys, columns, row_sums)
        multiply(v_at, v_row, v_step, dout_across, QUERIES, grads, QUERIES, keys, d_v, columns,
                 True)  # fmt: skip
        differentiate(weights, grads, keys, columns, shifts)
        if not full:
            hide(see, batch, head, tile, start, stop, grads, 0.0)
        multiply(weights, QUERIES, 1, dout_rows, dv_padded, address(dv[start:]), dv_padded, keys,
                 rows, dv_padded, False)  # fmt: skip
        multiply(grads, QUERIES, 1, q_rows, d_padded, address(dk[start:]), d_padded, keys, rows,
                 d_padded, False)  # fmt: skip
        multiply(k_at, k_step, k_row, grads, QUERIES, dq_across, QUERIES, d, keys, columns, False)
        if key_bias.size:
            sum_rows(grads, keys, rows, scale, dkey_bias[start:])
        if banded:
            band_of(grads, band, keys, rows)
            multiply(entries, 1, d_padded, band, QUERIES, dq_across, QUERIES, d, count, columns,
                     False)  # fmt: skip
            skipped = max(0, -low)
            there = min(low + count, table.shape[1]) - (low + skipped)
            multiply(offset(band, skipped * QUERIES), QUERIES, 1, q_rows, d_padded,
                     address(dtable[low + skipped:]), d_padded, there, rows, d_padded,
                     False)  # fmt: skip
            if table_bias.size:
                sum_rows(
                    offset(band, skipped * QUERIES), there, rows, scale,
                    dtable_bias[low + skipped :],
                )  # fmt: skip
    for row in range(rows):
        for channel in range(d):
            dq[batch, head, first + row, channel] = get(dq_across, channel * QUERIES + row) * scale


def _forward(
    q, k, v, table, table_bias, key_bias, out, lse, zero, scale, causal, window, sinks, row_start,
    row_end, key_mask, mask,
    block_index, block_count, block_full, q_block, k_block, tiles, part, parts, scratch, spans,
):  # fmt: skip
    """Fill one part of out and lse: every task congruent to `part`."""
    see = Visible(
        causal, window, sinks, row_start, row_end, key_mask, mask, block_index, block_count,
        block_full, q_block, k_block,
    )  # fmt: skip
    batches, heads, per_head = q.shape[0], q.shape[1], tiles.shape[0]
    for task in range(part, batches * heads * per_head, parts):
        pair, tile = task // per_head, tile_at(tiles, task % per_head)
        attend_tile(
            q, k, v, table, table_bias, key_bias, out, lse, zero, scale, see, pair // heads,
            pair % heads, tile, scratch, spans,
        )  # fmt: skip


def _backward(
    q, k, v, table, table_bias, key_bias, dout, lse, shift, dq, dk, dv, dtable, dtable_bias,
    dkey_bias, zero, scale, causal, window, sinks,
    row_start, row_end, key_mask, mask, block_index, block_count, block_full, q_block, k_block,
    tiles, part, parts, scratch, spans,
):  # fmt: skip
    """Fill one part of dq, and add to its zeros in dk, dv (shares, batch, kv_heads, k_tokens,
    padded), dtable (shares, batch, heads, rows, padded) and the biases' gradients, laid out as
    theirs behind (shares, batch), as the flash engine's `_backward`.
    """
    see = Visible(
        causal, window, sinks, row_start, row_end, key_mask, mask, block_index, block_count,
        block_full, q_block, k_block,
    )  # fmt: skip
    shares, batches, kv_heads = dk.shape[0], dk.shape[1], dk.shape[2]
    group = q.shape[1] // kv_heads
    for task in range(part, shares * batches * kv_heads, parts):
        share, pair = task % shares, task // shares
        batch, kv_head = pair // kv_heads, pair % kv_heads
        for head in range(kv_head * group, (kv_head + 1) * group):
            for index in range(share, tiles.shape[0], shares):
                backward_tile(
                    q, k, v, table, table_bias, key_bias, dout, lse, shift, dq,
                    dk[share, batch, kv_head], dv[share, batch, kv_head],
                    dtable[share, batch, head], dtable_bias[share, batch, head],
                    dkey_bias[share, batch, head], zero, scale, see, batch, head,
                    tile_at(tiles, index), scratch, spans,
                )  # fmt: skip


@functools.cache
def forward_kernel(real: types.Type) -> Any:
    """The compiled kernel for numbers of type `real`: one signature, whatever the strides."""
    tensor, rows = strided(real, 4), strided(real, 3)
    signature = types.void(
        tensor, tensor, tensor, rows, strided(real, 2), rows, tensor, rows, types.int64,
        types.float64, *VISIBLE, *work_types(real),
    )  # fmt: skip
    return njit(signature, **KERNEL)(_forward)


@functools.cache
def backward_kernel(real: types.Type) -> Any:
    """The compiled kernel for numbers of type `real`: one signature, whatever the strides."""
    tensor, rows, sums = strided(real, 4), strided(real, 3), real[:, :, :, :, ::1]
    flat = real[:, :, :, ::1]
    signature = types.void(
        tensor, tensor, tensor, rows, strided(real, 2), rows, tensor, rows, rows, tensor, sums,
        sums, sums, flat, flat, types.int64, types.float64, *VISIBLE, *work_types(real),
    )  # fmt: skip
    return njit(signature, **KERNEL)(_backward)
