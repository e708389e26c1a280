"""Triton kernels for the states between segments: each segment's own sum, then a chain over them.

Forward, a segment contributes sum_t e^(G_end - G_t) k_t v_t^T to the state behind it; backward, it
contributes scale sum_t e^(G_t) q_t do_t^T to the gradient of the state before it. Under a decay per
channel the factors are already in k and q (see `triton_pairs.py`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.fast.engines.scan.triton_common import (
    BITS,
    CONSTANT,
    NONE,
    SCALAR,
    VANISHED,
    VANISHED_BITS,
    VECTOR,
    bits_of,
    block_decay,
    decay_of,
    exchanged,
    load_decay,
    locate,
    offset,
    open_rows,
    read_rows,
)
from attnspec.fast.engines.scan.triton_walk import numbers

SEARCH = tl.constexpr(1024)
"""Rows of log decays read at once to find where they have summed up to VANISHED."""


@triton.jit
def reach(gates, stride_t, slope, count, DECAY: tl.constexpr, BACKWARD: tl.constexpr):
    """How many rows next to the segment's end (its start if BACKWARD) can weigh anything."""
    rows = count
    if DECAY == CONSTANT:
        far = -VANISHED / tl.maximum(slope, 1e-30)
        rows = tl.minimum(far, count.to(tl.float32)).to(tl.int32) + 1
    elif (DECAY == SCALAR) | (DECAY == BITS):
        vanished: tl.constexpr = VANISHED_BITS if DECAY == BITS else VANISHED
        rows = count * 0
        total = tl.full((), 0.0, tl.float32)
        while (rows < count) & (total > vanished):
            more = tl.minimum(count - rows, SEARCH)
            at = count - rows - more
            if BACKWARD:
                at = rows
            g = load_decay(gates + at.to(tl.int64) * stride_t, stride_t, more, SEARCH, DECAY)
            total += tl.sum(g)
            rows += more
    return tl.minimum(rows, count)


