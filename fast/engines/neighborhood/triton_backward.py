"""The fused backward kernels: dq by boxes of queries, dk and dv by boxes of keys.

Every output element is written by one program, so the gradients are the same on every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.fast.engines.flash.triton_tiles import store_rows
from attnspec.fast.engines.flash.triton_visible import LOG2E, finite_rows, has_nan
from attnspec.fast.engines.neighborhood.triton_forward import any_flag, key_box
from attnspec.fast.engines.neighborhood.triton_grid import (
    VARYING,
    head_at,
    load_rows,
    own_box,
    visible,
    walk_box,
)


@triton.jit
def differentiate_boxes(
    count, dq_tile, q_tile, dout_tile, row_lse2, row_delta, k_rows, v_rows, who, tokens,
    extra, factor, tainted,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    WALKED: tl.constexpr, WORDS: tl.constexpr, BEHIND: tl.constexpr, ACCESS: tl.constexpr,
    PRECISION: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """`count` boxes of keys, added to dq / scale; CAREFUL as in `attend_boxes`, for the keys."""
    for i in range(count):
        at, inside, seen = key_box(i, who, tokens, extra, WALKED, WORDS, BEHIND)
        k_tile = load_rows(k_rows, at, inside, WIDTH, D, ACCESS)
        v_tile = load_rows(v_rows, at, inside, WIDTH_V, DV, ACCESS)
        scores = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)
        dweights = tl.dot(dout_tile, v_tile.T, input_precision=PRECISION)
        scores = tl.where(seen, scores, -float("inf"))
        weights = tl.exp2(scores * factor - row_lse2[:, None])
        dscores = weights * (dweights - row_delta[:, None])
        if CAREFUL:
            dscores = tl.where(seen, dscores, 0.0)
            k_tile, finite = finite_rows(k_tile)
            tainted |= tl.max((seen & (finite == 0)[None, :]).to(tl.int32), axis=1) > 0
        dq_tile = tl.dot(dscores.to(k_tile.dtype), k_tile, dq_tile, input_precision=PRECISION)
    return dq_tile, tainted


@triton.jit
def dq_box(
    program, q_source, k_source, v_source, dout_source, sums, dq, flags, axes, guards, tokens,
    extra, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, OWNED: tl.constexpr, WALKED: tl.constexpr,
    WORDS: tl.constexpr, EXTRA: tl.constexpr, ACCESS: tl.constexpr, PRECISION: tl.constexpr,
    CAREFUL: tl.constexpr,
):  # fmt: skip
    """dq of one box of queries: ds = p (dout . v - delta), dq = scale * ds k; CAREFUL as in the
    forward kernel.
    """
    head, token, used, lower, upper, count, walk, _spans = own_box(
        program, axes, guards, OWNED, WALKED, WORDS, False
    )
    kv_head = head // HEADS * (HEADS // GROUP) + head % HEADS // GROUP
    q_rows = head_at(q_source, head, HEADS, ACCESS)
    dout_rows = head_at(dout_source, head, HEADS, ACCESS)
    k_rows = head_at(k_source, kv_head, HEADS // GROUP, ACCESS)
    v_rows = head_at(v_source, kv_head, HEADS // GROUP, ACCESS)
    at = token.to(tl.int64)
    at_row = head.to(tl.int64) * tokens + at
    q_tile = load_rows(q_rows, at, used, WIDTH, D, ACCESS)
    dout_tile = load_rows(dout_rows, at, used, WIDTH_V, DV, ACCESS)
    row_lse2 = tl.load(sums + at_row * 2, mask=used, other=float("inf"))
    row_delta = tl.load(sums + at_row * 2 + 1, mask=used, other=0.0)
    who = (used, lower, upper, walk, guards)
    factor = scale * LOG2E
    tainted = token < 0
    dq_tile, tainted = differentiate_boxes(
        count, tl.zeros([OWNED, WIDTH], tl.float32), q_tile, dout_tile, row_lse2, row_delta,
        k_rows, v_rows, who, tokens, extra, factor, tainted,
        D, DV, WIDTH, WIDTH_V, WALKED, WORDS, False, ACCESS, PRECISION, CAREFUL,
    )  # fmt: skip
    if EXTRA:
        dq_tile, tainted = differentiate_boxes(
            tl.cdiv(extra, WALKED), dq_tile, q_tile, dout_tile, row_lse2, row_delta,
            k_rows, v_rows, who, tokens, extra, factor, tainted,
            D, DV, WIDTH, WIDTH_V, WALKED, WORDS, True, ACCESS, PRECISION, CAREFUL,
        )  # fmt: skip
    if CAREFUL:
        store_rows(dq, dq_tile * scale, at_row, used & (tainted == 0), WIDTH, D)
    else:
        store_rows(dq, dq_tile * scale, at_row, used, WIDTH, D)
        tl.store(flags + program, has_nan(dq_tile).to(tl.int32))


@triton.jit(do_not_specialize=VARYING)
def dq_kernel(
    q, k, v, dout, sums, dq, flags,
    q_stride_b, q_stride_h, q_stride_t, q_stride_d,
    k_stride_b, k_stride_h, k_stride_t, k_stride_d,
    v_stride_b, v_stride_h, v_stride_t, v_stride_d,
    dout_stride_b, dout_stride_h, dout_stride_t, dout_stride_d,
    size_z, kernel_z, step_z, dilation_z, causal_z, box_z, walk_z, tiles_z, shift_z, bits_z,
    size_y, kernel_y, step_y, dilation_y, causal_y, box_y, walk_y, tiles_y, shift_y, bits_y,
    size_x, kernel_x, step_x, dilation_x, causal_x, box_x, walk_x, tiles_x, shift_x, bits_x,
    guards, tokens, extra, scale, programs,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, OWNED: tl.constexpr, WALKED: tl.constexpr,
    WORDS: tl.constexpr, EXTRA: tl.constexpr, ACCESS: tl.constexpr, PRECISION: tl.constexpr,
    REPAIR: tl.constexpr,
):  # fmt: skip
    """dq of a box of queries, or the repair of those of REPAIR boxes that met a NaN."""
    axes = (
        (size_z, kernel_z, step_z, dilation_z, causal_z, box_z,
         walk_z, tiles_z, shift_z, bits_z),
        (size_y, kernel_y, step_y, dilation_y, causal_y, box_y,
         walk_y, tiles_y, shift_y, bits_y),
        (size_x, kernel_x, step_x, dilation_x, causal_x, box_x,
         walk_x, tiles_x, shift_x, bits_x),
    )  # fmt: skip
    q_source = (q, q_stride_b, q_stride_h, q_stride_t, q_stride_d)
    k_source = (k, k_stride_b, k_stride_h, k_stride_t, k_stride_d)
    v_source = (v, v_stride_b, v_stride_h, v_stride_t, v_stride_d)
    dout_source = (dout, dout_stride_b, dout_stride_h, dout_stride_t, dout_stride_d)
    if REPAIR:
        if any_flag(flags, programs, REPAIR):
            for n in range(REPAIR):
                program = tl.program_id(0) * REPAIR + n
                if tl.load(flags + program, mask=program < programs, other=0) > 0:
                    dq_box(
                        program, q_source, k_source, v_source, dout_source, sums, dq,
                        flags, axes, guards, tokens, extra, scale,
                        HEADS, GROUP, D, DV, WIDTH, WIDTH_V, OWNED, WALKED, WORDS, EXTRA, ACCESS,
                        PRECISION, True,
                    )  # fmt: skip
    else:
        dq_box(
            tl.program_id(0), q_source, k_source, v_source, dout_source, sums, dq,
            flags, axes, guards, tokens, extra, scale,
            HEADS, GROUP, D, DV, WIDTH, WIDTH_V, OWNED, WALKED, WORDS, EXTRA, ACCESS, PRECISION,
            False,
        )  # fmt: skip


@triton.jit
def add_queries(
    dk_tile, dv_tile, k_tile, v_tile, q_tile, dout_tile, sums, at, inside, seen, factor,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What the queries `at` add to dk / scale and dv of a tile of keys; `seen` (keys, queries).

    The two sums of a query lie side by side and are loaded as one tile: as two short vectors, every
    thread would load all the numbers it needs by itself.
    """
    place = sums + at[:, None] * 2 + tl.arange(0, 2)[None, :]
    row_lse2, row_delta = tl.split(tl.load(place, mask=inside[:, None], other=0.0))
    scores = tl.dot(k_tile, q_tile.T, input_precision=PRECISION)
    dweights = tl.dot(v_tile, dout_tile.T, input_precision=PRECISION)
    scores = tl.where(seen, scores, -float("inf"))
    weights = tl.exp2(scores * factor - row_lse2[None, :])
    dv_tile = tl.dot(weights.to(dout_tile.dtype), dout_tile, dv_tile, input_precision=PRECISION)
    dscores = weights * (dweights - row_delta[None, :])
    dk_tile = tl.dot(dscores.to(q_tile.dtype), q_tile, dk_tile, input_precision=PRECISION)
    return dk_tile, dv_tile


