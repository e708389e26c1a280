"""The relative engine's forward kernel: one program owns a tile of rows of one query head.

Its key tiles follow one another, so the products with one new chunk of 64 table rows a tile are
enough: one tensor-core product more than attention without a band, and a turn (`triton_rotate`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnspec.fast.engines.flash.triton_forward import finish, online_softmax
from attnspec.fast.engines.flash.triton_tiles import owned_tile, store_rows
from attnspec.fast.engines.flash.triton_visible import LOG2E
from attnspec.fast.engines.relative import triton_launch as host
from attnspec.fast.engines.relative.triton_bands import (
    VARYING,
    chunk_of,
    key_walk,
    load_within,
    lowest,
    seen_pairs,
    with_bias,
)
from attnspec.fast.engines.relative.triton_rotate import rotate


@triton.jit
def attend_tiles(
    begin, end, sums, bands, q_tile, k_source, v_source, table_source, place, factor,
    table_bias, key_bias, at_table, at_keys, table_rows,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    ROWS: tl.constexpr, CAUSAL: tl.constexpr, ACCESS: tl.constexpr, PRECISION: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """Key tiles begin..end-1 added to sums = (maxima, denominators, values).

    `bands` are the products with the newest chunk, and what this tile and the next one need of the
    chunks before it, element by element. EDGE tiles look at every pair.
    """
    top, total, mixed = sums
    new, waiting, later = bands
    row, low, row_stop, k_tokens, shift, base, band = place
    NEWEST: tl.constexpr = 2 if ROWS > 64 else 1
    slant = ROWS - 1 - tl.arange(0, ROWS)
    chunk = chunk_of(slant, ROWS)
    for i in range(begin, end):
        at = base + i * 64
        k_tile = load_within(k_source, at, 64, WIDTH, D, ACCESS)
        scores = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)
        ring = rotate(tl.where(chunk == NEWEST, new, waiting), slant & 63, ROWS)
        ring = with_bias(ring, key_bias, at_keys, at, k_tokens)
        # Not a plain sum, which would become the start of the product and make it wait.
        scores = tl.fma(scores, 1.0, ring)
        # Each element keeps the chunks that it still needs. Passing `new` on as it is would keep
        # the loads of the loop from being pipelined.
        if ROWS > 64:
            waiting = tl.where(chunk == 0, later, new)
            later = tl.where(chunk == 0, new, later)
        else:
            waiting = tl.where(chunk == 0, new, waiting)
        if EDGE:
            key = at + tl.arange(0, 64)
            seen = seen_pairs(
                row[:, None], key[None, :], low[:, None], row_stop, k_tokens, shift, CAUSAL
            )
            scores = tl.where(seen, scores, -float("inf"))
        weights, top, total, rescale = online_softmax(scores, top, total, factor)
        v_tile = load_within(v_source, at, 64, WIDTH_V, DV, ACCESS)
        weights = weights.to(v_tile.dtype)
        mixed = tl.dot(weights, v_tile, mixed * rescale[:, None], input_precision=PRECISION)
        # One tile ahead, so that this product runs beside the others.
        band_tile = load_within(table_source, band + (i + 1) * 64, 64, WIDTH, D, ACCESS)
        new = tl.dot(q_tile, band_tile.T, input_precision=PRECISION)
        new = with_bias(new, table_bias, at_table, band + (i + 1) * 64, table_rows)
    return (top, total, mixed), (new, waiting, later)


@triton.jit(do_not_specialize=VARYING)
def relative_forward_kernel(
    q, k, v, table, table_bias, key_bias, out, lse, row_start,
    q_stride_b, q_stride_h, q_stride_t, q_stride_d,
    k_stride_b, k_stride_h, k_stride_t, k_stride_d,
    v_stride_b, v_stride_h, v_stride_t, v_stride_d,
    table_stride_b, table_stride_h, table_stride_t, table_stride_d,
    q_tokens, k_tokens, table_rows, tiles, sequences, section, zero, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, TABLE_HEADS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    ROWS: tl.constexpr, CAUSAL: tl.constexpr, ACCESS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
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
    k_source = (k, b, h // GROUP, k_tokens, k_stride_b, k_stride_h, k_stride_t, k_stride_d)
    v_source = (v, b, h // GROUP, k_tokens, v_stride_b, v_stride_h, v_stride_t, v_stride_d)
    table_source = (
        table, b * 0, h_table, table_rows,
        table_stride_b, table_stride_h, table_stride_t, table_stride_d,
    )  # fmt: skip
    q_tile = load_within(q_source, first, ROWS, WIDTH, D, ACCESS)
    # Pair (row 0, key base) needs table row zero + base - first - shift, the last row one that lies
    # ROWS - 1 before. The newest of a tile's two chunks, three for more than 64 rows, begins at
    # band + 64 i for tile i.
    WIDE: tl.constexpr = 1 if ROWS > 64 else 0
    band = zero + base - first - shift - (ROWS - 1) + 64 * (1 + WIDE)
    band_tile = load_within(table_source, band, 64, WIDTH, D, ACCESS)
    new = tl.dot(q_tile, band_tile.T, input_precision=PRECISION)
    at_table = h_table.to(tl.int64) * table_rows
    at_keys = (b * HEADS + h).to(tl.int64) * k_tokens
    new = with_bias(new, table_bias, at_table, band, table_rows)
    band_tile = load_within(table_source, band - 64, 64, WIDTH, D, ACCESS)
    waiting = tl.dot(q_tile, band_tile.T, input_precision=PRECISION)
    waiting = with_bias(waiting, table_bias, at_table, band - 64, table_rows)
    later = waiting
    if WIDE:
        band_tile = load_within(table_source, band - 128, 64, WIDTH, D, ACCESS)
        oldest = tl.dot(q_tile, band_tile.T, input_precision=PRECISION)
        oldest = with_bias(oldest, table_bias, at_table, band - 128, table_rows)
        waiting = tl.where(chunk_of(ROWS - 1 - tl.arange(0, ROWS), ROWS) == 0, oldest, waiting)
    top = tl.full([ROWS], -float("inf"), tl.float32)
    sums = (top, tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, WIDTH_V], tl.float32))
    bands = (new, waiting, later)
    place = (row, low, stop, k_tokens, shift, base, band)
    factor = scale * LOG2E
    if row_start is not None:
        sums, bands = attend_tiles(
            0, full_from, sums, bands, q_tile, k_source, v_source, table_source, place, factor,
            table_bias, key_bias, at_table, at_keys, table_rows,
            D, DV, WIDTH, WIDTH_V, ROWS, CAUSAL, ACCESS, PRECISION, True,
        )  # fmt: skip
    sums, bands = attend_tiles(
        full_from, full_to, sums, bands, q_tile, k_source, v_source, table_source, place, factor,
        table_bias, key_bias, at_table, at_keys, table_rows,
        D, DV, WIDTH, WIDTH_V, ROWS, CAUSAL, ACCESS, PRECISION, False,
    )  # fmt: skip
    sums, bands = attend_tiles(
        full_to, count, sums, bands, q_tile, k_source, v_source, table_source, place, factor,
        table_bias, key_bias, at_table, at_keys, table_rows,
        D, DV, WIDTH, WIDTH_V, ROWS, CAUSAL, ACCESS, PRECISION, True,
    )  # fmt: skip
    log_total, mixed = finish(sums, None, h)
    at_row = (b * HEADS + h).to(tl.int64) * q_tokens + row
    tl.store(lse + at_row, log_total, mask=row < stop)
    store_rows(out, mixed, at_row, row < stop, WIDTH_V, DV)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    table_bias: Tensor | None,
    key_bias: Tensor | None,
    zero: int,
    scale: float,
    causal: bool,
    row_start: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """out (batch, heads, q_tokens, dv) in q's dtype and lse (batch, heads, q_tokens) in float32."""
    if host.can_specialise(q, v):
        # Not every Triton has what this module is written in.
        from attnspec.fast.engines.relative import triton_specialised_host

        return triton_specialised_host.forward(
            q, k, v, table, table_bias, key_bias, zero, scale, causal, row_start
        )
    batch, heads, q_tokens, d = q.shape
    out = q.new_empty(batch, heads, q_tokens, v.shape[3])
    lse = q.new_empty(batch, heads, q_tokens, dtype=torch.float32)
    chosen = host.choose_config("forward", q, v)
    walked = k.shape[2] * (2 * d + v.shape[3]) * q.element_size()
    place = host.grid(q_tokens, chosen.rows, batch * heads, walked)
    arguments = {
        **host.inputs(q, k, v, table, chosen),
        **host.shared_arguments(q, k, v, chosen, zero, scale, causal),
        **place,
        "row_start": row_start,
        "table_bias": table_bias,
        "key_bias": key_bias,
        "out": out,
        "lse": lse,
    }
    host.launch(relative_forward_kernel, place["tiles"] * batch * heads, chosen, arguments)
    return out, lse
