"""The Triton kernel that does the work: each program walks one segment, its state in registers.

It computes out_t = sum_j decay(j, t) (q_t . k_j) v_j over j <= t, or over j >= t if BACKWARD. With
other tensors in these roles that is every quantity of the scan: o is walk(q, k, v), dq is
walk(do, v, k), dk is walk(v, do, q) and dv is walk(k, q, do), the last two BACKWARD. A block of C
rows reads the state, adds the masked products inside the block and moves the state on, so every row
is touched once and no state of a block is ever written. A program owns a tile of v's channels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.fast.engines.scan.triton_common import (
    BITS,
    CONSTANT,
    NONE,
    SCALAR,
    VECTOR,
    block_decay,
    decay_of,
    exchanged,
    load_decay,
    load_tile,
    load_weights,
    locate,
    offset,
    open_rows,
    pair_decay,
    read_rows,
    store_tile,
)


@triton.jit
def state_offsets(
    tile, R: tl.constexpr, V: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Offsets (BR, BV) of a tile of a contiguous state (R, V), stored as (V, R) if TRANSPOSED, and
    which of them exist.
    """
    rows, columns = tl.arange(0, BR)[:, None], tile * BV + tl.arange(0, BV)[None, :]
    inside = (rows < R) & (columns < V)
    places = columns * R + rows if TRANSPOSED else rows * V + columns
    return places, inside


@triton.jit
def numbers(
    gates, g_t, inner, inner_t, outer, outer_t, i, count,
    C: tl.constexpr, DECAY: tl.constexpr, INNER: tl.constexpr, OUTER: tl.constexpr,
):  # fmt: skip
    """Log decays and weights (C,) of block `i`, as far as there are any; none before block 0."""
    left = tl.where(i < 0, 0, count - i * C)
    at = tl.cast(i, tl.int64) * C
    g = tl.zeros((C,), tl.float32)
    read, written = g, g
    if (DECAY == SCALAR) | (DECAY == BITS):
        g = load_decay(gates + at * g_t, g_t, left, C, DECAY)
    if INNER:
        written = load_weights(inner + at * inner_t, inner_t, left, C)
    if OUTER:
        read = load_weights(outer + at * outer_t, outer_t, left, C)
    return g, written, read


