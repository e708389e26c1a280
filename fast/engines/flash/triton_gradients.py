"""The flash engine's backward kernels: row sums first, then dq by rows, then dk and dv by keys.

Every output element is written by one program, so the gradients are the same on every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.fast.engines.flash.triton_tiles import (
    VARYING,
    extent,
    key_tile,
    load_numbers,
    load_rows,
    owned_tile,
    plan_columns,
    plan_rows,
    row_tile,
    row_tiles,
    store_rows,
)
from attnspec.fast.engines.flash.triton_visible import (
    LOG2E,
    add_bias,
    end_key,
    finite_rows,
    has_nan,
    lowest_key,
    nan_flag,
    positions,
    seen_rows,
    visible,
    visible_to,
)


@triton.jit(do_not_specialize=["rows", "q_tokens", "sums_stride", "dout_stride_b", "dout_stride_h"])
def flash_rows_kernel(
    dout, out, lse, dlse, lse2, delta,
    dout_stride_b, dout_stride_h, dout_stride_t, dout_stride_d, rows, q_tokens, sums_stride,
    HEADS: tl.constexpr, DV: tl.constexpr, WIDTH_V: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Per row: lse in base 2, and dout . out - dlse. An empty row gets lse +inf, so weights 0.

    `sums_stride` separates the heads of both.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, WIDTH_V)
    inside = (row < rows)[:, None] & (channel < DV)[None, :]
    head = row // q_tokens
    at = head // HEADS * dout_stride_b + head % HEADS * dout_stride_h
    at = (at + row % q_tokens * dout_stride_t)[:, None] + channel[None, :] * dout_stride_d
    upstream = tl.load(dout + at, mask=inside, other=0.0).to(tl.float32)
    output = tl.load(out + row[:, None] * DV + channel[None, :], mask=inside, other=0.0)
    log_total = tl.load(lse + row, mask=row < rows, other=-float("inf"))
    inner = tl.sum(upstream * output.to(tl.float32), axis=1)
    if dlse is not None:
        inner -= tl.load(dlse + row, mask=row < rows, other=0.0)
    empty = log_total == -float("inf")
    at_sums = head * sums_stride + row % q_tokens
    tl.store(delta + at_sums, tl.where(empty, 0.0, inner), mask=row < rows)
    tl.store(lse2 + at_sums, tl.where(empty, float("inf"), log_total * LOG2E), mask=row < rows)


@triton.jit
def differentiate_tiles(
    count, dq_tile, q_tile, dout_tile, row_lse2, row_delta, k_source, v_source, walk, who, scale,
    tainted,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    KEYS: tl.constexpr, K_BLOCK: tl.constexpr, RANGED: tl.constexpr,
    WHOLE: tl.constexpr, ACCESS: tl.constexpr, PRECISION: tl.constexpr, PASS: tl.constexpr,
    CAREFUL: tl.constexpr,
):  # fmt: skip
    """The first `count` key tiles of a pass, added to dq / scale.

    The full tiles come first. PASS 2 goes on to the edges in the same loop, whose pipeline fills
    but once. CAREFUL leaves out keys that are not finite, and adds the rows that see one to
    `tainted`.
    """
    CUT: tl.constexpr = K_BLOCK % KEYS > 0
    row, low, high, position, b, h, stop, sinks, slopes, masks = who
    for i in range(count):
        at, key_stop = key_tile(i, PASS, walk, K_BLOCK, KEYS)
        key = at + tl.arange(0, KEYS)
        k_tile = load_rows(k_source, at, KEYS, WIDTH, D, ACCESS)
        v_tile = load_rows(v_source, at, KEYS, WIDTH_V, DV, ACCESS)
        scores = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)
        dweights = tl.dot(dout_tile, v_tile.T, input_precision=PRECISION)
        scores, factor = add_bias(scores, scale * LOG2E, key[None, :], position[:, None], h, slopes)
        weights = tl.exp2(scores * factor - row_lse2[:, None])
        dscores = weights * (dweights - row_delta[:, None])
        if PASS == 1 or CAREFUL:
            seen = visible(
                row[:, None], key[None, :], low[:, None], high[:, None], b, h, key_stop, sinks,
                masks, RANGED, CUT,
            )  # fmt: skip
            if PASS == 2 and WHOLE:
                seen |= (i < walk[5]) & (row < stop)[:, None] & (key < key_stop)[None, :]
            dscores = tl.where(seen, dscores, 0.0)
        elif PASS == 2 and i >= walk[5]:
            seen = visible(
                row[:, None], key[None, :], low[:, None], high[:, None], b, h, key_stop, sinks,
                masks, RANGED, CUT,
            )  # fmt: skip
            dscores = tl.where(seen, dscores, 0.0)
        if CAREFUL:
            k_tile, finite = finite_rows(k_tile)
            tainted |= tl.max((seen & (finite == 0)[None, :]).to(tl.int32), axis=1) > 0
        dscores = dscores.to(k_tile.dtype)
        dq_tile = tl.dot(dscores, k_tile, dq_tile, input_precision=PRECISION)
    return dq_tile, tainted


@triton.jit(do_not_specialize=VARYING)
def flash_dq_kernel(
    when, q, k, v, dout, lse2, delta, dq,
    q_stride_b, q_stride_h, q_stride_t, q_stride_d,
    k_stride_b, k_stride_h, k_stride_t, k_stride_d,
    v_stride_b, v_stride_h, v_stride_t, v_stride_d,
    dout_stride_b, dout_stride_h, dout_stride_t, dout_stride_d,
    key_mask, key_bounds, key_mask_stride_b, key_mask_stride_k,
    mask, mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k,
    block_index, block_count, block_full,
    index_stride_b, index_stride_h, index_stride_q, count_stride_b, count_stride_h,
    table, q_offsets, k_offsets, row_start, row_end, slopes, slope_positions,
    q_tokens, k_tokens, sums_stride, tiles, sequences, section, lead, window, sinks, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, CAUSAL: tl.constexpr,
    ACCESS: tl.constexpr, ALL_EDGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one tile of rows: ds = p (dout . v - delta), dq = scale * ds k. If there is a number
    `when`, only if it is not 0.
    """
    if when is not None:  # noqa: SIM102 (Triton would load nothing)
        if tl.load(when) == 0:
            return
    RANGED: tl.constexpr = window is not None or row_start is not None
    WHOLE: tl.constexpr = block_full is not None
    all_rows = q_tokens
    place, walk, lengths = plan_rows(
        tl.program_id(0), tiles, sequences, section, lead, table, q_offsets, k_offsets, q_tokens,
        k_tokens,
        window, sinks, row_start, row_end, key_bounds, block_index, block_count, block_full,
        index_stride_b, index_stride_h, index_stride_q, count_stride_b, count_stride_h,
        HEADS, ROWS, KEYS, Q_BLOCK, K_BLOCK, CAUSAL, ALL_EDGE,
    )  # fmt: skip
    b, h, q_begin, k_begin, k_tokens, first, stop, shift = place
    masks = (
        key_mask, key_mask_stride_b, key_mask_stride_k,
        mask, mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k,
    )  # fmt: skip
    q_end, k_end = q_begin + stop, k_begin + k_tokens
    q_source = (q, b, h, q_begin, q_end, q_stride_b, q_stride_h, q_stride_t, q_stride_d)
    dout_source = (
        dout, b, h, q_begin, q_end, dout_stride_b, dout_stride_h, dout_stride_t, dout_stride_d
    )  # fmt: skip
    k_source = (
        k, b, h // GROUP, k_begin, k_end, k_stride_b, k_stride_h, k_stride_t, k_stride_d
    )  # fmt: skip
    v_source = (
        v, b, h // GROUP, k_begin, k_end, v_stride_b, v_stride_h, v_stride_t, v_stride_d
    )  # fmt: skip
    row = first + tl.arange(0, ROWS)
    low = lowest_key(row, q_begin, stop, shift, window, row_start)
    high = end_key(row, q_begin, stop, shift, k_tokens, row_end, CAUSAL)
    position = positions(row, q_begin, stop, shift, slope_positions)
    q_tile = load_rows(q_source, first, ROWS, WIDTH, D, ACCESS)
    dout_tile = load_rows(dout_source, first, ROWS, WIDTH_V, DV, ACCESS)
    head = (b * HEADS + h).to(tl.int64)
    at_row = head * all_rows + q_begin + row
    at_sums = head * sums_stride + q_begin + row
    row_lse2 = tl.load(lse2 + at_sums, mask=row < stop, other=float("inf"))
    row_delta = tl.load(delta + at_sums, mask=row < stop, other=0.0)
    who = (row, low, high, position, b, h, stop, sinks, slopes, masks)
    dq_tile = tl.zeros([ROWS, WIDTH], tl.float32)
    tainted = row >= stop
    dq_tile, tainted = differentiate_tiles(
        lengths[0] + lengths[1], dq_tile, q_tile, dout_tile, row_lse2, row_delta, k_source,
        v_source, walk, who, scale, tainted,
        D, DV, WIDTH, WIDTH_V, KEYS, K_BLOCK, RANGED, WHOLE, ACCESS, PRECISION, 2 - ALL_EDGE, False,
    )  # fmt: skip
    store_rows(dq, dq_tile * scale, at_row, row < stop, WIDTH, D)
    if has_nan(dq_tile):
        # As in the forward kernel: rows that do not see the NaN's key are done again.
        redone, left_out = differentiate_tiles(
            lengths[0] + lengths[1], tl.zeros([ROWS, WIDTH], tl.float32), q_tile, dout_tile,
            row_lse2, row_delta, k_source, v_source, walk, who, scale, tainted,
            D, DV, WIDTH, WIDTH_V, KEYS, K_BLOCK, RANGED, WHOLE, ACCESS, PRECISION, 2,
            True,
        )  # fmt: skip
        store_rows(dq, redone * scale, at_row, left_out == 0, WIDTH, D)