@triton.jit(do_not_specialize=VARYING)
def dkdv_kernel(
    q, k, v, dout, sums, dk, dv,
    q_stride_b, q_stride_h, q_stride_t, q_stride_d,
    k_stride_b, k_stride_h, k_stride_t, k_stride_d,
    v_stride_b, v_stride_h, v_stride_t, v_stride_d,
    dout_stride_b, dout_stride_h, dout_stride_t, dout_stride_d,
    size_z, kernel_z, step_z, dilation_z, causal_z, box_z, walk_z, tiles_z, shift_z, bits_z,
    size_y, kernel_y, step_y, dilation_y, causal_y, box_y, walk_y, tiles_y, shift_y, bits_y,
    size_x, kernel_x, step_x, dilation_x, causal_x, box_x, walk_x, tiles_x, shift_x, bits_x,
    guards, tokens, extra, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, OWNED: tl.constexpr, WALKED: tl.constexpr,
    WORDS: tl.constexpr, EXTRA: tl.constexpr, ACCESS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of one box of the grid's keys, over the queries whose windows hold one of them."""
    axes = (
        (size_z, kernel_z, step_z, dilation_z, causal_z, box_z,
         walk_z, tiles_z, shift_z, bits_z),
        (size_y, kernel_y, step_y, dilation_y, causal_y, box_y,
         walk_y, tiles_y, shift_y, bits_y),
        (size_x, kernel_x, step_x, dilation_x, causal_x, box_x,
         walk_x, tiles_x, shift_x, bits_x),
    )  # fmt: skip
    q_source = (q, q_stride_b, q_stride_h, q_stride_t, q_stride_d)
    k_source = (k, k_stride_b, k_stride_h, k_stride_t, k_stride_d)
    v_source = (v, v_stride_b, v_stride_h, v_stride_t, v_stride_d)
    dout_source = (dout, dout_stride_b, dout_stride_h, dout_stride_t, dout_stride_d)
    KV_HEADS: tl.constexpr = HEADS // GROUP
    head, token, used, lower, upper, count, walk, _spans = own_box(
        tl.program_id(0), axes, guards, OWNED, WALKED, WORDS, True
    )
    at_key = token.to(tl.int64)
    k_tile = load_rows(head_at(k_source, head, KV_HEADS, ACCESS), at_key, used, WIDTH, D, ACCESS)
    v_tile = load_rows(head_at(v_source, head, KV_HEADS, ACCESS), at_key, used, WIDTH_V, DV, ACCESS)
    dk_tile = tl.zeros([OWNED, WIDTH], tl.float32)
    dv_tile = tl.zeros([OWNED, WIDTH_V], tl.float32)
    for member in range(GROUP):
        q_head = head // KV_HEADS * HEADS + head % KV_HEADS * GROUP + member
        q_rows = head_at(q_source, q_head, HEADS, ACCESS)
        dout_rows = head_at(dout_source, q_head, HEADS, ACCESS)
        rows = sums + q_head.to(tl.int64) * tokens * 2
        for i in range(count):
            at, to_lower, to_upper, inside = walk_box(i, walk, WORDS)
            seen = visible(
                lower[:, None], upper[:, None], to_lower[None, :], to_upper[None, :], guards, WORDS
            )
            q_tile = load_rows(q_rows, at, inside, WIDTH, D, ACCESS)
            dout_tile = load_rows(dout_rows, at, inside, WIDTH_V, DV, ACCESS)
            dk_tile, dv_tile = add_queries(
                dk_tile, dv_tile, k_tile, v_tile, q_tile, dout_tile, rows, at, inside, seen,
                scale * LOG2E, PRECISION,
            )  # fmt: skip
    at_row = head.to(tl.int64) * (tokens + extra) + at_key
    store_rows(dk, dk_tile * scale, at_row, used, WIDTH, D)
    store_rows(dv, dv_tile, at_row, used, WIDTH_V, DV)


@triton.jit(do_not_specialize=VARYING)
def extra_dkdv_kernel(
    q, k, v, dout, sums, dk, dv,
    q_stride_b, q_stride_h, q_stride_t, q_stride_d,
    k_stride_b, k_stride_h, k_stride_t, k_stride_d,
    v_stride_b, v_stride_h, v_stride_t, v_stride_d,
    dout_stride_b, dout_stride_h, dout_stride_t, dout_stride_d,
    tokens, extra, scale, splits,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, OWNED: tl.constexpr, WALKED: tl.constexpr,
    ACCESS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of the additional keys over one of `splits` shares of all queries."""
    q_source = (q, q_stride_b, q_stride_h, q_stride_t, q_stride_d)
    k_source = (k, k_stride_b, k_stride_h, k_stride_t, k_stride_d)
    v_source = (v, v_stride_b, v_stride_h, v_stride_t, v_stride_d)
    dout_source = (dout, dout_stride_b, dout_stride_h, dout_stride_t, dout_stride_d)
    KV_HEADS: tl.constexpr = HEADS // GROUP
    share = tl.program_id(0) % splits
    program = tl.program_id(0) // splits
    tiles = tl.cdiv(extra, OWNED)
    head = program // tiles
    slot = program % tiles * OWNED + tl.arange(0, OWNED)
    used = slot < extra
    at_key = (tokens + slot).to(tl.int64)
    k_tile = load_rows(head_at(k_source, head, KV_HEADS, ACCESS), at_key, used, WIDTH, D, ACCESS)
    v_tile = load_rows(head_at(v_source, head, KV_HEADS, ACCESS), at_key, used, WIDTH_V, DV, ACCESS)
    dk_tile = tl.zeros([OWNED, WIDTH], tl.float32)
    dv_tile = tl.zeros([OWNED, WIDTH_V], tl.float32)
    boxes = tl.cdiv(tokens, WALKED)
    per_share = tl.cdiv(boxes, splits)
    first = share * per_share
    count = tl.maximum(tl.minimum(per_share, boxes - first), 0)
    for member in range(GROUP):
        q_head = head // KV_HEADS * HEADS + head % KV_HEADS * GROUP + member
        q_rows = head_at(q_source, q_head, HEADS, ACCESS)
        dout_rows = head_at(dout_source, q_head, HEADS, ACCESS)
        rows = sums + q_head.to(tl.int64) * tokens * 2
        for i in range(count):
            row = (first + i) * WALKED + tl.arange(0, WALKED)
            inside = row < tokens
            at = row.to(tl.int64)
            q_tile = load_rows(q_rows, at, inside, WIDTH, D, ACCESS)
            dout_tile = load_rows(dout_rows, at, inside, WIDTH_V, DV, ACCESS)
            dk_tile, dv_tile = add_queries(
                dk_tile, dv_tile, k_tile, v_tile, q_tile, dout_tile, rows, at, inside,
                used[:, None] & inside[None, :], scale * LOG2E, PRECISION,
            )  # fmt: skip
    at_row = (share * (tl.num_programs(0) // splits // tiles) + head).to(tl.int64) * extra + slot
    store_rows(dk, dk_tile * scale, at_row, used, WIDTH, D)
    store_rows(dv, dv_tile, at_row, used, WIDTH_V, DV)
