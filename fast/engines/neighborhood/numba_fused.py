"""The fused CPU kernels: a run of queries along the last axis against the keys of its windows.

The queries of a run share their windows along the other axes, so the keys they see are rows of the
grid, cut where the run's first window starts and its last one ends. The arithmetic is that of the
flash engine: keys or channels down, queries across in vector registers.
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
    KERNEL,
    KEYS,
    QUERIES,
    add_seen,
    copy_seen,
    row_address,
    strided,
)

RUN = 7
"""Numbers of a run: the entries z, y and first and last x in its dilation group, the group."""


@njit(**INNER)
def window(at, group, size, kernel, step, dilation, causal):
    """Where the window of entry `at` of a dilation group starts and ends."""
    length = size // dilation + (1 if group < size % dilation else 0)
    leader = at // step * step
    if causal:
        return max(min(leader + step - 1, length - 1) - kernel + 1, 0), at + 1
    left = kernel // 2
    right = kernel - 1 - left
    centre = min(max(min(leader + step // 2, length - 1), left), length - 1 - right)
    return centre - left, centre + right + 1


@njit(**INNER)
def axis_window(at, group, axes, axis):
    """`window` on one row of `axes`, (3, 5): length, kernel, stride, dilation, causal."""
    return window(
        at, group, axes[axis, 0], axes[axis, 1], axes[axis, 2], axes[axis, 3], axes[axis, 4] != 0
    )


@njit(**INNER)
def token_of(z, y, x, run, axes):
    """The token of entries z, y, x of a run's dilation group."""
    row = (z * axes[0, 3] + run[4]) * axes[1, 0] + y * axes[1, 3] + run[5]
    return row * axes[2, 0] + x * axes[2, 3] + run[6]


@njit(**INNER)
def take(x, token, count, step):
    """x[:, :, token::step] with `count` tokens."""
    return x[:, :, token : token + (count - 1) * step + 1 : step]


@njit(**INNER)
def list_spans(run, axes, tokens, extra, spans):
    """Fill `spans` (2 * most, 2) with the pieces of rows of keys that the run may see: first token
    and keys, then step and first entry along x, -1 for keys that all see. Returns their number.
    """
    z_start, z_stop = axis_window(run[0], run[4], axes, 0)
    y_start, y_stop = axis_window(run[1], run[5], axes, 1)
    start, _ = axis_window(run[2], run[6], axes, 2)
    _, stop = axis_window(run[3] - 1, run[6], axes, 2)
    count = 0
    for z in range(z_start, z_stop):
        for y in range(y_start, y_stop):
            for x in range(start, stop, KEYS):
                spans[2 * count, 0] = token_of(z, y, x, run, axes)
                spans[2 * count, 1] = min(KEYS, stop - x)
                spans[2 * count + 1, 0] = axes[2, 3]
                spans[2 * count + 1, 1] = x
                count += 1
    for first in range(0, extra, KEYS):
        spans[2 * count, 0] = tokens + first
        spans[2 * count, 1] = min(KEYS, extra - first)
        spans[2 * count + 1, 0] = 1
        spans[2 * count + 1, 1] = -1
        count += 1
    return count


@njit(**INNER)
def hide(run, axes, first, keys, pairs, value):
    """Write `value` over the entries of pairs (keys, QUERIES) that a window does not hold; keys are
    the entries from `first` on along x.
    """
    for row in range(run[3] - run[2]):
        start, stop = axis_window(run[2] + row, run[6], axes, 2)
        for key in range(min(max(start - first, 0), keys)):
            put(pairs, key * QUERIES + row, value)
        for key in range(max(stop - first, 0), keys):
            put(pairs, key * QUERIES + row, value)


def forward_scratch(d: int, dv: int) -> int:
    """Numbers of scratch one part of `forward` needs."""
    return QUERIES * (d + dv + KEYS + 2) + KEYS * dv


def backward_scratch(d_padded: int, dv_padded: int) -> int:
    """Numbers of scratch one part of `backward` needs."""
    return QUERIES * (3 * d_padded + 2 * dv_padded + 2 * KEYS + 2) + KEYS * (d_padded + dv_padded)


