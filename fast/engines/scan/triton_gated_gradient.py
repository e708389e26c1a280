"""The gradient of the scan between gates in Triton, a segment's tiles from the end.

A tile's gates and states are made again from the state before it. A thread holds all rows of a tile
for its channels, so that rows meet in its registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.fast.engines.scan.triton_elementwise import place_of, stretch_of
from attnspec.fast.engines.scan.triton_gated import (
    VARYING,
    channels_of,
    forget,
    line_of,
    numbers_at,
    power_of,
    rows_at,
    sigmoids,
    softplus,
)
from attnspec.fast.engines.scan.triton_selective_gradient import state_before


@triton.jit
def before_rows(a, x, first, BC: tl.constexpr, ROWS: tl.constexpr, BACK: tl.constexpr):
    """`state_before` of rows that lie along the first axis."""
    return tl.trans(state_before(tl.trans(a), tl.trans(x), first[:, None], BC, ROWS, BACK))


@triton.jit(do_not_specialize=[*VARYING, "y_b", "y_t"])
def gated_gradient_kernel(
    f, f_b, f_t, f_c, z, z_b, z_t, z_c, i, i_b, i_t, i_c, o, o_b, o_t, o_c, dy, y_b, y_t, y_c,
    alpha, power, marks, dlast, behind, df, dz, di, do, dalpha, dh0, table,
    tokens, length, segments, tiles, channels,
    BC: tl.constexpr, ROWS: tl.constexpr, REVERSED: tl.constexpr, LEARNED: tl.constexpr,
    SLOPE: tl.constexpr, PAIRS: tl.constexpr, NATIVE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """df, dz, di, do (batch, tokens, channels) of a segment, from what is handed to it from
    `behind`, or `dlast`. If SLOPE, dalpha (batch, segments, channels) are its parts of the gradient
    of alpha. dh0 is what the first row hands on.
    """
    lanes, _, segment, row = place_of(channels, segments, BC)
    part = segment if PACKED else segments - 1 - segment
    sequence, start, stop, opens, closes = stretch_of(
        table, part, row, segments, tokens, length, PACKED
    )
    at = (row * segments + segment - 1) * channels + lanes
    if PACKED:
        if start == stop:
            return
        at += 2 * channels
        marks += sequence * channels
    inside = channels_of(lanes, channels, PAIRS)
    rows = tl.arange(0, ROWS)
    f = line_of(f, row, f_b, lanes, f_c, PAIRS)
    z = line_of(z, row, z_b, lanes, z_c, PAIRS)
    i = line_of(i, row, i_b, lanes, i_c, PAIRS)
    o = line_of(o, row, o_b, lanes, o_c, PAIRS)
    dy = line_of(dy, row, y_b, lanes, y_c, PAIRS)
    made = tokens * channels
    df, dz = line_of(df, row, made, lanes, 1, PAIRS), line_of(dz, row, made, lanes, 1, PAIRS)
    di, do = line_of(di, row, made, lanes, 1, PAIRS), line_of(do, row, made, lanes, 1, PAIRS)
    marks += row * tiles * channels + lanes
    power = power_of(alpha, power, LEARNED)
    slope = tl.zeros((BC,), tl.float32)
    if closes:
        handed = tl.load(dlast + sequence * channels + lanes, mask=inside, other=0.0)
    else:
        handed = tl.load(behind + at, mask=inside, other=0.0)
    many = tl.cdiv(stop - start, ROWS)
    for n in range(many):
        first = start + (many - 1 - n) * ROWS
        mask = (rows < stop - first)[:, None] & inside[None, :]
        F = numbers_at(f, first, f_t, rows, mask, PAIRS)
        Z = numbers_at(z, first, z_t, rows, mask, PAIRS)
        I = numbers_at(i, first, i_t, rows, mask, PAIRS)
        O = numbers_at(o, first, o_t, rows, mask, PAIRS)
        up = numbers_at(dy, first, y_t, rows, mask, PAIRS)
        before = tl.load(marks + first // ROWS * channels, mask=inside, other=0.0)
        steep, A = sigmoids(F, NATIVE)
        if REVERSED:
            A, steep = forget(F, power, REVERSED, NATIVE), -power * steep
        else:
            A, steep = steep, A
        A = tl.where(mask, A, 1.0)
        enter, shut = sigmoids(I, NATIVE)
        X = enter * Z
        kept = A * before_rows(A, X, before, BC, ROWS, False)
        read, unread = sigmoids(O, NATIVE)
        G = read * up
        slope_o = (G * (kept + X) * unread).to(do.dtype.element_ty)
        tl.store(rows_at(do, first, channels, rows, PAIRS), slope_o, mask=mask)
        G += before_rows(A, A * G, handed, BC, ROWS, True)
        slope_z = (G * enter).to(dz.dtype.element_ty)
        tl.store(rows_at(dz, first, channels, rows, PAIRS), slope_z, mask=mask)
        slope_i = (G * X * shut).to(di.dtype.element_ty)
        tl.store(rows_at(di, first, channels, rows, PAIRS), slope_i, mask=mask)
        kept *= G
        slope_f = (kept * steep).to(df.dtype.element_ty)
        tl.store(rows_at(df, first, channels, rows, PAIRS), slope_f, mask=mask)
        if SLOPE:
            # Where nothing is kept, not even an infinite exponent changes anything.
            own = tl.where(mask & (kept != 0.0), kept * softplus(F, NATIVE), 0.0)
            slope -= tl.sum(own, 0)
        handed = tl.sum(tl.where((rows == 0)[:, None], A * G, 0.0), 0)
    if SLOPE:
        tl.store(dalpha + (row * segments + segment) * channels + lanes, slope, mask=inside)
    if opens:
        tl.store(dh0 + sequence * channels + lanes, handed, mask=inside)
