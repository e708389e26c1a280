"""The flash engine's specialised forward kernel for Hopper: warps of different trades, in Gluon.

A program runs two consumers, each with `ROWS` rows of one tile, and a producer that brings keys and
values. While the matrix units multiply one tile's weights with its values, the consumer that asked
for it works out the next tile's weights, and the two consumers take turns at the units. Programs
live as long as there are tiles, so that the producer begins the next one while the last is written.

It knows the rules that need no masks or slopes, and lists with counts of what is seen whole
(`Rules.known`). What is computed is what `triton_forward` computes, edges first. Written for Triton
3.6.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from attnspec.fast.engines.flash.triton_specialised_parts import (
    LOG2E,
    bounds,
    finish,
    hide,
    key_at,
    plan,
    repair,
    rounds,
    soften,
    store_rows,
    tile_bounds,
)
from attnspec.fast.engines.flash.triton_tiles import VARYING


@gluon.jit
def room_for(x, STAGES: gl.constexpr):
    """Room for `STAGES` tiles of x."""
    shape: gl.constexpr = [STAGES] + x.block_shape  # noqa: RUF005 (Gluon knows no other way)
    return gl.allocate_shared_memory(x.dtype, shape, x.layout)


@gluon.jit
def signals(STAGES: gl.constexpr, READERS: gl.constexpr, WRITERS: gl.constexpr = 1):
    """For each stage of a ring whether it is full, when all its writers say so, and whether it is
    empty again.
    """
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=WRITERS)
        mbarrier.init(empty.index(stage), count=READERS)
    return full, empty


@gluon.jit
def ring(x, STAGES: gl.constexpr, READERS: gl.constexpr):
    """Room for `STAGES` tiles of x, and for each whether it is full and whether it is empty again,
    which it is when all its readers say so.
    """
    room = room_for(x, STAGES)
    full, empty = signals(STAGES, READERS)
    return room, full, empty


@gluon.jit
def fetch(x, b, h, first, ring, stage, phase, MORE: gl.constexpr = 0, column=0):
    """Copy rows of a head, from a channel on, to a stage of a ring as soon as it is empty; with
    MORE other bytes, which the caller copies, it is full.
    """
    room, full, empty = ring
    mbarrier.wait(empty.index(stage), phase)
    mbarrier.expect(full.index(stage), x.block_type.nbytes + MORE)
    tma.async_copy_global_to_shared(x, [b, h, first, column], full.index(stage), room.index(stage))


@gluon.jit
def produce(
    q, k, v, rings, grid, rules, HEADS: gl.constexpr, GROUP: gl.constexpr, ROWS: gl.constexpr,
    KEYS: gl.constexpr, STAGES: gl.constexpr, Q_BLOCK: gl.constexpr, K_BLOCK: gl.constexpr,
    CAUSAL: gl.constexpr,
):  # fmt: skip
    """Bring the rows of both consumers and the tiles of keys and values, as rings have room."""
    q_ring, k_ring, v_ring, _turns = rings
    at = 0
    for turn in range(rounds(grid)):
        place, walk, lengths = plan(
            turn, grid, rules, HEADS, ROWS, KEYS, Q_BLOCK, K_BLOCK, CAUSAL
        )  # fmt: skip
        b, h, q_begin, k_begin, _k_tokens, first, _stop, _shift = place
        for who in gl.static_range(2):
            fetch(q, b, h, q_begin + first + who * ROWS, q_ring, who, (turn & 1) ^ 1)
        # Rows that see nothing at all look at one tile and find nothing there.
        count = gl.maximum(lengths[0] + lengths[1], 1)
        following = key_at(0, walk, lengths, KEYS, K_BLOCK)
        for i in range(count):
            key = k_begin + following
            # A list is read one tile ahead, while the rings are full.
            following = key_at(gl.minimum(i + 1, count - 1), walk, lengths, KEYS, K_BLOCK)
            fetch(k, b, h // GROUP, key, k_ring, at % STAGES, (at // STAGES & 1) ^ 1)
            fetch(v, b, h // GROUP, key, v_ring, at % STAGES, (at // STAGES & 1) ^ 1)
            at += 1


@gluon.jit
def attend_tiles(
    first, last, total_tiles, at, sums, weights, q_tile, rings, low, high, walk, lengths, rules,
    factor, ROWS: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
    K_BLOCK: gl.constexpr, EDGE: gl.constexpr, WHO: gl.constexpr,
):  # fmt: skip
    """Tiles [first, last) of the walk: the product of the tile before is under way meanwhile."""
    top, total, mixed = sums
    _q_ring, k_ring, v_ring, turns = rings
    k_room, k_full, k_empty = k_ring
    v_room, v_full, v_empty = v_ring
    WEIGHTS: gl.constexpr = weights.type.layout
    VALUES: gl.constexpr = mixed.type.layout
    SCORES: gl.constexpr = top.type.layout.parent
    for i in range(first, last):
        c = at + i
        stage, before = c % STAGES, (c - 1) % STAGES
        key = 0
        if EDGE:
            key = key_at(i, walk, lengths, KEYS, K_BLOCK)
        mbarrier.wait(v_full.index(before), (c - 1) // STAGES & 1)
        mbarrier.wait(turns[WHO], (c & 1) ^ (1 - WHO))
        nothing = gl.zeros([ROWS, KEYS], gl.float32, SCORES)
        keys = k_room.index(stage).reshape([KEYS, q_tile.shape[1]]).permute((1, 0))
        scores = warpgroup_mma(q_tile, keys, nothing, use_acc=False, is_async=True)
        values = v_room.index(before).reshape([KEYS, mixed.shape[1]])
        mixed = warpgroup_mma(weights, values, mixed, is_async=True)
        mbarrier.arrive(turns[1 - WHO], count=1)
        scores = warpgroup_mma_wait(1, deps=[scores])
        mbarrier.arrive(k_empty.index(stage), count=1)
        if EDGE:
            lowest, end = tile_bounds(low, high, key, True, rules)
            scores, _seen = hide(scores, lowest, end, key, rules)
        new_weights, top, rescale, more = soften(scores, top, factor)
        total = total * rescale + more
        new_weights = gl.convert_layout(new_weights.to(q_tile.dtype), WEIGHTS)
        # Waiting for the next keys here keeps the compiler from waiting for the product before the
        # weights are done, which would have nothing run beside it.
        mbarrier.wait(
            k_full.index((c + 1) % STAGES), (c + 1) // STAGES & 1, pred=i + 1 < total_tiles
        )
        mixed, weights = warpgroup_mma_wait(0, deps=[mixed, new_weights])
        mbarrier.arrive(v_empty.index(before), count=1)
        mixed = mixed * gl.convert_layout(rescale, gl.SliceLayout(1, VALUES))[:, None]
    return (top, total, mixed), weights


@gluon.jit
def consume(
    inputs, rings, doubts, WHO: gl.constexpr, HEADS: gl.constexpr, DV: gl.constexpr,
    WIDTH: gl.constexpr, WIDTH_V: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr,
    STAGES: gl.constexpr, Q_BLOCK: gl.constexpr, K_BLOCK: gl.constexpr, CAUSAL: gl.constexpr,
    DTYPE: gl.constexpr,
):  # fmt: skip
    """Attend for `ROWS` rows of every tile, those behind the other consumer's if WHO is 1; leave a
    NaN in `doubts` if there was one in any.
    """
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, KEYS, 16])
    VALUES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, WIDTH_V, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, VALUES, 2)
    WRITTEN: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    out, lse, sink_logit, grid, rules, scale = inputs
    q_ring, k_ring, v_ring, turns = rings
    q_room, q_full, q_empty = q_ring
    k_room, k_full, k_empty = k_ring
    v_room, v_full, v_empty = v_ring
    q_tile = q_room.index(WHO).reshape([ROWS, WIDTH])
    factor = scale * LOG2E
    doubt = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, VALUES))
    at = 0
    for turn in range(rounds(grid)):
        place, walk, lengths = plan(
            turn, grid, rules, HEADS, ROWS, KEYS, Q_BLOCK, K_BLOCK, CAUSAL
        )  # fmt: skip
        b, h, q_begin, _k_begin, k_tokens, first, stop, _shift = place
        fulls, edges = lengths
        total_tiles = gl.maximum(fulls + edges, 1)
        first += WHO * ROWS
        row = first + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
        low, high = bounds(row, place, rules, CAUSAL)
        top = gl.full([ROWS], -float("inf"), gl.float32, gl.SliceLayout(1, SCORES))
        total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, SCORES))
        mixed = gl.zeros([ROWS, WIDTH_V], gl.float32, VALUES)
        key = gl.where(fulls + edges > 0, key_at(0, walk, lengths, KEYS, K_BLOCK), k_tokens)
        mbarrier.wait(q_full.index(WHO), turn & 1)
        stage = at % STAGES
        mbarrier.wait(k_full.index(stage), at // STAGES & 1)
        mbarrier.wait(turns[WHO], (at & 1) ^ (1 - WHO))
        keys = k_room.index(stage).reshape([KEYS, WIDTH]).permute((1, 0))
        nothing = gl.zeros([ROWS, KEYS], gl.float32, SCORES)
        scores = warpgroup_mma(q_tile, keys, nothing, use_acc=False, is_async=True)
        mbarrier.arrive(turns[1 - WHO], count=1)
        scores = warpgroup_mma_wait(0, deps=[scores])
        mbarrier.arrive(k_empty.index(stage), count=1)
        lowest, end = tile_bounds(low, high, key, edges > 0, rules)
        scores, _seen = hide(scores, lowest, end, key, rules)
        weights, top, _rescale, total = soften(scores, top, factor)
        weights = gl.convert_layout(weights.to(DTYPE), WEIGHTS)
        mbarrier.wait(k_full.index((at + 1) % STAGES), (at + 1) // STAGES & 1, pred=total_tiles > 1)
        sums = (top, total, mixed)
        edges = gl.maximum(edges, 1)
        sums, weights = attend_tiles(
            1, edges, total_tiles, at, sums, weights, q_tile, rings, low, high, walk, lengths,
            rules, factor, ROWS, KEYS, STAGES, K_BLOCK, True, WHO,
        )  # fmt: skip
        sums, weights = attend_tiles(
            edges, total_tiles, total_tiles, at, sums, weights, q_tile, rings, low, high, walk,
            lengths, rules, factor, ROWS, KEYS, STAGES, K_BLOCK, False, WHO,
        )  # fmt: skip
        mbarrier.arrive(q_empty.index(WHO), count=1)
        top, total, mixed = sums
        c = at + total_tiles - 1
        mbarrier.wait(v_full.index(c % STAGES), c // STAGES & 1)
        values = v_room.index(c % STAGES).reshape([KEYS, WIDTH_V])
        mixed = warpgroup_mma(weights, values, mixed, is_async=True)
        mixed = warpgroup_mma_wait(0, deps=[mixed])
        mbarrier.arrive(v_empty.index(c % STAGES), count=1)
        log_total, tile = finish((top, total, mixed), sink_logit, h)
        at_row = (b * HEADS + h).to(gl.int64) * rules[0] + q_begin
        gl.store(lse + at_row + row, log_total, mask=row < stop)
        written = first + gl.arange(0, ROWS, gl.SliceLayout(1, WRITTEN))
        store_rows(out, gl.convert_layout(tile.to(DTYPE), WRITTEN), at_row, written, stop, DV)
        # A NaN, once there is one, stays in what is added up.
        doubt += gl.sum(tile, 1) * 0.0
        at += total_tiles
    doubts.index(WHO).store(doubt)


@gluon.jit(do_not_specialize=[*VARYING, "q_stride_t", "k_stride_t", "v_stride_t"])
def specialised_forward_kernel(
    q_tiles, k_tiles, v_tiles, q, k, v, out, lse, sink_logit,
    q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_h, k_stride_t,
    v_stride_b, v_stride_h, v_stride_t,
    table, q_offsets, k_offsets, row_start, row_end,
    block_index, block_count, block_full,
    index_stride_b, index_stride_h, index_stride_q, count_stride_b, count_stride_h,
    q_tokens, k_tokens, tiles, sequences, section, window, sinks, scale,
    HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, DV: gl.constexpr,
    WIDTH: gl.constexpr, WIDTH_V: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr,
    STAGES: gl.constexpr, Q_BLOCK: gl.constexpr, K_BLOCK: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    DTYPE: gl.constexpr = q_tiles.dtype
    first_turn = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    second_turn = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(first_turn, count=1)
    mbarrier.init(second_turn, count=1)
    rings = (
        ring(q_tiles, 2, 1),
        ring(k_tiles, STAGES, 2),
        ring(v_tiles, STAGES, 2),
        (first_turn, second_turn),
    )
    strides = (
        q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_h, k_stride_t,
        v_stride_b, v_stride_h, v_stride_t,
    )  # fmt: skip
    grid = (tiles, sequences, section)
    lists = (
        block_index, block_count, block_full, index_stride_b, index_stride_h, index_stride_q,
        count_stride_b, count_stride_h,
    )  # fmt: skip
    rules = (
        q_tokens, k_tokens, window, sinks, (table, q_offsets, k_offsets), (row_start, row_end),
        lists,
    )  # fmt: skip
    inputs = (out, lse, sink_logit, grid, rules, scale)
    doubts = gl.allocate_shared_memory(
        gl.float32, [2, ROWS], gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    )
    gl.warp_specialize(
        [
            (consume, (
                inputs, rings, doubts, 0, HEADS, DV, WIDTH, WIDTH_V, ROWS, KEYS, STAGES, Q_BLOCK,
                K_BLOCK, CAUSAL, DTYPE,
            )),
            (consume, (
                inputs, rings, doubts, 1, HEADS, DV, WIDTH, WIDTH_V, ROWS, KEYS, STAGES, Q_BLOCK,
                K_BLOCK, CAUSAL, DTYPE,
            )),
            (produce, (
                q_tiles, k_tiles, v_tiles, rings, grid, rules, HEADS, GROUP, ROWS, KEYS, STAGES,
                Q_BLOCK, K_BLOCK, CAUSAL,
            )),
        ],
        [4, 1], [240, 24],
    )  # fmt: skip
    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    doubt = doubts.index(0).load(FLAT) + doubts.index(1).load(FLAT)
    if gl.max((doubt != doubt).to(gl.int32), 0) > 0:
        repair(
            q, k, v, inputs, strides, HEADS, GROUP, D, DV, WIDTH, WIDTH_V, ROWS, KEYS, Q_BLOCK,
            K_BLOCK, CAUSAL,
        )  # fmt: skip