@njit(**INNER)
def attend_run(q, k, v, out, lse, scale, axes, run, batch, head, scratch, spans):
    """Output and lse of one run of queries of one head."""
    d, dv, rows, tokens = q.shape[3], v.shape[3], run[3] - run[2], q.shape[2]
    kv_head = head // (q.shape[1] // k.shape[1])
    queries = address(scratch)
    lanes = lane_count(queries)
    columns = (rows + lanes - 1) // lanes * lanes
    sums = offset(queries, QUERIES * d)
    scores = offset(sums, QUERIES * dv)
    most = offset(scores, QUERIES * KEYS)
    total = offset(most, QUERIES)
    seen_values = offset(total, QUERIES)
    first, step = token_of(run[0], run[1], run[2], run, axes), axes[2, 3]
    own = take(q, first, rows, step)
    load_transposed(own, batch, head, 0, rows, scale / math.log(2), columns, queries)
    for row in range(columns):
        put(most, row, -np.inf)
        put(total, row, 0.0)
    for at in range(QUERIES * dv):
        put(sums, at, 0.0)
    for span in range(list_spans(run, axes, tokens, k.shape[2] - tokens, spans)):
        start, keys = spans[2 * span, 0], spans[2 * span, 1]
        stride, entry = spans[2 * span + 1, 0], spans[2 * span + 1, 1]
        some_keys, some_values = take(k, start, keys, stride), take(v, start, keys, stride)
        at, row_step, channel_step = row_address(some_keys, batch, kv_head, 0)
        multiply(at, row_step, channel_step, queries, QUERIES, scores, QUERIES, keys, d, columns,
                 True)  # fmt: skip
        at, row_step, channel_step = row_address(some_values, batch, kv_head, 0)
        finite = True
        if entry >= 0:
            hide(run, axes, entry, keys, scores, -np.inf)
            finite = copy_seen(some_values, batch, kv_head, 0, keys, scores, rows, seen_values)
            at, row_step, channel_step = seen_values, dv, 1
        add_weights(scores, keys, columns, most, total, sums, dv)
        if finite:
            multiply(at, channel_step, row_step, scores, QUERIES, sums, QUERIES, dv, keys, columns,
                     False)  # fmt: skip
        else:
            add_seen(scores, 1, QUERIES, at, row_step, channel_step, sums, 1, QUERIES, rows, keys,
                     dv)  # fmt: skip
    for row in range(rows):
        mass = np.float64(get(total, row))
        token = first + row * step
        lse[batch, head, token] = get(most, row) * math.log(2) + math.log(mass)
        for channel in range(dv):
            out[batch, head, token, channel] = get(sums, channel * QUERIES + row) / mass


def _forward(q, k, v, out, lse, scale, axes, runs, part, parts, scratch, spans):
    """Fill one part of out (batch, heads, tokens, dv) and lse: every task congruent to `part`."""
    per_head = runs.shape[0]
    for task in range(part, q.shape[0] * q.shape[1] * per_head, parts):
        pair, run = task // per_head, runs[task % per_head]
        attend_run(
            q, k, v, out, lse, scale, axes, run, pair // q.shape[1], pair % q.shape[1], scratch,
            spans,
        )  # fmt: skip


