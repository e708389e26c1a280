"""Flows up to each token in Triton, and linear attention with the sources that these weigh.

The chain is as long as its definition: sums of features, flows, sums of features over flows,
conserved flows, sums of e^Oh, and the state of the weighed sources. Each link sums its segments,
`prefix_kernel` turns the sums into those before every segment, and the next link walks its segment
from there. A warp walks alone, many side by side: no barrier, and loads of whole rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.fast.engines.scan.triton_common import links, packed_segment
from attnspec.fast.engines.scan.triton_flows import (
    clipped,
    existing,
    features,
    inverse,
    load_rows,
    place,
    stretch,
)


@triton.jit
def prefix(
    totals, first, before, last, items, inside, segments, width: tl.constexpr,
    ROWS: tl.constexpr, ITEMS: tl.constexpr, STARTED: tl.constexpr, ACROSS: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """Sums of all totals (segments, width) before each, and behind the last; if REVERSE, of those
    behind each, and before the first.
    """
    kept = items
    if ACROSS > 0:
        kept = items % ACROSS * (width // ACROSS) + items // ACROSS
    total = tl.zeros((ITEMS,), tl.float32)
    if STARTED:
        total = tl.load(first + kept, mask=inside, other=0.0)
    rows = tl.arange(0, ROWS)
    for tile in range(0, segments + 1, ROWS):
        at = tile + rows
        source, target = at - 1, at
        if REVERSE:
            source, target = segments - at, segments - 1 - at
        mask = ((at > 0) & (at <= segments))[:, None] & inside[None, :]
        X = tl.load(totals + source[:, None] * width + items[None, :], mask=mask, other=0.0)
        U = total[None, :] + tl.cumsum(X, 0)
        mask = (at < segments)[:, None] & inside[None, :]
        tl.store(before + target[:, None] * width + items[None, :], U, mask=mask)
        total += tl.sum(X, 0)
    tl.store(last + kept, total, mask=inside)


@triton.jit(do_not_specialize=["lines", "states", "segments", "heads", "kv_heads"])
def prefix_kernel(
    totals, first_x, first_y, before, last_x, last_y, bounds, lines, states, segments, heads,
    kv_heads,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, ITEMS: tl.constexpr, STARTED: tl.constexpr,
    SHARED: tl.constexpr, ACROSS: tl.constexpr, REVERSE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """before (sides, lines, segments, WIDTH) and what is `last`, from the `first` on. Totals are
    likewise, except that of the second side there is one for every kv line if SHARED. ACROSS is the
    number of columns of matrices whose `first` and `last` are stored transposed. REVERSE sums from
    the end. `first` and `last` are of as many `states` as lines or, if PACKED, of (sequences,
    heads), the segments of a line being those of all sequences.
    """
    pieces: tl.constexpr = (WIDTH + ITEMS - 1) // ITEMS
    program = tl.program_id(0)
    row = program // pieces
    items = program % pieces * ITEMS + tl.arange(0, ITEMS)
    inside = items < WIDTH
    if row < states:
        own = row.to(tl.int64)
        line, low, many = links(bounds, own, segments, heads, PACKED)
        at = (line * segments + low) * WIDTH
        prefix(
            totals + at, first_x + own * WIDTH, before + at, last_x + own * WIDTH, items, inside,
            many, WIDTH, ROWS, ITEMS, STARTED, ACROSS, REVERSE,
        )  # fmt: skip
    else:
        own = (row - states).to(tl.int64)
        line, low, many = links(bounds, own, segments, heads, PACKED)
        source = line
        if SHARED:
            source = line // heads * kv_heads + line % heads // (heads // kv_heads)
        other = lines.to(tl.int64)
        prefix(
            totals + ((other + source) * segments + low) * WIDTH, first_y + own * WIDTH,
            before + ((other + line) * segments + low) * WIDTH, last_y + own * WIDTH, items, inside,
            many, WIDTH, ROWS, ITEMS, STARTED, ACROSS, REVERSE,
        )  # fmt: skip


@triton.jit
def counted_from(first_N, line, t, STARTED: tl.constexpr):
    """The number of tokens up to each of t."""
    N = (t + 1).to(tl.float32)
    if STARTED:
        N += tl.load(first_N + line)
    return N


@triton.jit
def running_flow(X, S, P, inside, eps):
    """The flow through tokens X from sums S before a tile and the parts P of its own rows."""
    sums = S[None, :] + tl.cumsum(P, 0) + eps
    return tl.sum(tl.where(inside, (X + eps) * sums, 0.0), 1)


@triton.jit(
    do_not_specialize=[
        "q_b", "q_h", "q_t", "k_b", "k_h", "k_t", "tokens", "length", "segments", "lines", "heads",
        "kv_heads",
    ]
)  # fmt: skip
def flows_kernel(
    q, q_b, q_h, q_t, q_d, k, k_b, k_h, k_t, k_d, before, first_N, shares, parts, table, bounds,
    tokens, length, segments, lines, heads, kv_heads, eps,
    D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr, KIND: tl.constexpr,
    STARTED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """shares (2, lines, tokens): 1 / I and 1 / O; parts: sums of a N / I and of b N / O."""
    where = tl.program_id(0)
    line, batch, head, kv_head, start = place(where, segments, length, heads, heads // kv_heads)
    start, end, begin, own = stretch(
        table, bounds, where, segments, length, tokens, line, start, heads, PACKED
    )
    q += (batch * q_b + head * q_h) * UNIT
    k += (batch * k_b + kv_head * k_h) * UNIT
    other = lines.to(tl.int64)
    shares += line * tokens
    channels = tl.arange(0, BD)
    here = where.to(tl.int64) * D + channels
    SX = tl.load(before + here, mask=channels < D, other=0.0)
    SY = tl.load(before + other * segments * D + here, mask=channels < D, other=0.0)
    TX = tl.zeros((ROWS, BD), tl.float32)
    TY = tl.zeros((ROWS, BD), tl.float32)
    for tile in range(0, end - start, ROWS):
        t = start + tile + tl.arange(0, ROWS)
        real = t < end
        inside = existing(real, 0, D, BD)
        A = features(q, q_t, q_d, t, real, D, BD, UNIT, KIND)
        B = features(k, k_t, k_d, t, real, D, BD, UNIT, KIND)
        N = counted_from(first_N, own, t - begin, STARTED)
        into = inverse(running_flow(A, SY, B, inside, eps))
        out_of = inverse(running_flow(B, SX, A, inside, eps))
        tl.store(shares + t, into, mask=real)
        tl.store(shares + other * tokens + t, out_of, mask=real)
        TX += A * (N * into)[:, None]
        TY += B * (N * out_of)[:, None]
        SX += tl.sum(A, 0)
        SY += tl.sum(B, 0)
    tl.store(parts + here, tl.sum(TX, 0), mask=channels < D)
    tl.store(parts + other * segments * D + here, tl.sum(TY, 0), mask=channels < D)


@triton.jit(
    do_not_specialize=[
        "q_b", "q_h", "q_t", "k_b", "k_h", "k_t", "tokens", "length", "segments", "lines", "heads",
        "kv_heads", "low", "high",
    ]
)  # fmt: skip
def conserved_kernel(
    q, q_b, q_h, q_t, q_d, k, k_b, k_h, k_t, k_d, before, first_N, shares, gates, weights, masses,
    conserved, table, bounds, tokens, length, segments, lines, heads, kv_heads, eps, low, high,
    D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr, KIND: tl.constexpr,
    STARTED: tl.constexpr, CLAMPED: tl.constexpr, KEEP: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Of each token, gates sigmoid(Ih) / I and weights e^Oh; masses, the sums of these. KEEP stores
    Ih and Oh as `conserved` (2, lines, tokens).
    """
    where = tl.program_id(0)
    line, batch, head, kv_head, start = place(where, segments, length, heads, heads // kv_heads)
    start, end, begin, own = stretch(
        table, bounds, where, segments, length, tokens, line, start, heads, PACKED
    )
    q += (batch * q_b + head * q_h) * UNIT
    k += (batch * k_b + kv_head * k_h) * UNIT
    other = lines.to(tl.int64)
    row = line * tokens
    channels = tl.arange(0, BD)
    here = where.to(tl.int64) * D + channels
    SX = tl.load(before + here, mask=channels < D, other=0.0)
    SY = tl.load(before + other * segments * D + here, mask=channels < D, other=0.0)
    mass = tl.zeros((ROWS,), tl.float32)
    for tile in range(0, end - start, ROWS):
        t = start + tile + tl.arange(0, ROWS)
        real = t < end
        inside = existing(real, 0, D, BD)
        A = features(q, q_t, q_d, t, real, D, BD, UNIT, KIND)
        B = features(k, k_t, k_d, t, real, D, BD, UNIT, KIND)
        N = counted_from(first_N, own, t - begin, STARTED)
        into = tl.load(shares + row + t, mask=real, other=0.0)
        out_of = tl.load(shares + other * tokens + row + t, mask=real, other=0.0)
        PX = A * (N * into)[:, None]
        PY = B * (N * out_of)[:, None]
        Ih = running_flow(A, SY, PY, inside, eps) / N
        Oh = running_flow(B, SX, PX, inside, eps) / N
        e = tl.where(real, tl.exp(clipped(Oh, low, high, CLAMPED)), 0.0)
        tl.store(gates + row + t, into / (1.0 + tl.exp(-Ih)), mask=real)
        tl.store(weights + row + t, e, mask=real)
        if KEEP:
            tl.store(conserved + row + t, Ih, mask=real)
            tl.store(conserved + other * tokens + row + t, Oh, mask=real)
        mass += e
        SX += tl.sum(PX, 0)
        SY += tl.sum(PY, 0)
    tl.store(masses + where, tl.sum(mass, 0))


@triton.jit(do_not_specialize=["tokens", "length", "segments", "heads"])
def weights_kernel(
    masses, first_se, first_N, weights, kept, last_se, last_N, table, bounds, tokens, length,
    segments, heads,
    TILE: tl.constexpr, STARTED: tl.constexpr, KEEP: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Weights e become c = N e / (the sum of e up to the token); the last such sum, and N. KEEP
    stores all sums as `kept`. Sequences without tokens are left out.
    """
    where = tl.program_id(0)
    line = (where // segments).to(tl.int64)
    segment = where % segments
    start = segment.to(tl.int64) * length
    start, end, begin, own = stretch(
        table, bounds, where, segments, length, tokens, line, start, heads, PACKED
    )
    low = segment * 0
    ends = segment == segments - 1
    if PACKED:
        low = tl.load(bounds + own // heads).to(tl.int32)
        _, _, _, _, ends = packed_segment(table, segment)
    items = tl.arange(0, TILE)
    parts = tl.zeros((TILE,), tl.float32)
    for tile in range(low, segment, TILE):
        at = tile + items
        parts += tl.load(masses + line * segments + at, mask=at < segment, other=0.0)
    total = tl.sum(parts, 0)
    if STARTED:
        total += tl.load(first_se + own)
    for tile in range(0, end - start, TILE):
        t = start + tile + items
        real = t < end
        e = tl.load(weights + line * tokens + t, mask=real, other=0.0)
        sums = total + tl.cumsum(e, 0)
        N = counted_from(first_N, own, t - begin, STARTED)
        tl.store(weights + line * tokens + t, N * e / sums, mask=real)
        if KEEP:
            tl.store(kept + line * tokens + t, sums, mask=real)
        total += tl.sum(e, 0)
    if ends:
        tl.store(last_se + own, total)
        tl.store(last_N + own, counted_from(first_N, own, end - 1 - begin, STARTED))


@triton.jit
def weighed(
    k, k_t, k_d, weights, t, real, D: tl.constexpr, BD: tl.constexpr, UNIT: tl.constexpr,
    KIND: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """The features c b of the rows t, as operands of a product."""
    B = features(k, k_t, k_d, t, real, D, BD, UNIT, KIND)
    c = tl.load(weights + t, mask=real, other=0.0)
    return (B * c[:, None]).to(PRODUCT)


@triton.jit(
    do_not_specialize=[
        "k_b", "k_h", "k_t", "v_b", "v_h", "v_t", "tokens", "length", "segments", "heads",
        "kv_heads",
    ]
)  # fmt: skip
def source_states_kernel(
    k, k_b, k_h, k_t, k_d, v, v_b, v_h, v_t, v_d, weights, states, table, tokens, length, segments,
    heads, kv_heads,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, ROWS: tl.constexpr,
    UNIT: tl.constexpr, KIND: tl.constexpr, PRODUCT: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """A segment's sum (DV, D) of v (c b)^T. Both operands go through shared memory."""
    tiles: tl.constexpr = (DV + BV - 1) // BV
    program = tl.program_id(0)
    first, where = program % tiles * BV, program // tiles
    line, batch, _, kv_head, start = place(where, segments, length, heads, heads // kv_heads)
    start, end, _, _ = stretch(
        table, table, where, segments, length, tokens, line, start, heads, PACKED
    )
    k += (batch * k_b + kv_head * k_h) * UNIT
    v += (batch * v_b + kv_head * v_h) * UNIT
    S = tl.zeros((BV, BD), tl.float32)
    for tile in range(0, end - start, ROWS):
        t = start + tile + tl.arange(0, ROWS)
        real = t < end
        B = weighed(k, k_t, k_d, weights + line * tokens, t, real, D, BD, UNIT, KIND, PRODUCT)
        V = load_rows(v, v_t, v_d, t, real, first, DV, BV, UNIT).to(PRODUCT)
        S = tl.dot(tl.trans(V), B, S, input_precision="ieee")
    rows, columns = first + tl.arange(0, BV)[:, None], tl.arange(0, BD)[None, :]
    places = where.to(tl.int64) * DV * D + rows * D + columns
    tl.store(states + places, S, mask=(rows < DV) & (columns < D))


@triton.jit
def last_tile(count, ROWS: tl.constexpr):
    """The first of a segment's rows in the last of its tiles."""
    return (count - 1) // ROWS * ROWS


@triton.jit(
    do_not_specialize=[
        "q_b", "q_h", "q_t", "k_b", "k_h", "k_t", "v_b", "v_h", "v_t", "tokens", "length",
        "segments", "heads", "q_group", "kv_group",
    ]
)  # fmt: skip
def ordered_read_kernel(
    q, q_b, q_h, q_t, q_d, k, k_b, k_h, k_t, k_d, v, v_b, v_h, v_t, v_d, gates, weights, entering,
    out, table, tokens, length, segments, heads, q_group, kv_group,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, ROWS: tl.constexpr,
    UNIT: tl.constexpr, KIND: tl.constexpr, PRODUCT: tl.constexpr, BACKWARD: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """out (lines, tokens, DV): gates times the features times the state of the sources so far, or
    of those from the token on if BACKWARD.

    States are kept as (DV, D), and a block's outputs as (DV, ROWS), so that what is computed last
    is the second operand of a product.
    """
    tiles: tl.constexpr = (DV + BV - 1) // BV
    program = tl.program_id(0)
    first, where = program % tiles * BV, program // tiles
    line, batch, head, kv_head, start = place(where, segments, length, heads, kv_group)
    start, end, _, _ = stretch(
        table, table, where, segments, length, tokens, line, start, heads, PACKED
    )
    q += (batch * q_b + head // q_group * q_h) * UNIT
    k += (batch * k_b + kv_head * k_h) * UNIT
    v += (batch * v_b + kv_head * v_h) * UNIT
    row = line * tokens
    columns, channels = first + tl.arange(0, BV), tl.arange(0, BD)
    held = (columns < DV)[:, None] & (channels < D)[None, :]
    places = where.to(tl.int64) * DV * D + columns[:, None] * D + channels[None, :]
    S = tl.load(entering + places, mask=held, other=0.0)
    rows = tl.arange(0, ROWS)
    seen = rows[:, None] <= rows[None, :]
    if BACKWARD:
        seen = rows[:, None] >= rows[None, :]
    count = end - start
    for tile in range(0, count, ROWS):
        t = start + (last_tile(count, ROWS) - tile if BACKWARD else tile) + rows
        real = t < end
        A = features(q, q_t, q_d, t, real, D, BD, UNIT, KIND).to(PRODUCT)
        B = weighed(k, k_t, k_d, weights + row, t, real, D, BD, UNIT, KIND, PRODUCT)
        V = load_rows(v, v_t, v_d, t, real, first, DV, BV, UNIT).to(PRODUCT)
        gate = tl.load(gates + row + t, mask=real, other=0.0)
        Y = tl.dot(S.to(PRODUCT), tl.trans(A), input_precision="ieee")
        P = tl.dot(B, tl.trans(A), input_precision="ieee")
        P = tl.where(seen, P, 0.0).to(PRODUCT)
        Y = tl.dot(tl.trans(V), P, Y, input_precision="ieee")
        S = tl.dot(tl.trans(V), B, S, input_precision="ieee")
        Y = tl.trans(Y * gate[None, :])
        at = (row + t)[:, None] * DV + columns[None, :]
        mask = real[:, None] & (columns < DV)[None, :]
        tl.store(out + at, Y.to(out.dtype.element_ty), mask=mask)
