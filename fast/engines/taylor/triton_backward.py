"""Triton kernels of the Taylor backward pass: dq by row tile, dk and dv by key tile.

The gradient of a state reaches a segment from the later ones as one more state, R, so both kernels
look like the forward one: pairs inside the segment, and a state for everything outside it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.fast.engines.scan.triton_common import offset
from attnspec.fast.engines.taylor.triton_features import (
    choose,
    load_rows,
    load_state,
    pick,
    place,
    precise_dot,
    spread_gradient,
    store_rows,
)


@triton.jit(
    do_not_specialize=[
        "segments", "length", "k_tokens", "q_tokens", "row_tiles", "q_b", "q_h", "k_b", "k_h",
        "v_b", "v_h", "o_b", "o_h", "m_b",
    ]
)  # fmt: skip
def dq_kernel(
    q, q_b, q_h, q_t, q_d, k, k_b, k_h, k_t, k_d, v, v_b, v_h, v_t, v_d, do, o_b, o_h, o_t, o_d,
    key_mask, m_b, m_t, inverse, delta, entering, dq, table, scale, segments, length, k_tokens,
    q_tokens, row_tiles, heads, group,
    D: tl.constexpr, DV: tl.constexpr, F: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BF: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
    LOCAL: tl.constexpr, REMOTE: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr,
    ALIGNED: tl.constexpr, MATH: tl.constexpr, PREC: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """dq (batch, heads, q_tokens, D) of BM rows of one segment. `inverse` is 1 / (z + eps) of a row
    and `delta` is do . o; BV holds all value channels.
    """
    program = tl.program_id(0)
    r0 = (program % row_tiles) * BM
    head = ((program // row_tiles) % heads).to(tl.int64)
    segment = program // row_tiles // heads
    _, batch, q_start, k_start, rows, keys = place(
        table, segment, segments, length, k_tokens, q_tokens, CAUSAL, PACKED
    )
    if (r0 >= rows) | (q_start + r0 + BM <= 0):
        return
    kv_head = head // group
    row = r0 + tl.arange(0, BM)
    inside = (row < rows) & (q_start + row >= 0)
    q += offset(batch, q_b, head, q_h, q_start, q_t, ALIGNED)
    do += offset(batch, o_b, head, o_h, q_start, o_t, ALIGNED)
    Q = load_rows(q, row, inside, q_t, q_d, D, BD, D < BD, MATH)
    G = load_rows(do, row, inside, o_t, o_d, DV, BV, DV < BV, MATH)
    start = (batch * heads + head) * q_tokens + q_start
    own = tl.load(delta + start + row, mask=inside, other=0.0)[:, None]
    share = tl.load(inverse + start + row, mask=inside, other=0.0)[:, None]
    total = tl.zeros((BM, BD), tl.float32)
    if LOCAL:
        k += offset(batch, k_b, kv_head, k_h, k_start, k_t, ALIGNED)
        v += offset(batch, v_b, kv_head, v_h, k_start, v_t, ALIGNED)
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
            V = load_rows(v, key, seen, v_t, v_d, DV, BV, DV < BV, MATH)
            s = tl.dot(Q, tl.trans(K), input_precision=PREC) * scale
            dw = tl.dot(G, tl.trans(V), input_precision=PREC) - own
            visible = seen[None, :]
            if CAUSAL:
                visible = visible & (key[None, :] <= row[:, None])
            ds = tl.where(visible, dw * (1.0 + s), 0.0)
            total = tl.dot(ds.to(MATH), K, total, input_precision=PREC)
        total *= scale
    if REMOTE:
        state = entering + (segment.to(tl.int64) * (heads // group) + kv_head) * F * (DV + 1)
        for first in range(0, F, BF):
            pick_a, pick_b, one_a, one_b, factor = choose(first, scale, D, BD, BF, MATH)
            S, zk = load_state(state, first, 0, F, DV, BF, BV)
            dphi = tl.zeros((BM, BF), tl.float32)
            dphi = precise_dot(G, tl.trans(S), dphi, MATH, PREC, SPLIT) - own * zk[None, :]
            total = spread_gradient(
                total, dphi, pick(Q, pick_a, one_a, PREC), pick(Q, pick_b, one_b, PREC),
                pick_a, pick_b, factor, MATH, PREC,
            )  # fmt: skip
    store_rows(dq + start * D, row, inside, D, total * share, D, BD, D < BD)


@triton.jit(
    do_not_specialize=[
        "segments", "length", "k_tokens", "q_tokens", "key_tiles", "q_b", "q_h", "k_b", "k_h",
        "v_b", "v_h", "o_b", "o_h", "m_b",
    ]
)  # fmt: skip
def dkv_kernel(
    q, q_b, q_h, q_t, q_d, k, k_b, k_h, k_t, k_d, v, v_b, v_h, v_t, v_d, do, o_b, o_h, o_t, o_d,
    key_mask, m_b, m_t, inverse, delta, leaving, dk, dv, table, scale, segments, length, k_tokens,
    q_tokens, key_tiles, kv_heads,
    D: tl.constexpr, DV: tl.constexpr, F: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BF: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr,
    CAUSAL: tl.constexpr, LOCAL: tl.constexpr, REMOTE: tl.constexpr, MASKED: tl.constexpr,
    PACKED: tl.constexpr, ALIGNED: tl.constexpr, MATH: tl.constexpr, PREC: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """dk (batch, kv_heads, k_tokens, D) and dv of BN keys of one segment, summed over the group."""
    program = tl.program_id(0)
    n0 = (program % key_tiles) * BN
    kv_head = ((program // key_tiles) % kv_heads).to(tl.int64)
    segment = program // key_tiles // kv_heads
    _, batch, q_start, k_start, rows, keys = place(
        table, segment, segments, length, k_tokens, q_tokens, CAUSAL, PACKED
    )
    if n0 >= keys:
        return
    key = n0 + tl.arange(0, BN)
    stored = key < keys
    seen = stored
    if MASKED:
        at = batch * m_b + (k_start + key) * m_t
        seen = seen & (tl.load(key_mask + at, mask=seen, other=0) != 0)
    k += offset(batch, k_b, kv_head, k_h, k_start, k_t, ALIGNED)
    v += offset(batch, v_b, kv_head, v_h, k_start, v_t, ALIGNED)
    K = load_rows(k, key, seen, k_t, k_d, D, BD, D < BD, MATH)
    V = load_rows(v, key, seen, v_t, v_d, DV, BV, DV < BV, MATH)
    dK = tl.zeros((BN, BD), tl.float32)
    dV = tl.zeros((BN, BV), tl.float32)
    if LOCAL:
        low = 0
        if CAUSAL:
            low = tl.maximum(n0, -q_start).to(tl.int32) // BM * BM
        for g in range(GROUP):
            head = kv_head * GROUP + g
            Q_rows = q + offset(batch, q_b, head, q_h, q_start, q_t, ALIGNED)
            G_rows = do + offset(batch, o_b, head, o_h, q_start, o_t, ALIGNED)
            start = (batch * kv_heads * GROUP + head) * q_tokens + q_start
            for r0 in range(low, rows, BM):
                row = r0 + tl.arange(0, BM)
                inside = (row < rows) & (q_start + row >= 0)
                Q = load_rows(Q_rows, row, inside, q_t, q_d, D, BD, D < BD, MATH)
                G = load_rows(G_rows, row, inside, o_t, o_d, DV, BV, DV < BV, MATH)
                own = tl.load(delta + start + row, mask=inside, other=0.0)[None, :]
                share = tl.load(inverse + start + row, mask=inside, other=0.0)[None, :]
                s = tl.dot(K, tl.trans(Q), input_precision=PREC) * scale
                visible = seen[:, None] & inside[None, :]
                if CAUSAL:
                    visible = visible & (key[:, None] <= row[None, :])
                w = tl.where(visible, (1.0 + s + 0.5 * s * s) * share, 0.0)
                dV = tl.dot(w.to(MATH), G, dV, input_precision=PREC)
                dw = (tl.dot(V, tl.trans(G), input_precision=PREC) - own) * share
                ds = tl.where(visible, dw * (1.0 + s), 0.0)
                dK = tl.dot(ds.to(MATH), Q, dK, input_precision=PREC)
        dK *= scale
    if REMOTE:
        state = leaving + (segment.to(tl.int64) * kv_heads + kv_head) * F * (DV + 1)
        for first in range(0, F, BF):
            pick_a, pick_b, one_a, one_b, factor = choose(first, scale, D, BD, BF, MATH)
            R, rz = load_state(state, first, 0, F, DV, BF, BV)
            x_a, x_b = pick(K, pick_a, one_a, PREC), pick(K, pick_b, one_b, PREC)
            phi = (x_a * x_b * factor[None, :]).to(MATH)
            dV = precise_dot(phi, R, dV, MATH, PREC, SPLIT)
            dphi = tl.zeros((BN, BF), tl.float32)
            dphi = precise_dot(V, tl.trans(R), dphi, MATH, PREC, SPLIT) + rz[None, :]
            dK = spread_gradient(dK, dphi, x_a, x_b, pick_a, pick_b, factor, MATH, PREC)
    start = (batch * kv_heads + kv_head) * k_tokens + k_start
    dK = tl.where(seen[:, None], dK, 0.0)
    dV = tl.where(seen[:, None], dV, 0.0)
    store_rows(dk + start * D, key, stored, D, dK, D, BD, D < BD)
    store_rows(dv + start * DV, key, stored, DV, dV, DV, BV, DV < BV)
