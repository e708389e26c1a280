"""The unfused kernels: products of boxes of tokens, gathered from and scattered to windows.

An entry of a window is the row-major offset of its key from the window's start, so its address is a
number of the query plus a number of the key.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.fast.engines.flash.triton_tiles import store_rows
from attnspec.fast.engines.neighborhood.triton_grid import (
    VARYING,
    box_place,
    head_at,
    load_rows,
    own_box,
    visible,
    walk_box,
    windows,
)


@triton.jit
def own_entry(spans, kernel_y, kernel_x):
    """What an owned query adds to the entries of its window: minus the offset of its start."""
    z, y, x, _, _, _ = spans
    return -((z[1] * kernel_y + y[1]) * kernel_x + x[1])


@triton.jit
def walk_entry(i, walk, spans, walk_z, walk_y, walk_x, kernel_y, kernel_x):
    """What a key of the i-th walked box adds to its entry in a window."""
    _, _, _, to_z, to_y, to_x = spans
    i_z, i_y, i_x = box_place(i, walk)
    z, y, x = i_z * walk_z + to_z, i_y * walk_y + to_y, i_x * walk_x + to_x
    return (z * kernel_y + y) * kernel_x + x


@triton.jit(do_not_specialize=VARYING)
def scores_kernel(
    q, k, s,
    q_stride_b, q_stride_h, q_stride_t, q_stride_d,
    k_stride_b, k_stride_h, k_stride_t, k_stride_d,
    size_z, kernel_z, step_z, dilation_z, causal_z, box_z, walk_z, tiles_z, shift_z, bits_z,
    size_y, kernel_y, step_y, dilation_y, causal_y, box_y, walk_y, tiles_y, shift_y, bits_y,
    size_x, kernel_x, step_x, dilation_x, causal_x, box_x, walk_x, tiles_x, shift_x, bits_x,
    guards, tokens, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    OWNED: tl.constexpr, WALKED: tl.constexpr, WORDS: tl.constexpr, ACCESS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of one box of queries, scattered to window order."""
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
    head, token, used, lower, upper, count, walk, spans = own_box(
        tl.program_id(0), axes, guards, OWNED, WALKED, WORDS, False
    )
    kv_head = head // HEADS * (HEADS // GROUP) + head % HEADS // GROUP
    q_rows = head_at(q_source, head, HEADS, ACCESS)
    k_rows = head_at(k_source, kv_head, HEADS // GROUP, ACCESS)
    at_row = token.to(tl.int64)
    q_tile = load_rows(q_rows, at_row, used, WIDTH, D, ACCESS)
    size = kernel_z * kernel_y * kernel_x
    row = s + (head.to(tl.int64) * tokens + at_row) * size + own_entry(spans, kernel_y, kernel_x)
    for i in range(count):
        at, to_lower, to_upper, inside = walk_box(i, walk, WORDS)
        seen = visible(
            lower[:, None], upper[:, None], to_lower[None, :], to_upper[None, :], guards, WORDS
        )
        k_tile = load_rows(k_rows, at, inside, WIDTH, D, ACCESS)
        scores = tl.dot(q_tile, k_tile.T, input_precision=PRECISION) * scale
        entry = walk_entry(i, walk, spans, walk_z, walk_y, walk_x, kernel_y, kernel_x)
        tl.store(row[:, None] + entry[None, :], scores.to(s.dtype.element_ty), mask=seen)


@triton.jit(do_not_specialize=VARYING)
def values_kernel(
    p, v, out,
    p_stride_b, p_stride_h, p_stride_t, p_stride_w,
    v_stride_b, v_stride_h, v_stride_t, v_stride_d,
    size_z, kernel_z, step_z, dilation_z, causal_z, box_z, walk_z, tiles_z, shift_z, bits_z,
    size_y, kernel_y, step_y, dilation_y, causal_y, box_y, walk_y, tiles_y, shift_y, bits_y,
    size_x, kernel_x, step_x, dilation_x, causal_x, box_x, walk_x, tiles_x, shift_x, bits_x,
    guards, tokens, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DV: tl.constexpr, WIDTH_V: tl.constexpr,
    OWNED: tl.constexpr, WALKED: tl.constexpr, WORDS: tl.constexpr, ACCESS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Weighted values of one box of queries, the weights gathered from window order."""
    axes = (
        (size_z, kernel_z, step_z, dilation_z, causal_z, box_z,
         walk_z, tiles_z, shift_z, bits_z),
        (size_y, kernel_y, step_y, dilation_y, causal_y, box_y,
         walk_y, tiles_y, shift_y, bits_y),
        (size_x, kernel_x, step_x, dilation_x, causal_x, box_x,
         walk_x, tiles_x, shift_x, bits_x),
    )  # fmt: skip
    p_source = (p, p_stride_b, p_stride_h, p_stride_t, p_stride_w)
    v_source = (v, v_stride_b, v_stride_h, v_stride_t, v_stride_d)
    head, token, used, lower, upper, count, walk, spans = own_box(
        tl.program_id(0), axes, guards, OWNED, WALKED, WORDS, False
    )
    kv_head = head // HEADS * (HEADS // GROUP) + head % HEADS // GROUP
    p_rows = head_at(p_source, head, HEADS, 0)
    v_rows = head_at(v_source, kv_head, HEADS // GROUP, ACCESS)
    at_row = token.to(tl.int64)
    row = p_rows[0] + at_row * p_stride_t
    own = own_entry(spans, kernel_y, kernel_x)
    mixed = tl.zeros([OWNED, WIDTH_V], tl.float32)
    for i in range(count):
        at, to_lower, to_upper, inside = walk_box(i, walk, WORDS)
        seen = visible(
            lower[:, None], upper[:, None], to_lower[None, :], to_upper[None, :], guards, WORDS
        )
        entry = walk_entry(i, walk, spans, walk_z, walk_y, walk_x, kernel_y, kernel_x)
        entry = (own[:, None] + entry[None, :]).to(tl.int64) * p_stride_w
        weights = tl.load(row[:, None] + entry, mask=seen, other=0.0)
        v_tile = load_rows(v_rows, at, inside, WIDTH_V, DV, ACCESS)
        mixed = tl.dot(weights.to(v_tile.dtype), v_tile, mixed, input_precision=PRECISION)
    store_rows(out, mixed * scale, head.to(tl.int64) * tokens + at_row, used, WIDTH_V, DV)


@triton.jit
def query_start(i, low, walk_size, to, length, kernel, step, causal):
    """Where the windows of the queries at walked entries start, along one axis."""
    at = tl.minimum(low + i * walk_size + to, length - 1)
    start, _ = windows(at, length, kernel, step, causal)
    return start


@triton.jit(do_not_specialize=VARYING)
def keys_kernel(
    p, x, out,
    p_stride_b, p_stride_h, p_stride_t, p_stride_w,
    x_stride_b, x_stride_h, x_stride_t, x_stride_d,
    size_z, kernel_z, step_z, dilation_z, causal_z, box_z, walk_z, tiles_z, shift_z, bits_z,
    size_y, kernel_y, step_y, dilation_y, causal_y, box_y, walk_y, tiles_y, shift_y, bits_y,
    size_x, kernel_x, step_x, dilation_x, causal_x, box_x, walk_x, tiles_x, shift_x, bits_x,
    guards, tokens, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DV: tl.constexpr, WIDTH_V: tl.constexpr,
    OWNED: tl.constexpr, WALKED: tl.constexpr, WORDS: tl.constexpr, ACCESS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """For one box of keys, the weighted rows of x of the queries whose windows hold one of them."""
    axes = (
        (size_z, kernel_z, step_z, dilation_z, causal_z, box_z,
         walk_z, tiles_z, shift_z, bits_z),
        (size_y, kernel_y, step_y, dilation_y, causal_y, box_y,
         walk_y, tiles_y, shift_y, bits_y),
        (size_x, kernel_x, step_x, dilation_x, causal_x, box_x,
         walk_x, tiles_x, shift_x, bits_x),
    )  # fmt: skip
    p_source = (p, p_stride_b, p_stride_h, p_stride_t, p_stride_w)
    x_source = (x, x_stride_b, x_stride_h, x_stride_t, x_stride_d)
    head, token, used, lower, upper, count, walk, spans = own_box(
        tl.program_id(0), axes, guards, OWNED, WALKED, WORDS, True
    )
    KV_HEADS: tl.constexpr = HEADS // GROUP
    z, y, x_span, to_z, to_y, to_x = spans
    own = (z[2] * kernel_y + y[2]) * kernel_x + x_span[2]
    at_key = token.to(tl.int64)
    mixed = tl.zeros([OWNED, WIDTH_V], tl.float32)
    for member in range(GROUP):
        q_head = head // KV_HEADS * HEADS + head % KV_HEADS * GROUP + member
        p_rows = head_at(p_source, q_head, HEADS, 0)
        x_rows = head_at(x_source, q_head, HEADS, ACCESS)
        for i in range(count):
            at, to_lower, to_upper, inside = walk_box(i, walk, WORDS)
            seen = visible(
                lower[:, None], upper[:, None], to_lower[None, :], to_upper[None, :], guards, WORDS
            )
            i_z, i_y, i_x = box_place(i, walk)
            start_z = query_start(i_z, z[0], walk_z, to_z, z[3], kernel_z, step_z, causal_z)
            start_y = query_start(i_y, y[0], walk_y, to_y, y[3], kernel_y, step_y, causal_y)
            start_x = query_start(
                i_x, x_span[0], walk_x, to_x, x_span[3], kernel_x, step_x, causal_x
            )
            start = (start_z * kernel_y + start_y) * kernel_x + start_x
            entry = (own[:, None] - start[None, :]).to(tl.int64) * p_stride_w
            weights = tl.load(p_rows[0] + (at * p_stride_t)[None, :] + entry, mask=seen, other=0.0)
            x_tile = load_rows(x_rows, at, inside, WIDTH_V, DV, ACCESS)
            mixed = tl.dot(weights.to(x_tile.dtype), x_tile, mixed, input_precision=PRECISION)
    store_rows(out, mixed * scale, head.to(tl.int64) * tokens + at_key, used, WIDTH_V, DV)
