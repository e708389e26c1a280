"""The relative engine's backward kernels: dq by rows, dk and dv by keys, dtable by distances.

Every output element is written by one program, so the gradients are the same on every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.fast.engines.flash.triton_tiles import owned_tile, row_tiles, store_rows
from attnspec.fast.engines.flash.triton_visible import LOG2E
from attnspec.fast.engines.relative.triton_bands import (
    VARYING,
    chunk_of,
    key_walk,
    load_within,
    lowest,
    seen_pairs,
    sum_columns,
    unsheared,
    with_bias,
)
from attnspec.fast.engines.relative.triton_rotate import rotate


@triton.jit
def differentiate_tiles(
    begin, end, dq_tile, old, dband, q_tile, dout_tile, row_lse2, row_delta, k_source, v_source,
    table_source, place, factor, table_bias, key_bias, at_table, at_keys, table_rows,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    ROWS: tl.constexpr, CAUSAL: tl.constexpr, ACCESS: tl.constexpr, PRECISION: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """Key tiles begin..end-1 added to dq / scale; `dband` is what the last tile left to `old`."""
    row, low, row_stop, k_tokens, shift, base, band = place
    slant = ROWS - 1 - tl.arange(0, ROWS)
    chunk = chunk_of(slant, ROWS)
    for i in range(begin, end):
        at = base + i * 64
        band_tile = load_within(table_source, band + (i + 1) * 64, 64, WIDTH, D, ACCESS)
        k_tile = load_within(k_source, at, 64, WIDTH, D, ACCESS)
        v_tile = load_within(v_source, at, 64, WIDTH_V, DV, ACCESS)
        new = tl.dot(q_tile, band_tile.T, input_precision=PRECISION)
        new = with_bias(new, table_bias, at_table, band + (i + 1) * 64, table_rows)
        scores = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)
        dweights = tl.dot(dout_tile, v_tile.T, input_precision=PRECISION)
        ring = rotate(tl.where(chunk == 1, new, old), slant, ROWS)
        ring = with_bias(ring, key_bias, at_keys, at, k_tokens)
        scores = tl.fma(scores, 1.0, ring)
        old = new
        weights = tl.exp2(scores * factor - row_lse2[:, None])
        dscores = weights * (dweights - row_delta[:, None])
        if EDGE:
            key = at + tl.arange(0, 64)
            seen = seen_pairs(
                row[:, None], key[None, :], low[:, None], row_stop, k_tokens, shift, CAUSAL
            )
            dscores = tl.where(seen, dscores, 0.0)
        dq_tile = tl.dot(dscores.to(k_tile.dtype), k_tile, dq_tile, input_precision=PRECISION)
        to_old, to_new = unsheared(dscores, slant, ROWS)
        band_tile = load_within(table_source, band + i * 64, 64, WIDTH, D, ACCESS)
        dband = (dband + to_old).to(band_tile.dtype)
        dq_tile = tl.dot(dband, band_tile, dq_tile, input_precision=PRECISION)
        dband = to_new
    return dq_tile, old, dband


@triton.jit(do_not_specialize=VARYING)
def relative_dq_kernel(
    q, k, v, table, table_bias, key_bias, dout, lse2, delta, dq, row_start,
    q_stride_b, q_stride_h, q_stride_t, q_stride_d,
    k_stride_b, k_stride_h, k_stride_t, k_stride_d,
    v_stride_b, v_stride_h, v_stride_t, v_stride_d,
    table_stride_b, table_stride_h, table_stride_t, table_stride_d,
    dout_stride_b, dout_stride_h, dout_stride_t, dout_stride_d,
    q_tokens, k_tokens, table_rows, tiles, sequences, section, zero, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, TABLE_HEADS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    ROWS: tl.constexpr, CAUSAL: tl.constexpr, ACCESS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one tile of rows: ds = p (dout . v - delta), dq = scale * (ds k + band of ds table)."""
    tile, sequence = owned_tile(tl.program_id(0), tiles, sequences, section, 0)
    b, h = sequence // HEADS, sequence % HEADS
    if CAUSAL:
        tile = tiles - 1 - tile
    first = tile * ROWS
    stop = tl.minimum(first + ROWS, q_tokens)
    shift = k_tokens - q_tokens
    row = first + tl.arange(0, ROWS)
    low = lowest(row, row_start, stop)
    ends = lowest(first + (stop - 1 - first) * tl.arange(0, 2), row_start, stop)
    base, count, full_from, full_to = key_walk(
        first, stop, tl.min(ends, axis=0), tl.max(ends, axis=0), k_tokens, shift, CAUSAL
    )
    h_table = h if TABLE_HEADS > 1 else h * 0
    q_source = (q, b, h, stop, q_stride_b, q_stride_h, q_stride_t, q_stride_d)
    dout_source = (dout, b, h, stop, dout_stride_b, dout_stride_h, dout_stride_t, dout_stride_d)
    k_source = (k, b, h // GROUP, k_tokens, k_stride_b, k_stride_h, k_stride_t, k_stride_d)
    v_source = (v, b, h // GROUP, k_tokens, v_stride_b, v_stride_h, v_stride_t, v_stride_d)
    table_source = (
        table, b * 0, h_table, table_rows,
        table_stride_b, table_stride_h, table_stride_t, table_stride_d,
    )  # fmt: skip
    q_tile = load_within(q_source, first, ROWS, WIDTH, D, ACCESS)
    dout_tile = load_within(dout_source, first, ROWS, WIDTH_V, DV, ACCESS)
    at_row = (b * HEADS + h).to(tl.int64) * q_tokens + row
    row_lse2 = tl.load(lse2 + at_row, mask=row < stop, other=float("inf"))
    row_delta = tl.load(delta + at_row, mask=row < stop, other=0.0)
    band = zero + base - first - shift - (ROWS - 1)
    band_tile = load_within(table_source, band, 64, WIDTH, D, ACCESS)
    old = tl.dot(q_tile, band_tile.T, input_precision=PRECISION)
    at_table = h_table.to(tl.int64) * table_rows
    at_keys = (b * HEADS + h).to(tl.int64) * k_tokens
    old = with_bias(old, table_bias, at_table, band, table_rows)
    dband = tl.zeros([ROWS, 64], tl.float32)
    dq_tile = tl.zeros([ROWS, WIDTH], tl.float32)
    place = (row, low, stop, k_tokens, shift, base, band)
    factor = scale * LOG2E
    if row_start is not None:
        dq_tile, old, dband = differentiate_tiles(
            0, full_from, dq_tile, old, dband, q_tile, dout_tile, row_lse2, row_delta,
            k_source, v_source, table_source, place, factor,
            table_bias, key_bias, at_table, at_keys, table_rows,
            D, DV, WIDTH, WIDTH_V, ROWS, CAUSAL, ACCESS, PRECISION, True,
        )  # fmt: skip
    dq_tile, old, dband = differentiate_tiles(
        full_from, full_to, dq_tile, old, dband, q_tile, dout_tile, row_lse2, row_delta,
        k_source, v_source, table_source, place, factor,
        table_bias, key_bias, at_table, at_keys, table_rows,
        D, DV, WIDTH, WIDTH_V, ROWS, CAUSAL, ACCESS, PRECISION, False,
    )  # fmt: skip
    dq_tile, old, dband = differentiate_tiles(
        full_to, count, dq_tile, old, dband, q_tile, dout_tile, row_lse2, row_delta,
        k_source, v_source, table_source, place, factor,
        table_bias, key_bias, at_table, at_keys, table_rows,
        D, DV, WIDTH, WIDTH_V, ROWS, CAUSAL, ACCESS, PRECISION, True,
    )  # fmt: skip
    band_tile = load_within(table_source, band + count * 64, 64, WIDTH, D, ACCESS)
    dq_tile = tl.dot(dband.to(band_tile.dtype), band_tile, dq_tile, input_precision=PRECISION)
    store_rows(dq, dq_tile * scale, at_row, row < stop, WIDTH, D)


@triton.jit(do_not_specialize=VARYING)
def relative_dkdv_kernel(
    q, k, v, table, table_bias, key_bias, dout, lse2, delta, dk, dv, dkey_bias, row_start, row_end,
    q_stride_b, q_stride_h, q_stride_t, q_stride_d,
    k_stride_b, k_stride_h, k_stride_t, k_stride_d,
    v_stride_b, v_stride_h, v_stride_t, v_stride_d,
    table_stride_b, table_stride_h, table_stride_t, table_stride_d,
    dout_stride_b, dout_stride_h, dout_stride_t, dout_stride_d,
    q_tokens, k_tokens, table_rows, tiles, sequences, section, zero, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, TABLE_HEADS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    ROWS: tl.constexpr, CAUSAL: tl.constexpr, ACCESS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys from one query head: dv = p' dout, dk = scale ds' q."""
    tile, sequence = owned_tile(tl.program_id(0), tiles, sequences, section, 0)
    b, h = sequence // HEADS, sequence % HEADS
    first = tile * 64
    stop = tl.minimum(first + 64, k_tokens)
    shift = k_tokens - q_tokens
    base, _, count, full_from, full_to = row_tiles(
        first, stop, 0, 0, shift, q_tokens, None, None, row_end, None, ROWS, CAUSAL, False
    )
    h_table = h if TABLE_HEADS > 1 else h * 0
    q_source = (q, b, h, q_tokens, q_stride_b, q_stride_h, q_stride_t, q_stride_d)
    dout_source = (
        dout, b, h, q_tokens, dout_stride_b, dout_stride_h, dout_stride_t, dout_stride_d
    )  # fmt: skip
    k_source = (k, b, h // GROUP, stop, k_stride_b, k_stride_h, k_stride_t, k_stride_d)
    v_source = (v, b, h // GROUP, stop, v_stride_b, v_stride_h, v_stride_t, v_stride_d)
    table_source = (
        table, b * 0, h_table, table_rows,
        table_stride_b, table_stride_h, table_stride_t, table_stride_d,
    )  # fmt: skip
    key = first + tl.arange(0, 64)
    k_tile = load_within(k_source, first, 64, WIDTH, D, ACCESS)
    v_tile = load_within(v_source, first, 64, WIDTH_V, DV, ACCESS)
    dk_tile = tl.zeros([64, WIDTH], tl.float32)
    dv_tile = tl.zeros([64, WIDTH_V], tl.float32)
    slant = ROWS - 1 - tl.arange(0, ROWS)
    chunk = chunk_of(slant, ROWS)
    at_head = (b * HEADS + h).to(tl.int64) * q_tokens
    at_table = h_table.to(tl.int64) * table_rows
    at_keys = (b * HEADS + h).to(tl.int64) * k_tokens
    sums = tl.zeros([64, 16], tl.float32)
    for i in range(count):
        at = base + i * ROWS
        row = at + tl.arange(0, ROWS)
        band = zero + first - at - shift - (ROWS - 1)
        q_tile = load_within(q_source, at, ROWS, WIDTH, D, ACCESS)
        dout_tile = load_within(dout_source, at, ROWS, WIDTH_V, DV, ACCESS)
        band_tile = load_within(table_source, band, 64, WIDTH, D, ACCESS)
        old = tl.dot(q_tile, band_tile.T, input_precision=PRECISION)
        old = with_bias(old, table_bias, at_table, band, table_rows)
        band_tile = load_within(table_source, band + 64, 64, WIDTH, D, ACCESS)
        new = tl.dot(q_tile, band_tile.T, input_precision=PRECISION)
        new = with_bias(new, table_bias, at_table, band + 64, table_rows)
        scores = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)
        ring = rotate(tl.where(chunk == 1, new, old), slant, ROWS)
        ring = with_bias(ring, key_bias, at_keys, first, stop)
        scores = tl.fma(scores, 1.0, ring)
        row_lse2 = tl.load(lse2 + at_head + row, mask=row < q_tokens, other=float("inf"))
        row_delta = tl.load(delta + at_head + row, mask=row < q_tokens, other=0.0)
        weights = tl.exp2(scores * (scale * LOG2E) - row_lse2[:, None])
        dweights = tl.dot(dout_tile, v_tile.T, input_precision=PRECISION)
        dscores = weights * (dweights - row_delta[:, None])
        if (i < full_from) | (i >= full_to):
            low = lowest(row, row_start, q_tokens)
            seen = seen_pairs(
                row[:, None], key[None, :], low[:, None], q_tokens, stop, shift, CAUSAL
            )
            weights = tl.where(seen, weights, 0.0)
            dscores = tl.where(seen, dscores, 0.0)
        weights = weights.to(dout_tile.dtype)
        dv_tile = tl.dot(weights.T, dout_tile, dv_tile, input_precision=PRECISION)
        dscores = dscores.to(q_tile.dtype)
        dk_tile = tl.dot(dscores.T, q_tile, dk_tile, input_precision=PRECISION)
        if key_bias is not None:
            sums = sum_columns(dscores, sums, ROWS, PRECISION)
    at_key = at_keys + key
    if key_bias is not None:
        tl.store(dkey_bias + at_key, tl.sum(sums, axis=1) * scale, mask=key < stop)
    store_rows(dk, dk_tile * scale, at_key, key < stop, WIDTH, D)
    store_rows(dv, dv_tile, at_key, key < stop, WIDTH_V, DV)


@triton.jit(do_not_specialize=VARYING)
def relative_dtable_kernel(
    q, k, v, table, table_bias, key_bias, dout, lse2, delta, dtable, dtable_bias, row_start,
    q_stride_b, q_stride_h, q_stride_t, q_stride_d,
    k_stride_b, k_stride_h, k_stride_t, k_stride_d,
    v_stride_b, v_stride_h, v_stride_t, v_stride_d,
    table_stride_b, table_stride_h, table_stride_t, table_stride_d,
    dout_stride_b, dout_stride_h, dout_stride_t, dout_stride_d,
    batches, q_tokens, k_tokens, table_rows, tiles, sequences, section, zero, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, TABLE_HEADS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    ROWS: tl.constexpr, CAUSAL: tl.constexpr, ACCESS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of 64 table rows from one query head, over the whole batch.

    Its pairs are a parallelogram: row r of a tile meets column x of the chunk at key start + r + x.
    The products with the table lie there as they are, and those with keys and values are turned.
    """
    tile, sequence = owned_tile(tl.program_id(0), tiles, sequences, section, 0)
    h = sequence
    chunk = tile * 64
    shift = k_tokens - q_tokens
    h_table = h if TABLE_HEADS > 1 else h * 0
    table_source = (
        table, h * 0, h_table, table_rows,
        table_stride_b, table_stride_h, table_stride_t, table_stride_d,
    )  # fmt: skip
    band_tile = load_within(table_source, chunk, 64, WIDTH, D, ACCESS)
    slant = tl.arange(0, ROWS)
    column = tl.arange(0, 64)[None, :]
    # Row i meets keys from chunk - zero + i + shift on, of which one at least must exist.
    begin = tl.maximum(zero - chunk - 63 - shift, 0)
    end = tl.minimum(k_tokens + zero - chunk - shift, q_tokens)
    if CAUSAL:
        end = tl.where(chunk > zero, 0, end)
    at_entry = h_table.to(tl.int64) * table_rows
    grad = tl.zeros([64, WIDTH], tl.float32)
    sums = tl.zeros([64, 16], tl.float32)
    for b in range(batches):
        q_source = (q, b, h, q_tokens, q_stride_b, q_stride_h, q_stride_t, q_stride_d)
        dout_source = (
            dout, b, h, q_tokens, dout_stride_b, dout_stride_h, dout_stride_t, dout_stride_d
        )  # fmt: skip
        k_source = (k, b, h // GROUP, k_tokens, k_stride_b, k_stride_h, k_stride_t, k_stride_d)
        v_source = (v, b, h // GROUP, k_tokens, v_stride_b, v_stride_h, v_stride_t, v_stride_d)
        at_head = (b * HEADS + h).to(tl.int64) * q_tokens
        at_keys = (b * HEADS + h).to(tl.int64) * k_tokens
        for at in range(begin, end, ROWS):
            row = at + slant
            start = chunk - zero + at + shift
            q_tile = load_within(q_source, at, ROWS, WIDTH, D, ACCESS)
            dout_tile = load_within(dout_source, at, ROWS, WIDTH_V, DV, ACCESS)
            k_tile = load_within(k_source, start, 64, WIDTH, D, ACCESS)
            near = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)
            near = with_bias(near, key_bias, at_keys, start, k_tokens)
            k_tile = load_within(k_source, start + 64, 64, WIDTH, D, ACCESS)
            far = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)
            far = with_bias(far, key_bias, at_keys, start + 64, k_tokens)
            scores = rotate(tl.where(column >= slant[:, None], near, far), slant, ROWS)
            scores = with_bias(scores, table_bias, at_entry, chunk, table_rows)
            scores += tl.dot(q_tile, band_tile.T, input_precision=PRECISION)
            v_tile = load_within(v_source, start, 64, WIDTH_V, DV, ACCESS)
            near = tl.dot(dout_tile, v_tile.T, input_precision=PRECISION)
            v_tile = load_within(v_source, start + 64, 64, WIDTH_V, DV, ACCESS)
            far = tl.dot(dout_tile, v_tile.T, input_precision=PRECISION)
            dweights = rotate(tl.where(column >= slant[:, None], near, far), slant, ROWS)
            row_lse2 = tl.load(lse2 + at_head + row, mask=row < q_tokens, other=float("inf"))
            row_delta = tl.load(delta + at_head + row, mask=row < q_tokens, other=0.0)
            weights = tl.exp2(scores * (scale * LOG2E) - row_lse2[:, None])
            dscores = weights * (dweights - row_delta[:, None])
            key = start + slant[:, None] + column
            low = lowest(row, row_start, q_tokens)
            seen = seen_pairs(row[:, None], key, low[:, None], q_tokens, k_tokens, shift, CAUSAL)
            dscores = tl.where(seen, dscores, 0.0).to(q_tile.dtype)
            grad = tl.dot(dscores.T, q_tile, grad, input_precision=PRECISION)
            if table_bias is not None:
                sums = sum_columns(dscores, sums, ROWS, PRECISION)
    at_table = chunk + tl.arange(0, 64)
    at_row = h.to(tl.int64) * table_rows + at_table
    if table_bias is not None:
        inside = at_table < table_rows
        tl.store(dtable_bias + at_row, tl.sum(sums, axis=1) * scale, mask=inside)
    store_rows(dtable, grad * scale, at_row, at_table < table_rows, WIDTH, D)
