"""The flash engine's specialised backward kernel for Hopper: all gradients in one walk, in Gluon.

A program owns tiles of keys, and walks over the rows that see one: two consumers hold 64 keys
each, with their gradients, and work out five products a pair of tiles, where kernels apart need
seven. A producer brings rows, and a fourth part adds the shares of a step to the gradients of its
rows, sums over programs, in the order of `triton_specialised_order`. Written for Triton 3.6.
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

from attnspec.fast.engines.flash.triton_specialised import fetch, ring, room_for, signals
from attnspec.fast.engines.flash.triton_specialised_order import (
    ADDED,
    DOUBT,
    DRAWN,
    KEYS,
    OWN,
    add_to_global,
    announce,
    count_up,
    draw,
    follow,
    hide,
    is_edge,
    place_in_order,
    read,
    step_at,
    walk_of,
)
from attnspec.fast.engines.flash.triton_specialised_parts import LOG2E


@gluon.jit
def produce(
    q, k, v, dout, sums, marks, rings, tickets, grid, rules, total, HEADS: gl.constexpr,
    GROUP: gl.constexpr, SHARE: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """Draw tiles of keys; bring them, and the rows that see them, as rings have room."""
    q_ring, dout_ring, k_ring, v_ring, lse_room, delta_room = rings
    NUMBERS: gl.constexpr = sums.block_type.nbytes
    _tiles, sequences, _section, lead = grid
    owners: gl.constexpr = HEADS // SHARE
    at, turn, held = 0, 0, 0
    n = draw(marks + DRAWN)
    while n < total:
        announce(tickets, turn, n)
        sequence, tile, first, begin, count = walk_of(n, grid, rules, CAUSAL)
        b, owner = sequence // owners, sequence % owners
        for i in range(SHARE * count):
            member, step = step_at(i, tile, begin, count, lead, SHARE)
            h = owner * SHARE + member
            line = b * HEADS + h
            row = step * OWN
            stage, phase = at % STAGES, (at // STAGES & 1) ^ 1
            fetch(q, b, h, row, q_ring, stage, phase, NUMBERS)
            full, room = q_ring[1].index(stage), lse_room.index(stage)
            tma.async_copy_global_to_shared(sums, [0, 0, line, row], full, room)
            fetch(dout, b, h, row, dout_ring, stage, phase, NUMBERS)
            full, room = dout_ring[1].index(stage), delta_room.index(stage)
            line += sequences // owners * HEADS
            tma.async_copy_global_to_shared(sums, [0, 0, line, row], full, room)
            if i == 0:
                h_kv = owner * SHARE // GROUP
                fetch(k, b, h_kv, first, k_ring, held & 1, (held >> 1 & 1) ^ 1)
                fetch(v, b, h_kv, first, v_ring, 0, (held & 1) ^ 1)
            at += 1
        held += (count > 0).to(gl.int32)
        turn += 1
        n = draw(marks + DRAWN)
    announce(tickets, turn, n)


@gluon.jit
def add_up(
    dq, marks, shares, tickets, grid, rules, total, HEADS: gl.constexpr, SHARE: gl.constexpr,
    WIDTH: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """Add each step's share to the gradients of its rows when it is its turn."""
    rooms, fulls, empties = shares
    _tiles, _sequences, _section, lead = grid
    owners: gl.constexpr = HEADS // SHARE
    row_tiles = (rules[0] + OWN - 1) // OWN
    at, turn = 0, 0
    n = follow(tickets, turn)
    while n < total:
        sequence, tile, _first, begin, count = walk_of(n, grid, rules, CAUSAL)
        b, owner = sequence // owners, sequence % owners
        for i in range(SHARE * count):
            member, step = step_at(i, tile, begin, count, lead, SHARE)
            h = owner * SHARE + member
            counter = marks + ADDED + (b * HEADS + h) * row_tiles + step
            before = place_in_order(tile, step, grid, rules)
            mbarrier.wait(fulls.index(0), at & 1)
            mbarrier.wait(fulls.index(1), at & 1)
            if before == 0:
                for who in gl.static_range(2):
                    tma.async_copy_shared_to_global(
                        dq, [b, h, step * OWN, who * WIDTH // 2], rooms.index(who)
                    )
            else:
                while read(counter) != before:
                    pass
                for who in gl.static_range(2):
                    add_to_global(dq, [b, h, step * OWN, who * WIDTH // 2], rooms.index(who))
            tma.store_wait(0)
            mbarrier.arrive(empties.index(0), count=1)
            mbarrier.arrive(empties.index(1), count=1)
            count_up(counter)
            at += 1
        turn += 1
        n = follow(tickets, turn)


@gluon.jit
def start_share(
    scores_room, k_room, at, slot, any_yet, WHO: gl.constexpr, WIDTH: gl.constexpr,
    layout: gl.constexpr,
):  # fmt: skip
    """Ask for half the channels of a step's share of dq, as soon as both consumers have its
    gradients of scores; its keys are in a slot.
    """
    ds_room, ds_full, _ds_empty = scores_room
    HALF: gl.constexpr = WIDTH // 2
    mbarrier.wait(ds_full.index(at & 1), at >> 1 & 1, pred=any_yet)
    both = ds_room.index(at & 1).permute((1, 0))
    channels = k_room.index(slot).reshape([KEYS, WIDTH]).slice(WHO * HALF, HALF, dim=1)
    nothing = gl.zeros([OWN, HALF], gl.float32, layout)
    return warpgroup_mma(both, channels, nothing, use_acc=False, is_async=True)


@gluon.jit
def hand_over(share, shares, at, WHO: gl.constexpr, WIDTH: gl.constexpr):
    """Give a step's share of dq to be added up."""
    rooms, fulls, empties = shares
    mbarrier.wait(empties.index(WHO), (at & 1) ^ 1)
    rooms.index(WHO).reshape([OWN, WIDTH // 2]).store(share)
    fence_async_shared()
    mbarrier.arrive(fulls.index(WHO), count=1)


@gluon.jit
def store_channels(out, part, sequence, first, column, rules, WIDE: gl.constexpr):
    """Write channels from `column` on of a tile of keys to contiguous rows of WIDE."""
    k_tokens = rules[1]
    key = first + gl.arange(0, OWN, gl.SliceLayout(1, part.type.layout))
    channel = column + gl.arange(0, part.shape[1], gl.SliceLayout(0, part.type.layout))
    inside = (key < k_tokens)[:, None] & (channel < WIDE)[None, :]
    at = (sequence.to(gl.int64) * k_tokens + key)[:, None] * WIDE + channel[None, :]
    gl.store(out + at, part, mask=inside)


@gluon.jit
def store_keys(out, tile, sequence, first, rules, room, WIDE: gl.constexpr):
    """Write a tile (keys, channels) to contiguous rows of WIDE. Rounded numbers go through `room`
    (keys, 64), as a thread has but two neighbours: pieces of 4 bytes take a window 19 per cent of
    its time.
    """
    kind = out.dtype.element_ty
    if kind.primitive_bitwidth == 16:
        WRITTEN: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        tile = tile.to(kind)
        parts = (tile,)
        if tile.shape[1] == 128:
            parts = gl.split(tile.reshape([OWN, 2, 64]).permute((0, 2, 1)))
        for part in gl.static_range(len(parts)):
            room.store(parts[part])
            pieces = room.load(WRITTEN)
            store_channels(out, pieces, sequence, first, part * 64, rules, WIDE)
    else:
        store_channels(out, tile, sequence, first, 0, rules, WIDE)


@gluon.jit
def consume(
    dk_out, dv_out, marks, rings, scores_room, shares, tickets, grid, rules, total, scale,
    WHO: gl.constexpr, HEADS: gl.constexpr, SHARE: gl.constexpr, D: gl.constexpr,
    DV: gl.constexpr, WIDTH: gl.constexpr, WIDTH_V: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """The gradients of 64 keys of every tile, and half the channels of its shares of dq."""
    PAIRS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, OWN, 16])
    BY_KEY: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, WIDTH, 16])
    BY_VALUE: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [4, 1], instr_shape=[16, WIDTH_V, 16]
    )
    BY_ROW: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [4, 1], instr_shape=[16, WIDTH // 2, 16]
    )
    LEFT: gl.constexpr = gl.DotOperandLayout(0, BY_VALUE, 2)
    q_ring, dout_ring, k_ring, v_ring, lse_room, delta_room = rings
    q_room, q_full, q_empty = q_ring
    dout_room, dout_full, dout_empty = dout_ring
    k_room, k_full, k_empty = k_ring
    v_room, v_full, v_empty = v_ring
    ds_room, ds_full, ds_empty = scores_room
    lead = grid[3]
    values = v_room.index(0).reshape([KEYS, WIDTH_V]).slice(WHO * OWN, OWN, dim=0)
    factor = scale * LOG2E
    doubt = gl.zeros([OWN], gl.float32, gl.SliceLayout(1, BY_KEY))
    c, turn, held = 0, 0, 0
    n = follow(tickets, turn)
    while n < total:
        sequence, tile, first, begin, count = walk_of(n, grid, rules, CAUSAL)
        steps = SHARE * count
        key = first + WHO * OWN + gl.arange(0, OWN, gl.SliceLayout(1, PAIRS))
        dk = gl.zeros([OWN, WIDTH], gl.float32, BY_KEY)
        dv = gl.zeros([OWN, WIDTH_V], gl.float32, BY_VALUE)
        mbarrier.wait(k_full.index(held & 1), held >> 1 & 1, pred=steps > 0)
        mbarrier.wait(v_full.index(0), held & 1, pred=steps > 0)
        keys = k_room.index(held & 1).reshape([KEYS, WIDTH]).slice(WHO * OWN, OWN, dim=0)
        for i in range(steps):
            _member, step = step_at(i, tile, begin, count, lead, SHARE)
            stage, phase = c % STAGES, c // STAGES & 1
            nothing = gl.zeros([OWN, OWN], gl.float32, PAIRS)
            queries = q_room.index(stage).reshape([OWN, WIDTH])
            upstream = dout_room.index(stage).reshape([OWN, WIDTH_V])
            mbarrier.wait(q_full.index(stage), phase)
            scores = warpgroup_mma(
                keys, queries.permute((1, 0)), nothing, use_acc=False, is_async=True
            )
            mbarrier.wait(dout_full.index(stage), phase)
            dweights = warpgroup_mma(
                values, upstream.permute((1, 0)), nothing, use_acc=False, is_async=True
            )
            scores = warpgroup_mma_wait(1, deps=[scores])
            lse = lse_room.index(stage).reshape([1, OWN]).load(PAIRS)
            weights = gl.exp2(scores * factor - lse)
            if is_edge(first, step * OWN, rules, CAUSAL):
                weights = hide(weights, key, step * OWN, rules, CAUSAL)
            rounded = gl.convert_layout(weights.to(DTYPE), LEFT)
            dv = warpgroup_mma(rounded, upstream, dv, is_async=True)
            dweights = warpgroup_mma_wait(1, deps=[dweights])
            mbarrier.arrive(v_empty.index(0), count=1, pred=i == steps - 1)
            delta = delta_room.index(stage).reshape([1, OWN]).load(PAIRS)
            dscores = (weights * (dweights - delta)).to(DTYPE)
            mbarrier.wait(ds_empty.index(c & 1), (c >> 1 & 1) ^ 1)
            own = ds_room.index(c & 1).slice(WHO * OWN, OWN, dim=0)
            own.store(dscores)
            fence_async_shared()
            mbarrier.arrive(ds_full.index(c & 1), count=1)
            dk = warpgroup_mma(own, queries, dk, is_async=True)
            # Of the step before, as the other consumer may be behind; at first, of nothing.
            slot = gl.where(i > 0, held, held - 1) & 1
            dq = start_share(scores_room, k_room, c - 1, slot, c > 0, WHO, WIDTH, BY_ROW)
            dk, dv, rounded = warpgroup_mma_wait(1, deps=[dk, dv, rounded])
            mbarrier.arrive(q_empty.index(stage), count=1)
            mbarrier.arrive(dout_empty.index(stage), count=1)
            dq = warpgroup_mma_wait(0, deps=[dq])
            mbarrier.arrive(ds_empty.index(c - 1 & 1), count=1, pred=c > 0)
            mbarrier.arrive(k_empty.index(slot), count=1, pred=(i == 0) & (c > 0))
            if c > 0:
                hand_over(dq, shares, c - 1, WHO, WIDTH)
            c += 1
        held += (steps > 0).to(gl.int32)
        dk = dk * scale
        mbarrier.wait(ds_empty.index(c & 1), (c >> 1 & 1) ^ 1)
        spare = ds_room.index(c & 1).slice(WHO * OWN, OWN, dim=0)
        store_keys(dk_out, dk, sequence, first + WHO * OWN, rules, spare, D)
        store_keys(dv_out, dv, sequence, first + WHO * OWN, rules, spare, DV)
        # A NaN, once there is one, stays in what is added up.
        doubt += gl.sum(dk, 1) * 0.0
        doubt += gl.convert_layout(gl.sum(dv, 1), gl.SliceLayout(1, BY_KEY)) * 0.0
        turn += 1
        n = follow(tickets, turn)
    if c > 0:
        dq = start_share(scores_room, k_room, c - 1, held - 1 & 1, True, WHO, WIDTH, BY_ROW)
        dq = warpgroup_mma_wait(0, deps=[dq])
        hand_over(dq, shares, c - 1, WHO, WIDTH)
    at_doubt = gl.arange(0, OWN, gl.SliceLayout(1, BY_KEY)) * 0
    gl.store(marks + DOUBT + at_doubt, at_doubt + 1, mask=doubt != doubt)


@gluon.jit(
    do_not_specialize=[
        "q_tokens", "k_tokens", "tiles", "sequences", "section", "lead", "window", "sinks",
        "scale", "total",
    ]
)  # fmt: skip
def specialised_backward_kernel(
    q_tiles, k_tiles, v_tiles, dout_tiles, sums, dq_tiles, dk, dv, marks,
    q_tokens, k_tokens, tiles, sequences, section, lead, window, sinks, scale, total,
    HEADS: gl.constexpr, GROUP: gl.constexpr, SHARE: gl.constexpr, D: gl.constexpr,
    DV: gl.constexpr, WIDTH: gl.constexpr, WIDTH_V: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr,
):  # fmt: skip
    """dk / dv of tiles of keys in the dtype of their tensors, and dq / scale in float32, for calls
    whose rules are the causal order and a window with sinks.

    `sums` are the numbers of rows, (1, 1, 2 batch heads, q_tokens): first all of lse to base 2,
    then all of delta. `marks` are zeros before the launch. Heads are owned by SHARE, whose sums dk
    and dv are; GROUP of them read the same keys.
    """
    DTYPE: gl.constexpr = q_tiles.dtype
    rings = (
        ring(q_tiles, STAGES, 2), ring(dout_tiles, STAGES, 2), ring(k_tiles, 2, 2),
        ring(v_tiles, 1, 2), room_for(sums, STAGES), room_for(sums, STAGES),
    )  # fmt: skip
    PAIRS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, OWN], DTYPE)
    ds_room = gl.allocate_shared_memory(DTYPE, [2, KEYS, OWN], PAIRS)
    ds_full, ds_empty = signals(2, 2, 2)
    scores_room = (ds_room, ds_full, ds_empty)
    shares = ring(dq_tiles, 2, 1)
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    numbers = gl.allocate_shared_memory(gl.int32, [2, 1], PLAIN)
    announced, followed = signals(2, 3)
    tickets = (numbers, announced, followed)
    grid = (tiles, sequences, section, lead)
    rules = (q_tokens, k_tokens, window, sinks)
    gl.warp_specialize(
        [
            (consume, (
                dk, dv, marks, rings, scores_room, shares, tickets, grid, rules, total, scale,
                0, HEADS, SHARE, D, DV, WIDTH, WIDTH_V, STAGES, CAUSAL, DTYPE,
            )),
            (consume, (
                dk, dv, marks, rings, scores_room, shares, tickets, grid, rules, total, scale,
                1, HEADS, SHARE, D, DV, WIDTH, WIDTH_V, STAGES, CAUSAL, DTYPE,
            )),
            (produce, (
                q_tiles, k_tiles, v_tiles, dout_tiles, sums, marks, rings, tickets, grid, rules,
                total, HEADS, GROUP, SHARE, STAGES, CAUSAL,
            )),
            (add_up, (
                dq_tiles, marks, shares, tickets, grid, rules, total, HEADS, SHARE, WIDTH,
                CAUSAL,
            )),
        ],
        [4, 1, 1], [240, 24, 24],
    )  # fmt: skip
