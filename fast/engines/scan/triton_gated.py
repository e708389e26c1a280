"""Gates around the elementwise scan, and what they let through, in Triton.

a = sigmoid(f), or sigmoid(-f)^power if REVERSED; x = sigmoid(i) z. Pre-activations are read as they
are, and gates and states live in registers. Segments are those of the elementwise scan.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.fast.engines.scan.triton_common import LOG2E, among, log1p, reciprocal
from attnspec.fast.engines.scan.triton_elementwise import join, place_of, stretch_of

VARYING = [
    "f_b", "f_t", "z_b", "z_t", "i_b", "i_t", "o_b", "o_t", "tokens", "length", "segments", "tiles",
    "channels",
]  # fmt: skip
"""Arguments whose values compile nothing anew, and whose alignment would spread a channel's rows
over threads."""


@triton.jit
def sigmoid(x, NATIVE: tl.constexpr):
    """1 / (1 + e^-x)."""
    return reciprocal(1.0 + tl.exp2(x * -LOG2E), NATIVE)


@triton.jit
def sigmoids(x, NATIVE: tl.constexpr):
    """sigmoid(x) and sigmoid(-x), either to full relative precision."""
    e = tl.exp2(tl.abs(x) * -LOG2E)
    larger = reciprocal(1.0 + e, NATIVE)
    smaller = e * larger
    return tl.where(x < 0, smaller, larger), tl.where(x < 0, larger, smaller)


@triton.jit
def softplus(x, NATIVE: tl.constexpr):
    """log(1 + e^x) to full relative precision."""
    return tl.maximum(x, 0.0) + log1p(tl.exp2(tl.abs(x) * -LOG2E), NATIVE)


@triton.jit
def power_of(alpha, power, LEARNED: tl.constexpr):
    """max(alpha, 0), read if LEARNED."""
    if LEARNED:
        power = tl.load(alpha)
        power = tl.where(power < 0.0, 0.0, power)
    return power


@triton.jit
def forget(f, power, REVERSED: tl.constexpr, NATIVE: tl.constexpr):
    """The decay a."""
    if REVERSED:
        return tl.exp2(softplus(f, NATIVE) * (power * -LOG2E))
    else:
        return sigmoid(f, NATIVE)


@triton.jit
def channels_of(lanes, channels, PAIRS: tl.constexpr):
    """Which lanes are channels; if PAIRS, in a way that shows that two neighbours agree."""
    if PAIRS:
        inside = lanes // 2 < channels // 2
    else:
        inside = lanes < channels
    return inside


@triton.jit
def line_of(x, row, x_b, lanes, x_c, PAIRS: tl.constexpr):
    """Pointers to the first token's numbers (channels,) of a row of the batch; if PAIRS, steps are
    even, of which the compiler hears.
    """
    skipped = row * x_b
    if PAIRS:
        skipped = tl.multiple_of(skipped, 2)
    return x + skipped + lanes.to(tl.int64) * x_c


@triton.jit
def rows_at(x, first, step, rows, PAIRS: tl.constexpr):
    """Pointers (rows, channels) to rows `first` + `rows`, `step` apart, of a line x."""
    skipped, ahead = first * step, rows.to(tl.int64) * step
    if PAIRS:
        skipped, ahead = tl.multiple_of(skipped, 2), tl.multiple_of(ahead, 2)
    return (x + skipped)[None, :] + ahead[:, None]


@triton.jit
def numbers_at(x, first, step, rows, mask, PAIRS: tl.constexpr):
    """What lies there, in float32, and 0 where masked."""
    return tl.load(rows_at(x, first, step, rows, PAIRS), mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=VARYING)
def gated_totals_kernel(
    f, f_b, f_t, f_c, z, z_b, z_t, z_c, i, i_b, i_t, i_c, alpha, power, products, sums, table,
    tokens, length, segments, channels,
    BC: tl.constexpr, ROWS: tl.constexpr, BACK: tl.constexpr, REVERSED: tl.constexpr,
    LEARNED: tl.constexpr, PAIRS: tl.constexpr, NATIVE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """A segment's product of a and its last h from 0, rows (batch, segments, channels); of packed
    sequences only those that another segment follows.

    If BACK, segments and their rows come from the end, packed segments their rows alone, and x is
    multiplied by its row's a: with the gradient of the output and its gate for z and i, h is what a
    row hands to the one before.
    """
    lanes, _, segment, row = place_of(channels, segments, BC)
    part = segments - 1 - segment if BACK and not PACKED else segment
    _, start, stop, opens, closes = stretch_of(table, part, row, segments, tokens, length, PACKED)
    if PACKED and ((start == stop) | (opens if BACK else closes)):
        return
    inside = channels_of(lanes, channels, PAIRS)
    rows = tl.arange(0, ROWS)
    f = line_of(f, row, f_b, lanes, f_c, PAIRS)
    z = line_of(z, row, z_b, lanes, z_c, PAIRS)
    i = line_of(i, row, i_b, lanes, i_c, PAIRS)
    product = tl.full((BC,), 1.0, tl.float32)
    total = tl.zeros((BC,), tl.float32)
    power = power_of(alpha, power, LEARNED)
    tiles = tl.cdiv(stop - start, ROWS)
    for n in range(tiles):
        first = start + (tiles - 1 - n if BACK else n) * ROWS
        ahead = ROWS - 1 - rows if BACK else rows
        mask = (ahead < stop - first)[:, None] & inside[None, :]
        F = numbers_at(f, first, f_t, ahead, mask, PAIRS)
        Z = numbers_at(z, first, z_t, ahead, mask, PAIRS)
        I = numbers_at(i, first, i_t, ahead, mask, PAIRS)
        A = tl.where(mask, forget(F, power, REVERSED, NATIVE), 1.0)
        X = sigmoid(I, NATIVE) * Z
        if BACK:
            X *= A
        A, X = tl.associative_scan((A, X), 0, join)
        end = (rows == ROWS - 1)[:, None]
        whole = tl.sum(tl.where(end, A, 0.0), 0)
        total = whole * total + tl.sum(tl.where(end, X, 0.0), 0)
        product *= whole
    here = (row * segments + segment) * channels + lanes
    tl.store(products + here, product, mask=inside)
    tl.store(sums + here, total, mask=inside)


@triton.jit(do_not_specialize=VARYING)
def gated_walk_kernel(
    f, f_b, f_t, f_c, z, z_b, z_t, z_c, i, i_b, i_t, i_c, o, o_b, o_t, o_c, alpha, power, h0,
    behind, y, last, marks, table, tokens, length, segments, tiles, channels,
    BC: tl.constexpr, ROWS: tl.constexpr, REVERSED: tl.constexpr, LEARNED: tl.constexpr,
    STARTED: tl.constexpr, MARKED: tl.constexpr, PAIRS: tl.constexpr, NATIVE: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """y = sigmoid(o) h (batch, tokens, channels) of a segment, from the state `behind` the one
    before; and the state before every MARKED rows (batch, tiles, channels), unless that is 0. Tiles
    of packed sequences lie as in `tile_starts`.
    """
    lanes, _, segment, row = place_of(channels, segments, BC)
    sequence, start, stop, opens, closes = stretch_of(
        table, segment, row, segments, tokens, length, PACKED
    )
    if PACKED:
        if start == stop:
            return
        marks += sequence * channels
    inside = channels_of(lanes, channels, PAIRS)
    rows = tl.arange(0, ROWS)
    f = line_of(f, row, f_b, lanes, f_c, PAIRS)
    z = line_of(z, row, z_b, lanes, z_c, PAIRS)
    i = line_of(i, row, i_b, lanes, i_c, PAIRS)
    o = line_of(o, row, o_b, lanes, o_c, PAIRS)
    y = line_of(y, row, tokens * channels, lanes, 1, PAIRS)
    marks += row * tiles * channels + lanes
    power = power_of(alpha, power, LEARNED)
    state = tl.zeros((BC,), tl.float32)
    if not opens:
        at = (row * segments + segment - 1) * channels + lanes
        state = tl.load(behind + at, mask=inside, other=0.0)
    elif STARTED:
        state = tl.load(h0 + sequence * channels + lanes, mask=inside, other=0.0).to(tl.float32)
    for first in range(start, stop, ROWS):
        mask = (rows < stop - first)[:, None] & inside[None, :]
        F = numbers_at(f, first, f_t, rows, mask, PAIRS)
        Z = numbers_at(z, first, z_t, rows, mask, PAIRS)
        I = numbers_at(i, first, i_t, rows, mask, PAIRS)
        O = numbers_at(o, first, o_t, rows, mask, PAIRS)
        A = tl.where(mask, forget(F, power, REVERSED, NATIVE), 1.0)
        X = sigmoid(I, NATIVE) * Z
        # The state enters by the first row: products of a are then nobody's business.
        X = tl.where((rows == 0)[:, None], A * state[None, :] + X, X)
        A, H = tl.associative_scan((A, X), 0, join)
        out = (sigmoid(O, NATIVE) * H).to(y.dtype.element_ty)
        tl.store(rows_at(y, first, channels, rows, PAIRS), out, mask=mask)
        if MARKED > 0:
            tile = first // MARKED
            tl.store(marks + tile * channels, state, mask=inside)
            for n in tl.static_range(1, ROWS // MARKED):
                state = tl.sum(tl.where((rows == n * MARKED - 1)[:, None], H, 0.0), 0)
                known = among(first + n * MARKED, first, stop, inside)
                tl.store(marks + (tile + n) * channels, state, mask=known)
        state = tl.sum(tl.where((rows == ROWS - 1)[:, None], H, 0.0), 0)
    if closes:
        tl.store(last + sequence * channels + lanes, state, mask=inside)
