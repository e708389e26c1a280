"""The gradient of the selective scan in Triton, a tile of rows at once.

A thread holds all rows of a tile for one channel, so that rows meet in its registers. For that not
even the alignment of the channels is told: loaded in vectors, a thread would have few rows of
several channels, and half of the instructions would be shuffles.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.fast.engines.scan.triton_common import among, exchanged
from attnspec.fast.engines.scan.triton_elementwise import place_of

VARYING = [
    "d_b", "d_t", "b_b", "b_t", "c_b", "c_t", "u_b", "u_t", "y_b", "y_t", "tokens", "tiles",
    "rows_all", "channels",
]  # fmt: skip


@triton.jit
def state_before(a, x, first, BC: tl.constexpr, ROWS: tl.constexpr, BACK: tl.constexpr):
    """h before each row (BC, ROWS) of the recurrence h <- a h + x that begins at `first` (BC, 1);
    from the last row on if BACK. Rows that a thread holds meet in its registers.
    """
    if ROWS == 1:
        return first
    else:
        a_near, a_far = tl.split(tl.reshape(a, (BC, ROWS // 2, 2)))
        x_near, x_far = tl.split(tl.reshape(x, (BC, ROWS // 2, 2)))
        if BACK:
            a_near, a_far, x_near, x_far = a_far, a_near, x_far, x_near
        both = state_before(a_far * a_near, a_far * x_near + x_far, first, BC, ROWS // 2, BACK)
        between = a_near * both + x_near
        pair = tl.join(between, both) if BACK else tl.join(both, between)
        return tl.reshape(pair, (BC, ROWS))


@triton.jit
def numbers_of_state(b, b_n, c, c_n, A, before, behind, s, valid, inside):
    """b, c, A and the states at both ends of a tile, of number `s` of the state."""
    wide = tl.cast(s, tl.int64)
    B = tl.load(b + wide * b_n, mask=valid, other=0.0)
    C = tl.load(c + wide * c_n, mask=valid, other=0.0)
    rate = tl.load(A + s, mask=inside, other=0.0)
    h = tl.load(before + s, mask=inside, other=0.0)
    g = tl.load(behind + s, mask=inside, other=0.0)
    return B, C, rate, h, g


@triton.jit(do_not_specialize=VARYING)
def gradient_kernel(
    Delta, d_b, d_t, d_c, A, b, b_b, b_t, b_n, c, c_b, c_t, c_n, u, u_b, u_t, u_c, D,
    dy, y_b, y_t, y_c, before, behind, dDelta, db, dc, du, starts, tokens, tiles, rows_all,
    channels,
    N: tl.constexpr, BC: tl.constexpr, ROWS: tl.constexpr, SKIP: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile from the state `before` it, which becomes its part of dA, and from g
    `behind` it; db and dc (parts, all rows, N) are those of this program's channels. Tiles of
    packed sequences are those of `tile_starts`.
    """
    lanes, inside, tile, row = place_of(channels, tiles, BC)
    part = tl.program_id(0) % tl.cdiv(channels, BC)
    rows = tl.arange(0, ROWS)
    start, beyond = tile.to(tl.int64) * ROWS, tl.cast(tokens, tl.int64)
    if PACKED:
        start, beyond = tl.load(starts + 2 * tile), tl.load(starts + 2 * tile + 1)
        if start >= beyond:
            return
    t = start + rows
    valid = t < beyond
    mask = valid[None, :] & inside[:, None]
    wide = lanes.to(tl.int64)
    end = start + ROWS
    Delta += row * d_b + wide * d_c
    u += row * u_b + wide[:, None] * u_c + t[None, :] * u_t
    dy += row * y_b + wide[:, None] * y_c + t[None, :] * y_t
    b += row * b_b + t * b_t
    c += row * c_b + t * c_t
    d = tl.load(Delta[:, None] + t[None, :] * d_t, mask=mask, other=0.0).to(tl.float32)
    d_end = tl.load(Delta + end * d_t, mask=among(end, end, beyond, inside), other=0.0)
    value = tl.load(u, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(dy, mask=mask, other=0.0).to(tl.float32)
    rate = tl.zeros((BC, ROWS), tl.float32)
    strength = tl.zeros((BC, ROWS), tl.float32)
    into = d * value
    size = tl.cast(channels, tl.int64) * N
    here = (row * tiles + tile) * size + lanes * N
    line = (tl.cast(part, tl.int64) * rows_all + row * tokens + t) * N
    A += lanes * N
    B_next, C_next, A_next, h_next, g_next = numbers_of_state(
        b, b_n, c, c_n, A, before + here, behind + here, 0, valid, inside
    )
    for s in range(N):
        A_s, h_in, g_in = A_next, h_next, g_next
        B, C = exchanged(B_next.to(tl.float32), ROWS), exchanged(C_next.to(tl.float32), ROWS)
        B_next, C_next, A_next, h_next, g_next = numbers_of_state(
            b, b_n, c, c_n, A, before + here, behind + here, tl.minimum(s + 1, N - 1), valid, inside
        )
        power = A_s * -1.4426950408889634
        a = tl.exp2(d * power[:, None])
        x = into * B[None, :]
        kept = a * state_before(a, x, h_in[:, None], BC, ROWS, False)
        # Before a row, from the end: the g behind it, through the decay of the row that has it.
        y = up * C[None, :]
        g_end = g_in * tl.exp2(d_end.to(tl.float32) * power)
        G = y + state_before(a, a * y, g_end[:, None], BC, ROWS, True)
        strength += G * B[None, :]
        tl.store(dc + line + s, tl.sum((kept + x) * up, 0), mask=valid)
        tl.store(db + line + s, tl.sum(G * into, 0), mask=valid)
        kept *= G
        rate += kept * A_s[:, None]
        tl.store(before + here + s, -tl.sum(kept * d, 1), mask=inside)
    place = (row * tokens + t[None, :]) * channels + lanes[:, None]
    made = strength * value - rate
    tl.store(dDelta + place, made.to(dDelta.dtype.element_ty), mask=mask)
    through = strength * d
    if SKIP:
        through += tl.load(D + lanes, mask=inside, other=0.0)[:, None] * up
    tl.store(du + place, through.to(du.dtype.element_ty), mask=mask)
