"""The softplus engine's backward CPU kernel: two sweeps over a tile's keys if it is sharpened.

See `triton_gradients` for the formulas: the first sweep finds what the first normaliser takes back
from each row, the second the gradients.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import njit, types

from attnspec.fast.engines.flash.numba_backward import load_rows
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
    over,
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
    copy_seen,
    hide,
    list_spans,
    row_address,
    span_state,
    strided,
    tile_at,
    work_types,
)
from attnspec.fast.engines.softplus.numba_kernels import (
    BARE,
    CUT,
    DELTA,
    GAIN,
    MASS,
    MEAN,
    ONE,
    PEAK,
    ROW_NUMBERS,
    SUM,
    TAKEN,
    TERMS,
    ZERO,
    inverse_first,
    multiplied,
    second_terms,
    soft,
    spread_terms,
)


def backward_scratch(d_padded: int, dv_padded: int) -> int:
    """Numbers of scratch one part of `backward` needs."""
    tiles = QUERIES * (3 * d_padded + 2 * dv_padded + 3 * KEYS + ROW_NUMBERS)
    return tiles + 16 * TERMS + KEYS * (d_padded + dv_padded)


@njit(**INNER)
def slopes_of(scores, grads, derivatives, keys, columns, rows, terms, last, sharp, whole, power):
    """From base-2 scores and the gradients g of weights: scores become weights before their factor,
    grads become g - delta, derivatives those of weights, all (keys, QUERIES); the last row of
    numbers, TAKEN, is left alone.
    """
    half = load(terms, 16 * (last + 1))
    for column in range(0, columns, lane_count(scores)):
        zero, one = load(rows, ZERO + column), load(rows, ONE + column)
        gain, cut = load(rows, GAIN + column), load(rows, CUT + column)
        delta = load(rows, DELTA + column)
        for key in range(keys):
            at = key * QUERIES + column
            weight = soft(load(scores, at), zero, terms, last, half)
            store(grads, at, subtract(load(grads, at), delta))
            if sharp:
                excess = larger(subtract(times(weight, gain), cut), zero)
                store(scores, at, excess)
                store(derivatives, at, multiplied(excess, one, max(whole - 1, 0)))
            else:
                store(scores, at, weight)
                store(derivatives, at, one)
    if sharp:
        for key in range(keys):
            for row in range(columns):
                at = key * QUERIES + row
                excess = get(scores, at)
                derivative = get(derivatives, at)
                if excess <= 0:
                    derivative = 0.0
                elif whole < 0:
                    derivative = excess ** (power - 1.0)
                put(derivatives, at, derivative)
                put(scores, at, derivative * excess)


@njit(**INNER)
def finish_slopes(scores, grads, derivatives, keys, columns, rows):
    """grads become (m - c) times the slope of softplus, given scores and m / gain in the rows."""
    for column in range(0, columns, lane_count(scores)):
        zero, one = load(rows, ZERO + column), load(rows, ONE + column)
        taken, factor = load(rows, TAKEN + column), load(rows, SUM + column)
        for key in range(keys):
            at = key * QUERIES + column
            m = times(times(load(derivatives, at), load(grads, at)), factor)
            bent = add(one, exp2(subtract(zero, load(scores, at))))
            store(grads, at, over(subtract(m, taken), bent))


@njit(**INNER)
def add_mean(weights, grads, keys, columns, rows):
    """Add each row's sum of weights to MASS, and times g less DELTA to MEAN."""
    for column in range(0, columns, lane_count(weights)):
        mean, mass = load(rows, MEAN + column), load(rows, MASS + column)
        for key in range(keys):
            at = key * QUERIES + column
            weight = load(weights, at)
            mass = add(mass, weight)
            mean = add(mean, times(weight, load(grads, at)))
        store(rows, MEAN + column, mean)
        store(rows, MASS + column, mass)


