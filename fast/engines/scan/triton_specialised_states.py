"""The scan's specialised sums of segments for Hopper, in Gluon: what `states_kernel` computes, by
warps of the trades of `triton_specialised`.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from attnspec.fast.engines.flash.triton_specialised import ring
from attnspec.fast.engines.scan.triton_common import (
    BITS,
    CONSTANT,
    LOWEST,
    LOWEST_BITS,
    SCALAR,
    VANISHED,
    VANISHED_BITS,
)
from attnspec.fast.engines.scan.triton_specialised_parts import (
    CHANNELS,
    FACTS,
    TOTAL,
    WRITING,
    facts_ring,
    locate,
    measure,
    numbers,
    produce,
    rings_of,
)

SEARCH = gl.constexpr(4096)
"""Rows of log decays read at once to find where they have summed up to VANISHED."""


@gluon.jit
def reach(gates, stride_t, slope, count, DECAY: gl.constexpr, BACKWARD: gl.constexpr):
    """How many rows next to the segment's end (its start if BACKWARD) can weigh anything."""
    rows = count
    if DECAY == CONSTANT:
        far = -VANISHED / gl.maximum(slope, 1e-30)
        rows = gl.minimum(far, count.to(gl.float32)).to(gl.int32) + 1
    elif (DECAY == SCALAR) | (DECAY == BITS):
        VANISHING: gl.constexpr = VANISHED_BITS if DECAY == BITS else VANISHED
        LEAST: gl.constexpr = LOWEST_BITS if DECAY == BITS else LOWEST
        LINE: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
        rows = count * 0
        total = gl.to_tensor(0.0)
        while (rows < count) & (total > VANISHING):
            more = gl.minimum(count - rows, SEARCH)
            first = rows if BACKWARD else count - rows - more
            row = gl.arange(0, SEARCH, LINE)
            at = gates + first.to(gl.int64) * stride_t
            g = numbers(at, stride_t, row, more)
            total += gl.sum(gl.where(g < LEAST, LEAST, g), 0)
            rows += more
    return gl.minimum(rows, count)


@gluon.jit
def consume(
    states, rings, place, heads, WHO: gl.constexpr, D: gl.constexpr, DV: gl.constexpr,
    WIDTH: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """Add up the segment for CHANNELS of b's channels."""
    STATE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, WIDTH, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, STATE, 2)
    owners, _batch, _part, segment, _start, _count, _low, steps = place
    head, channel = owners[WHO]
    _q, a_rings, b_rings, _w, facts_rings = rings
    a_room, a_full, a_empty = a_rings[WHO]
    b_room, b_full, b_empty = b_rings[WHO]
    facts, facts_full, facts_empty = facts_rings[WHO]
    S = gl.zeros([CHANNELS, WIDTH], gl.float32, STATE)
    for n in range(steps):
        stage, phase = n % STAGES, n // STAGES & 1
        fact = stage * FACTS
        mbarrier.wait(facts_full.index(stage), phase)
        kept = facts.index(fact + WRITING).load(gl.SliceLayout(0, LEFT))[None, :]
        total = facts.index(fact + TOTAL).load(gl.SliceLayout(1, STATE))[:, None]
        mbarrier.wait(b_full.index(stage), phase)
        B = b_room.index(stage).reshape([C, CHANNELS]).permute((1, 0)).load(LEFT)
        mbarrier.arrive(facts_empty.index(stage), count=1)
        mbarrier.arrive(b_empty.index(stage), count=1)
        B = (B.to(gl.float32) * kept).to(DTYPE)
        mbarrier.wait(a_full.index(stage), phase)
        A = a_room.index(stage).reshape([C, WIDTH])
        S = warpgroup_mma(B, A, S * total, is_async=True)
        S, B = warpgroup_mma_wait(0, deps=[S, B])
        mbarrier.arrive(a_empty.index(stage), count=1)
    down = (channel + gl.arange(0, CHANNELS, gl.SliceLayout(1, STATE)))[:, None]
    across = gl.arange(0, WIDTH, gl.SliceLayout(0, STATE))[None, :]
    at = (segment.to(gl.int64) * heads + head) * D * DV
    inside = (down < DV) & (across < D) & (steps > 0)
    gl.store(states + at + across * DV + down, S, mask=inside)


@gluon.jit(do_not_specialize=["segments", "length", "tokens", "g_b", "g_h", "inner_b", "inner_h"])
def specialised_states_kernel(
    a_tiles, b_tiles, gates, g_b, g_h, g_t, inner, inner_b, inner_h, inner_t, states, decays,
    scale, segments, length, tokens, heads, a_group, b_group, inner_group,
    D: gl.constexpr, DV: gl.constexpr, WIDTH: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr,
    DECAY: gl.constexpr, BACKWARD: gl.constexpr, EVERY: gl.constexpr, INNER: gl.constexpr,
    SHARED: gl.constexpr,
):  # fmt: skip
    """`states_kernel` of sequences that are not packed, under a decay that is the same for all
    channels. Tiles are of rows (batch, heads, tokens, width); SHARED says that both consumers of a
    program read the same a.
    """
    DTYPE: gl.constexpr = a_tiles.dtype
    where = locate(segments, length, tokens, heads, (DV + CHANNELS - 1) // CHANNELS)
    owners, batch, part, segment, start, count = where
    if not EVERY:
        count = gl.where(part == (0 if BACKWARD else segments - 1), 0, count)
    within = count * 0
    for who in gl.static_range(2):
        head, _channel = owners[who]
        slope = 0.0
        if DECAY == CONSTANT:
            slope = gl.load(gates + head)
        line = gates + batch.to(gl.int64) * g_b + head.to(gl.int64) * g_h + start * g_t
        within = gl.maximum(within, reach(line, g_t, slope, count, DECAY, BACKWARD))
    low = 0 if BACKWARD else (count - within) // C
    steps = (within if BACKWARD else count - low * C) + C - 1
    place = (owners, batch, part, segment, start, count, low, steps // C)
    a_rings = rings_of(a_tiles, STAGES, SHARED)
    rings = (
        a_rings, a_rings, (ring(b_tiles, STAGES, 1), ring(b_tiles, STAGES, 1)), a_rings,
        (facts_ring(C, STAGES), facts_ring(C, STAGES)),
    )  # fmt: skip
    strides = (g_b, g_h, g_t, inner_b, inner_h, inner_t, 0, 0, 0)
    groups = (a_group, a_group, b_group, b_group, inner_group, 1)
    gl.warp_specialize(
        [
            (consume, (states, rings, place, heads, 0, D, DV, WIDTH, C, STAGES, DTYPE)),
            (consume, (states, rings, place, heads, 1, D, DV, WIDTH, C, STAGES, DTYPE)),
            (produce, (
                None, a_tiles, b_tiles, None, rings, place, groups, C, STAGES, BACKWARD, SHARED,
                False,
            )),
            (measure, (
                gates, inner, inner, rings, place, strides, groups, scale, 0, C, STAGES, DECAY,
                BACKWARD, INNER, False, decays, heads,
            )),
            (measure, (
                gates, inner, inner, rings, place, strides, groups, scale, 1, C, STAGES, DECAY,
                BACKWARD, INNER, False, decays, heads,
            )),
        ],
        [4, 1, 1, 1], [168, 40, 40, 40],
    )  # fmt: skip