@triton.jit
def gather_tiles(
    program, grid, operands, rules, lists, masks, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, SHARE: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr, ACCESS: tl.constexpr, DESCRIBED: tl.constexpr, ALL_EDGE: tl.constexpr,
    PRECISION: tl.constexpr, EARLY: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """dk / scale and dv of the tile of keys that a program owns, of SHARE query heads, and where
    they belong: the batch entry, the keys, their end and their rows in dk and dv.

    CAREFUL makes one pass over all tiles of rows and leaves out rows that are not finite. The last
    thing returned says which keys see one, or are behind the end.
    """
    CUT: tl.constexpr = Q_BLOCK % ROWS > 0
    tiles, sequences, section, lead, table, q_offsets, k_offsets, q_tokens, k_tokens = grid
    q, k, v, dout, sums, q_strides, k_strides, v_strides, dout_strides = operands
    lse2, delta, sums_stride = sums
    window, started, ended, sinks, slopes, slope_positions = rules
    block_index, block_count, block_full, stride_b, stride_h, stride_k, count_b, count_h = lists
    tile, sequence = owned_tile(program, tiles, sequences, section, lead)
    b, owner = sequence // (HEADS // SHARE), sequence % (HEADS // SHARE)
    h_kv = owner * SHARE // GROUP
    all_keys = k_tokens
    k_begin, k_tokens, q_begin, q_tokens, first, stop, own_block = extent(
        tile, table, k_offsets, q_offsets, k_tokens, q_tokens, K_BLOCK, KEYS
    )
    shift = k_tokens - q_tokens
    span = row_tiles(
        first, stop, k_begin, q_begin, shift, q_tokens, sinks, window, started, ended,
        ROWS, CAUSAL, ALL_EDGE,
    )  # fmt: skip
    key = first + tl.arange(0, KEYS)
    low, high = seen_rows(
        key, stop, k_begin, q_begin, shift, q_tokens, sinks, window, started, ended, CAUSAL
    )
    q_end, k_end = q_begin + q_tokens, k_begin + stop
    k_source = (k, b, h_kv, k_begin, k_end, k_strides[0], k_strides[1], k_strides[2], k_strides[3])
    v_source = (v, b, h_kv, k_begin, k_end, v_strides[0], v_strides[1], v_strides[2], v_strides[3])
    q_stride_b, q_stride_h, q_stride_t, q_stride_d = q_strides
    dout_stride_b, dout_stride_h, dout_stride_t, dout_stride_d = dout_strides
    k_tile = load_rows(k_source, first, KEYS, WIDTH, D, ACCESS)
    v_tile = load_rows(v_source, first, KEYS, WIDTH_V, DV, ACCESS)
    dk_tile = tl.zeros([KEYS, WIDTH], tl.float32)
    dv_tile = tl.zeros([KEYS, WIDTH_V], tl.float32)
    tainted = key >= stop
    for member in range(SHARE):
        h = owner * SHARE + member
        lse2_source = (lse2, b * HEADS + h, q_begin, sums_stride)
        delta_source = (delta, b * HEADS + h, q_begin, sums_stride)
        q_source = (q, b, h, q_begin, q_end, q_stride_b, q_stride_h, q_stride_t, q_stride_d)
        dout_source = (
            dout, b, h, q_begin, q_end, dout_stride_b, dout_stride_h, dout_stride_t, dout_stride_d
        )  # fmt: skip
        walk, lengths = plan_columns(
            span, block_index, block_count, block_full, stride_b, stride_h, stride_k, count_b,
            count_h, b, h, own_block, q_tokens, Q_BLOCK, ROWS, ALL_EDGE,
        )  # fmt: skip
        for PASS in tl.static_range(2 if CAREFUL else ALL_EDGE, 3 if CAREFUL else 2):
            count = lengths[0] + lengths[1] if CAREFUL else lengths[PASS]
            for i in tl.range(count, num_stages=1 if CAREFUL else None):
                at, row_stop = row_tile(i, PASS, walk, Q_BLOCK, ROWS)
                row = at + tl.arange(0, ROWS)
                q_tile = load_rows(q_source, at, ROWS, WIDTH, D, ACCESS)
                dout_tile = load_rows(dout_source, at, ROWS, WIDTH_V, DV, ACCESS)
                # A full tile of a listed block may reach behind its sequence; edges are masked.
                row_lse2 = load_numbers(
                    lse2_source, at, row_stop, float("inf"), ROWS, PASS == 0 and Q_BLOCK > 0,
                    DESCRIBED,
                )  # fmt: skip
                if CAREFUL:
                    q_tile, finite_q = finite_rows(q_tile)
                    dout_tile, finite_dout = finite_rows(dout_tile)
                scores = tl.dot(k_tile, q_tile.T, input_precision=PRECISION)
                if EARLY:
                    dweights = tl.dot(v_tile, dout_tile.T, input_precision=PRECISION)
                position = positions(row, q_begin, row_stop, shift, slope_positions)
                scores, factor = add_bias(
                    scores, scale * LOG2E, key[:, None], position[None, :], h, slopes
                )
                weights = tl.exp2(scores * factor - row_lse2[None, :])
                if PASS > 0:
                    seen = visible_to(
                        row[None, :], key[:, None], low[:, None], high[:, None], b, h, row_stop,
                        stop, masks, CUT,
                    )  # fmt: skip
                    if CAREFUL and block_full is not None:
                        seen |= (i < walk[5]) & (row < row_stop)[None, :] & (key < stop)[:, None]
                    weights = tl.where(seen, weights, 0.0)
                if CAREFUL:
                    left_out = seen & ((finite_q & finite_dout) == 0)[None, :]
                    tainted |= tl.max(left_out.to(tl.int32), axis=1) > 0
                dv_tile = tl.dot(
                    weights.to(dout_tile.dtype), dout_tile, dv_tile, input_precision=PRECISION
                )
                row_delta = load_numbers(delta_source, at, row_stop, 0.0, ROWS, False, DESCRIBED)
                if not EARLY:
                    dweights = tl.dot(v_tile, dout_tile.T, input_precision=PRECISION)
                dscores = weights * (dweights - row_delta[None, :])
                if CAREFUL:
                    dscores = tl.where(seen, dscores, 0.0)
                dscores = dscores.to(q_tile.dtype)
                dk_tile = tl.dot(dscores, q_tile, dk_tile, input_precision=PRECISION)
    at_key = (b * (HEADS // SHARE) + owner).to(tl.int64) * all_keys + k_begin + key
    return dk_tile, dv_tile, (b, key, stop, at_key), tainted


@triton.jit
def real_keys(place, key_mask, stride_b, stride_k):
    """Which keys of a tile have a gradient: those before its end that the key mask keeps.

    The mask is left to the end: a hidden key changes nothing but its own gradient.
    """
    b, key, stop, _ = place
    kept = key < stop
    if key_mask is not None:
        at = key_mask + b.to(tl.int64) * stride_b + key.to(tl.int64) * stride_k
        kept &= tl.load(at, mask=kept, other=0) != 0
    return kept


@triton.jit(do_not_specialize=VARYING)
def flash_dkdv_kernel(
    when, q, k, v, dout, lse2, delta, dk, dv,
    q_stride_b, q_stride_h, q_stride_t, q_stride_d,
    k_stride_b, k_stride_h, k_stride_t, k_stride_d,
    v_stride_b, v_stride_h, v_stride_t, v_stride_d,
    dout_stride_b, dout_stride_h, dout_stride_t, dout_stride_d,
    key_mask, key_mask_stride_b, key_mask_stride_k,
    mask, mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k,
    block_index, block_count, block_full,
    index_stride_b, index_stride_h, index_stride_q, count_stride_b, count_stride_h,
    table, q_offsets, k_offsets, started, ended, slopes, slope_positions,
    q_tokens, k_tokens, sums_stride, tiles, sequences, section, lead, window, sinks, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, SHARE: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, CAUSAL: tl.constexpr,
    ACCESS: tl.constexpr, DESCRIBED: tl.constexpr, ALL_EDGE: tl.constexpr, PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys, summed over SHARE query heads: dv = p' dout, dk = scale ds' q.

    Scores are computed transposed, (keys, rows), so that p' and ds' are ready as left operands. If
    there is a number `when`, only if it is not 0.
    """
    if when is not None:  # noqa: SIM102 (Triton would load nothing)
        if tl.load(when) == 0:
            return
    grid = (tiles, sequences, section, lead, table, q_offsets, k_offsets, q_tokens, k_tokens)
    operands = (
        q, k, v, dout, (lse2, delta, sums_stride),
        (q_stride_b, q_stride_h, q_stride_t, q_stride_d),
        (k_stride_b, k_stride_h, k_stride_t, k_stride_d),
        (v_stride_b, v_stride_h, v_stride_t, v_stride_d),
        (dout_stride_b, dout_stride_h, dout_stride_t, dout_stride_d),
    )  # fmt: skip
    rules = (window, started, ended, sinks, slopes, slope_positions)
    lists = (
        block_index, block_count, block_full, index_stride_b, index_stride_h, index_stride_q,
        count_stride_b, count_stride_h,
    )  # fmt: skip
    masks = (None, 0, 0, mask, mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k)
    dk_tile, dv_tile, place, _ = gather_tiles(
        tl.program_id(0), grid, operands, rules, lists, masks, scale,
        HEADS, GROUP, SHARE, D, DV, WIDTH, WIDTH_V, ROWS, KEYS, Q_BLOCK, K_BLOCK, CAUSAL,
        ACCESS, DESCRIBED, ALL_EDGE, PRECISION, EARLY, False,
    )  # fmt: skip
    kept = real_keys(place, key_mask, key_mask_stride_b, key_mask_stride_k)
    _b, key, stop, at_key = place
    store_rows(dk, tl.where(kept[:, None], dk_tile * scale, 0.0), at_key, key < stop, WIDTH, D)
    store_rows(dv, tl.where(kept[:, None], dv_tile, 0.0), at_key, key < stop, WIDTH_V, DV)
    again = tl.maximum(nan_flag(dk_tile), nan_flag(dv_tile))
    if again > 0:
        # A NaN in a row reaches keys that the row does not see: these are done again without it.
        # Everything is formed anew from a number that the compiler does not know to be the first
        # one's: kept for this walk, it would take registers from the other.
        dk_tile, dv_tile, place, tainted = gather_tiles(
            tl.program_id(0) * again, grid, operands, rules, lists, masks, scale,
            HEADS, GROUP, SHARE, D, DV, WIDTH, WIDTH_V, ROWS, KEYS, Q_BLOCK, K_BLOCK, CAUSAL,
            ACCESS, DESCRIBED, ALL_EDGE, PRECISION, EARLY, True,
        )  # fmt: skip
        kept = real_keys(place, key_mask, key_mask_stride_b, key_mask_stride_k)
        _b, key, stop, at_key = place
        store_rows(dk, dk_tile * scale, at_key, kept & (tainted == 0), WIDTH, D)
        store_rows(dv, dv_tile, at_key, kept & (tainted == 0), WIDTH_V, DV)
