"""Flows between all sinks and all sources in Triton, and what the sinks read: five launches.

Sinks are the features of q, sources those of k, taken from each tile as it is read. Sums over
tokens are cut in segments, a program each, whose parts the next launch adds: no atomics. A sink's
program needs what the sources sum to, and the other way round, so that both sides go through the
first two launches together; then the sources compete, their states are merged, and the sinks read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.fast.engines.scan.triton_common import packed_segment
from attnspec.fast.engines.scan.triton_running import phi

ROWS_OF_PARTS = tl.constexpr(32)
"""Parts of a sum that are added at a time."""


@triton.jit
def place(where, segments, length, heads, group):
    """Of segment number `where`: line, batch, head, kv head and first token. Divided in 32 bits,
    and returned in 64.
    """
    line = where // segments
    head = line % heads
    start = (where % segments).to(tl.int64) * length
    batch, kv_head = (line // heads).to(tl.int64), (head // group).to(tl.int64)
    return line.to(tl.int64), batch, head.to(tl.int64), kv_head, start


@triton.jit
def stretch(
    table, bounds, where, segments, length, tokens, line, start, heads, PACKED: tl.constexpr
):
    """Of segment number `where`, which begins at `start` unless PACKED: its first token and that
    behind its last, the first of its sequence, and where the states of that and of the head are.
    """
    end = tl.minimum(tokens, start + length)
    begin = start * 0
    own = line
    if PACKED:
        slot = where % segments
        sequence, start, count, _, _ = packed_segment(table, slot)
        end = start + count
        begin = start - (slot - tl.load(bounds + sequence)) * length
        own = sequence * heads + line
    return start, end, begin, own


@triton.jit
def real_rows(mask, mask_t, t, count, MASKED: tl.constexpr):
    """Which of the tokens t are among `count` and, if MASKED, not padded."""
    real = t < count
    if MASKED:
        real = real & tl.load(mask + t * mask_t, mask=real, other=0).to(tl.int1)
    return real


@triton.jit
def existing(real, first, WIDTH: tl.constexpr, BW: tl.constexpr):
    """Which numbers of rows exist, in the BW channels of WIDTH from `first` on."""
    inside = real[:, None]
    if WIDTH % BW != 0:
        inside = inside & (first + tl.arange(0, BW) < WIDTH)[None, :]
    return inside


@triton.jit
def load_rows(
    x, x_t, x_d, t, real, first, WIDTH: tl.constexpr, BW: tl.constexpr, UNIT: tl.constexpr
):
    """The rows t (int64) of x from channel `first` on, 0 where they are not real. They lie
    x_t * UNIT apart: told the factor, Triton loads vectors.
    """
    channels = (first + tl.arange(0, BW)).to(tl.int64)
    at = (t * x_t * UNIT)[:, None] + (channels * x_d)[None, :]
    return tl.load(x + at, mask=existing(real, first, WIDTH, BW), other=0.0)


@triton.jit
def features(
    x, x_t, x_d, t, real, D: tl.constexpr, BD: tl.constexpr, UNIT: tl.constexpr, KIND: tl.constexpr
):
    """phi (float32) of the rows t of x, 0 where a row or channel is not real."""
    X = load_rows(x, x_t, x_d, t, real, 0, D, BD, UNIT).to(tl.float32)
    return tl.where(existing(real, 0, D, BD), phi(X, KIND), 0.0)


@triton.jit
def added(parts, row, count, D: tl.constexpr, BD: tl.constexpr):
    """The sum (BD,) of the parts (rows, count, D) of one row."""
    channels = tl.arange(0, BD)
    rows = tl.arange(0, ROWS_OF_PARTS)
    total = tl.zeros((ROWS_OF_PARTS, BD), tl.float32)
    for tile in range(0, count, ROWS_OF_PARTS):
        at = tile + rows
        mask = (at < count)[:, None] & (channels < D)[None, :]
        places = (row * count + at)[:, None] * D + channels[None, :]
        total += tl.load(parts + places, mask=mask, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def counted(counts, row, count):
    """The sum of the numbers (rows, count) of one row."""
    return tl.sum(added(counts, row, count, 1, 2), 0)


@triton.jit
def raised(total, eps, D: tl.constexpr, BD: tl.constexpr):
    """total + eps, and 0 in channels that do not exist, which then add nothing to a flow."""
    return tl.where(tl.arange(0, BD) < D, total + eps, 0.0)


@triton.jit
def flow(X, other, eps):
    """What passes each token, given its features and the raised sum of the other side's."""
    return tl.sum((X + eps) * other[None, :], 1)


