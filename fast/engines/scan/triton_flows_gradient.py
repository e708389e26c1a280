"""The gradient of Flowformer's causal outputs in Triton; `flows_gradient.py` has the formulas.

Three walks over the state's segments are linear attention with other tensors in the roles, and give
what the gates and weights receive. Then come walks of vectors, like the forward's: each sums its
segments, `prefix_kernel` turns the sums into those behind every segment, and the next starts there.
A warp walks alone and has all channels of a row, so that a sum along the tokens stays in a thread.
What a token received from earlier ones is summed forwards and its gradient backwards: so that one
last walk can have both, the sums before each of its tiles are stored on the way.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.fast.engines.scan.triton_flows import (
    clipped,
    existing,
    features,
    load_rows,
    place,
    stretch,
)
from attnspec.fast.engines.scan.triton_flows_causal import counted_from, last_tile
from attnspec.fast.engines.scan.triton_running import phi, slope


@triton.jit(
    do_not_specialize=[
        "x_b", "x_h", "x_t", "y_b", "y_h", "y_t", "z_b", "z_h", "z_t", "w_b", "w_h", "w_t",
        "tokens", "length", "segments", "lines", "heads", "x_group", "y_group",
    ]
)  # fmt: skip
def turned_read_kernel(
    x, x_b, x_h, x_t, x_d, y, y_b, y_h, y_t, y_d, z, z_b, z_h, z_t, z_d, w, w_b, w_h, w_t, w_d,
    scales, weights, entering, out, dots, table, tokens, length, segments, lines, heads, x_group,
    y_group,
    D: tl.constexpr, DV: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, ROWS: tl.constexpr,
    UNIT: tl.constexpr, KIND: tl.constexpr, PRODUCT: tl.constexpr, BACKWARD: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """With Y_t (D,) the sum of weights_s phi(z_s) y_s . x_t over s <= t, or over s >= t if
    BACKWARD, and the part of the states (DV, D) `entering`: out (lines, tokens, D) is scales Y, and
    dots (tiles, lines, tokens) are phi(w) . Y, by tiles of BT channels. w is grouped like x, z like
    y.
    """
    tiles: tl.constexpr = (D + BT - 1) // BT
    program = tl.program_id(0)
    first, where = program % tiles * BT, program // tiles
    line, batch, head, _, start = place(where, segments, length, heads, 1)
    start, end, _, _ = stretch(
        table, table, where, segments, length, tokens, line, start, heads, PACKED
    )
    x += (batch * x_b + head // x_group * x_h) * UNIT
    w += (batch * w_b + head // x_group * w_h) * UNIT
    y += (batch * y_b + head // y_group * y_h) * UNIT
    z += (batch * z_b + head // y_group * z_h) * UNIT
    row = line * tokens
    dots += (program % tiles).to(tl.int64) * lines * tokens + row
    channels, columns = first + tl.arange(0, BT), tl.arange(0, BV)
    held = (columns < DV)[:, None] & (channels < D)[None, :]
    places = where.to(tl.int64) * DV * D + columns[:, None] * D + channels[None, :]
    S = tl.load(entering + places, mask=held, other=0.0)
    rows = tl.arange(0, ROWS)
    seen = rows[:, None] >= rows[None, :]
    if BACKWARD:
        seen = rows[:, None] <= rows[None, :]
    count = end - start
    for tile in range(0, count, ROWS):
        t = start + (last_tile(count, ROWS) - tile if BACKWARD else tile) + rows
        real = t < end
        inside = existing(real, first, D, BT)
        X = load_rows(x, x_t, x_d, t, real, 0, DV, BV, UNIT).to(PRODUCT)
        Y = load_rows(y, y_t, y_d, t, real, 0, DV, BV, UNIT).to(PRODUCT)
        Z = phi(load_rows(z, z_t, z_d, t, real, first, D, BT, UNIT).to(tl.float32), KIND)
        weight = tl.load(weights + row + t, mask=real, other=0.0)
        Z = tl.where(inside, Z * weight[:, None], 0.0).to(PRODUCT)
        G = tl.dot(X, S.to(PRODUCT), input_precision="ieee")
        P = tl.dot(X, tl.trans(Y), input_precision="ieee")
        P = tl.where(seen, P, 0.0).to(PRODUCT)
        G = tl.dot(P, Z, G, input_precision="ieee")
        S = tl.dot(tl.trans(Y), Z, S, input_precision="ieee")
        W = phi(load_rows(w, w_t, w_d, t, real, first, D, BT, UNIT).to(tl.float32), KIND)
        tl.store(dots + t, tl.sum(tl.where(inside, G * W, 0.0), 1), mask=real)
        scale = tl.load(scales + row + t, mask=real, other=0.0)
        at = (row + t)[:, None] * D + channels[None, :]
        tl.store(out + at, (G * scale[:, None]).to(out.dtype.element_ty), mask=inside)


@triton.jit
def summed_dots(dots, t, real, lines, tokens, TILES: tl.constexpr):
    """The dots (TILES, lines, tokens) of the tokens t of a line, over all tiles of channels."""
    total = tl.load(dots + t, mask=real, other=0.0)
    for tile in tl.static_range(1, TILES):
        other = lines.to(tl.int64) * tokens * tile
        total += tl.load(dots + other + t, mask=real, other=0.0)
    return total


@triton.jit(do_not_specialize=["tokens", "length", "segments", "lines"])
def losses_kernel(
    dots, weights, sums, masses, table, tokens, length, segments, lines,
    TILE: tl.constexpr, TILES: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """A segment's sum of c' c / E."""
    where = tl.program_id(0)
    row = (where // segments).to(tl.int64) * tokens
    start = (where % segments).to(tl.int64) * length
    start, end, _, _ = stretch(table, table, where, segments, length, tokens, row, start, 1, PACKED)
    mass = tl.zeros((TILE,), tl.float32)
    for tile in range(0, end - start, TILE):
        t = start + tile + tl.arange(0, TILE)
        real = t < end
        dc = summed_dots(dots + row, t, real, lines, tokens, TILES)
        c = tl.load(weights + row + t, mask=real, other=0.0)
        mass += dc * c / tl.load(sums + row + t, mask=real, other=1.0)
    tl.store(masses + where, tl.sum(mass, 0))


@triton.jit(do_not_specialize=["tokens", "length", "segments", "lines", "heads", "low", "high"])
def rates_kernel(
    gate_dots, dots, shares, conserved, weights, sums, masses, last_se, first_N, rates, counts,
    table, bounds, tokens, length, segments, lines, heads, low, high,
    TILE: tl.constexpr, TILES: tl.constexpr, STARTED: tl.constexpr, ENDED: tl.constexpr,
    CLAMPED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """rates (3, lines, tokens): p', r', and the gate's gradient x times g. counts (2, lines,
    segments) gets the first half of N's gradient.
    """
    where = tl.program_id(0)
    line = (where // segments).to(tl.int64)
    segment = where % segments
    start = segment.to(tl.int64) * length
    start, end, begin, own = stretch(
        table, bounds, where, segments, length, tokens, line, start, heads, PACKED
    )
    many = segments
    if PACKED:
        many = tl.load(bounds + own // heads + 1).to(tl.int32)
    items = tl.arange(0, TILE)
    row, plane = line * tokens, lines.to(tl.int64) * tokens
    parts = tl.zeros((TILE,), tl.float32)
    for tile in range(segment + 1, many, TILE):
        at = tile + items
        parts += tl.load(masses + line * segments + at, mask=at < many, other=0.0)
    behind = tl.sum(parts, 0)
    of_last = tl.full((), 0.0, tl.float32)
    if ENDED:
        of_last = tl.load(last_se + own)
    number = tl.zeros((TILE,), tl.float32)
    count = end - start
    for tile in range(0, count, TILE):
        t = start + last_tile(count, TILE) - tile + items
        real = t < end
        here = row + t
        x = summed_dots(gate_dots + row, t, real, lines, tokens, TILES)
        dc = summed_dots(dots + row, t, real, lines, tokens, TILES)
        i = tl.load(shares + here, mask=real, other=0.0)
        Ih = tl.load(conserved + here, mask=real, other=0.0)
        Oh = tl.load(conserved + plane + here, mask=real, other=0.0)
        c = tl.load(weights + here, mask=real, other=0.0)
        E = tl.load(sums + here, mask=real, other=1.0)
        N = counted_from(first_N, own, t - begin, STARTED)
        far = tl.exp(-tl.abs(Ih))
        g = tl.where(Ih < 0.0, far, 1.0) / (1.0 + far)
        e = tl.exp(clipped(Oh, low, high, CLAMPED))
        loss = dc * c / E
        into = x * i * far / ((1.0 + far) * (1.0 + far)) / N
        out_of = (dc * c + e * (of_last - (behind + tl.cumsum(loss, 0, reverse=True)))) / N
        if CLAMPED:
            out_of = tl.where((Oh >= low) & (Oh <= high), out_of, 0.0)
        behind += tl.sum(loss, 0)
        tl.store(rates + here, into, mask=real)
        tl.store(rates + plane + here, out_of, mask=real)
        tl.store(rates + 2 * plane + here, x * g, mask=real)
        number += tl.where(real, dc * c / N - into * Ih - out_of * Oh, 0.0)
    tl.store(counts + where, tl.sum(number, 0))


@triton.jit(
    do_not_specialize=[
        "q_b", "q_h", "q_t", "k_b", "k_h", "k_t", "tokens", "length", "segments", "lines", "heads",
        "kv_heads",
    ]
)  # fmt: skip
def receive_kernel(
    q, q_b, q_h, q_t, q_d, k, k_b, k_h, k_t, k_d, first_N, shares, rates, before, between, states,
    parts, table, bounds, tokens, length, segments, lines, heads, kv_heads, eps,
    D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr, KIND: tl.constexpr,
    STARTED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """parts (2, lines, segments, D): a segment's sums of p' A and of r' B; states (lines, segments,
    tiles, 4, D): the sums sb, sbO, sa and saI before each tile.
    """
    where = tl.program_id(0)
    line, batch, head, kv_head, start = place(where, segments, length, heads, heads // kv_heads)
    start, end, begin, own = stretch(
        table, bounds, where, segments, length, tokens, line, start, heads, PACKED
    )
    q += (batch * q_b + head * q_h) * UNIT
    k += (batch * k_b + kv_head * k_h) * UNIT
    row, plane = line * tokens, lines.to(tl.int64) * tokens
    channels = tl.arange(0, BD)
    held = channels < D
    here = where.to(tl.int64) * D + channels
    other = lines.to(tl.int64) * segments * D
    SA = tl.load(before + here, mask=held, other=0.0)
    SB = tl.load(before + other + here, mask=held, other=0.0)
    TA = tl.load(between + here, mask=held, other=0.0)
    TB = tl.load(between + other + here, mask=held, other=0.0)
    PA = tl.zeros((BD,), tl.float32)
    PB = tl.zeros((BD,), tl.float32)
    states += where.to(tl.int64) * (length // ROWS) * 4 * D + channels
    for tile in range(0, end - start, ROWS):
        tl.store(states, SB, mask=held)
        tl.store(states + D, TB, mask=held)
        tl.store(states + 2 * D, SA, mask=held)
        tl.store(states + 3 * D, TA, mask=held)
        states += 4 * D
        t = start + tile + tl.arange(0, ROWS)
        real = t < end
        A = features(q, q_t, q_d, t, real, D, BD, UNIT, KIND)
        B = features(k, k_t, k_d, t, real, D, BD, UNIT, KIND)
        N = counted_from(first_N, own, t - begin, STARTED)
        into = tl.load(shares + row + t, mask=real, other=0.0) * N
        out_of = tl.load(shares + plane + row + t, mask=real, other=0.0) * N
        p = tl.load(rates + row + t, mask=real, other=0.0)
        r = tl.load(rates + plane + row + t, mask=real, other=0.0)
        SA += tl.sum(A, 0)
        SB += tl.sum(B, 0)
        TA += tl.sum(A * into[:, None], 0)
        TB += tl.sum(B * out_of[:, None], 0)
        PA += tl.sum((A + eps) * p[:, None], 0)
        PB += tl.sum((B + eps) * r[:, None], 0)
    tl.store(parts + here, PA, mask=held)
    tl.store(parts + other + here, PB, mask=held)


@triton.jit(
    do_not_specialize=[
        "q_b", "q_h", "q_t", "k_b", "k_h", "k_t", "tokens", "length", "segments", "lines", "heads",
        "kv_heads",
    ]
)  # fmt: skip
def return_kernel(
    q, q_b, q_h, q_t, q_d, k, k_b, k_h, k_t, k_d, first_N, shares, rates, after, slopes, parts,
    counts, table, bounds, tokens, length, segments, lines, heads, kv_heads, eps,
    D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr, KIND: tl.constexpr,
    STARTED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """slopes (2, lines, tokens): I' and O'; parts (2, lines, segments, D): a segment's sums of I' A
    and of O' B, after those of p' A and r' B behind it. counts gets the other half.
    """
    where = tl.program_id(0)
    line, batch, head, kv_head, start = place(where, segments, length, heads, heads // kv_heads)
    start, end, begin, own = stretch(
        table, bounds, where, segments, length, tokens, line, start, heads, PACKED
    )
    q += (batch * q_b + head * q_h) * UNIT
    k += (batch * k_b + kv_head * k_h) * UNIT
    row, plane = line * tokens, lines.to(tl.int64) * tokens
    channels = tl.arange(0, BD)
    held = channels < D
    here = where.to(tl.int64) * D + channels
    other = lines.to(tl.int64) * segments * D
    RA = tl.load(after + here, mask=held, other=0.0)
    RB = tl.load(after + other + here, mask=held, other=0.0)
    PA = tl.zeros((BD,), tl.float32)
    PB = tl.zeros((BD,), tl.float32)
    number = tl.zeros((ROWS,), tl.float32)
    count = end - start
    for tile in range(0, count, ROWS):
        t = start + last_tile(count, ROWS) - tile + (ROWS - 1 - tl.arange(0, ROWS))
        real = t < end
        A = features(q, q_t, q_d, t, real, D, BD, UNIT, KIND)
        B = features(k, k_t, k_d, t, real, D, BD, UNIT, KIND)
        N = counted_from(first_N, own, t - begin, STARTED)
        i = tl.load(shares + row + t, mask=real, other=0.0)
        o = tl.load(shares + plane + row + t, mask=real, other=0.0)
        p = tl.load(rates + row + t, mask=real, other=0.0)
        r = tl.load(rates + plane + row + t, mask=real, other=0.0)
        gate = tl.load(rates + 2 * plane + row + t, mask=real, other=0.0)
        AP = (A + eps) * p[:, None]
        BR = (B + eps) * r[:, None]
        y = tl.sum(B * (RA[None, :] + tl.cumsum(AP, 0)), 1)
        z = tl.sum(A * (RB[None, :] + tl.cumsum(BR, 0)), 1)
        RA += tl.sum(AP, 0)
        RB += tl.sum(BR, 0)
        dI = -i * i * (gate + N * z)
        dO = -o * o * N * y
        tl.store(slopes + row + t, dI, mask=real)
        tl.store(slopes + plane + row + t, dO, mask=real)
        PA += tl.sum((A + eps) * dI[:, None], 0)
        PB += tl.sum((B + eps) * dO[:, None], 0)
        number += tl.where(real, y * o + z * i, 0.0)
    tl.store(parts + here, PA, mask=held)
    tl.store(parts + other + here, PB, mask=held)
    tl.store(counts + lines * segments + where, tl.sum(number, 0))


@triton.jit
def sums_until(S, X, beginning):
    """The sums up to each row X (ROWS, BD), which come last first, S (BD,) being what is before
    them. A difference of sums takes no shuffles: those from a row on are NaN only where all is. At
    the beginning it would be all error.
    """
    U = S[None, :] + (tl.sum(X, 0)[None, :] - (tl.cumsum(X, 0) - X))
    if beginning:
        U = S[None, :] + tl.cumsum(X, 0, reverse=True)
    return U


@triton.jit
def sums_from(S, X):
    """The sums from each row X on, S (BD,) being what is behind the tile, and those from the first
    on.
    """
    return S[None, :] + tl.cumsum(X, 0), S + tl.sum(X, 0)


@triton.jit(
    do_not_specialize=[
        "q_b", "q_h", "q_t", "k_b", "k_h", "k_t", "tokens", "length", "segments", "lines", "heads",
        "kv_heads", "step",
    ]
)  # fmt: skip
def features_gradient_kernel(
    q, q_b, q_h, q_t, q_d, k, k_b, k_h, k_t, k_d, first_N, shares, rates, slopes, states, after,
    behind, part_q, part_k, dq, dk, table, bounds, tokens, length, segments, lines, heads, kv_heads,
    step, eps,
    D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr, KIND: tl.constexpr,
    STARTED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """dq and dk (lines, tokens, D): a' and b' times the slope of the features, the parts from the
    state being given. `after` are the sums of p' A and r' B behind a segment, `behind` those of
    I' A and O' B. The rows of all these lie step * UNIT apart: Triton, told no larger factor, gives
    a warp whole rows.
    """
    where = tl.program_id(0)
    line, batch, head, kv_head, start = place(where, segments, length, heads, heads // kv_heads)
    start, end, begin, own = stretch(
        table, bounds, where, segments, length, tokens, line, start, heads, PACKED
    )
    q += (batch * q_b + head * q_h) * UNIT
    k += (batch * k_b + kv_head * k_h) * UNIT
    row, plane = line * tokens, lines.to(tl.int64) * tokens
    channels = tl.arange(0, BD)
    held = channels < D
    here = where.to(tl.int64) * D + channels
    other = lines.to(tl.int64) * segments * D
    Y = tl.load(after + here, mask=held, other=0.0)
    Z = tl.load(after + other + here, mask=held, other=0.0)
    RB = tl.load(behind + here, mask=held, other=0.0)
    RA = tl.load(behind + other + here, mask=held, other=0.0)
    states += where.to(tl.int64) * (length // ROWS) * 4 * D + channels
    count = end - start
    for tile in range(0, count, ROWS):
        skipped = last_tile(count, ROWS) - tile
        t = start + skipped + (ROWS - 1 - tl.arange(0, ROWS))
        real = t < end
        inside = existing(real, 0, D, BD)
        X = load_rows(q, q_t, q_d, t, real, 0, D, BD, UNIT).to(tl.float32)
        K = load_rows(k, k_t, k_d, t, real, 0, D, BD, UNIT).to(tl.float32)
        A = tl.where(inside, phi(X, KIND), 0.0)
        B = tl.where(inside, phi(K, KIND), 0.0)
        places = ((row + t) * step * UNIT)[:, None] + channels[None, :]
        GA = tl.load(part_q + places, mask=inside, other=0.0).to(tl.float32)
        GB = tl.load(part_k + places, mask=inside, other=0.0).to(tl.float32)
        N = counted_from(first_N, own, t - begin, STARTED)
        into = (tl.load(shares + row + t, mask=real, other=0.0) * N)[:, None]
        out_of = (tl.load(shares + plane + row + t, mask=real, other=0.0) * N)[:, None]
        p = tl.load(rates + row + t, mask=real, other=0.0)[:, None]
        r = tl.load(rates + plane + row + t, mask=real, other=0.0)[:, None]
        dI = tl.load(slopes + row + t, mask=real, other=0.0)[:, None]
        dO = tl.load(slopes + plane + row + t, mask=real, other=0.0)[:, None]
        known = states + skipped // ROWS * 4 * D
        none = start + skipped == begin
        GA += dI * (sums_until(tl.load(known, mask=held, other=0.0), B, none) + eps)
        GA += p * (sums_until(tl.load(known + D, mask=held, other=0.0), B * out_of, none) + eps)
        GB += dO * (sums_until(tl.load(known + 2 * D, mask=held, other=0.0), A, none) + eps)
        GB += r * (sums_until(tl.load(known + 3 * D, mask=held, other=0.0), A * into, none) + eps)
        later, Y = sums_from(Y, (A + eps) * p)
        GB += out_of * later
        later, RB = sums_from(RB, (A + eps) * dI)
        GB += later
        later, Z = sums_from(Z, (B + eps) * r)
        GA += into * later
        later, RA = sums_from(RA, (B + eps) * dO)
        GA += later
        if KIND == 1:
            GA *= A * (1.0 - A)
            GB *= B * (1.0 - B)
        else:
            GA *= slope(X, KIND)
            GB *= slope(K, KIND)
        tl.store(dq + places, GA.to(dq.dtype.element_ty), mask=inside)
        tl.store(dk + places, GB.to(dk.dtype.element_ty), mask=inside)
