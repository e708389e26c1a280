"""Triton kernels of the Taylor forward pass: states of segments, then outputs by row tile.

A segment's own tokens meet by the polynomial of their scores, all earlier ones through the state
that enters the segment. Both are products added to one accumulator, so no row depends on another
program and no state is carried along the sequence.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.fast.engines.scan.triton_common import locate, offset
from attnspec.fast.engines.taylor.triton_features import (
    choose,
    load_rows,
    load_state,
    pick,
    place,
    precise_dot,
    store_rows,
)


@triton.jit(
    do_not_specialize=[
        "segments", "length", "tokens", "shift", "u_tokens", "x_b", "x_h", "y_b", "y_h", "m_b",
    ]
)  # fmt: skip
def sums_kernel(
    x, x_b, x_h, x_t, x_d, y, y_b, y_h, y_t, y_d, inverse, dden, key_mask, m_b, m_t, states, table,
    scale, segments, length, tokens, shift, u_tokens, heads,
    D: tl.constexpr, DV: tl.constexpr, F: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BF: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr, WEIGHTED: tl.constexpr,
    MASKED: tl.constexpr, PACKED: tl.constexpr, ALIGNED: tl.constexpr, MATH: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """states[segment, kv head] = the segment's sums of phi(x)^T y and of phi(x).

    x, y are k, v; or, WEIGHTED, q and do of all query heads of the group, phi(q) being weighted by
    the row's `inverse` in the first sum and by its `dden` in the second. Row r of a segment is row
    r - shift of x and y, and those before row 0 do not exist.
    """
    v_tiles: tl.constexpr = (DV + BV - 1) // BV
    f_tiles: tl.constexpr = (F + BF - 1) // BF
    program = tl.program_id(0)
    column = (program % v_tiles) * BV
    first = ((program // v_tiles) % f_tiles) * BF
    kv_head = ((program // v_tiles // f_tiles) % heads).to(tl.int64)
    segment = program // v_tiles // f_tiles // heads
    _, batch, start, count, _, _ = locate(table, segment, segments, length, tokens, PACKED)
    start = start - shift
    pick_a, pick_b, one_a, one_b, factor = choose(first, scale, D, BD, BF, MATH)
    S = tl.zeros((BF, BV), tl.float32)
    z = tl.zeros((BF,), tl.float32)
    for g in range(GROUP):
        head = kv_head * GROUP + g
        X_rows = x + offset(batch, x_b, head, x_h, start, x_t, ALIGNED)
        Y_rows = y + offset(batch, y_b, head, y_h, start, y_t, ALIGNED) + column * y_d
        u = (batch * heads * GROUP + head) * u_tokens + start
        for r0 in range(0, count, C):
            row = r0 + tl.arange(0, C)
            inside = (row < count) & (start + row >= 0)
            if MASKED:
                seen = tl.load(
                    key_mask + batch * m_b + (start + row).to(tl.int64) * m_t, mask=inside, other=0
                )
                inside = inside & (seen != 0)
            X = load_rows(X_rows, row, inside, x_t, x_d, D, BD, D < BD, MATH)
            Y = load_rows(Y_rows, row, inside, y_t, y_d, DV - column, BV, DV % BV != 0, MATH)
            phi = pick(X, pick_a, one_a, PREC) * pick(X, pick_b, one_b, PREC) * factor[None, :]
            if WEIGHTED:
                into_z = tl.load(dden + u + row, mask=inside, other=0.0)
                into_S = tl.load(inverse + u + row, mask=inside, other=0.0)
                z += tl.sum(phi * into_z[:, None], 0)
                phi = (phi * into_S[:, None]).to(MATH)
            else:
                phi = tl.where(inside[:, None], phi, 0.0).to(MATH)
                z += tl.sum(phi.to(tl.float32), 0)
            S = tl.dot(tl.trans(phi), Y, S, input_precision=PREC)
    states += (segment.to(tl.int64) * heads + kv_head) * F * (DV + 1)
    features = first + tl.arange(0, BF)
    columns = column + tl.arange(0, BV)
    tl.store(
        states + features[:, None] * DV + columns[None, :],
        S,
        mask=(features < F)[:, None] & (columns < DV)[None, :],
    )
    if column == 0:
        tl.store(states + F * DV + features, z, mask=features < F)


@triton.jit(
    do_not_specialize=[
        "segments", "length", "k_tokens", "q_tokens", "row_tiles", "q_b", "q_h", "k_b", "k_h",
        "v_b", "v_h", "m_b",
    ]
)  # fmt: skip
def outputs_kernel(
    q, q_b, q_h, q_t, q_d, k, k_b, k_h, k_t, k_d, v, v_b, v_h, v_t, v_d, key_mask, m_b, m_t,
    entering, out, z, table, scale, eps, segments, length, k_tokens, q_tokens, row_tiles, heads,
    group,
    D: tl.constexpr, DV: tl.constexpr, F: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BF: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
    LOCAL: tl.constexpr, REMOTE: tl.constexpr, NORM: tl.constexpr, MASKED: tl.constexpr,
    PACKED: tl.constexpr, ALIGNED: tl.constexpr, MATH: tl.constexpr, PREC: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """out (batch, heads, q_tokens, DV) and z (batch, heads, q_tokens) of BM rows of one segment:
    LOCAL from the segment's own keys, REMOTE from the state `entering` it.
    """
    v_tiles: tl.constexpr = (DV + BV - 1) // BV
    program = tl.program_id(0)
    column = (program % v_tiles) * BV
    r0 = ((program // v_tiles) % row_tiles) * BM
    head = ((program // v_tiles // row_tiles) % heads).to(tl.int64)
    segment = program // v_tiles // row_tiles // heads
    _, batch, q_start, k_start, rows, keys = place(
        table, segment, segments, length, k_tokens, q_tokens, CAUSAL, PACKED
    )
    if (r0 >= rows) | (q_start + r0 + BM <= 0):
        return
    kv_head = head // group
    row = r0 + tl.arange(0, BM)
    inside = (row < rows) & (q_start + row >= 0)
    q += offset(batch, q_b, head, q_h, q_start, q_t, ALIGNED)
    Q = load_rows(q, row, inside, q_t, q_d, D, BD, D < BD, MATH)
    total = tl.zeros((BM, BV), tl.float32)
    den = tl.zeros((BM,), tl.float32)
    if REMOTE:
        state = entering + (segment.to(tl.int64) * (heads // group) + kv_head) * F * (DV + 1)
        for first in range(0, F, BF):
            pick_a, pick_b, one_a, one_b, factor = choose(first, scale, D, BD, BF, MATH)
            phi = pick(Q, pick_a, one_a, PREC) * pick(Q, pick_b, one_b, PREC) * factor[None, :]
            phi = phi.to(MATH)
            S, zk = load_state(state, first, column, F, DV, BF, BV)
            den += tl.sum(phi.to(tl.float32) * zk[None, :], 1)
            total = precise_dot(phi, S, total, MATH, PREC, SPLIT)
    if LOCAL:
        k += offset(batch, k_b, kv_head, k_h, k_start, k_t, ALIGNED)
        v += offset(batch, v_b, kv_head, v_h, k_start, v_t, ALIGNED) + column * v_d
        last = keys
        if CAUSAL:
            last = tl.minimum(keys, r0 + BM)
        for n0 in range(0, last, BN):
            key = n0 + tl.arange(0, BN)
            seen = key < keys
            if MASKED:
                at = batch * m_b + (k_start + key) * m_t
                seen = seen & (tl.load(key_mask + at, mask=seen, other=0) != 0)
            K = load_rows(k, key, seen, k_t, k_d, D, BD, D < BD, MATH)
            V = load_rows(v, key, seen, v_t, v_d, DV - column, BV, DV % BV != 0, MATH)
            s = tl.dot(Q, tl.trans(K), input_precision=PREC) * scale
            visible = seen[None, :]
            if CAUSAL:
                visible = visible & (key[None, :] <= row[:, None])
            w = tl.where(visible, 1.0 + s + 0.5 * s * s, 0.0)
            den += tl.sum(w, 1)
            total = tl.dot(w.to(MATH), V, total, input_precision=PREC)
    if NORM:
        total = tl.where(den[:, None] == 0, 0.0, total / (den + eps)[:, None])
    start = (batch * heads + head) * q_tokens + q_start
    store_rows(out + start * DV + column, row, inside, DV, total, DV - column, BV, DV % BV != 0)
    if column == 0:
        tl.store(z + start + row, den, mask=inside)