@triton.jit
def inverse(x):
    """1 / x, and 0 where x is 0."""
    return tl.where(x == 0.0, 0.0, 1.0 / tl.where(x == 0.0, 1.0, x))


@triton.jit
def clipped(x, low, high, CLAMPED: tl.constexpr):
    """x within bounds; NaN stays NaN."""
    if CLAMPED:
        x = tl.where(x < low, low, tl.where(x > high, high, x))
    return x


@triton.jit
def sum_side(
    x, x_t, x_d, mask, mask_t, out, tokens, start, count, length,
    D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr, KIND: tl.constexpr,
    MASKED: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """The sum of a segment's features, and if COUNTED of how many tokens."""
    total = tl.zeros((ROWS, BD), tl.float32)
    seen = tl.zeros((ROWS,), tl.float32)
    for tile in range(0, tl.minimum(count - start, length), ROWS):
        t = start + tile + tl.arange(0, ROWS)
        real = real_rows(mask, mask_t, t, count, MASKED)
        total += features(x, x_t, x_d, t, real, D, BD, UNIT, KIND)
        seen += real.to(tl.float32)
    channels = tl.arange(0, BD)
    tl.store(out + channels, tl.sum(total, 0), mask=channels < D)
    if COUNTED:
        tl.store(tokens, tl.sum(seen, 0))


@triton.jit(
    do_not_specialize=[
        "q_b", "q_h", "q_t", "k_b", "k_h", "k_t", "sinks_b", "sinks_t", "sources_b", "sources_t",
        "n", "m", "length", "n_segments", "m_segments", "lines", "heads", "kv_heads",
    ]
)  # fmt: skip
def sums_kernel(
    q, q_b, q_h, q_t, q_d, k, k_b, k_h, k_t, k_d, sinks, sinks_b, sinks_t, sources, sources_b,
    sources_t, sums, counts, table, n, m, length, n_segments, m_segments, lines, heads, kv_heads,
    D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr, KIND: tl.constexpr,
    SINKS: tl.constexpr, SOURCES: tl.constexpr, COUNTED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Sums (D,) of sinks by line and segment, then of sources by kv line and segment; if COUNTED,
    of how many tokens too. Segments are those of a table if PACKED, the same on both sides.
    """
    program = tl.program_id(0)
    sums += program.to(tl.int64) * D
    counts += program
    if program < lines * n_segments:
        line, batch, head, _, start = place(program, n_segments, length, heads, 1)
        start, end, _, _ = stretch(
            table, table, program, n_segments, length, n, line, start, heads, PACKED
        )
        sum_side(
            q + (batch * q_b + head * q_h) * UNIT, q_t, q_d, sinks + batch * sinks_b, sinks_t,
            sums, counts, start, end, length, D, BD, ROWS, UNIT, KIND, SINKS, COUNTED,
        )  # fmt: skip
    else:
        program -= lines * n_segments
        line, batch, head, _, start = place(program, m_segments, length, kv_heads, 1)
        start, end, _, _ = stretch(
            table, table, program, m_segments, length, m, line, start, heads, PACKED
        )
        sum_side(
            k + (batch * k_b + head * k_h) * UNIT, k_t, k_d, sources + batch * sources_b, sources_t,
            sums, counts, start, end, length, D, BD, ROWS, UNIT, KIND, SOURCES, COUNTED,
        )  # fmt: skip


@triton.jit
def share_side(
    x, x_t, x_d, mask, mask_t, other, shares, out, start, count, length, eps,
    D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr, KIND: tl.constexpr,
    MASKED: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """The sum of a segment's features, each token's divided by its flow; KEEP stores 1 / flow."""
    total = tl.zeros((ROWS, BD), tl.float32)
    for tile in range(0, tl.minimum(count - start, length), ROWS):
        t = start + tile + tl.arange(0, ROWS)
        real = real_rows(mask, mask_t, t, count, MASKED)
        X = features(x, x_t, x_d, t, real, D, BD, UNIT, KIND)
        share = tl.where(real, inverse(flow(X, other, eps)), 0.0)
        total += X * share[:, None]
        if KEEP:
            tl.store(shares + t, share, mask=t < count)
    channels = tl.arange(0, BD)
    tl.store(out + channels, tl.sum(total, 0), mask=channels < D)


@triton.jit(
    do_not_specialize=[
        "q_b", "q_h", "q_t", "k_b", "k_h", "k_t", "sinks_b", "sinks_t", "sources_b", "sources_t",
        "n", "m", "length", "n_segments", "m_segments", "lines", "heads", "kv_heads",
    ]
)  # fmt: skip
def shares_kernel(
    q, q_b, q_h, q_t, q_d, k, k_b, k_h, k_t, k_d, sinks, sinks_b, sinks_t, sources, sources_b,
    sources_t, sums, shares, parts, n, m, length, n_segments, m_segments, lines, heads, kv_heads,
    eps,
    D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr, KIND: tl.constexpr,
    SINKS: tl.constexpr, SOURCES: tl.constexpr,
):  # fmt: skip
    """Parts of the sums of a / I, then of b / O for every query head, and 1 / I of the sinks."""
    program = tl.program_id(0)
    group = heads // kv_heads
    parts += program.to(tl.int64) * D
    if program < lines * n_segments:
        line, batch, head, kv_head, start = place(program, n_segments, length, heads, group)
        sums += lines.to(tl.int64) * n_segments * D
        other = raised(added(sums, batch * kv_heads + kv_head, m_segments, D, BD), eps, D, BD)
        share_side(
            q + (batch * q_b + head * q_h) * UNIT, q_t, q_d, sinks + batch * sinks_b, sinks_t,
            other, shares + line * n, parts, start, n, length, eps, D, BD, ROWS, UNIT, KIND, SINKS,
            True,
        )  # fmt: skip
    else:
        program -= lines * n_segments
        line, batch, head, kv_head, start = place(program, m_segments, length, heads, group)
        other = raised(added(sums, line, n_segments, D, BD), eps, D, BD)
        share_side(
            k + (batch * k_b + kv_head * k_h) * UNIT, k_t, k_d, sources + batch * sources_b,
            sources_t, other, shares, parts, start, m, length, eps, D, BD, ROWS, UNIT, KIND,
            SOURCES, False,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "k_b", "k_h", "k_t", "v_b", "v_h", "v_t", "sources_b", "sources_t", "m", "length",
        "n_segments", "m_segments", "heads", "kv_heads", "low", "high",
    ]
)  # fmt: skip
def compete_kernel(
    k, k_b, k_h, k_t, k_d, v, v_b, v_h, v_t, v_d, sources, sources_b, sources_t, parts, states,
    masses, m, length, n_segments, m_segments, heads, kv_heads, eps, low, high,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, ROWS: tl.constexpr,
    UNIT: tl.constexpr, KIND: tl.constexpr, SOURCES: tl.constexpr, CLAMPED: tl.constexpr,
    BOUNDED: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """A segment's sum (DV, D) of v (e b)^T with e = exp(Oh - top), and as `masses` (2,) the sum of
    e and the top: the largest Oh, or if BOUNDED the upper bound, so near the lower one that nothing
    vanishes. Products have rows of V, as loaded, for their first operand: one that is computed
    would be held in registers while the product runs.
    """
    tiles: tl.constexpr = (DV + BV - 1) // BV
    program = tl.program_id(0)
    first = program % tiles * BV
    where = program // tiles
    line, batch, _, kv_head, start = place(where, m_segments, length, heads, heads // kv_heads)
    other = raised(added(parts, line, n_segments, D, BD), eps, D, BD)
    k += (batch * k_b + kv_head * k_h) * UNIT
    v += (batch * v_b + kv_head * v_h) * UNIT
    sources += batch * sources_b
    S = tl.zeros((BV, BD), tl.float32)
    mass = tl.zeros((ROWS,), tl.float32)
    base = tl.full((), 0.0, tl.float32)
    top = base + float("-inf")
    if BOUNDED:
        base += high
        top = base
    for tile in range(0, tl.minimum(m - start, length), ROWS):
        t = start + tile + tl.arange(0, ROWS)
        real = real_rows(sources, sources_t, t, m, SOURCES)
        B = features(k, k_t, k_d, t, real, D, BD, UNIT, KIND)
        V = load_rows(v, v_t, v_d, t, real, first, DV, BV, UNIT)
        x = clipped(flow(B, other, eps), low, high, CLAMPED)
        if not BOUNDED:
            above = tl.maximum(top, tl.max(tl.where(real, x, float("-inf")), 0))
            base = tl.where(above == float("-inf"), 0.0, above)
            kept = tl.exp(top - base)
            S, mass, top = S * kept, mass * kept, above
        e = tl.where(real, tl.exp(x - base), 0.0)
        mass += e
        weighted = (B * e[:, None]).to(PRODUCT)
        S = tl.dot(tl.trans(V.to(PRODUCT)), weighted, S, input_precision="ieee")
    rows, columns = first + tl.arange(0, BV)[:, None], tl.arange(0, BD)[None, :]
    places = where.to(tl.int64) * DV * D + rows * D + columns
    tl.store(states + places, S, mask=(rows < DV) & (columns < D))
    if first == 0:
        tl.store(masses + 2 * where, tl.sum(mass, 0))
        tl.store(masses + 2 * where + 1, top)


@triton.jit(do_not_specialize=["n_segments", "m_segments", "lines", "heads", "kv_heads"])
def merge_kernel(
    states, masses, parts, counts, KV, into, ratios, n_segments, m_segments, lines, heads, kv_heads,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """KV (lines, DV, D) with c = m softmax(Oh), the sum `into` (lines, D) of b / O, and n / m."""
    pieces: tl.constexpr = (D * DV + ITEMS - 1) // ITEMS
    program = tl.program_id(0)
    line, piece = (program // pieces).to(tl.int64), program % pieces
    items = piece * ITEMS + tl.arange(0, ITEMS)
    inside = items < D * DV
    S = tl.zeros((ITEMS,), tl.float32)
    mass = tl.full((), 0.0, tl.float32)
    top = tl.full((), float("-inf"), tl.float32)
    for segment in tl.range(0, m_segments, num_stages=4):
        where = line * m_segments + segment
        other = tl.load(masses + 2 * where + 1)
        above = tl.maximum(top, other)
        base = tl.where(above == float("-inf"), 0.0, above)
        kept, scale = tl.exp(top - base), tl.exp(other - base)
        S = S * kept + scale * tl.load(states + where * D * DV + items, mask=inside, other=0.0)
        mass = mass * kept + scale * tl.load(masses + 2 * where)
        top = above
    kv_line = program // pieces // heads * kv_heads
    kv_line += program // pieces % heads // (heads // kv_heads)
    sinks = lines.to(tl.int64) * n_segments
    m = counted(counts + sinks, kv_line, m_segments)
    S *= m / tl.where(mass == 0.0, 1.0, mass)
    tl.store(KV + line * D * DV + items, S.to(KV.dtype.element_ty), mask=inside)
    if piece == 0:
        channels = tl.arange(0, BD)
        total = added(parts + sinks * D, line, m_segments, D, BD)
        tl.store(into + line * D + channels, total, mask=channels < D)
        tl.store(ratios + line, counted(counts, line, n_segments) / tl.maximum(m, 1.0))


@triton.jit(
    do_not_specialize=[
        "q_b", "q_h", "q_t", "sinks_b", "sinks_t", "n", "length", "n_segments", "heads",
    ]
)  # fmt: skip
def read_kernel(
    q, q_b, q_h, q_t, q_d, sinks, sinks_b, sinks_t, shares, into, ratios, KV, out, n, length,
    n_segments, heads, eps,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, ROWS: tl.constexpr,
    UNIT: tl.constexpr, KIND: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """out (lines, n, DV): sigmoid(Ih n / m) / I times the features times KV."""
    tiles: tl.constexpr = (DV + BV - 1) // BV
    program = tl.program_id(0)
    first = program % tiles * BV
    line, batch, head, _, start = place(program // tiles, n_segments, length, heads, 1)
    q += (batch * q_b + head * q_h) * UNIT
    sinks += batch * sinks_b
    channels, columns = tl.arange(0, BD), first + tl.arange(0, BV)
    total = tl.load(into + line * D + channels, mask=channels < D, other=0.0)
    other = raised(total, eps, D, BD)
    held = (columns < DV)[:, None] & (channels < D)[None, :]
    at = (line * DV + columns)[:, None] * D + channels[None, :]
    state = tl.load(KV + at, mask=held, other=0.0)
    ratio = tl.load(ratios + line)
    for tile in range(0, tl.minimum(n - start, length), ROWS):
        t = start + tile + tl.arange(0, ROWS)
        real = real_rows(sinks, sinks_t, t, n, SINKS)
        A = features(q, q_t, q_d, t, real, D, BD, UNIT, KIND)
        share = tl.load(shares + line * n + t, mask=t < n, other=0.0)
        gate = share / (1.0 + tl.exp(-flow(A, other, eps) * ratio))
        Y = tl.dot(state, tl.trans(A.to(state.dtype)), input_precision="ieee")
        Y = tl.trans(Y * gate[None, :])
        places = (line * n + t)[:, None] * DV + columns[None, :]
        mask = (t < n)[:, None] & (columns < DV)[None, :]
        tl.store(out + places, Y.to(out.dtype.element_ty), mask=mask)