@njit(**INNER)
def add_taken(scores, grads, derivatives, keys, columns, rows, terms, last):
    """Add each row's sum of softplus scores times derivatives to BARE, and so with g to TAKEN."""
    half = load(terms, 16 * (last + 1))
    for column in range(0, columns, lane_count(scores)):
        zero = load(rows, ZERO + column)
        taken, bare = load(rows, TAKEN + column), load(rows, BARE + column)
        for key in range(keys):
            at = key * QUERIES + column
            steep = times(soft(load(scores, at), zero, terms, last, half), load(derivatives, at))
            bare = add(bare, steep)
            taken = add(taken, times(steep, load(grads, at)))
        store(rows, TAKEN + column, taken)
        store(rows, BARE + column, bare)


@njit(**INNER)
def backward_tile(q, k, v, dout, counts, numbers, delta, dq, dk, dv, eps, power, whole, warm, dead,
                  see, series, batch, head, tile, scratch, spans):  # fmt: skip
    """Write dq of one tile of one head, and add to dk and dv of its kv head, all of them those of
    the prepared queries and keys.
    """
    first, last_row = tile[0], tile[1]
    d, d_v, count = q.shape[3], v.shape[3], last_row - first
    d_padded, dv_padded = dk.shape[1], dv.shape[1]
    kv_head = head // (q.shape[1] // k.shape[1])
    across = address(scratch)
    lanes = lane_count(across)
    columns = (count + lanes - 1) // lanes * lanes
    dout_across = offset(across, QUERIES * d_padded)
    dq_across = offset(dout_across, QUERIES * dv_padded)
    q_rows = offset(dq_across, QUERIES * d_padded)
    dout_rows = offset(q_rows, QUERIES * d_padded)
    weights = offset(dout_rows, QUERIES * dv_padded)
    grads = offset(weights, QUERIES * KEYS)
    derivatives = offset(grads, QUERIES * KEYS)
    rows = offset(derivatives, QUERIES * KEYS)
    terms = offset(rows, QUERIES * ROW_NUMBERS)
    keys_copy = offset(terms, 16 * TERMS)
    values_copy = offset(keys_copy, KEYS * d_padded)
    spread_terms(series, terms)
    last = series.size - 2
    for row in range(columns):
        there = row < count
        put(rows, ZERO + row, 0.0)
        put(rows, ONE + row, 1.0)
        put(rows, TAKEN + row, 0.0)
        put(rows, MEAN + row, 0.0)
        put(rows, BARE + row, 0.0)
        put(rows, MASS + row, 0.0)
        put(rows, DELTA + row, delta[batch, head, first + row] if there else 0.0)
        total = numbers[1, batch, head, first + row] if there else 0.0
        inverse, gain, cut = inverse_first(total, eps), 0.0, 0.0
        factor = inverse
        if power > 0:
            inverse, factor = 0.0, 0.0
            if there:
                peak = numbers[2, batch, head, first + row]
                gain, cut, _ = second_terms(total, peak, counts[batch, first + row], eps, warm,
                                            dead)  # fmt: skip
                inverse = numbers[3, batch, head, first + row]
                factor = inverse * gain * power
        put(rows, GAIN + row, gain)
        put(rows, CUT + row, cut)
        put(rows, PEAK + row, inverse)
        put(rows, SUM + row, factor)
    load_rows(q, batch, head, first, count, 1.0, d_padded, q_rows)
    load_rows(dout, batch, head, first, count, 1.0, dv_padded, dout_rows)
    load_transposed(q, batch, head, first, last_row, 1.0, columns, across)
    load_transposed(dout, batch, head, first, last_row, 1.0, columns, dout_across)
    for row in range(count):
        for channel in range(dv_padded):
            # dv is weighed by what the second, or the only, normaliser leaves.
            at = row * dv_padded + channel
            put(dout_rows, at, get(dout_rows, at) * get(rows, PEAK + row))
    for at in range(QUERIES * d):
        put(dq_across, at, 0.0)
    for final in range(0 if power > 0 else 1, 2):
        for span in range(list_spans(see, batch, head, tile, spans)):
            start, stop = spans[span, 0], spans[span, 1]
            state = span_state(see, batch, head, tile, start, stop)
            if state == SKIPPED:
                continue
            keys = stop - start
            k_at, k_row, k_step = row_address(k, batch, kv_head, start)
            v_at, v_row, v_step = row_address(v, batch, kv_head, start)
            multiply(k_at, k_row, k_step, across, QUERIES, weights, QUERIES, keys, d, columns, True)
            if state != FULL:
                hide(see, batch, head, tile, start, stop, weights, -np.inf)
                copy_seen(k, batch, kv_head, start, stop, weights, count, keys_copy)
                copy_seen(v, batch, kv_head, start, stop, weights, count, values_copy)
                k_at, k_row, k_step = keys_copy, d, 1
                v_at, v_row, v_step = values_copy, d_v, 1
            multiply(v_at, v_row, v_step, dout_across, QUERIES, grads, QUERIES, keys, d_v, columns,
                     True)  # fmt: skip
            slopes_of(weights, grads, derivatives, keys, columns, rows, terms, last, power > 0,
                      whole, power)  # fmt: skip
            if not final:
                add_mean(weights, grads, keys, columns, rows)
            else:
                multiply(weights, QUERIES, 1, dout_rows, dv_padded, address(dv[start:]), dv_padded,
                         keys, count, dv_padded, False)  # fmt: skip
            multiply(k_at, k_row, k_step, across, QUERIES, weights, QUERIES, keys, d, columns, True)
            if state != FULL:
                hide(see, batch, head, tile, start, stop, weights, -np.inf)
                hide(see, batch, head, tile, start, stop, derivatives, 0.0)
            if not final:
                add_taken(weights, grads, derivatives, keys, columns, rows, terms, last)
                continue
            finish_slopes(weights, grads, derivatives, keys, columns, rows)
            if state != FULL:
                hide(see, batch, head, tile, start, stop, grads, 0.0)
            multiply(grads, QUERIES, 1, q_rows, d_padded, address(dk[start:]), d_padded, keys,
                     count, d_padded, False)  # fmt: skip
            multiply(k_at, k_step, k_row, grads, QUERIES, dq_across, QUERIES, d, keys, columns,
                     False)  # fmt: skip
        if not final:
            # The rounded output's delta is not good enough for a sharpened row: correct it.
            for row in range(count):
                inverse, rough = get(rows, PEAK + row), get(rows, DELTA + row)
                row_delta = get(rows, MEAN + row) * inverse
                row_delta += rough * (get(rows, MASS + row) * inverse - 1.0)
                taken = get(rows, TAKEN + row) - row_delta * get(rows, BARE + row)
                total = numbers[1, batch, head, first + row]
                taken = taken * get(rows, SUM + row) * inverse_first(total, eps)
                put(rows, DELTA + row, rough + row_delta)
                put(rows, TAKEN + row, taken)
    for row in range(count):
        for channel in range(d):
            dq[batch, head, first + row, channel] = get(dq_across, channel * QUERIES + row)