@njit(**INNER)
def backward_run(q, k, v, dout, lse, shift, dq, dk, dv, scale, axes, run, batch, head, scratch,
                 spans):  # fmt: skip
    """Write dq of one run of queries of one head, and add to dk and dv of its kv head.

    dk (tokens + extra, d padded) and dv (tokens + extra, dv padded) are the sums of this task.
    """
    d, d_v, rows, tokens = q.shape[3], v.shape[3], run[3] - run[2], q.shape[2]
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
    first, step = token_of(run[0], run[1], run[2], run, axes), axes[2, 3]
    for row in range(columns):
        there, token = row < rows, first + row * step
        put(row_sums, row, lse[batch, head, token] / math.log(2) if there else 0.0)
        put(shifts, row, shift[batch, head, token] if there else 0.0)
    own, upstream = take(q, first, rows, step), take(dout, first, rows, step)
    rows_finite = load_rows(own, batch, head, 0, rows, scale, d_padded, q_rows)
    rows_finite &= load_rows(upstream, batch, head, 0, rows, 1.0, dv_padded, dout_rows)
    load_transposed(own, batch, head, 0, rows, scale / math.log(2), columns, across)
    load_transposed(upstream, batch, head, 0, rows, 1.0, columns, dout_across)
    for at in range(QUERIES * d):
        put(dq_across, at, 0.0)
    for span in range(list_spans(run, axes, tokens, k.shape[2] - tokens, spans)):
        start, keys = spans[2 * span, 0], spans[2 * span, 1]
        stride, entry = spans[2 * span + 1, 0], spans[2 * span + 1, 1]
        some_keys, some_values = take(k, start, keys, stride), take(v, start, keys, stride)
        k_at, k_row, k_step = row_address(some_keys, batch, kv_head, 0)
        v_at, v_row, v_step = row_address(some_values, batch, kv_head, 0)
        multiply(k_at, k_row, k_step, across, QUERIES, weights, QUERIES, keys, d, columns, True)
        finite = True
        if entry >= 0:
            hide(run, axes, entry, keys, weights, -np.inf)
            finite = rows_finite
            finite &= copy_seen(some_keys, batch, kv_head, 0, keys, weights, rows, keys_copy)
            finite &= copy_seen(some_values, batch, kv_head, 0, keys, weights, rows, values_copy)
            k_at, k_row, k_step = keys_copy, d, 1
            v_at, v_row, v_step = values_copy, d_v, 1
        weigh(weights, keys, columns, row_sums)
        multiply(v_at, v_row, v_step, dout_across, QUERIES, grads, QUERIES, keys, d_v, columns,
                 True)  # fmt: skip
        differentiate(weights, grads, keys, columns, shifts)
        if entry >= 0:
            hide(run, axes, entry, keys, grads, 0.0)
        dk_at, dv_at = address(dk[start:]), address(dv[start:])
        dk_row, dv_row = stride * d_padded, stride * dv_padded
        if finite:
            multiply(weights, QUERIES, 1, dout_rows, dv_padded, dv_at, dv_row, keys, rows,
                     dv_padded, False)  # fmt: skip
            multiply(grads, QUERIES, 1, q_rows, d_padded, dk_at, dk_row, keys, rows, d_padded,
                     False)  # fmt: skip
            multiply(k_at, k_step, k_row, grads, QUERIES, dq_across, QUERIES, d, keys, columns,
                     False)  # fmt: skip
        else:
            add_seen(weights, QUERIES, 1, dout_rows, dv_padded, 1, dv_at, dv_row, 1, keys, rows,
                     d_v)  # fmt: skip
            add_seen(grads, QUERIES, 1, q_rows, d_padded, 1, dk_at, dk_row, 1, keys, rows,
                     d)  # fmt: skip
            add_seen(grads, 1, QUERIES, k_at, k_row, k_step, dq_across, 1, QUERIES, rows, keys,
                     d)  # fmt: skip
    for row in range(rows):
        for channel in range(d):
            value = get(dq_across, channel * QUERIES + row) * scale
            dq[batch, head, first + row * step, channel] = value


def _backward(q, k, v, dout, lse, shift, dq, dk, dv, scale, axes, runs, part, parts, scratch,
              spans):  # fmt: skip
    """Fill one part of dq, and add to its zeros in dk (shares, batch, kv_heads, tokens + extra,
    d padded) and in dv; share s of a kv head takes the runs congruent to s.
    """
    shares, kv_heads = dk.shape[0], dk.shape[2]
    group = q.shape[1] // kv_heads
    for task in range(part, shares * dk.shape[1] * kv_heads, parts):
        share, pair = task % shares, task // shares
        batch, kv_head = pair // kv_heads, pair % kv_heads
        for head in range(kv_head * group, (kv_head + 1) * group):
            for index in range(share, runs.shape[0], shares):
                backward_run(
                    q, k, v, dout, lse, shift, dq, dk[share, batch, kv_head],
                    dv[share, batch, kv_head], scale, axes, runs[index], batch, head, scratch,
                    spans,
                )  # fmt: skip


TABLE = types.int64[:, ::1]


@functools.cache
def forward_kernel(real: types.Type) -> Any:
    """The compiled kernel for numbers of type `real`: one signature, whatever the strides."""
    tensor = strided(real, 4)
    signature = types.void(
        tensor, tensor, tensor, tensor, strided(real, 3), types.float64, TABLE, TABLE, types.int64,
        types.int64, real[::1], TABLE,
    )  # fmt: skip
    return njit(signature, **KERNEL)(_forward)


@functools.cache
def backward_kernel(real: types.Type) -> Any:
    """The compiled kernel for numbers of type `real`: one signature, whatever the strides."""
    tensor, rows, sums = strided(real, 4), strided(real, 3), real[:, :, :, :, ::1]
    signature = types.void(
        tensor, tensor, tensor, tensor, rows, rows, tensor, sums, sums, types.float64, TABLE, TABLE,
        types.int64, types.int64, real[::1], TABLE,
    )  # fmt: skip
    return njit(signature, **KERNEL)(_backward)
