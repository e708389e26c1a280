"""What the scan's specialised kernels share: where a program's rows lie, rings of tiles, and the
facts of a block, which are what its products are multiplied by, worked out by a warp of their own.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from attnspec.fast.engines.flash.triton_specialised import fetch, ring, signals
from attnspec.fast.engines.scan.triton_common import (
    BITS,
    CONSTANT,
    LOWEST,
    LOWEST_BITS,
    NONE,
    SCALAR,
    bits_of,
    decay_of,
)
from attnspec.fast.engines.scan.triton_plan import SPECIALISED_COLUMNS

CHANNELS = gl.constexpr(SPECIALISED_COLUMNS)
"""Of v, for a consumer."""
SUMS, READING, WRITING, PAIRS, ROWS_OUT, TOTAL, FACTS = (gl.constexpr(n) for n in range(7))
"""What is known of a block's rows, by place: sums of log decays, and what multiplies the state a
row reads, the values it writes, the products of pairs, and the rows of the output; then what
multiplies the state, once for every row; and how many places there are.
"""


@gluon.jit
def locate(segments, length, tokens, heads, TILES: gl.constexpr):
    """Head and first channel of the first consumer and of the second; sequence, segment of it and
    of all, first row, how many rows.

    Consumers are dealt the tiles of one head after the other.
    """
    pairs = heads * TILES // 2
    first = gl.program_id(0) % pairs * 2
    segment = gl.program_id(0) // pairs
    start = (segment % segments).to(gl.int64) * length
    count = gl.minimum(tokens - start, length).to(gl.int32)
    own = (first // TILES, first % TILES * CHANNELS)
    others = ((first + 1) // TILES, (first + 1) % TILES * CHANNELS)
    return (own, others), segment // segments, segment % segments, segment, start, count


@gluon.jit
def whole(where, C: gl.constexpr):
    """`where` rows lie, all blocks of which are walked: the first of these, and how many."""
    owners, batch, part, segment, start, count = where
    return owners, batch, part, segment, start, count, 0, (count + C - 1) // C


@gluon.jit
def rings_of(x, STAGES: gl.constexpr, SHARED: gl.constexpr):
    """A ring for each consumer, or one for both."""
    if SHARED:
        both = ring(x, STAGES, 2)
        rings = (both, both)
    else:
        rings = (ring(x, STAGES, 1), ring(x, STAGES, 1))
    return rings


@gluon.jit
def facts_ring(C: gl.constexpr, STAGES: gl.constexpr):
    """A ring for the facts of blocks, with one reader."""
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    room = gl.allocate_shared_memory(gl.float32, [STAGES * FACTS, C], PLAIN)
    full, empty = signals(STAGES, 1)
    return room, full, empty


@gluon.jit
def add(a, b):
    return a + b


@gluon.jit
def block_at(n, low, steps, BACKWARD: gl.constexpr):
    """The n-th block of a walk through `steps` blocks from `low` on."""
    return low + steps - 1 - n if BACKWARD else low + n


@gluon.jit
def produce(
    q, k, v, w, rings, place, groups, C: gl.constexpr, STAGES: gl.constexpr,
    BACKWARD: gl.constexpr, SHARED: gl.constexpr, PRODUCTS: gl.constexpr,
):  # fmt: skip
    """Bring the tiles of all blocks, as rings have room; those of q if there is one."""
    owners, batch, _part, _segment, start, _count, low, steps = place
    q_group, k_group, v_group, w_group, _inner, _outer = groups
    q_rings, k_rings, v_rings, w_rings, _facts = rings
    for n in range(steps):
        row = start.to(gl.int32) + block_at(n, low, steps, BACKWARD) * C
        stage, phase = n % STAGES, (n // STAGES & 1) ^ 1
        for who in gl.static_range(1 if SHARED else 2):
            head, _channel = owners[who]
            fetch(k, batch, head // k_group, row, k_rings[who], stage, phase)
            if q is not None:
                fetch(q, batch, head // q_group, row, q_rings[who], stage, phase)
        for who in gl.static_range(2):
            head, channel = owners[who]
            fetch(v, batch, head // v_group, row, v_rings[who], stage, phase, column=channel)
            if PRODUCTS:
                fetch(w, batch, head // w_group, row, w_rings[who], stage, phase, column=channel)


@gluon.jit
def numbers(x, stride, row, left):
    """Numbers of the first `left` rows in float32, zeros beyond."""
    return gl.load(x + row.to(gl.int64) * stride, mask=row < left, other=0.0).to(gl.float32)


@gluon.jit
def given(
    gates, g_t, inner, inner_t, outer, outer_t, row, left, DECAY: gl.constexpr,
    INNER: gl.constexpr, OUTER: gl.constexpr,
):  # fmt: skip
    """Log decays and weights of rows, as far as there are any: else zeros and ones."""
    one = gl.full(row.shape, 1.0, gl.float32, row.type.layout)
    g, written, read = one * 0.0, one, one
    if (DECAY == SCALAR) | (DECAY == BITS):
        g = numbers(gates, g_t, row, left)
    if INNER:
        written = numbers(inner, inner_t, row, left)
    if OUTER:
        read = numbers(outer, outer_t, row, left)
    return g, written, read


@gluon.jit
def measure(
    gates, inner, outer, rings, place, strides, groups, scale, WHO: gl.constexpr, C: gl.constexpr,
    STAGES: gl.constexpr, DECAY: gl.constexpr, BACKWARD: gl.constexpr, INNER: gl.constexpr,
    OUTER: gl.constexpr, decays=None, heads=0,
):  # fmt: skip
    """Work out the facts of all blocks for a consumer; log decays and weights are loaded a block
    ahead. Their total, to base 2, goes to `decays` (segments, heads), if given.
    """
    owners, batch, _part, segment, start, count, low, steps = place
    head, channel = owners[WHO]
    g_b, g_h, g_t, inner_b, inner_h, inner_t, outer_b, outer_h, outer_t = strides
    _q, _k, _v, _w, inner_group, outer_group = groups
    room, full, empty = rings[4][WHO]
    LINE: gl.constexpr = gl.BlockedLayout([C // 32], [32], [1], [0])
    LEAST: gl.constexpr = LOWEST_BITS if DECAY == BITS else LOWEST
    place_in = gl.arange(0, C, LINE)
    batch, head = batch.to(gl.int64), head.to(gl.int64)
    slope = 0.0
    if DECAY == CONSTANT:
        slope = gl.load(gates + head)
    gates += batch * g_b + head * g_h + start * g_t
    inner += batch * inner_b + head // inner_group * inner_h + start * inner_t
    outer += batch * outer_b + head // outer_group * outer_h + start * outer_t
    whole_total = gl.zeros([C], gl.float32, LINE)
    one = gl.full([C], 1.0, gl.float32, LINE)
    # There may be no block at all.
    row = place_in + gl.maximum(block_at(0, low, steps, BACKWARD), 0) * C
    g_next, written_next, read_next = given(
        gates, g_t, inner, inner_t, outer, outer_t, row, count, DECAY, INNER, OUTER
    )
    for n in range(steps):
        i = block_at(n, low, steps, BACKWARD)
        g, written, read = g_next, written_next, read_next
        row = place_in + block_at(gl.minimum(n + 1, steps - 1), low, steps, BACKWARD) * C
        g_next, written_next, read_next = given(
            gates, g_t, inner, inner_t, outer, outer_t, row, count, DECAY, INNER, OUTER
        )
        if DECAY == NONE:
            sums = one * 0.0
            total = sums
        elif DECAY == CONSTANT:
            rows = gl.minimum(count - i * C, C)
            sums = -slope * gl.minimum(place_in + 1, rows).to(gl.float32)
            total = -slope * rows.to(gl.float32) * one
        else:
            # What is not a number stays that.
            g = gl.where(g < LEAST, LEAST, g)
            sums = gl.associative_scan(g, 0, add)
            total = gl.sum(g, 0) * one
        whole_total += total
        reading, writing = sums, total - sums
        if BACKWARD:
            reading, writing = writing, sums
        reading, writing = decay_of(reading, DECAY), decay_of(writing, DECAY)
        if BACKWARD:
            writing *= scale
        else:
            reading *= scale
        stage = n % STAGES
        mbarrier.wait(empty.index(stage), (n // STAGES & 1) ^ 1)
        room.index(stage * FACTS + SUMS).store(sums)
        room.index(stage * FACTS + READING).store(reading)
        room.index(stage * FACTS + WRITING).store(writing * written)
        room.index(stage * FACTS + PAIRS).store(written * scale)
        room.index(stage * FACTS + ROWS_OUT).store(read)
        room.index(stage * FACTS + TOTAL).store(decay_of(total, DECAY))
        mbarrier.arrive(full.index(stage), count=1)
    if decays is not None:
        at = decays + segment.to(gl.int64) * heads + head + place_in * 0
        mask = (place_in == 0) & (channel == 0) & (steps > 0)
        gl.store(at, bits_of(whole_total, DECAY), mask=mask)
