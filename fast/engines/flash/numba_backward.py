"""The backward CPU kernel: one pass over the query tiles of a kv head, in a fixed order.

As in the forward kernel keys run down and queries across. A task owns a kv head, or an interleaved
share of its query tiles with dk and dv sums of its own that are added afterwards, so nothing is
written by two workers and the same number of shares always gives the same bits.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numba import njit, types

from attnspec.fast.engines.flash.numba_forward import load_transposed
from attnspec.fast.engines.flash.numba_lanes import (
    INNER,
    add,
    address,
    exp2,
    get,
    lane_count,
    load,
    multiply,
    offset,
    put,
    store,
    subtract,
    times,
)
from attnspec.fast.engines.flash.numba_visible import (
    FULL,
    KERNEL,
    KEYS,
    QUERIES,
    SKIPPED,
    VISIBLE,
    Visible,
    add_bias,
    add_seen,
    copy_seen,
    hide,
    list_spans,
    row_address,
    span_state,
    strided,
    tile_at,
    work_types,
)


def scratch_size(d_padded: int, dv_padded: int) -> int:
    """Numbers of scratch one part of `backward` needs."""
    return QUERIES * (3 * d_padded + 2 * dv_padded + 2 * KEYS + 2) + KEYS * (d_padded + dv_padded)


@njit(**INNER)
def load_rows(x, batch, head, first, rows, factor, padded, copy):
    """Write x[batch, head, first:first + rows] * factor to `copy` (rows, padded), zeros on its
    right; returns whether all that was copied is finite.
    """
    finite = True
    for row in range(rows):
        for channel in range(padded):
            value = 0.0
            if channel < x.shape[3]:
                value = x[batch, head, first + row, channel] * factor
                finite &= np.isfinite(value)
            put(copy, row * padded + channel, value)
    return finite


@njit(**INNER)
def weigh(scores, keys, columns, row_sums):
    """Turn scores (keys, QUERIES) into weights 2**(score - row_sum) in place."""
    for column in range(0, columns, lane_count(scores)):
        row_sum = load(row_sums, column)
        for key in range(keys):
            at = key * QUERIES + column
            store(scores, at, exp2(subtract(load(scores, at), row_sum)))


@njit(**INNER)
def differentiate(weights, grads, keys, columns, shifts):
    """Turn the gradients of weights (keys, QUERIES) into those of scores, in place."""
    for column in range(0, columns, lane_count(weights)):
        shift = load(shifts, column)
        for key in range(keys):
            at = key * QUERIES + column
            store(grads, at, times(load(weights, at), add(load(grads, at), shift)))


@njit(**INNER)
def backward_tile(q, k, v, dout, lse, shift, dq, dk, dv, scale, see, slopes, slope_positions,
                  batch, head, tile, scratch, spans):  # fmt: skip
    """Write dq of the queries of one tile of one head, and add to dk and dv of its kv head.

    dk (k_tokens, d padded) and dv (k_tokens, dv padded) are the sums of this task.
    """
    first, last = tile[0], tile[1]
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
    keys_copy = offset(shifts, QUERIES)
    values_copy = offset(keys_copy, KEYS * d_padded)
    sums_known = True
    for row in range(columns):
        there = row < rows
        row_sum = lse[batch, head, first + row] if there else 0.0
        sums_known &= not math.isnan(row_sum)
        put(row_sums, row, 0.0 if row_sum == -np.inf else row_sum / math.log(2))
        put(shifts, row, shift[batch, head, first + row] if there else 0.0)
    rows_finite = load_rows(q, batch, head, first, rows, scale, d_padded, q_rows)
    rows_finite &= load_rows(dout, batch, head, first, rows, 1.0, dv_padded, dout_rows)
    load_transposed(q, batch, head, first, last, scale / math.log(2), columns, across)
    load_transposed(dout, batch, head, first, last, 1.0, columns, dout_across)
    for at in range(QUERIES * d):
        put(dq_across, at, 0.0)
    for span in range(list_spans(see, batch, head, tile, spans)):
        start, stop = spans[span, 0], spans[span, 1]
        state = FULL if spans[span, 2] else span_state(see, batch, head, tile, start, stop)
        if state == SKIPPED:
            continue
        keys = stop - start
        k_at, k_row, k_step = row_address(k, batch, kv_head, start)
        v_at, v_row, v_step = row_address(v, batch, kv_head, start)
        multiply(k_at, k_row, k_step, across, QUERIES, weights, QUERIES, keys, d, columns, True)
        if slopes.size > 0:
            add_bias(weights, head, tile, start, stop, slopes, slope_positions)
        finite = True
        if state != FULL:
            hide(see, batch, head, tile, start, stop, weights, -np.inf)
            finite = rows_finite
            finite &= copy_seen(k, batch, kv_head, start, stop, weights, rows, keys_copy)
            finite &= copy_seen(v, batch, kv_head, start, stop, weights, rows, values_copy)
            k_at, k_row, k_step = keys_copy, d, 1
            v_at, v_row, v_step = values_copy, d_v, 1
        weigh(weights, keys, columns, row_sums)
        if state != FULL and not sums_known:
            # A row that saw a NaN has no weights: not for the keys it does not see either.
            hide(see, batch, head, tile, start, stop, weights, 0.0)
        multiply(v_at, v_row, v_step, dout_across, QUERIES, grads, QUERIES, keys, d_v, columns,
                 True)  # fmt: skip
        differentiate(weights, grads, keys, columns, shifts)
        if state != FULL:
            hide(see, batch, head, tile, start, stop, grads, 0.0)
        dk_at, dv_at = address(dk[start:]), address(dv[start:])
        if finite:
            multiply(weights, QUERIES, 1, dout_rows, dv_padded, dv_at, dv_padded, keys, rows,
                     dv_padded, False)  # fmt: skip
            multiply(grads, QUERIES, 1, q_rows, d_padded, dk_at, d_padded, keys, rows, d_padded,
                     False)  # fmt: skip
            multiply(k_at, k_step, k_row, grads, QUERIES, dq_across, QUERIES, d, keys, columns,
                     False)  # fmt: skip
        else:
            add_seen(weights, QUERIES, 1, dout_rows, dv_padded, 1, dv_at, dv_padded, 1, keys, rows,
                     d_v)  # fmt: skip
            add_seen(grads, QUERIES, 1, q_rows, d_padded, 1, dk_at, d_padded, 1, keys, rows,
                     d)  # fmt: skip
            add_seen(grads, 1, QUERIES, k_at, k_row, k_step, dq_across, 1, QUERIES, rows, keys,
                     d)  # fmt: skip
    for row in range(rows):
        for channel in range(d):
            dq[batch, head, first + row, channel] = get(dq_across, channel * QUERIES + row) * scale


def _backward(
    q, k, v, dout, lse, shift, dq, dk, dv, scale, causal, window, sinks, row_start, row_end,
    key_mask, mask, block_index, block_count, block_full, q_block, k_block, slopes,
    slope_positions, tiles, part, parts, scratch, spans,
):  # fmt: skip
    """Fill one part of dq (batch, heads, q_tokens, d), and add to its zeros in dk (shares, batch,
    kv_heads, k_tokens, d padded) and in dv: every task congruent to `part`.

    `shift` (batch, heads, q_tokens) is dlse - sum(dout * out); share s of a kv head takes the query
    tiles congruent to s of every query head in its group.
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
                    q, k, v, dout, lse, shift, dq, dk[share, batch, kv_head],
                    dv[share, batch, kv_head], scale, see, slopes, slope_positions, batch, head,
                    tile_at(tiles, index), scratch, spans,
                )  # fmt: skip


@functools.cache
def backward_kernel(real: types.Type) -> Any:
    """The compiled kernel for numbers of type `real`: one signature, whatever the strides."""
    tensor, rows, sums = strided(real, 4), strided(real, 3), real[:, :, :, :, ::1]
    signature = types.void(
        tensor, tensor, tensor, tensor, rows, rows, tensor, sums, sums, types.float64, *VISIBLE,
        strided(real, 1), strided(types.int64, 1), *work_types(real),
    )  # fmt: skip
    return njit(signature, **KERNEL)(_backward)
