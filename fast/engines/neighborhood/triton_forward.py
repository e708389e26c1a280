"""The fused forward kernel: one program owns a box of queries of one head."""

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.fast.engines.flash.triton_forward import finish, online_softmax
from attnspec.fast.engines.flash.triton_tiles import store_rows
from attnspec.fast.engines.flash.triton_visible import LOG2E, finite_rows, has_nan
from attnspec.fast.engines.neighborhood.triton_grid import (
    VARYING,
    head_at,
    load_rows,
    own_box,
    visible,
    walk_box,
)


@triton.jit
def key_box(i, who, tokens, extra, WALKED: tl.constexpr, WORDS: tl.constexpr, BEHIND: tl.constexpr):
    """The i-th box of keys: tokens, which of them to read, and who of the owned queries sees them.

    BEHIND walks over the additional keys behind the grid's instead, which all queries see.
    """
    used, lower, upper, walk, guards = who
    if BEHIND:
        slot = i * WALKED + tl.arange(0, WALKED)
        inside = slot < extra
        at = (tokens + slot).to(tl.int64)
        seen = used[:, None] & inside[None, :]
    else:
        at, to_lower, to_upper, inside = walk_box(i, walk, WORDS)
        seen = visible(
            lower[:, None], upper[:, None], to_lower[None, :], to_upper[None, :], guards, WORDS
        )
    return at, inside, seen


@triton.jit
def attend_boxes(
    count, sums, q_tile, k_rows, v_rows, who, tokens, extra, factor, tainted,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    WALKED: tl.constexpr, WORDS: tl.constexpr, BEHIND: tl.constexpr, ACCESS: tl.constexpr,
    PRECISION: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """`count` boxes of keys, added to sums = (maxima, denominators, values).

    CAREFUL leaves out values that are not finite, and adds the rows that see one to `tainted`.
    """
    top, total, mixed = sums
    for i in range(count):
        at, inside, seen = key_box(i, who, tokens, extra, WALKED, WORDS, BEHIND)
        k_tile = load_rows(k_rows, at, inside, WIDTH, D, ACCESS)
        scores = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)
        scores = tl.where(seen, scores, -float("inf"))
        weights, top, total, rescale = online_softmax(scores, top, total, factor)
        v_tile = load_rows(v_rows, at, inside, WIDTH_V, DV, ACCESS)
        if CAREFUL:
            v_tile, finite = finite_rows(v_tile)
            tainted |= tl.max((seen & (finite == 0)[None, :]).to(tl.int32), axis=1) > 0
        weights = weights.to(v_tile.dtype)
        mixed = tl.dot(weights, v_tile, mixed * rescale[:, None], input_precision=PRECISION)
    return (top, total, mixed), tainted


@triton.jit
def any_flag(flags, programs, COUNT: tl.constexpr):
    """Whether one of the COUNT programs that this one may repair met a NaN."""
    program = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    return tl.max(tl.load(flags + program, mask=program < programs, other=0), axis=0) > 0


@triton.jit
def forward_box(
    program, q_source, k_source, v_source, out, lse, flags, axes, guards, tokens, extra, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, OWNED: tl.constexpr, WALKED: tl.constexpr,
    WORDS: tl.constexpr, EXTRA: tl.constexpr, ACCESS: tl.constexpr, PRECISION: tl.constexpr,
    CAREFUL: tl.constexpr,
):  # fmt: skip
    """Output and lse of one box of queries, and whether there was a NaN.

    A product spreads 0 * NaN to queries that do not see the NaN's key. CAREFUL does their rows
    again, and leaves the others as they are.
    """
    head, token, used, lower, upper, count, walk, _spans = own_box(
        program, axes, guards, OWNED, WALKED, WORDS, False
    )
    kv_head = head // HEADS * (HEADS // GROUP) + head % HEADS // GROUP
    q_rows = head_at(q_source, head, HEADS, ACCESS)
    k_rows = head_at(k_source, kv_head, HEADS // GROUP, ACCESS)
    v_rows = head_at(v_source, kv_head, HEADS // GROUP, ACCESS)
    at = token.to(tl.int64)
    q_tile = load_rows(q_rows, at, used, WIDTH, D, ACCESS)
    who = (used, lower, upper, walk, guards)
    factor = scale * LOG2E
    top = tl.full([OWNED], -float("inf"), tl.float32)
    sums = (top, tl.zeros([OWNED], tl.float32), tl.zeros([OWNED, WIDTH_V], tl.float32))
    tainted = token < 0
    sums, tainted = attend_boxes(
        count, sums, q_tile, k_rows, v_rows, who, tokens, extra, factor, tainted,
        D, DV, WIDTH, WIDTH_V, WALKED, WORDS, False, ACCESS, PRECISION, CAREFUL,
    )  # fmt: skip
    if EXTRA:
        sums, tainted = attend_boxes(
            tl.cdiv(extra, WALKED), sums, q_tile, k_rows, v_rows, who, tokens, extra, factor,
            tainted,
            D, DV, WIDTH, WIDTH_V, WALKED, WORDS, True, ACCESS, PRECISION, CAREFUL,
        )  # fmt: skip
    log_total, mixed = finish(sums, None, head)
    at_row = head.to(tl.int64) * tokens + at
    if CAREFUL:
        store_rows(out, mixed, at_row, used & (tainted == 0), WIDTH_V, DV)
    else:
        tl.store(lse + at_row, log_total, mask=used)
        store_rows(out, mixed, at_row, used, WIDTH_V, DV)
        tl.store(flags + program, has_nan(mixed).to(tl.int32))


@triton.jit(do_not_specialize=VARYING)
def forward_kernel(
    q, k, v, out, lse, flags,
    q_stride_b, q_stride_h, q_stride_t, q_stride_d,
    k_stride_b, k_stride_h, k_stride_t, k_stride_d,
    v_stride_b, v_stride_h, v_stride_t, v_stride_d,
    size_z, kernel_z, step_z, dilation_z, causal_z, box_z, walk_z, tiles_z, shift_z, bits_z,
    size_y, kernel_y, step_y, dilation_y, causal_y, box_y, walk_y, tiles_y, shift_y, bits_y,
    size_x, kernel_x, step_x, dilation_x, causal_x, box_x, walk_x, tiles_x, shift_x, bits_x,
    guards, tokens, extra, scale, programs,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, OWNED: tl.constexpr, WALKED: tl.constexpr,
    WORDS: tl.constexpr, EXTRA: tl.constexpr, ACCESS: tl.constexpr, PRECISION: tl.constexpr,
    REPAIR: tl.constexpr,
):  # fmt: skip
    """One box of queries, or the repair of those of REPAIR boxes that met a NaN."""
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
    if REPAIR:
        if any_flag(flags, programs, REPAIR):
            for n in range(REPAIR):
                program = tl.program_id(0) * REPAIR + n
                if tl.load(flags + program, mask=program < programs, other=0) > 0:
                    forward_box(
                        program, q_source, k_source, v_source, out, lse,
                        flags, axes, guards, tokens, extra, scale,
                        HEADS, GROUP, D, DV, WIDTH, WIDTH_V, OWNED, WALKED, WORDS, EXTRA, ACCESS,
                        PRECISION, True,
                    )  # fmt: skip
    else:
        forward_box(
            tl.program_id(0), q_source, k_source, v_source, out, lse,
            flags, axes, guards, tokens, extra, scale,
            HEADS, GROUP, D, DV, WIDTH, WIDTH_V, OWNED, WALKED, WORDS, EXTRA, ACCESS, PRECISION,
            False,
        )  # fmt: skip
