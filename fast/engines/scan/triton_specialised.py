"""The scan's specialised walk for Hopper: warps of different trades, in Gluon.

What is computed is what `triton_walk` computes. A program walks a segment with two consumers, each
for 64 channels of v of a head; they share queries and keys if they can. A producer asks for the
tiles of a block as soon as those of an earlier one are not needed any more, and for each consumer a
warp turns log decays and weights into the numbers that a block's products are multiplied by. A
consumer keeps its state transposed, (channels of v, R): so it is the first operand of the product
with the queries and need not leave registers, and no more do the values. Written for Triton 3.6.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from attnspec.fast.engines.flash.triton_specialised import ring
from attnspec.fast.engines.scan.triton_common import decay_of
from attnspec.fast.engines.scan.triton_specialised_parts import (
    CHANNELS,
    FACTS,
    PAIRS,
    READING,
    ROWS_OUT,
    SUMS,
    TOTAL,
    WRITING,
    block_at,
    facts_ring,
    locate,
    measure,
    produce,
    rings_of,
    whole,
)


@gluon.jit
def state_places(
    channel, R: gl.constexpr, V: gl.constexpr, WIDTH: gl.constexpr, TRANSPOSED: gl.constexpr,
    layout: gl.constexpr,
):  # fmt: skip
    """Where the state of v's channels from `channel` on, (CHANNELS, WIDTH), lies in a contiguous
    (R, V), or (V, R) if TRANSPOSED, and which of it exists.
    """
    down = (channel + gl.arange(0, CHANNELS, gl.SliceLayout(1, layout)))[:, None]
    across = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))[None, :]
    inside = (down < V) & (across < R)
    places = down * R + across if TRANSPOSED else across * V + down
    return places, inside


@gluon.jit
def consume(
    entering, final, out, products, rings, rooms, place, sizes, WHO: gl.constexpr,
    R: gl.constexpr, V: gl.constexpr, WIDTH: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr,
    DECAY: gl.constexpr, BACKWARD: gl.constexpr, TRANSPOSED: gl.constexpr,
    ENTERING: gl.constexpr, FINAL: gl.constexpr, PRODUCTS: gl.constexpr, OUTER: gl.constexpr,
    DTYPE: gl.constexpr,
):  # fmt: skip
    """Walk the segment for CHANNELS of v's channels."""
    STATE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, WIDTH, 16])
    ROWS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, C, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, ROWS, 2)
    LEFT_STATE: gl.constexpr = gl.DotOperandLayout(0, STATE, 2)
    owners, batch, part, segment, start, _count, low, steps = place
    head, channel = owners[WHO]
    segments, tokens, heads, batches = sizes
    q_rings, k_rings, v_rings, w_rings, facts_rings = rings
    q_room, q_full, q_empty = q_rings[WHO]
    k_room, k_full, k_empty = k_rings[WHO]
    v_room, v_full, v_empty = v_rings[WHO]
    facts, facts_full, facts_empty = facts_rings[WHO]
    # Products of pairs are not needed any more when rows of the output are written.
    out_room = rooms[WHO]
    pairs_room = out_room.reshape([C, CHANNELS])
    places, inside = state_places(channel, R, V, WIDTH, TRANSPOSED, STATE)
    S = gl.zeros([CHANNELS, WIDTH], gl.float32, STATE)
    if ENTERING:
        at = (segment.to(gl.int64) * heads + head) * R * V
        S = gl.load(entering + at + places, mask=inside, other=0.0)
    across = gl.arange(0, C, gl.SliceLayout(0, ROWS))[None, :]
    down = gl.arange(0, C, gl.SliceLayout(1, ROWS))[:, None]
    for n in range(steps):
        stage, phase = n % STAGES, n // STAGES & 1
        fact = stage * FACTS
        nothing = gl.zeros([CHANNELS, C], gl.float32, ROWS)
        keys = k_room.index(stage).reshape([C, WIDTH])
        queries = q_room.index(stage).reshape([C, WIDTH]).permute((1, 0))
        # Before any product is under way, which the assembler would have it wait for.
        S_rounded = gl.convert_layout(S.to(DTYPE), LEFT)
        mbarrier.wait(k_full.index(stage), phase)
        mbarrier.wait(q_full.index(stage), phase)
        # Pairs are (read, reading).
        P = warpgroup_mma(keys, queries, nothing, use_acc=False, is_async=True)
        Y = warpgroup_mma(S_rounded, queries, nothing, use_acc=False, is_async=True)
        mbarrier.wait(facts_full.index(stage), phase)
        reading = facts.index(fact + SUMS).load(gl.SliceLayout(0, ROWS))[None, :]
        read = facts.index(fact + SUMS).load(gl.SliceLayout(1, ROWS))[:, None]
        gap = read - reading if BACKWARD else reading - read
        seen = down >= across if BACKWARD else down <= across
        decay = decay_of(gl.where(seen, gap, float("-inf")), DECAY)
        decay *= facts.index(fact + PAIRS).load(gl.SliceLayout(1, ROWS))[:, None]
        mbarrier.wait(v_full.index(stage), phase)
        X = v_room.index(stage).reshape([C, CHANNELS]).permute((1, 0)).load(LEFT)
        mbarrier.arrive(v_empty.index(stage), count=1)
        P = (warpgroup_mma_wait(1, deps=[P]) * decay).to(DTYPE)
        tma.store_wait(0)
        pairs_room.store(P)
        fence_async_shared()
        Y, S_rounded = warpgroup_mma_wait(0, deps=[Y, S_rounded])
        mbarrier.arrive(q_empty.index(stage), count=1)
        Y = Y * facts.index(fact + READING).load(gl.SliceLayout(0, ROWS))[None, :]
        Y = warpgroup_mma(X, pairs_room, Y, is_async=True)
        kept = facts.index(fact + WRITING).load(gl.SliceLayout(0, LEFT))[None, :]
        written = gl.convert_layout((X.to(gl.float32) * kept).to(DTYPE), LEFT_STATE)
        S = S * facts.index(fact + TOTAL).load(gl.SliceLayout(1, STATE))[:, None]
        S = warpgroup_mma(written, keys, S, is_async=True)
        outward = facts.index(fact + ROWS_OUT).load(gl.SliceLayout(0, ROWS))[None, :]
        mbarrier.arrive(facts_empty.index(stage), count=1)
        Y, X = warpgroup_mma_wait(1, deps=[Y, X])
        row = start.to(gl.int32) + block_at(n, low, steps, BACKWARD) * C
        if PRODUCTS:
            w_room, w_full, w_empty = w_rings[WHO]
            mbarrier.wait(w_full.index(stage), phase)
            W = w_room.index(stage).reshape([C, CHANNELS]).permute((1, 0)).load(ROWS)
            mbarrier.arrive(w_empty.index(stage), count=1)
            sums = gl.sum(W.to(gl.float32) * Y, 0)
            line = (channel // CHANNELS).to(gl.int64) * batches + batch
            each = row + gl.arange(0, C, gl.SliceLayout(0, ROWS))
            gl.store(products + (line * heads + head) * tokens + each, sums, mask=each < tokens)
        if OUTER:
            Y = Y * outward
        pairs_room.permute((1, 0)).store(Y.to(DTYPE))
        fence_async_shared()
        tma.async_copy_shared_to_global(out, [batch, head, row, channel], out_room)
        S, written = warpgroup_mma_wait(0, deps=[S, written])
        mbarrier.arrive(k_empty.index(stage), count=1)
    tma.store_wait(0)
    if FINAL:
        edge = part == (0 if BACKWARD else segments - 1)
        at = (batch.to(gl.int64) * heads + head) * R * V
        gl.store(final + at + places, S, mask=inside & edge)


@gluon.jit
def room_of(x):
    """Room for one tile of x."""
    return gl.allocate_shared_memory(x.dtype, x.block_shape, x.layout)


@gluon.jit(
    do_not_specialize=[
        "segments", "length", "tokens", "batches", "g_b", "g_h", "inner_b", "inner_h", "outer_b",
        "outer_h",
    ]
)  # fmt: skip
def specialised_walk_kernel(
    q_tiles, k_tiles, v_tiles, w_tiles, out_tiles, gates, g_b, g_h, g_t,
    inner, inner_b, inner_h, inner_t, outer, outer_b, outer_h, outer_t, entering, products, final,
    scale, segments, length, tokens, heads, batches,
    q_group, k_group, v_group, w_group, inner_group, outer_group,
    R: gl.constexpr, V: gl.constexpr, WIDTH: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr,
    DECAY: gl.constexpr, BACKWARD: gl.constexpr, TRANSPOSED: gl.constexpr,
    ENTERING: gl.constexpr, FINAL: gl.constexpr, PRODUCTS: gl.constexpr, INNER: gl.constexpr,
    OUTER: gl.constexpr, SHARED: gl.constexpr,
):  # fmt: skip
    """`walk_kernel` of sequences that are not packed, under a decay that is the same for all
    channels. Tiles are of rows (batch, heads, tokens, width), and sums for PRODUCTS are of
    CHANNELS each. SHARED says that both consumers of a program read the same q and k.
    """
    DTYPE: gl.constexpr = q_tiles.dtype
    place = whole(locate(segments, length, tokens, heads, (V + CHANNELS - 1) // CHANNELS), C)
    v_rings = (ring(v_tiles, STAGES, 1), ring(v_tiles, STAGES, 1))
    w_rings = v_rings
    if PRODUCTS:
        w_rings = (ring(w_tiles, STAGES, 1), ring(w_tiles, STAGES, 1))
    rings = (
        rings_of(q_tiles, STAGES, SHARED), rings_of(k_tiles, STAGES, SHARED), v_rings, w_rings,
        (facts_ring(C, STAGES), facts_ring(C, STAGES)),
    )  # fmt: skip
    rooms = (room_of(out_tiles), room_of(out_tiles))
    strides = (g_b, g_h, g_t, inner_b, inner_h, inner_t, outer_b, outer_h, outer_t)
    groups = (q_group, k_group, v_group, w_group, inner_group, outer_group)
    sizes = (segments, tokens, heads, batches)
    gl.warp_specialize(
        [
            (consume, (
                entering, final, out_tiles, products, rings, rooms, place, sizes, 0, R, V, WIDTH, C,
                STAGES, DECAY, BACKWARD, TRANSPOSED, ENTERING, FINAL, PRODUCTS, OUTER, DTYPE,
            )),
            (consume, (
                entering, final, out_tiles, products, rings, rooms, place, sizes, 1, R, V, WIDTH, C,
                STAGES, DECAY, BACKWARD, TRANSPOSED, ENTERING, FINAL, PRODUCTS, OUTER, DTYPE,
            )),
            (produce, (
                q_tiles, k_tiles, v_tiles, w_tiles, rings, place, groups, C, STAGES, BACKWARD,
                SHARED, PRODUCTS,
            )),
            (measure, (
                gates, inner, outer, rings, place, strides, groups, scale, 0, C, STAGES, DECAY,
                BACKWARD, INNER, OUTER,
            )),
            (measure, (
                gates, inner, outer, rings, place, strides, groups, scale, 1, C, STAGES, DECAY,
                BACKWARD, INNER, OUTER,
            )),
        ],
        [4, 1, 1, 1], [232, 40, 40, 40],
    )  # fmt: skip
