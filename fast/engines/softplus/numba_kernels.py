"""The softplus engine's forward CPU kernel: flash attention's tiles without a softmax.

As there, keys run down and queries across. Queries come multiplied by the factor of their row and
keys as unit vectors, so a product of the two is a base-2 score. A row's numbers lie in vectors
across the tile's queries: `rows` is (11, QUERIES), by the names below.
"""

from __future__ import annotations

import functools
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

ROW_NUMBERS = 11
ZERO, ONE, SUM, PEAK, GAIN = (n * QUERIES for n in range(5))
CUT, DELTA, TAKEN, MEAN, BARE, MASS = (n * QUERIES for n in range(5, ROW_NUMBERS))
TERMS = 24
"""Most coefficients of the polynomial, each spread over a vector of up to 16 lanes."""
PLAIN, MEASURE, SHARP = 0, 1, 2


def forward_scratch(d: int, dv: int) -> int:
    """Numbers of scratch one part of `forward` needs."""
    return QUERIES * (d + dv + KEYS + ROW_NUMBERS) + 16 * TERMS + KEYS * dv


@njit(**INNER)
def spread_terms(series, terms):
    """Write each coefficient of the polynomial to a vector of `terms`."""
    for n in range(series.size):
        for lane in range(16):
            put(terms, 16 * n + lane, series[n])


@njit(**INNER)
def soft(y, zero, terms, last, half):
    """softplus(y ln 2) / ln 2: max(y, 0) plus e times a polynomial in e - 1/2, e = 2**-|y|."""
    e = exp2(subtract(zero, larger(y, subtract(zero, y))))
    z = subtract(e, half)
    value = load(terms, 16 * last)
    n = last - 1
    while n >= 0:
        value = add(times(value, z), load(terms, 16 * n))
        n -= 1
    return add(larger(y, zero), times(value, e))


@njit(**INNER)
def multiplied(x, one, whole):
    """x to a whole power >= 0; the power 0 gives one."""
    result = one
    square = x
    while whole > 0:
        if whole & 1:
            result = times(result, square)
        whole >>= 1
        if whole > 0:
            square = times(square, square)
    return result


@njit(**INNER)
def raise_rest(values, count, columns, power):
    """values ** power in place where it is no whole number; 0 stays 0."""
    for key in range(count):
        for column in range(columns):
            value = get(values, key * QUERIES + column)
            put(values, key * QUERIES + column, value**power if value > 0 else 0.0)


@njit(**INNER)
def weigh(scores, keys, columns, rows, terms, last, stage, whole, power):
    """Turn base-2 scores (keys, QUERIES) into weights in place, adding to the rows' sums.

    The stage MEASURE follows the rows' largest scores as well.
    """
    half = load(terms, 16 * (last + 1))
    for column in range(0, columns, lane_count(scores)):
        zero, one = load(rows, ZERO + column), load(rows, ONE + column)
        gain, cut = load(rows, GAIN + column), load(rows, CUT + column)
        peak, total = load(rows, PEAK + column), load(rows, SUM + column)
        for key in range(keys):
            at = key * QUERIES + column
            y = load(scores, at)
            weight = soft(y, zero, terms, last, half)
            if stage == 1:
                peak = larger(y, peak)
            if stage == 2:
                weight = larger(subtract(times(weight, gain), cut), zero)
                if whole > 0:
                    weight = multiplied(weight, one, whole)
            store(scores, at, weight)
            if stage != 2 or whole > 0:
                total = add(total, weight)
        store(rows, PEAK + column, peak)
        store(rows, SUM + column, total)
    if stage == 2 and whole < 0:
        raise_rest(scores, keys, columns, power)
        for column in range(0, columns, lane_count(scores)):
            total = load(rows, SUM + column)
            for key in range(keys):
                total = add(total, load(scores, key * QUERIES + column))
            store(rows, SUM + column, total)


@njit(**INNER)
def inverse_first(total, eps):
    """One over a row's first normaliser, 0 without any mass."""
    mass = total + eps / np.log(2.0)
    return 1.0 / mass if mass > 0 else 0.0


@njit(**INNER)
def second_terms(total, peak, count, eps, warm, dead):
    """Gain, cut and largest excess of a row in the second stage, 0 for a dead one."""
    offset_of = 1.0 if count > warm else 0.0
    gain = count * inverse_first(total, eps)
    largest = max(peak, 0.0) + np.log1p(2.0 ** -abs(peak)) / np.log(2.0)
    most = gain * largest - offset_of
    if count > 0 and most > dead:
        return gain / most, offset_of / most, most
    return 0.0, 0.0, 0.0