def _backward(
    q, k, v, dout, counts, numbers, delta, dq, dk, dv, eps, power, whole, warm, dead, series,
    causal, window, sinks, row_start, row_end, key_mask, mask, block_index, block_count,
    block_full, q_block, k_block,
    tiles, part, parts, scratch, spans,
):  # fmt: skip
    """Fill one part of dq, and add to dk and dv (shares, batch, kv_heads, k_tokens, padded), as
    the flash engine's `_backward`.
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
                    q, k, v, dout, counts, numbers, delta, dq, dk[share, batch, kv_head],
                    dv[share, batch, kv_head], eps, power, whole, warm, dead, see, series, batch,
                    head, tile_at(tiles, index), scratch, spans,
                )  # fmt: skip


@functools.cache
def backward_kernel(real: types.Type) -> Any:
    """The compiled kernel for numbers of type `real`: one signature, whatever the strides."""
    tensor, rows, sums = strided(real, 4), strided(real, 2), real[:, :, :, :, ::1]
    number, whole = types.float64, types.int64
    signature = types.void(
        tensor, tensor, tensor, tensor, rows, tensor, strided(real, 3), tensor, sums, sums, number,
        number, whole, whole, number, strided(real, 1), *VISIBLE, *work_types(real),
    )  # fmt: skip
    return njit(signature, **KERNEL)(_backward)