@triton.jit(
    do_not_specialize=[
        "segments", "length", "tokens", "batches", "q_b", "q_h", "k_b", "k_h", "v_b", "v_h",
        "w_b", "w_h", "g_b", "g_h", "inner_b", "inner_h", "outer_b", "outer_h",
    ]
)  # fmt: skip
def walk_kernel(
    q, q_b, q_h, q_t, q_d, k, k_b, k_h, k_t, k_d, v, v_b, v_h, v_t, v_d, w, w_b, w_h, w_t, w_d,
    gates, g_b, g_h, g_t, inner, inner_b, inner_h, inner_t, outer, outer_b, outer_h, outer_t,
    pairs, totals, entering, out, products, final, table, scale, segments, length, tokens, heads,
    batches, q_group, k_group, v_group, w_group, inner_group, outer_group,
    R: tl.constexpr, V: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    DECAY: tl.constexpr, PACKED: tl.constexpr, BACKWARD: tl.constexpr, TRANSPOSED: tl.constexpr,
    ENTERING: tl.constexpr, FINAL: tl.constexpr, PAIRS: tl.constexpr, PRODUCTS: tl.constexpr,
    INNER: tl.constexpr, OUTER: tl.constexpr,
    ALIGNED: tl.constexpr, WIDE: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """out (batches, heads, tokens, V) of one segment and BV channels, from the state `entering` it.

    q and k have R channels; a state is stored as (R, V), or as (V, R) if TRANSPOSED. FINAL keeps
    the state at the end of the sequence (at its start if BACKWARD), PRODUCTS the sums over the tile
    of w * out by token. `inner` weighs the terms of the sum by the token of k and v if INNER, and
    `outer` the rows of out, but not PRODUCTS, if OUTER. Under a decay per channel the rows come
    weighted, along R, or along V if TRANSPOSED, and the products inside a block are given as
    `pairs` if PAIRS, else left out.
    """
    tiles: tl.constexpr = (V + BV - 1) // BV
    rag_r: tl.constexpr = R < BR
    rag_v: tl.constexpr = V % BV != 0
    program = tl.program_id(0)
    tile = (program % tiles).to(tl.int64)
    head = ((program // tiles) % heads).to(tl.int64)
    segment = (program // tiles) // heads
    sequence, batch, start, count, first, last = locate(
        table, segment, segments, length, tokens, PACKED
    )
    if count == 0:
        return
    width = V - tile * BV
    q += offset(batch, q_b, head // q_group, q_h, start, q_t, ALIGNED)
    k += offset(batch, k_b, head // k_group, k_h, start, k_t, ALIGNED)
    v += offset(batch, v_b, head // v_group, v_h, start, v_t, ALIGNED) + tile * BV * v_d
    Q_rows = open_rows(q, count, tl.full((), R, tl.int32), q_t, C, BR, DESCRIPTORS)
    K_rows = open_rows(k, count, tl.full((), R, tl.int32), k_t, C, BR, DESCRIPTORS)
    V_rows = open_rows(v, count, width, v_t, C, BV, DESCRIPTORS)
    if PRODUCTS:
        w += offset(batch, w_b, head // w_group, w_h, start, w_t, ALIGNED) + tile * BV * w_d
    row = (batch * heads + head) * tokens + start
    out += row * V + tile * BV
    if DECAY != VECTOR:
        products += tile * batches * heads * tokens + row
    slope = 0.0
    if DECAY == CONSTANT:
        slope = tl.load(gates + head)
    if (DECAY == SCALAR) | (DECAY == BITS):
        gates += batch * g_b + head * g_h + start * g_t
    if INNER:
        inner += batch * inner_b + head // inner_group * inner_h + start * inner_t
    if OUTER:
        outer += batch * outer_b + head // outer_group * outer_h + start * outer_t
    state = segment.to(tl.int64) * heads + head
    places, inside = state_offsets(tile, R, V, BR, BV, TRANSPOSED)
    S = tl.zeros((BR, BV), tl.float32)
    if ENTERING:
        S = tl.load(entering + state * R * V + places, mask=inside, other=0.0)
    blocks = tl.cdiv(count, C)
    i = blocks * 0
    if BACKWARD:
        i = blocks - 1
    g_next, inner_next, outer_next = numbers(
        gates, g_t, inner, inner_t, outer, outer_t, i, count, C, DECAY, INNER, OUTER
    )
    for n in range(blocks):
        g, inner_now, outer_now = g_next, inner_next, outer_next
        i = n
        following = n + 1
        if BACKWARD:
            i = blocks - 1 - n
            following = i - 1
        # A block ahead: the first thing a block needs should not be the last to come.
        g_next, inner_next, outer_next = numbers(
            gates, g_t, inner, inner_t, outer, outer_t, following, count, C, DECAY, INNER, OUTER
        )
        at = tl.cast(i, tl.int64) * C
        left = count - i * C
        Q = read_rows(Q_rows, i, q_t, q_d, left, R, C, BR, rag_r, WIDE, DESCRIPTORS)
        K = read_rows(K_rows, i, k_t, k_d, left, R, C, BR, rag_r, WIDE, DESCRIPTORS)
        X = read_rows(V_rows, i, v_t, v_d, left, width, C, BV, rag_v, WIDE, DESCRIPTORS)
        Y = tl.dot(Q, S.to(Q.dtype), input_precision="ieee")
        if DECAY == VECTOR:
            if PAIRS:
                P = load_tile(pairs + (row + at) * C, C, 1, left, C, C, C, False)
                if BACKWARD:
                    P = tl.trans(P)
                Y = tl.dot(P, X, Y, input_precision="ieee")
            block = (state // heads * tl.cdiv(length, C) + i) * heads + head
            if TRANSPOSED:
                channels = tile * BV + tl.arange(0, BV)
                total = tl.load(totals + block * V + channels, mask=channels < V, other=0.0)
                S *= decay_of(total, DECAY)[None, :]
            else:
                channels = tl.arange(0, BR)
                total = tl.load(totals + block * R + channels, mask=channels < R, other=0.0)
                S *= decay_of(total, DECAY)[:, None]
        else:
            sums, total = block_decay(g, slope, left, C, DECAY)
            reading, writing = sums, total - sums
            if BACKWARD:
                reading, writing = writing, sums
            P = tl.dot(Q, tl.trans(K), input_precision="ieee")
            P *= pair_decay(sums, C, DECAY, BACKWARD) * scale
            kept = decay_of(writing, DECAY)
            if BACKWARD:
                kept *= scale
            if INNER:
                weights = exchanged(inner_now, C)
                P *= weights[None, :]
                kept *= weights
            if BACKWARD:
                Y *= decay_of(reading, DECAY)[:, None]
            else:
                Y *= (decay_of(reading, DECAY) * scale)[:, None]
            Y = tl.dot(P.to(X.dtype), X, Y, input_precision="ieee")
            if BACKWARD or DECAY != NONE or INNER:
                X = (X * kept[:, None]).to(X.dtype)
            if DECAY != NONE:
                S *= decay_of(total, DECAY)
        rows_out = Y
        if OUTER:
            rows_out = Y * outer_now[:, None]
        store_tile(out + at * V, V, rows_out, left, width, C, BV, rag_v)
        if PRODUCTS:
            W = load_tile(w + at * w_t, w_t, w_d, left, width, C, BV, rag_v, WIDE)
            rows = tl.arange(0, C)
            if DECAY == VECTOR:
                block = (state // heads * tl.cdiv(length, C) + i) * heads + head
                columns = tile * BV + tl.arange(0, BV)
                sums = tl.sum(tl.where((rows < left)[:, None], W * Y, 0.0), 0)
                tl.store(products + block * V + columns, sums, mask=columns < V)
            else:
                tl.store(products + at + rows, tl.sum(W * Y, 1), mask=rows < left)
        S = tl.dot(tl.trans(K), X, S, input_precision="ieee")
    if FINAL:
        edge = last
        if BACKWARD:
            edge = first
        if edge:
            tl.store(final + (sequence * heads + head) * R * V + places, S, mask=inside)