@njit(**INNER)
def sweep(q, k, v, see, batch, head, tile, spans, queries, scores, sums, values, rows, terms, last,
          stage, whole, power, columns):  # fmt: skip
    """One pass over the keys; all stages but MEASURE add the weighed values to `sums`."""
    d, dv = q.shape[3], v.shape[3]
    kv_head = head // (q.shape[1] // k.shape[1])
    for span in range(list_spans(see, batch, head, tile, spans)):
        start, stop = spans[span, 0], spans[span, 1]
        state = span_state(see, batch, head, tile, start, stop)
        if state == SKIPPED:
            continue
        keys = stop - start
        at, row, step = row_address(k, batch, kv_head, start)
        multiply(at, row, step, queries, QUERIES, scores, QUERIES, keys, d, columns, True)
        at, row, step = row_address(v, batch, kv_head, start)
        finite = True
        if state != FULL:
            hide(see, batch, head, tile, start, stop, scores, -np.inf)
            if stage != 1:
                count = tile[1] - tile[0]
                finite = copy_seen(v, batch, kv_head, start, stop, scores, count, values)
                at, row, step = values, dv, 1
        weigh(scores, keys, columns, rows, terms, last, stage, whole, power)
        if stage == 1:
            continue
        if finite:
            multiply(at, step, row, scores, QUERIES, sums, QUERIES, dv, keys, columns, False)
        else:
            add_seen(scores, 1, QUERIES, at, row, step, sums, 1, QUERIES, tile[1] - tile[0], keys,
                     dv)  # fmt: skip


@njit(**INNER)
def attend_tile(q, k, v, counts, out, numbers, eps, power, whole, warm, second_eps, dead, see,
                series, batch, head, tile, scratch, spans):  # fmt: skip
    """Output of the queries of one tile of one head, and their numbers for the backward pass."""
    first, last_row = tile[0], tile[1]
    d, dv, count = q.shape[3], v.shape[3], last_row - first
    queries = address(scratch)
    lanes = lane_count(queries)
    columns = (count + lanes - 1) // lanes * lanes
    sums = offset(queries, QUERIES * d)
    scores = offset(sums, QUERIES * dv)
    rows = offset(scores, QUERIES * KEYS)
    terms = offset(rows, QUERIES * ROW_NUMBERS)
    values = offset(terms, 16 * TERMS)
    spread_terms(series, terms)
    last = series.size - 2
    load_transposed(q, batch, head, first, last_row, 1.0, columns, queries)
    for row in range(columns):
        put(rows, ZERO + row, 0.0)
        put(rows, ONE + row, 1.0)
        put(rows, SUM + row, 0.0)
        put(rows, PEAK + row, -np.inf)
    for at in range(QUERIES * dv):
        put(sums, at, 0.0)
    stage = PLAIN
    if power > 0:
        sweep(q, k, v, see, batch, head, tile, spans, queries, scores, sums, values, rows, terms,
              last, MEASURE, whole, power, columns)  # fmt: skip
        stage = SHARP
        for row in range(count):
            total, peak = get(rows, SUM + row), get(rows, PEAK + row)
            gain, cut, most = second_terms(total, peak, counts[batch, first + row], eps, warm, dead)
            put(rows, GAIN + row, gain)
            put(rows, CUT + row, cut)
            put(rows, SUM + row, 0.0)
            numbers[1, batch, head, first + row] = total
            numbers[2, batch, head, first + row] = peak
            # The eps of the second normaliser, where a row's largest weight is 1.
            added = 0.0
            if second_eps > 0 and most > 0:
                added = np.exp(min(np.log(second_eps) - power * np.log(most), 700.0))
            numbers[3, batch, head, first + row] = added
    sweep(q, k, v, see, batch, head, tile, spans, queries, scores, sums, values, rows, terms, last,
          stage, whole, power, columns)  # fmt: skip
    for row in range(count):
        total = np.float64(get(rows, SUM + row))
        if power > 0:
            inverse = 0.0
            if total > 0:
                inverse = 1.0 / (total + np.float64(numbers[3, batch, head, first + row]))
            numbers[3, batch, head, first + row] = inverse
        else:
            inverse = inverse_first(total, eps)
            numbers[1, batch, head, first + row] = total
        for channel in range(dv):
            out[batch, head, first + row, channel] = get(sums, channel * QUERIES + row) * inverse


def _forward(
    q, k, v, counts, out, numbers, eps, power, whole, warm, second_eps, dead, series, causal,
    window, sinks, row_start, row_end, key_mask, mask, block_index, block_count, block_full,
    q_block, k_block, tiles,
    part, parts, scratch, spans,
):  # fmt: skip
    """Fill one part of out and numbers: every task congruent to `part`."""
    see = Visible(
        causal, window, sinks, row_start, row_end, key_mask, mask, block_index, block_count,
        block_full, q_block, k_block,
    )  # fmt: skip
    batches, heads, per_head = q.shape[0], q.shape[1], tiles.shape[0]
    for task in range(part, batches * heads * per_head, parts):
        pair, tile = task // per_head, tile_at(tiles, task % per_head)
        attend_tile(
            q, k, v, counts, out, numbers, eps, power, whole, warm, second_eps, dead, see, series,
            pair // heads, pair % heads, tile, scratch, spans,
        )  # fmt: skip


@functools.cache
def forward_kernel(real: types.Type) -> Any:
    """The compiled kernel for numbers of type `real`: one signature, whatever the strides."""
    tensor, rows = strided(real, 4), strided(real, 2)
    number, whole = types.float64, types.int64
    signature = types.void(
        tensor, tensor, tensor, rows, tensor, tensor, number, number, whole, whole, number, number,
        strided(real, 1), *VISIBLE, *work_types(real),
    )  # fmt: skip
    return njit(signature, **KERNEL)(_forward)
