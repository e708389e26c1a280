"""Triton kernels for the gradient of the log decays, and of q and k under a decay per channel.

dg_t sums q . dq - k . dk over the tokens from t to the end of its segment, plus the product of the
state behind the segment with its gradient: the part of all later tokens, with no long sum. Under a
decay per channel a block is a program: what pairs inside a block add to its sum cancels, so the
walks, which know the rest, already hand over the sums of whole blocks.

The kernels of a decay per channel run on two warps on Hopper, where matrix products are then no
asynchronous ones: those lost operands that came through registers on a device.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.fast.engines.scan.triton_common import (
    LOG2E,
    load_tile,
    locate,
    locate_block,
    offset,
    store_tile,
)
from attnspec.fast.engines.scan.triton_levels import (
    FLAGS,
    group_pairs,
    level_pairs,
    level_weights,
    load_gates,
    pick_steep,
    sum_rows,
    weigh_rows,
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


@triton.jit
def pair_gradients(
    do, o_t, o_d, v, v_t, v_d, left, DV: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """do v^T (C, C) of one block."""
    dP = tl.zeros((C, C), tl.float32)
    for column in range(0, DV, BV):
        wide = tl.cast(column, tl.int64)
        width = DV - column
        V = load_tile(v + wide * v_d, v_t, v_d, left, width, C, BV, DV % BV != 0, WIDE)
        dO = load_tile(do + wide * o_d, o_t, o_d, left, width, C, BV, DV % BV != 0, WIDE)
        dP = tl.dot(dO, tl.trans(V), dP, input_precision="ieee")
    return dP


@triton.jit(
    do_not_specialize=[
        "many", "span", "segments", "length", "tokens", "q_b", "q_h", "k_b", "k_h", "v_b", "v_h",
        "o_b", "o_h", "g_b", "g_h",
    ]
)  # fmt: skip
def steep_gates_kernel(
    q, q_b, q_h, q_t, q_d, k, k_b, k_h, k_t, k_d, v, v_b, v_h, v_t, v_d, do, o_b, o_h, o_t, o_d,
    gates, g_b, g_h, g_t, g_d, dq, dk, steep, many, span, table, scale, segments, length, tokens,
    heads, k_group, v_group,
    D: tl.constexpr, DV: tl.constexpr, BC: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    LEVELS: tl.constexpr, REACH: tl.constexpr, PACKED: tl.constexpr, ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """For the steep ones of `span` blocks, turn the gradients of the weighted q and k into those of
    q and k, in place; the weights are those of `steep_pairs_kernel`.
    """
    ragged: tl.constexpr = D % BC != 0
    program, programs = tl.program_id(0), tl.num_programs(0)
    chosen = pick_steep(steep, span, many, REACH)
    if tl.max(chosen, 0) == 0:
        return
    for n in range(span):
        head, _, batch, start, left = locate_block(
            program + n * programs, table, segments, length, tokens, heads, C, PACKED
        )
        if (tl.sum(tl.where(tl.arange(0, FLAGS) == n, chosen, 0), 0) == 1) & (left > 0):
            Q_rows = q + offset(batch, q_b, head, q_h, start, q_t, ALIGNED)
            K_rows = k + offset(batch, k_b, head // k_group, k_h, start, k_t, ALIGNED)
            V_rows = v + offset(batch, v_b, head // v_group, v_h, start, v_t, ALIGNED)
            dO_rows = do + offset(batch, o_b, head, o_h, start, o_t, ALIGNED)
            g_rows = gates + offset(batch, g_b, head, g_h, start, g_t, ALIGNED)
            row = (batch * heads + head) * tokens + start
            dP = pair_gradients(dO_rows, o_t, o_d, V_rows, v_t, v_d, left, DV, BV, C, WIDE) * scale
            for channel in range(0, D, BC):
                width = D - channel
                wide = tl.cast(channel, tl.int64)
                Q = load_tile(Q_rows + wide * q_d, q_t, q_d, left, width, C, BC, ragged, WIDE)
                K = load_tile(K_rows + wide * k_d, k_t, k_d, left, width, C, BC, ragged, WIDE)
                g = load_gates(g_rows + wide * g_d, g_t, g_d, left, width, C, BC, ragged, WIDE)
                here = row * D + channel
                dQ = load_tile(dq + here, D, 1, left, width, C, BC, ragged).to(tl.float32) * scale
                dK = load_tile(dk + here, D, 1, left, width, C, BC, ragged).to(tl.float32)
                Q, g, level, near, until, behind = weigh_rows(Q, g, Q.dtype, C, REACH)
                dQ *= tl.exp2(until)
                dK *= tl.exp2(behind)
                rise, fall = tl.exp2(near), tl.exp2(-near)
                part = tl.where(group_pairs(level, C), dP, 0.0).to(Q.dtype)
                dQ += rise * tl.dot(part, (K * fall).to(K.dtype), input_precision="ieee")
                dK += fall * tl.dot(tl.trans(part), (Q * rise).to(Q.dtype), input_precision="ieee")
                for higher in range(level, LEVELS):
                    E = tl.exp2(sum_rows(level_weights(higher, C), g, Q.dtype))
                    part = tl.where(level_pairs(higher, C), dP, 0.0).to(Q.dtype)
                    dQ += E * tl.dot(part, (K * E).to(K.dtype), input_precision="ieee")
                    dK += E * tl.dot(tl.trans(part), (Q * E).to(Q.dtype), input_precision="ieee")
                store_tile(dq + here, D, dQ, left, width, C, BC, ragged)
                store_tile(dk + here, D, dK, left, width, C, BC, ragged)


@triton.jit(do_not_specialize=["segments", "length", "tokens"])
def carried_gates_kernel(
    q_sums, k_sums, entering, final, leaving, carried, table, segments, length, tokens, heads,
    D: tl.constexpr, DV: tl.constexpr, BC: tl.constexpr, C: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """What dg has from all rows behind a block: carried (blocks, heads, D), for one segment and BC
    channels, from the blocks' sums (blocks, heads, D) of q . dq and of k . dk.
    """
    parts: tl.constexpr = (D + BC - 1) // BC
    program = tl.program_id(0)
    channel = (program % parts) * BC
    head = ((program // parts) % heads).to(tl.int64)
    segment = (program // parts) // heads
    sequence, _, _, count, _, last = locate(table, segment, segments, length, tokens, PACKED)
    if count == 0:
        return
    behind = state_product(
        entering, final, leaving, segment, sequence, head, heads, last, channel,
        tl.minimum(D - channel, BC), D, DV, BC,
    )  # fmt: skip
    blocks = tl.cdiv(count, C)
    channels = channel + tl.arange(0, BC)
    inside = channels < D
    first = segment.to(tl.int64) * tl.cdiv(length, C)
    for n in tl.range(0, blocks, num_stages=4):
        at = ((first + blocks - 1 - n) * heads + head) * D + channels
        of_q = tl.load(q_sums + at, mask=inside, other=0.0)
        of_k = tl.load(k_sums + at, mask=inside, other=0.0)
        tl.store(carried + at, behind, mask=inside)
        behind += of_q - of_k


@triton.jit(
    do_not_specialize=[
        "segments", "length", "tokens", "q_b", "q_h", "k_b", "k_h", "v_b", "v_h", "o_b", "o_h",
        "g_b", "g_h",
    ]
)  # fmt: skip
def vector_gates_kernel(
    q, q_b, q_h, q_t, q_d, k, k_b, k_h, k_t, k_d, v, v_b, v_h, v_t, v_d, do, o_b, o_h, o_t, o_d,
    gates, g_b, g_h, g_t, g_d, dq_weighted, dk_weighted, steep, carried, dq, dk,
    dg, table, scale, segments, length, tokens, heads, k_group, v_group,
    D: tl.constexpr, DV: tl.constexpr, BC: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    LEVELS: tl.constexpr, REACH: tl.constexpr, PACKED: tl.constexpr, ALIGNED: tl.constexpr,
    WIDE: tl.constexpr, DGATES: tl.constexpr,
):  # fmt: skip
    """dq, dk and, if DGATES, dg (batch, heads, tokens, D) of one block, from the gradients of the
    weighted q and k and from the products inside the block. Of steep blocks `steep_gates_kernel`
    has left dq and dk where the weighted ones were.
    """
    ragged: tl.constexpr = D % BC != 0
    program = tl.program_id(0)
    head, _, batch, start, left = locate_block(
        program, table, segments, length, tokens, heads, C, PACKED
    )
    if left <= 0:
        return
    q += offset(batch, q_b, head, q_h, start, q_t, ALIGNED)
    k += offset(batch, k_b, head // k_group, k_h, start, k_t, ALIGNED)
    gates += offset(batch, g_b, head, g_h, start, g_t, ALIGNED)
    row = (batch * heads + head) * tokens + start
    part = tl.zeros((C, C), q.dtype.element_ty)
    gentle = left < 0
    if REACH > 0:
        gentle = tl.load(steep + program) == 0
        if gentle:
            v += offset(batch, v_b, head // v_group, v_h, start, v_t, ALIGNED)
            do += offset(batch, o_b, head, o_h, start, o_t, ALIGNED)
            dP = pair_gradients(do, o_t, o_d, v, v_t, v_d, left, DV, BV, C, WIDE)
            part = tl.where(group_pairs(LEVELS, C), dP * scale, 0.0).to(q.dtype.element_ty)
    for channel in range(0, D, BC):
        width = D - channel
        wide = tl.cast(channel, tl.int64)
        here = row * D + channel
        Q = load_tile(q + wide * q_d, q_t, q_d, left, width, C, BC, ragged, WIDE)
        K = load_tile(k + wide * k_d, k_t, k_d, left, width, C, BC, ragged, WIDE)
        dQ = load_tile(dq_weighted + here, D, 1, left, width, C, BC, ragged)
        dK = load_tile(dk_weighted + here, D, 1, left, width, C, BC, ragged)
        if REACH > 0:  # noqa: SIM102 (a constant, and a number on the device)
            if gentle:
                g = load_gates(gates + wide * g_d, g_t, g_d, left, width, C, BC, ragged, WIDE)
                middle = tl.sum(g, 0) * (0.5 * LOG2E)
                half = tl.exp2(middle)[None, :]
                near = tl.cumsum(g * LOG2E, 0) - middle[None, :]
                rise, fall = tl.exp2(near), tl.exp2(-near)
                dQ = rise * tl.dot(part, (K * fall).to(K.dtype), dQ * (half * scale))
                dK = fall * tl.dot(tl.trans(part), (Q * rise).to(Q.dtype), dK * half)
        store_tile(dq + here, D, dQ, left, width, C, BC, ragged)
        store_tile(dk + here, D, dK, left, width, C, BC, ragged)
        if DGATES:
            channels = tl.arange(0, BC)
            at = program.to(tl.int64) * D + channel + channels
            behind = tl.load(carried + at, mask=channels < width, other=0.0)
            x = tl.cumsum(Q * dQ - K * dK, 0, reverse=True) + behind[None, :]
            store_tile(dg + here, D, x, left, width, C, BC, ragged)
