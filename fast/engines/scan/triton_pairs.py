"""Triton kernels for the products inside a block under a decay per channel; how they are weighed is
told in `triton_levels.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.fast.engines.scan.triton_common import (
    load_tile,
    locate_block,
    offset,
    store_tile,
)
from attnspec.fast.engines.scan.triton_levels import (
    FLAGS,
    LOG2E,
    fits,
    group_pairs,
    group_weights,
    level_pairs,
    level_weights,
    load_gates,
    pick_steep,
    sum_rows,
    weigh_rows,
)


@triton.jit(
    do_not_specialize=[
        "segments", "length", "tokens", "q_b", "q_h", "k_b", "k_h", "g_b", "g_h",
    ]
)  # fmt: skip
def pairs_kernel(
    q, q_b, q_h, q_t, q_d, k, k_b, k_h, k_t, k_d, gates, g_b, g_h, g_t, g_d,
    pairs, q_weighted, k_weighted, totals, steep, table, scale, segments, length, tokens, heads,
    q_group, k_group,
    D: tl.constexpr, BC: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, REACH: tl.constexpr,
    PACKED: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """For one block: its products (C rows of C), scale e^G q, e^(G_end - G) k, G_end, and whether
    it is steep, in which case the first three hold nothing of use.
    """
    ragged: tl.constexpr = D % BC != 0
    program = tl.program_id(0)
    head, block, batch, start, left = locate_block(
        program, table, segments, length, tokens, heads, C, PACKED
    )
    if left <= 0:
        tl.store(steep + program, 0)
        return
    q += offset(batch, q_b, head // q_group, q_h, start, q_t, ALIGNED)
    k += offset(batch, k_b, head // k_group, k_h, start, k_t, ALIGNED)
    gates += offset(batch, g_b, head, g_h, start, g_t, ALIGNED)
    row = (batch * heads + head) * tokens + start
    weights = group_weights(LEVELS, C)
    P = tl.zeros((C, C), tl.float32)
    gentle = left > 0
    for channel in range(0, D, BC):
        width = D - channel
        wide = tl.cast(channel, tl.int64)
        Q = load_tile(q + wide * q_d, q_t, q_d, left, width, C, BC, ragged, WIDE)
        K = load_tile(k + wide * k_d, k_t, k_d, left, width, C, BC, ragged, WIDE)
        g = load_gates(gates + wide * g_d, g_t, g_d, left, width, C, BC, ragged, WIDE)
        total = tl.sum(g, 0)
        gentle = gentle & fits(total, REACH)
        half = tl.exp2(total * (0.5 * LOG2E))[None, :]
        near = sum_rows(weights, g, Q.dtype)
        Q_risen = Q * tl.exp2(near)
        K_fallen = K * tl.exp2(-near)
        P = tl.dot(Q_risen.to(Q.dtype), tl.trans(K_fallen.to(K.dtype)), P)
        here = row * D + channel
        store_tile(q_weighted + here, D, Q_risen * (half * scale), left, width, C, BC, ragged)
        store_tile(k_weighted + here, D, K_fallen * half, left, width, C, BC, ragged)
        channels = tl.arange(0, BC)
        at = (block.to(tl.int64) * heads + head) * D + channel + channels
        tl.store(totals + at, total, mask=channels < width)
    P = tl.where(group_pairs(LEVELS, C), P * scale, 0.0)
    store_tile(pairs + row * C, C, P, left, C, C, C, False)
    tl.store(steep + program, (~gentle).to(tl.int8))


@triton.jit(
    do_not_specialize=[
        "many", "span", "segments", "length", "tokens", "q_b", "q_h", "k_b", "k_h", "g_b", "g_h",
    ]
)  # fmt: skip
def steep_pairs_kernel(
    q, q_b, q_h, q_t, q_d, k, k_b, k_h, k_t, k_d, gates, g_b, g_h, g_t, g_d,
    pairs, q_weighted, k_weighted, totals, steep, many, span, table, scale, segments, length,
    tokens, heads, q_group, k_group,
    D: tl.constexpr, BC: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, REACH: tl.constexpr,
    PACKED: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """As `pairs_kernel`, for the steep ones of `span` blocks; the host never learns which."""
    ragged: tl.constexpr = D % BC != 0
    program, programs = tl.program_id(0), tl.num_programs(0)
    chosen = pick_steep(steep, span, many, REACH)
    if tl.max(chosen, 0) == 0:
        return
    for n in range(span):
        head, block, batch, start, left = locate_block(
            program + n * programs, table, segments, length, tokens, heads, C, PACKED
        )
        if (tl.sum(tl.where(tl.arange(0, FLAGS) == n, chosen, 0), 0) == 1) & (left > 0):
            Q_rows = q + offset(batch, q_b, head // q_group, q_h, start, q_t, ALIGNED)
            K_rows = k + offset(batch, k_b, head // k_group, k_h, start, k_t, ALIGNED)
            g_rows = gates + offset(batch, g_b, head, g_h, start, g_t, ALIGNED)
            row = (batch * heads + head) * tokens + start
            P = tl.zeros((C, C), tl.float32)
            for channel in range(0, D, BC):
                width = D - channel
                wide = tl.cast(channel, tl.int64)
                Q = load_tile(Q_rows + wide * q_d, q_t, q_d, left, width, C, BC, ragged, WIDE)
                K = load_tile(K_rows + wide * k_d, k_t, k_d, left, width, C, BC, ragged, WIDE)
                g = load_gates(g_rows + wide * g_d, g_t, g_d, left, width, C, BC, ragged, WIDE)
                channels = tl.arange(0, BC)
                at = (block.to(tl.int64) * heads + head) * D + channel + channels
                tl.store(totals + at, tl.sum(g, 0), mask=channels < width)
                Q, g, level, near, until, behind = weigh_rows(Q, g, Q.dtype, C, REACH)
                here = row * D + channel
                Q_weighted = Q * tl.exp2(until) * scale
                K_weighted = K * tl.exp2(behind)
                store_tile(q_weighted + here, D, Q_weighted, left, width, C, BC, ragged)
                store_tile(k_weighted + here, D, K_weighted, left, width, C, BC, ragged)
                Q_risen = (Q * tl.exp2(near)).to(Q.dtype)
                K_fallen = (K * tl.exp2(-near)).to(K.dtype)
                product = tl.dot(Q_risen, tl.trans(K_fallen), input_precision="ieee")
                P += tl.where(group_pairs(level, C), product, 0.0)
                for higher in range(level, LEVELS):
                    E = tl.exp2(sum_rows(level_weights(higher, C), g, Q.dtype))
                    product = tl.dot(
                        (Q * E).to(Q.dtype), tl.trans((K * E).to(K.dtype)), input_precision="ieee"
                    )
                    P += tl.where(level_pairs(higher, C), product, 0.0)
            store_tile(pairs + row * C, C, P * scale, left, C, C, C, False)
