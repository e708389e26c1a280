"""Triton kernels for the gradient of the log decays, and of q and k under a decay per channel.

dg_t sums q . dq - k . dk over the tokens from t to the end of its segment, plus the product of the
state behind the segment with its gradient: the part of all later tokens, with no long sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.fast.engines.scan.triton_common import load_tile, locate, offset, store_tile
from attnspec.fast.engines.scan.triton_pairs import (
    load_gates,
    pair_totals,
    upper_half,
)


@triton.jit
def state_product(
    entering, final, leaving, segment, sequence, head, heads, last, first_channel, width,
    D: tl.constexpr, DV: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """sum_j S_cj R_cj (BC,) of the state behind a segment and its gradient."""
    index = segment.to(tl.int64) * heads + head
    inside = (sequence * heads + head) * D * DV
    state = entering
    at = (index + heads) * D * DV
    if last:
        state = final
        at = inside
    total = tl.zeros((BC,), tl.float32)
    rows = first_channel + tl.arange(0, BC)[:, None]
    for column in range(0, DV, 32):
        columns = column + tl.arange(0, 32)[None, :]
        mask = (rows < first_channel + width) & (columns < DV)
        S = tl.load(state + at + rows * DV + columns, mask=mask, other=0.0)
        R = tl.load(leaving + index * D * DV + rows * DV + columns, mask=mask, other=0.0)
        total += tl.sum(S * R, 1)
    return total


@triton.jit(do_not_specialize=["segments", "length", "tokens"])
def scalar_gates_kernel(
    products, entering, final, leaving, dg, table, segments, length, tokens, heads,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """dg (batch, heads, tokens) of one segment from products = q . dq - k . dk, shaped alike."""
    program = tl.program_id(0)
    head = (program % heads).to(tl.int64)
    segment = program // heads
    sequence, batch, start, count, _, last = locate(
        table, segment, segments, length, tokens, PACKED
    )
    if count == 0:
        return
    carried = tl.sum(
        state_product(
            entering, final, leaving, segment, sequence, head, heads, last, 0, D, D, DV, BD
        )
    )
    row = (batch * heads + head) * tokens + start
    rows = tl.arange(0, ROWS)
    blocks = tl.cdiv(count, ROWS)
    for n in range(blocks):
        at = (blocks - 1 - n) * ROWS
        inside = rows < count - at
        x = tl.load(products + row + at + rows, mask=inside, other=0.0)
        tl.store(dg + row + at + rows, tl.cumsum(x, 0, reverse=True) + carried, mask=inside)
        carried += tl.sum(x)


@triton.jit(
    do_not_specialize=[
        "segments", "length", "tokens", "q_b", "q_h", "k_b", "k_h", "v_b", "v_h", "o_b", "o_h",
        "g_b", "g_h",
    ]
)  # fmt: skip
def vector_gates_kernel(
    q, q_b, q_h, q_t, q_d, k, k_b, k_h, k_t, k_d, v, v_b, v_h, v_t, v_d, do, o_b, o_h, o_t, o_d,
    gates, g_b, g_h, g_t, g_d, dq_weighted, dk_weighted, entering, final, leaving, dq, dk, dg,
    table, scale, segments, length, tokens, heads, k_group, v_group,
    D: tl.constexpr, DV: tl.constexpr, BC: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    LEVELS: tl.constexpr, PACKED: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr,
    DGATES: tl.constexpr,
):  # fmt: skip
    """dq, dk and, if DGATES, dg (batch, heads, tokens, D) of one segment and BC key channels, from
    the gradients of the weighted q and k and from the products inside each block.
    """
    parts: tl.constexpr = (D + BC - 1) // BC
    ragged: tl.constexpr = D % BC != 0
    program = tl.program_id(0)
    channel = (program % parts).to(tl.int64) * BC
    head = ((program // parts) % heads).to(tl.int64)
    segment = (program // parts) // heads
    sequence, batch, start, count, _, last = locate(
        table, segment, segments, length, tokens, PACKED
    )
    if count == 0:
        return
    width = D - channel
    q += offset(batch, q_b, head, q_h, start, q_t, ALIGNED) + channel * q_d
    k += offset(batch, k_b, head // k_group, k_h, start, k_t, ALIGNED) + channel * k_d
    v += offset(batch, v_b, head // v_group, v_h, start, v_t, ALIGNED)
    do += offset(batch, o_b, head, o_h, start, o_t, ALIGNED)
    gates += offset(batch, g_b, head, g_h, start, g_t, ALIGNED) + channel * g_d
    row = (batch * heads + head) * tokens + start
    down, across = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    apart = down ^ across
    carried = tl.zeros((BC,), tl.float32)
    if DGATES:
        carried = state_product(
            entering, final, leaving, segment, sequence, head, heads, last, channel,
            tl.minimum(width, BC), D, DV, BC,
        )  # fmt: skip
    blocks = tl.cdiv(count, C)
    for n in range(blocks):
        i = blocks - 1 - n
        at = tl.cast(i, tl.int64) * C
        left = count - i * C
        dP = tl.zeros((C, C), tl.float32)
        for column in range(0, DV, BV):
            V = load_tile(
                v + at * v_t + tl.cast(column, tl.int64) * v_d,
                v_t,
                v_d,
                left,
                DV - column,
                C,
                BV,
                DV % BV != 0,
                WIDE,
            )
            dO = load_tile(
                do + at * o_t + tl.cast(column, tl.int64) * o_d,
                o_t,
                o_d,
                left,
                DV - column,
                C,
                BV,
                DV % BV != 0,
                WIDE,
            )
            dP = tl.dot(dO, tl.trans(V), dP, input_precision="ieee")
        dP *= scale
        same = tl.sum(tl.where(down == across, dP, 0.0), 1)[:, None]
        dP = tl.where(down > across, dP, 0.0)
        Q = load_tile(q + at * q_t, q_t, q_d, left, width, C, BC, ragged, WIDE)
        K = load_tile(k + at * k_t, k_t, k_d, left, width, C, BC, ragged, WIDE)
        g = load_gates(gates + at * g_t, g_t, g_d, left, width, C, BC, ragged, WIDE)
        dQ = same * K
        dK = same * Q
        sums, group = g, g
        for level in tl.static_range(0, LEVELS):
            upper = upper_half(1 << level, C)
            E = tl.exp(tl.where(upper, sums, group - sums))
            part = tl.where((apart >> level) == 1, dP, 0.0).to(Q.dtype)
            dQ += E * tl.dot(part, (K * E).to(K.dtype), input_precision="ieee")
            dK += E * tl.dot(tl.trans(part), (Q * E).to(Q.dtype), input_precision="ieee")
            wider = pair_totals(group, 1 << level, C, BC)
            sums += tl.where(upper, wider - group, 0.0)
            group = wider
        here = (row + at) * D + channel
        dQ += load_tile(dq_weighted + here, D, 1, left, width, C, BC, ragged) * (
            tl.exp(sums) * scale
        )
        dK += load_tile(dk_weighted + here, D, 1, left, width, C, BC, ragged) * tl.exp(group - sums)
        store_tile(dq + here, D, dQ, left, width, C, BC, ragged)
        store_tile(dk + here, D, dK, left, width, C, BC, ragged)
        if DGATES:
            x = Q * dQ - K * dK
            store_tile(
                dg + here, D, tl.cumsum(x, 0, reverse=True) + carried[None, :], left, width, C, BC,
                ragged,
            )  # fmt: skip
            carried += tl.sum(x, 0)
