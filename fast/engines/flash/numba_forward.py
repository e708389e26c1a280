"""The forward CPU kernel: one query tile against the keys it sees, with an online softmax.

Everything is held transposed, keys or channels down and queries across, so that every loop runs
over queries in vector registers: k and v are read where they lie, with any strides, the running
maximum and sum need no horizontal operation, and both matrix products read one broadcast number of
k or v against a row of queries.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numba import njit, types

from attnspec.fast.engines.flash.numba_lanes import (
    INNER,
    add,
    address,
    exp2,
    finite_or_zero,
    get,
    lane_count,
    larger,
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


def scratch_size(d: int, dv: int) -> int:
    """Numbers of scratch one part of `forward` needs."""
    return QUERIES * (d + dv + KEYS + 2) + KEYS * dv


@njit(**INNER)
def load_transposed(x, batch, head, first, last, factor, columns, copy):
    """Write x[batch, head, first:last].T * factor to `copy` (width, QUERIES), then zeros."""
    for row in range(columns):
        for channel in range(x.shape[3]):
            value = x[batch, head, first + row, channel] * factor if first + row < last else 0.0
            put(copy, channel * QUERIES + row, value)


@njit(**INNER)
def add_weights(scores, keys, columns, most, total, sums, channels):
    """Turn scores (keys, QUERIES) into weights 2**(score - most) in place after moving the running
    maximum `most`; rescales the running `total` and `sums` (channels, QUERIES).
    """
    for column in range(0, columns, lane_count(scores)):
        before = load(most, column)
        top = before
        for key in range(keys):
            top = larger(load(scores, key * QUERIES + column), top)
        base = finite_or_zero(top)
        shrink = exp2(subtract(before, base))
        running = times(load(total, column), shrink)
        for key in range(keys):
            weight = exp2(subtract(load(scores, key * QUERIES + column), base))
            store(scores, key * QUERIES + column, weight)
            running = add(running, weight)
        store(most, column, top)
        store(total, column, running)
        for channel in range(channels):
            at = channel * QUERIES + column
            store(sums, at, times(load(sums, at), shrink))


@njit(**INNER)
def attend_tile(q, k, v, out, lse, scale, see, sink_logit, slopes, slope_positions, batch, head,
                tile, scratch, spans):  # fmt: skip
    """Output and lse of the queries of one tile of one head."""
    first, last = tile[0], tile[1]
    d, dv, rows = q.shape[3], v.shape[3], last - first
    kv_head = head // (q.shape[1] // k.shape[1])
    queries = address(scratch)
    lanes = lane_count(queries)
    columns = (rows + lanes - 1) // lanes * lanes
    sums = offset(queries, QUERIES * d)
    scores = offset(sums, QUERIES * dv)
    most = offset(scores, QUERIES * KEYS)
    total = offset(most, QUERIES)
    values = offset(total, QUERIES)
    load_transposed(q, batch, head, first, last, scale / math.log(2), columns, queries)
    sunk = sink_logit.size > 0
    for row in range(columns):
        put(most, row, sink_logit[head] / math.log(2) if sunk else -np.inf)
        put(total, row, 1.0 if sunk else 0.0)
    for at in range(QUERIES * dv):
        put(sums, at, 0.0)
    for span in range(list_spans(see, batch, head, tile, spans)):
        start, stop = spans[span, 0], spans[span, 1]
        state = FULL if spans[span, 2] else span_state(see, batch, head, tile, start, stop)
        if state == SKIPPED:
            continue
        keys = stop - start
        at, row, step = row_address(k, batch, kv_head, start)
        multiply(at, row, step, queries, QUERIES, scores, QUERIES, keys, d, columns, True)
        if slopes.size > 0:
            add_bias(scores, head, tile, start, stop, slopes, slope_positions)
        at, row, step = row_address(v, batch, kv_head, start)
        finite = True
        if state != FULL:
            hide(see, batch, head, tile, start, stop, scores, -np.inf)
            finite = copy_seen(v, batch, kv_head, start, stop, scores, rows, values)
            at, row, step = values, dv, 1
        add_weights(scores, keys, columns, most, total, sums, dv)
        if finite:
            multiply(at, step, row, scores, QUERIES, sums, QUERIES, dv, keys, columns, False)
        else:
            add_seen(scores, 1, QUERIES, at, row, step, sums, 1, QUERIES, rows, keys, dv)
    for row in range(rows):
        mass = np.float64(get(total, row))
        empty = mass == 0
        lse[batch, head, first + row] = (
            -np.inf if empty else get(most, row) * math.log(2) + math.log(mass)
        )
        for channel in range(dv):
            value = get(sums, channel * QUERIES + row)
            out[batch, head, first + row, channel] = 0.0 if empty else value / mass


def _forward(
    q, k, v, out, lse, scale, causal, window, sinks, row_start, row_end, key_mask, mask,
    block_index, block_count, block_full, q_block, k_block, sink_logit, slopes, slope_positions,
    tiles, part, parts, scratch, spans,
):  # fmt: skip
    """Fill one part of out (batch, heads, q_tokens, dv) and lse (batch, heads, q_tokens): every
    task congruent to `part`, which evens out the short tiles at the start of a causal sequence.
    """
    see = Visible(
        causal, window, sinks, row_start, row_end, key_mask, mask, block_index, block_count,
        block_full, q_block, k_block,
    )  # fmt: skip
    batches, heads, per_head = q.shape[0], q.shape[1], tiles.shape[0]
    for task in range(part, batches * heads * per_head, parts):
        pair, tile = task // per_head, tile_at(tiles, task % per_head)
        attend_tile(
            q, k, v, out, lse, scale, see, sink_logit, slopes, slope_positions, pair // heads,
            pair % heads, tile, scratch, spans,
        )  # fmt: skip


@functools.cache
def forward_kernel(real: types.Type) -> Any:
    """The compiled kernel for numbers of type `real`: one signature, whatever the strides."""
    tensor = strided(real, 4)
    signature = types.void(
        tensor, tensor, tensor, tensor, strided(real, 3), types.float64, *VISIBLE,
        strided(real, 1), strided(real, 1), strided(types.int64, 1), *work_types(real),
    )  # fmt: skip
    return njit(signature, **KERNEL)(_forward)
