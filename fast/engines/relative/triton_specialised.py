"""The relative engine's specialised forward kernel for Hopper: warps of different trades, in Gluon.

As in the flash engine's (`flash.triton_specialised`), a producer brings tiles and two consumers of
64 rows take turns at the matrix units, so that the turning and the softmax of one run beside the
products of the other. A tile of keys brings one chunk of 64 table rows along, which both consumers
need: the lower one's rows stand 64 later, so the chunk that is new to the upper one is new to it a
tile later. What is computed is what `triton_forward` computes. Written for Triton 3.6.
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

from attnspec.fast.engines.flash.triton_specialised import fetch, ring, room_for
from attnspec.fast.engines.flash.triton_specialised_parts import (
    LOG2E,
    finish,
    rounds,
    soften,
    store_rows,
    turned,
)
from attnspec.fast.engines.flash.triton_tiles import owned_tile
from attnspec.fast.engines.relative.triton_bands import VARYING, key_walk, lowest
from attnspec.fast.engines.relative.triton_specialised_rotate import chunk_is_new, rotate, turning

ROWS = gl.constexpr(64)
"""Rows of a consumer, keys of a tile and rows of a chunk: the length of the ring."""


@gluon.jit
def plan(turn, grid, sizes, row_start, HEADS: gl.constexpr, CAUSAL: gl.constexpr):
    """This program's tile of a round: batch entry, head, first row and the row where it ends; the
    first key, how many tiles of keys, and which of them are seen whole.
    """
    tiles, sequences, section = grid
    q_tokens, k_tokens, _zero, _slack = sizes
    program = turn * gl.num_programs(0) + turned(turn)
    tile, sequence = owned_tile(program, tiles, sequences, section, 0)
    if CAUSAL:
        tile = tiles - 1 - tile
    first = tile * (2 * ROWS)
    stop = gl.minimum(first + 2 * ROWS, q_tokens)
    low_first = lowest(first, row_start, stop)
    low_last = lowest(stop - 1, row_start, stop)
    base, count, full_from, full_to = key_walk(
        first, stop, low_first, low_last, k_tokens, k_tokens - q_tokens, CAUSAL
    )
    # Rows that see nothing at all look at one tile and find nothing there.
    walk = (base, gl.maximum(count, 1), full_from, full_to)
    return sequence // HEADS, sequence % HEADS, first, stop, walk


@gluon.jit
def fetch_biased(x, b, h, first, ring, bias, line, at, bias_room, stage, phase):
    """`fetch`, and with the rows their numbers, from `at` on in a line of `bias`, if there is one.

    `at` is a multiple of four: what descriptors of float32 bring begins at 16 bytes.
    """
    if bias is None:
        fetch(x, b, h, first, ring, stage, phase)
    else:
        fetch(x, b, h, first, ring, stage, phase, bias.block_type.nbytes)
        _room, full, _empty = ring
        tma.async_copy_global_to_shared(bias, [line, at], full.index(stage), bias_room.index(stage))


@gluon.jit
def produce(
    operands, rings, grid, sizes, row_start, HEADS: gl.constexpr, GROUP: gl.constexpr,
    TABLE_HEADS: gl.constexpr, STAGES: gl.constexpr, CHUNKS: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """Bring the rows of both consumers, the tiles of keys and values and the chunks of the table
    that go with them, as rings have room.
    """
    q, k, v, table, table_bias, key_bias = operands
    q_ring, k_ring, v_ring, t_ring, biases, _turns = rings
    q_tokens, k_tokens, zero, slack = sizes
    at, chunk = 0, 0
    for turn in range(rounds(grid)):
        b, h, first, _stop, walk = plan(turn, grid, sizes, row_start, HEADS, CAUSAL)
        base, count, _full_from, _full_to = walk
        h_table = h if TABLE_HEADS > 1 else h * 0
        for who in gl.static_range(2):
            fetch(q, b, h, first + who * ROWS, q_ring, who, (turn & 1) ^ 1)
        # The oldest that a consumer needs: pair (row 0 of the lower one, key base) needs table row
        # zero + base - (first + 64) - shift, the last row of the consumer one that lies 63 before.
        band = zero + base - first - (k_tokens - q_tokens) - (2 * ROWS - 1)
        for _ in gl.static_range(3):
            fetch_biased(
                table, b * 0, h_table, band, t_ring, table_bias, h_table, band + slack, biases[0],
                chunk % CHUNKS, (chunk // CHUNKS & 1) ^ 1,
            )  # fmt: skip
            band += ROWS
            chunk += 1
        for i in range(count):
            key, stage, phase = base + i * ROWS, at % STAGES, (at // STAGES & 1) ^ 1
            fetch_biased(
                k, b, h // GROUP, key, k_ring, key_bias, b * HEADS + h, key, biases[1], stage,
                phase,
            )  # fmt: skip
            fetch_biased(
                table, b * 0, h_table, band, t_ring, table_bias, h_table, band + slack, biases[0],
                chunk % CHUNKS, (chunk // CHUNKS & 1) ^ 1,
            )  # fmt: skip
            fetch(v, b, h // GROUP, key, v_ring, stage, phase)
            at += 1
            band += ROWS
            chunk += 1


@gluon.jit
def with_bias(products, room, stage):
    """Products plus the numbers of their columns, if there are any."""
    if room is not None:
        LAYOUT: gl.constexpr = gl.SliceLayout(0, products.type.layout)
        products += room.index(stage).reshape([ROWS]).load(LAYOUT)[None, :]
    return products


@gluon.jit
def hide(scores, first, at, bounds, CAUSAL: gl.constexpr):
    """`scores` (rows from `first` on, keys from `at` on) with -inf for keys that a row does not
    see. Bounds of rows are looked up again each time: edges are few, and registers are.
    """
    row_stop, k_tokens, shift, row_start = bounds
    row = first + gl.arange(0, ROWS, gl.SliceLayout(1, scores.type.layout))
    high = gl.where(row < row_stop, k_tokens, 0)
    if CAUSAL:
        high = gl.minimum(high, row + shift + 1)
    column = gl.arange(0, scores.shape[1], gl.SliceLayout(0, scores.type.layout))
    # By eights, as the flash engine's `hide`.
    eights, within = (column >> 3)[None, :], (column & 7)[None, :]
    seen = eights < ((high - at)[:, None] - within + 7) >> 3
    if row_start is not None:
        low = lowest(row, row_start, row_stop)
        seen = seen & (eights >= ((low - at)[:, None] - within + 7) >> 3)
    return gl.where(seen, scores, -float("inf"))


@gluon.jit
def attend_tiles(
    counts, walk, sums, weights, bands, q_tile, rings, rows, factor,
    STAGES: gl.constexpr, CHUNKS: gl.constexpr, CAUSAL: gl.constexpr, WHO: gl.constexpr,
):  # fmt: skip
    """All tiles of the walk but the first: the product of the tile before is under way meanwhile.

    `bands` are the second tile's products with the table, turned, and those with its newest chunk.
    """
    top, total, mixed = sums
    turned_band, waiting = bands
    at, chunk = counts
    base, count, full_from, full_to = walk
    first, bounds, turns_by = rows
    _q_ring, k_ring, v_ring, t_ring, biases, turns = rings
    k_room, k_full, k_empty = k_ring
    v_room, v_full, v_empty = v_ring
    t_room, t_full, t_empty = t_ring
    WEIGHTS: gl.constexpr = weights.type.layout
    VALUES: gl.constexpr = mixed.type.layout
    SCORES: gl.constexpr = top.type.layout.parent
    for i in range(1, count):
        c, n = at + i, chunk + i + 3 - WHO
        stage, before = c % STAGES, (c - 1) % STAGES
        mbarrier.wait(v_full.index(before), (c - 1) // STAGES & 1)
        mbarrier.wait(turns[WHO], (c & 1) ^ (1 - WHO))
        keys = k_room.index(stage).reshape([ROWS, q_tile.shape[1]]).permute((1, 0))
        scores = warpgroup_mma(q_tile, keys, turned_band, is_async=True)
        distances = t_room.index(n % CHUNKS).reshape([ROWS, q_tile.shape[1]]).permute((1, 0))
        nothing = gl.zeros([ROWS, ROWS], gl.float32, SCORES)
        new = warpgroup_mma(q_tile, distances, nothing, use_acc=False, is_async=True)
        values = v_room.index(before).reshape([ROWS, mixed.shape[1]])
        mixed = warpgroup_mma(weights, values, mixed, is_async=True)
        mbarrier.arrive(turns[1 - WHO], count=1)
        scores = with_bias(warpgroup_mma_wait(2, deps=[scores]), biases[1], stage)
        mbarrier.arrive(k_empty.index(stage), count=1)
        if (i < full_from) | (i >= full_to):
            scores = hide(scores, first, base + i * ROWS, bounds, CAUSAL)
        new_weights, top, rescale, more = soften(scores, top, factor)
        total = total * rescale + more
        new_weights = gl.convert_layout(new_weights.to(q_tile.dtype), WEIGHTS)
        new, new_weights = warpgroup_mma_wait(1, deps=[new, new_weights])
        new = with_bias(new, biases[0], n % CHUNKS)
        mbarrier.arrive(t_empty.index(n % CHUNKS), count=1)
        # The index is never negative, which the compiler cannot tell.
        new_chunk = chunk_is_new(SCORES, i >> 31)
        turned_band = rotate(gl.where(new_chunk, new, waiting), turns_by)
        waiting = new
        # Waiting for the next tiles here keeps the compiler from waiting for the product before the
        # weights are done, which would have nothing run beside it.
        more_tiles = i + 1 < count
        mbarrier.wait(k_full.index((c + 1) % STAGES), (c + 1) // STAGES & 1, pred=more_tiles)
        mbarrier.wait(t_full.index((n + 1) % CHUNKS), (n + 1) // CHUNKS & 1, pred=more_tiles)
        mixed, weights, turned_band = warpgroup_mma_wait(0, deps=[mixed, new_weights, turned_band])
        mbarrier.arrive(v_empty.index(before), count=1)
        mixed = mixed * gl.convert_layout(rescale, gl.SliceLayout(1, VALUES))[:, None]
    return (top, total, mixed), weights, (turned_band, waiting)


@gluon.jit
def consume(
    inputs, rings, WHO: gl.constexpr, HEADS: gl.constexpr, DV: gl.constexpr,
    WIDTH: gl.constexpr, WIDTH_V: gl.constexpr, STAGES: gl.constexpr, CHUNKS: gl.constexpr,
    CAUSAL: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """Attend for 64 rows of every tile, those behind the other consumer's if WHO is 1."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, ROWS, 16])
    VALUES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, WIDTH_V, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, VALUES, 2)
    WRITTEN: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    out, lse, grid, sizes, row_start, scale = inputs
    q_tokens, k_tokens, _zero, _slack = sizes
    q_ring, k_ring, v_ring, t_ring, biases, turns = rings
    q_room, q_full, q_empty = q_ring
    k_room, k_full, k_empty = k_ring
    v_room, v_full, v_empty = v_ring
    t_room, t_full, t_empty = t_ring
    q_tile = q_room.index(WHO).reshape([ROWS, WIDTH])
    factor = scale * LOG2E
    new_chunk = chunk_is_new(SCORES)
    turns_by = turning(SCORES)
    at, chunk = 0, 0
    for turn in range(rounds(grid)):
        b, h, first, stop, walk = plan(turn, grid, sizes, row_start, HEADS, CAUSAL)
        base, count, _full_from, _full_to = walk
        first += WHO * ROWS
        bounds = (stop, k_tokens, k_tokens - q_tokens, row_start)
        mixed = gl.zeros([ROWS, WIDTH_V], gl.float32, VALUES)
        nothing = gl.zeros([ROWS, ROWS], gl.float32, SCORES)
        mbarrier.wait(q_full.index(WHO), turn & 1)
        stage, n = at % STAGES, chunk + 1 - WHO
        if WHO == 0:
            # The oldest chunk is the other's alone.
            mbarrier.wait(t_full.index(chunk % CHUNKS), chunk // CHUNKS & 1)
            mbarrier.arrive(t_empty.index(chunk % CHUNKS), count=1)
        mbarrier.wait(t_full.index(n % CHUNKS), n // CHUNKS & 1)
        mbarrier.wait(t_full.index((n + 1) % CHUNKS), (n + 1) // CHUNKS & 1)
        distances = t_room.index(n % CHUNKS).reshape([ROWS, WIDTH]).permute((1, 0))
        old = warpgroup_mma(q_tile, distances, nothing, use_acc=False, is_async=True)
        distances = t_room.index((n + 1) % CHUNKS).reshape([ROWS, WIDTH]).permute((1, 0))
        new = warpgroup_mma(q_tile, distances, nothing, use_acc=False, is_async=True)
        old, new = warpgroup_mma_wait(0, deps=[old, new])
        old = with_bias(old, biases[0], n % CHUNKS)
        new = with_bias(new, biases[0], (n + 1) % CHUNKS)
        mbarrier.arrive(t_empty.index(n % CHUNKS), count=1)
        mbarrier.arrive(t_empty.index((n + 1) % CHUNKS), count=1)
        turned_band = rotate(gl.where(new_chunk, new, old), turns_by)
        waiting = new
        mbarrier.wait(k_full.index(stage), at // STAGES & 1)
        mbarrier.wait(t_full.index((n + 2) % CHUNKS), (n + 2) // CHUNKS & 1)
        mbarrier.wait(turns[WHO], (at & 1) ^ (1 - WHO))
        keys = k_room.index(stage).reshape([ROWS, WIDTH]).permute((1, 0))
        scores = warpgroup_mma(q_tile, keys, turned_band, is_async=True)
        distances = t_room.index((n + 2) % CHUNKS).reshape([ROWS, WIDTH]).permute((1, 0))
        new = warpgroup_mma(q_tile, distances, nothing, use_acc=False, is_async=True)
        mbarrier.arrive(turns[1 - WHO], count=1)
        scores, new = warpgroup_mma_wait(0, deps=[scores, new])
        scores = with_bias(scores, biases[1], stage)
        new = with_bias(new, biases[0], (n + 2) % CHUNKS)
        mbarrier.arrive(k_empty.index(stage), count=1)
        mbarrier.arrive(t_empty.index((n + 2) % CHUNKS), count=1)
        turned_band = rotate(gl.where(new_chunk, new, waiting), turns_by)
        scores = hide(scores, first, base, bounds, CAUSAL)
        top = gl.full([ROWS], -float("inf"), gl.float32, gl.SliceLayout(1, SCORES))
        weights, top, _rescale, total = soften(scores, top, factor)
        weights = gl.convert_layout(weights.to(DTYPE), WEIGHTS)
        mbarrier.wait(k_full.index((at + 1) % STAGES), (at + 1) // STAGES & 1, pred=count > 1)
        mbarrier.wait(t_full.index((n + 3) % CHUNKS), (n + 3) // CHUNKS & 1, pred=count > 1)
        sums, bands = (top, total, mixed), (turned_band, new)
        counts = (at, chunk)
        rows = (first, bounds, turns_by)
        sums, weights, bands = attend_tiles(
            counts, walk, sums, weights, bands, q_tile, rings, rows, factor, STAGES, CHUNKS, CAUSAL,
            WHO,
        )  # fmt: skip
        mbarrier.arrive(q_empty.index(WHO), count=1)
        at += count
        chunk += count + 3
        if WHO == 1:
            # The newest chunk is the other's alone.
            mbarrier.wait(t_full.index((chunk - 1) % CHUNKS), (chunk - 1) // CHUNKS & 1)
            mbarrier.arrive(t_empty.index((chunk - 1) % CHUNKS), count=1)
        top, total, mixed = sums
        last = (at - 1) % STAGES
        mbarrier.wait(v_full.index(last), (at - 1) // STAGES & 1)
        values = v_room.index(last).reshape([ROWS, WIDTH_V])
        mixed = warpgroup_mma(weights, values, mixed, is_async=True)
        mixed = warpgroup_mma_wait(0, deps=[mixed])
        mbarrier.arrive(v_empty.index(last), count=1)
        log_total, tile = finish((top, total, mixed), None, h)
        at_row = (b * HEADS + h).to(gl.int64) * q_tokens
        row = first + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
        gl.store(lse + at_row + row, log_total, mask=row < stop)
        written = first + gl.arange(0, ROWS, gl.SliceLayout(1, WRITTEN))
        store_rows(out, gl.convert_layout(tile.to(DTYPE), WRITTEN), at_row, written, stop, DV)


@gluon.jit(do_not_specialize=VARYING)
def specialised_relative_kernel(
    q, k, v, table, table_bias, key_bias, out, lse, row_start,
    q_tokens, k_tokens, tiles, sequences, section, zero, slack, scale,
    HEADS: gl.constexpr, GROUP: gl.constexpr, TABLE_HEADS: gl.constexpr, DV: gl.constexpr,
    WIDTH: gl.constexpr, WIDTH_V: gl.constexpr, STAGES: gl.constexpr, CHUNKS: gl.constexpr,
    CAUSAL: gl.constexpr,
):  # fmt: skip
    DTYPE: gl.constexpr = q.dtype
    first_turn = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    second_turn = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(first_turn, count=1)
    mbarrier.init(second_turn, count=1)
    table_numbers, key_numbers = None, None
    if table_bias is not None:
        table_numbers = room_for(table_bias, CHUNKS)
    if key_bias is not None:
        key_numbers = room_for(key_bias, STAGES)
    rings = (
        ring(q, 2, 1), ring(k, STAGES, 2), ring(v, STAGES, 2), ring(table, CHUNKS, 2),
        (table_numbers, key_numbers), (first_turn, second_turn),
    )  # fmt: skip
    grid = (tiles, sequences, section)
    sizes = (q_tokens, k_tokens, zero, slack)
    operands = (q, k, v, table, table_bias, key_bias)
    inputs = (out, lse, grid, sizes, row_start, scale)
    gl.warp_specialize(
        [
            (consume, (
                inputs, rings, 0, HEADS, DV, WIDTH, WIDTH_V, STAGES, CHUNKS, CAUSAL, DTYPE,
            )),
            (consume, (
                inputs, rings, 1, HEADS, DV, WIDTH, WIDTH_V, STAGES, CHUNKS, CAUSAL, DTYPE,
            )),
            (produce, (
                operands, rings, grid, sizes, row_start, HEADS, GROUP, TABLE_HEADS, STAGES, CHUNKS,
                CAUSAL,
            )),
        ],
        [4, 1], [240, 24],
    )  # fmt: skip
