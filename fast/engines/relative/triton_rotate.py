"""Turning every row of a tile by an amount of its own: what makes a band of products a tile.

Row r of a tile of queries by keys needs the products with table rows that start one later for each
row above it: a shear. The products with two neighbouring chunks of 64 table rows hold all of it,
and each (row, column) of the tile needs exactly one of the two, so it suffices to choose by element
and to turn the row as a ring of 64. Shared memory would have to be written and read once a tile
with bank conflicts, and `tl.gather` over 64 columns converts the layout twice.

Instead the turn is taken apart along the layout in which a tensor core leaves its result: column
8m + 2t + e lies in register (m, e) of lane t. The lowest bit of the turn exchanges even and odd
columns, its middle bits are one shuffle among four lanes, and its upper bits are three selections
among registers: one shuffle and five selections an element, without shared memory or barriers.
Rows go to (half, warp, lane) order first, because that is where `tl.gather` looks for the rows of a
warp.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def to_lanes(x, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Rows (warp, half, lane) of a tile in the order (half, warp, lane)."""
    x = x.reshape(ROWS // 16, 2, 8, WIDTH).permute(1, 0, 2, 3)
    return x.reshape(ROWS, WIDTH)


@triton.jit
def from_lanes(x, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """The inverse of `to_lanes`."""
    x = x.reshape(2, ROWS // 16, 8, WIDTH).permute(1, 0, 2, 3)
    return x.reshape(ROWS, WIDTH)


@triton.jit
def parted(x, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """The even and the odd ones of the GROUPS groups of four columns of x."""
    x = x.reshape(ROWS, GROUPS // 2, 2, 4).permute(0, 1, 3, 2)
    even, odd = tl.split(x)
    return even, odd


@triton.jit
def turned_groups(pieces, shift, one: tl.constexpr):
    """Each of eight pieces, or the one `one` places behind where bit `one` of `shift` is set."""
    p0, p1, p2, p3, p4, p5, p6, p7 = pieces
    take = (shift & one) != 0
    if one == 1:
        s0, s1, s2, s3, s4, s5, s6, s7 = p1, p2, p3, p4, p5, p6, p7, p0
    elif one == 2:
        s0, s1, s2, s3, s4, s5, s6, s7 = p2, p3, p4, p5, p6, p7, p0, p1
    else:
        s0, s1, s2, s3, s4, s5, s6, s7 = p4, p5, p6, p7, p0, p1, p2, p3
    return (
        tl.where(take, s0, p0), tl.where(take, s1, p1), tl.where(take, s2, p2),
        tl.where(take, s3, p3), tl.where(take, s4, p4), tl.where(take, s5, p5),
        tl.where(take, s6, p6), tl.where(take, s7, p7),
    )  # fmt: skip


@triton.jit
def turn_pairs(x, shift, ROWS: tl.constexpr):
    """x (ROWS, 32) with row r turned left by shift[r] columns; `shift` (ROWS, 1), 0..32."""
    lane = tl.arange(0, 4)[None, :]
    groups = (shift >> 2) + (lane < (shift & 3)).to(tl.int32)
    source = (lane + shift) & 3
    a, b = parted(x.reshape(ROWS, 8, 4), ROWS, 8)
    a0, a1 = parted(a, ROWS, 4)
    b0, b1 = parted(b, ROWS, 4)
    p0, p4 = parted(a0, ROWS, 2)
    p2, p6 = parted(a1, ROWS, 2)
    p1, p5 = parted(b0, ROWS, 2)
    p3, p7 = parted(b1, ROWS, 2)
    pieces = (
        p0.reshape(ROWS, 4), p1.reshape(ROWS, 4), p2.reshape(ROWS, 4), p3.reshape(ROWS, 4),
        p4.reshape(ROWS, 4), p5.reshape(ROWS, 4), p6.reshape(ROWS, 4), p7.reshape(ROWS, 4),
    )  # fmt: skip
    pieces = turned_groups(pieces, groups, 1)
    pieces = turned_groups(pieces, groups, 2)
    p0, p1, p2, p3, p4, p5, p6, p7 = turned_groups(pieces, groups, 4)
    p0, p1 = tl.gather(p0, source, axis=1), tl.gather(p1, source, axis=1)
    p2, p3 = tl.gather(p2, source, axis=1), tl.gather(p3, source, axis=1)
    p4, p5 = tl.gather(p4, source, axis=1), tl.gather(p5, source, axis=1)
    p6, p7 = tl.gather(p6, source, axis=1), tl.gather(p7, source, axis=1)
    even = tl.join(tl.join(p0, p4), tl.join(p2, p6))
    odd = tl.join(tl.join(p1, p5), tl.join(p3, p7))
    return tl.join(even, odd).permute(0, 2, 3, 4, 1).reshape(ROWS, 32)


@triton.jit
def rotate(x, shift, ROWS: tl.constexpr):
    """x (ROWS, 64) with row r turned left by shift[r]: result[r, c] = x[r, (c + shift[r]) % 64].

    `shift` (ROWS,) int32, 0..63.
    """
    x = to_lanes(x, ROWS, 64)
    shift = to_lanes(shift.reshape(ROWS, 1), ROWS, 1)
    even, odd = tl.split(x.reshape(ROWS, 32, 2))
    flip = (shift & 1) != 0
    first = turn_pairs(tl.where(flip, odd, even), shift >> 1, ROWS)
    second = turn_pairs(tl.where(flip, even, odd), (shift + 1) >> 1, ROWS)
    return from_lanes(tl.join(first, second).reshape(ROWS, 64), ROWS, 64)