@triton.jit(
    do_not_specialize=[
        "segments", "length", "tokens", "a_b", "a_h", "b_b", "b_h", "g_b", "g_h", "inner_b",
        "inner_h",
    ]
)  # fmt: skip
def states_kernel(
    a, a_b, a_h, a_t, a_d, b, b_b, b_h, b_t, b_d, gates, g_b, g_h, g_t,
    inner, inner_b, inner_h, inner_t, totals, states, decays,
    table, scale, segments, length, tokens, heads, a_group, b_group, inner_group,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    DECAY: tl.constexpr, PACKED: tl.constexpr, BACKWARD: tl.constexpr, EVERY: tl.constexpr,
    INNER: tl.constexpr,
    ALIGNED: tl.constexpr, WIDE: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """states[segment, head] = the segment's weighted sum of a^T b; decays = its decay's logarithm
    to base 2.

    a, b are k, v (forward) or q, do (BACKWARD). The last segment of a sequence (the first, if
    BACKWARD) is needed by no other and left out unless EVERY. `inner` weighs the rows if INNER.
    """
    tiles: tl.constexpr = (DV + BV - 1) // BV
    program = tl.program_id(0)
    tile = (program % tiles).to(tl.int64)
    head = ((program // tiles) % heads).to(tl.int64)
    segment = (program // tiles) // heads
    _, batch, start, count, first, last = locate(table, segment, segments, length, tokens, PACKED)
    unread = last
    if BACKWARD:
        unread = first
    if EVERY:
        unread = count == 0
    if unread | (count == 0):
        return
    a += offset(batch, a_b, head // a_group, a_h, start, a_t, ALIGNED)
    b += offset(batch, b_b, head // b_group, b_h, start, b_t, ALIGNED) + tile * BV * b_d
    width = DV - tile * BV
    A_rows = open_rows(a, count, tl.full((), D, tl.int32), a_t, C, BD, DESCRIPTORS)
    B_rows = open_rows(b, count, width, b_t, C, BV, DESCRIPTORS)
    slope = 0.0
    if DECAY == CONSTANT:
        slope = tl.load(gates + head)
    if (DECAY == SCALAR) | (DECAY == BITS):
        gates += batch * g_b + head * g_h + start * g_t
    if INNER:
        inner += batch * inner_b + head // inner_group * inner_h + start * inner_t
    blocks_per_segment = tl.cdiv(length, C)
    where = segment.to(tl.int64) * heads + head
    within = reach(gates, g_t, slope, count, DECAY, BACKWARD)
    blocks = tl.cdiv(count, C)
    low = 0
    if BACKWARD:
        blocks = tl.cdiv(within, C)
    else:
        low = (count - within) // C
    S = tl.zeros((BD, BV), tl.float32)
    log_decay = tl.zeros((BD,), tl.float32) if DECAY == VECTOR else tl.full((), 0.0, tl.float32)
    channels = tl.arange(0, BD)
    i = low
    if BACKWARD:
        i = blocks - 1
    g_next, inner_next, _ = numbers(
        gates, g_t, inner, inner_t, inner, inner_t, i, count, C, DECAY, INNER, False
    )
    for n in range(blocks - low):
        g, inner_now = g_next, inner_next
        i = low + n
        following = i + 1
        if BACKWARD:
            i = blocks - 1 - n
            following = i - 1
        # A block ahead: the product waits for them.
        g_next, inner_next, _ = numbers(
            gates, g_t, inner, inner_t, inner, inner_t, following, count, C, DECAY, INNER, False
        )
        left = count - i * C
        A = read_rows(A_rows, i, a_t, a_d, left, D, C, BD, D < BD, WIDE, DESCRIPTORS)
        B = read_rows(B_rows, i, b_t, b_d, left, width, C, BV, DV % BV != 0, WIDE, DESCRIPTORS)
        if DECAY == VECTOR:
            block = (segment.to(tl.int64) * blocks_per_segment + i) * heads + head
            total = tl.load(totals + block * D + channels, mask=channels < D, other=0.0)
            S *= decay_of(total, DECAY)[:, None]
        else:
            sums, total = block_decay(g, slope, left, C, DECAY)
            weights = decay_of(sums if BACKWARD else total - sums, DECAY)
            if BACKWARD:
                weights *= scale
            if INNER:
                weights *= exchanged(inner_now, C)
            if BACKWARD or DECAY != NONE or INNER:
                B = (B * weights[:, None]).to(B.dtype)
            if DECAY != NONE:
                S *= decay_of(total, DECAY)
        log_decay += total
        S = tl.dot(tl.trans(A), B, S, input_precision="ieee")
    rows, columns = channels[:, None], tile * BV + tl.arange(0, BV)[None, :]
    inside = (rows < D) & (columns < DV)
    tl.store(states + where * D * DV + rows * DV + columns, S, mask=inside)
    if tile == 0:
        if DECAY == VECTOR:
            tl.store(decays + where * D + channels, bits_of(log_decay, DECAY), mask=channels < D)
        else:
            tl.store(decays + where, bits_of(log_decay, DECAY))


@triton.jit(do_not_specialize=["segments"])
def chain_kernel(
    states, decays, initial, final, bounds, segments, heads,
    D: tl.constexpr, DV: tl.constexpr, ITEMS: tl.constexpr, PACKED: tl.constexpr,
    DECAY: tl.constexpr, INITIAL: tl.constexpr, BACKWARD: tl.constexpr, FINAL: tl.constexpr,
):  # fmt: skip
    """Turn the sums of the segments into the states that enter them, in place: forward the state
    before each segment, BACKWARD the gradient of the state behind it. FINAL also keeps the last.
    """
    parts: tl.constexpr = (D * DV + ITEMS - 1) // ITEMS
    program = tl.program_id(0)
    items = (program % parts) * ITEMS + tl.arange(0, ITEMS)
    inside = items < D * DV
    head = ((program // parts) % heads).to(tl.int64)
    sequence = ((program // parts) // heads).to(tl.int64)
    if PACKED:
        low = tl.load(bounds + sequence)
        high = tl.load(bounds + sequence + 1)
    else:
        low = sequence * segments
        high = low + segments
    own = (sequence * heads + head) * D * DV + items
    S = tl.zeros((ITEMS,), tl.float32)
    if INITIAL:
        S = tl.load(initial + own, mask=inside, other=0.0)
    count = (high - low).to(tl.int32)
    for n in tl.range(0, count, num_stages=4):
        segment = low + n
        if BACKWARD:
            segment = high - 1 - n
        where = segment * heads + head
        at = states + where * D * DV + items
        summed = n + 1 < count
        if FINAL:
            summed = n < count
        wanted = items < tl.where(summed, D * DV, 0)
        sums = tl.load(at, mask=wanted, other=0.0)
        tl.store(at, S, mask=inside)
        if DECAY == VECTOR:
            decay = tl.load(decays + where * D + items // DV, mask=wanted, other=0.0)
        else:
            decay = tl.where(summed, tl.load(decays + where), 0.0)
        S = S * tl.exp2(decay) + sums
    if FINAL:
        tl.store(final + own, S, mask=inside)
