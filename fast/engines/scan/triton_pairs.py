"""Triton kernels for the products inside a block under a decay per channel.

The pair (i, j) weighs sum_c q_ic k_jc e^(G_ic - G_jc). Splitting both factors at a row between
them, e^(G_i - G_m) and e^(G_m - G_j), keeps every exponent <= 0, so rows are halved again and
again: at level h, groups of 2h rows split in the middle, and the pairs with i in a group's upper
half and j in its lower half are one matrix product of q e^x and k e^x, where x is the sum of the
log decays between a row and the middle. Levels h = 1, 2, .., C/2 and the diagonal cover all pairs;
the level of a pair is the highest bit in which i and j differ.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.fast.engines.scan.triton_common import (
    LOWEST,
    load_tile,
    locate,
    offset,
    store_tile,
)


@triton.jit
def load_gates(
    base, stride_t, stride_d, left, width, C: tl.constexpr, W: tl.constexpr, RAGGED: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Log decays (C, W), zeros beyond `left` rows and `width` channels; NaN stays NaN."""
    g = load_tile(base, stride_t, stride_d, left, width, C, W, RAGGED, WIDE).to(tl.float32)
    return tl.where(g < LOWEST, LOWEST, g)


@triton.jit
def pair_totals(totals, H: tl.constexpr, C: tl.constexpr, W: tl.constexpr):
    """Totals (C, W) of groups of 2H rows from those of groups of H rows, at every row."""
    groups: tl.constexpr = C // (2 * H)
    both = tl.sum(tl.reshape(totals, (groups, 2, H, W)), axis=1, keep_dims=True)
    return tl.reshape(tl.broadcast_to(both, (groups, 2, H, W)), (C, W))


@triton.jit
def upper_half(H: tl.constexpr, C: tl.constexpr):
    """Rows (C, 1) in the upper half of their group."""
    return ((tl.arange(0, C) & H) != 0)[:, None]


@triton.jit(
    do_not_specialize=[
        "segments", "length", "tokens", "q_b", "q_h", "k_b", "k_h", "g_b", "g_h",
    ]
)  # fmt: skip
def pairs_kernel(
    q, q_b, q_h, q_t, q_d, k, k_b, k_h, k_t, k_d, gates, g_b, g_h, g_t, g_d,
    pairs, q_weighted, k_weighted, totals, table, scale, segments, length, tokens, heads,
    q_group, k_group,
    D: tl.constexpr, BC: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    PACKED: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """For one block: its products (C rows of C), scale e^G q, e^(G_end - G) k and G_end."""
    ragged: tl.constexpr = D % BC != 0
    program = tl.program_id(0)
    head = (program % heads).to(tl.int64)
    block = program // heads
    blocks_per_segment = tl.cdiv(length, C)
    segment = block // blocks_per_segment
    _, batch, start, count, _, _ = locate(table, segment, segments, length, tokens, PACKED)
    skipped = (block % blocks_per_segment) * C
    left = count - skipped
    if left <= 0:
        return
    start += skipped
    q += offset(batch, q_b, head // q_group, q_h, start, q_t, ALIGNED)
    k += offset(batch, k_b, head // k_group, k_h, start, k_t, ALIGNED)
    gates += offset(batch, g_b, head, g_h, start, g_t, ALIGNED)
    row = (batch * heads + head) * tokens + start
    down, across = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    apart = down ^ across
    P = tl.zeros((C, C), tl.float32)
    for channel in range(0, D, BC):
        width = D - channel
        wide = tl.cast(channel, tl.int64)
        Q = load_tile(q + wide * q_d, q_t, q_d, left, width, C, BC, ragged, WIDE)
        K = load_tile(k + wide * k_d, k_t, k_d, left, width, C, BC, ragged, WIDE)
        g = load_gates(gates + wide * g_d, g_t, g_d, left, width, C, BC, ragged, WIDE)
        same = tl.sum(Q.to(tl.float32) * K.to(tl.float32), 1)
        P += tl.where(down == across, same[:, None], 0.0)
        sums, group = g, g
        for level in tl.static_range(0, LEVELS):
            upper = upper_half(1 << level, C)
            E = tl.exp(tl.where(upper, sums, group - sums))
            product = tl.dot(
                (Q * E).to(Q.dtype), tl.trans((K * E).to(K.dtype)), input_precision="ieee"
            )
            P += tl.where((down > across) & ((apart >> level) == 1), product, 0.0)
            wider = pair_totals(group, 1 << level, C, BC)
            sums += tl.where(upper, wider - group, 0.0)
            group = wider
        here = row * D + channel
        store_tile(q_weighted + here, D, Q * tl.exp(sums) * scale, left, width, C, BC, ragged)
        store_tile(k_weighted + here, D, K * tl.exp(group - sums), left, width, C, BC, ragged)
        channels = tl.arange(0, BC)
        total = tl.sum(g, 0)
        at = (block.to(tl.int64) * heads + head) * D + channel + channels
        tl.store(totals + at, total, mask=channels < width)
    store_tile(pairs + row * C, C, P * scale, left, C, C, C, False)
