"""`triton_rotate` in Gluon, for 64 rows of 64 columns as the matrix units leave them: rows by warp,
half and lane, columns by register group, lane and pair. It needs no turn of rows, and what a row is
turned by does not change: it is worked out once.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from attnspec.fast.engines.relative.triton_rotate import turned_groups


@gluon.jit
def chunk_is_new(LAYOUT: gl.constexpr, nothing=0):
    """Which elements of a tile's ring come from the newer of its two chunks, in `LAYOUT`.

    Column c of row r is entry c + 63 - r of the two side by side; `rotate` moves it to its place.
    `nothing` is a 0 that the compiler does not know, in a loop: the comparison is then made in
    every turn instead of once, which would take registers all along.
    """
    column = gl.arange(0, 64, gl.SliceLayout(0, LAYOUT))
    slant = 63 + nothing - gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
    # By eights, as the flash engine's `hide`.
    eights, within = (column >> 3)[None, :], (column & 7)[None, :]
    return eights < (slant[:, None] - within + 7) >> 3


@gluon.jit
def pairs(x):
    """The even and the odd columns of x (64, 64), as (warp, half, lane of row, lane, group)."""
    return gl.split(x.reshape([4, 2, 8, 8, 4, 2]).permute((0, 1, 2, 4, 3, 5)))


@gluon.jit
def parted(x, GROUPS: gl.constexpr):
    """The even and the odd ones of the groups of x."""
    return gl.split(x.reshape([4, 2, 8, 4, GROUPS // 2, 2]))


@gluon.jit
def pieces_of(x):
    """The eight groups of x, one by one."""
    a, b = parted(x, 8)
    a0, a1 = parted(a, 4)
    b0, b1 = parted(b, 4)
    p0, p4 = parted(a0, 2)
    p2, p6 = parted(a1, 2)
    p1, p5 = parted(b0, 2)
    p3, p7 = parted(b1, 2)
    return p0, p1, p2, p3, p4, p5, p6, p7


@gluon.jit
def turning(LAYOUT: gl.constexpr):
    """By how much `rotate` turns each row r, 63 - r, as its parts: whether pairs are exchanged, and
    for the even and the odd columns how many groups to go and which lane to ask.
    """
    nothing = gl.zeros([64, 64], gl.int32, LAYOUT)
    row, _ = pairs(nothing + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))[:, None])
    column, _ = pairs(nothing + gl.arange(0, 64, gl.SliceLayout(0, LAYOUT))[None, :])
    flip = (row & 1) == 0
    shift = 63 - pieces_of(row)[0]
    lane = pieces_of(column)[0] >> 1
    even, odd = shift >> 1, (shift + 1) >> 1
    return (
        flip,
        ((even >> 2) + (lane < (even & 3)).to(gl.int32), (lane + even) & 3),
        ((odd >> 2) + (lane < (odd & 3)).to(gl.int32), (lane + odd) & 3),
    )


@gluon.jit
def turn_pairs(x, by):
    """x turned left by pairs of columns; `by` (groups, lane)."""
    groups, source = by
    pieces = turned_groups(pieces_of(x), groups, 1)
    pieces = turned_groups(pieces, groups, 2)
    p0, p1, p2, p3, p4, p5, p6, p7 = turned_groups(pieces, groups, 4)
    p0, p1 = gl.gather(p0, source, axis=3), gl.gather(p1, source, axis=3)
    p2, p3 = gl.gather(p2, source, axis=3), gl.gather(p3, source, axis=3)
    p4, p5 = gl.gather(p4, source, axis=3), gl.gather(p5, source, axis=3)
    p6, p7 = gl.gather(p6, source, axis=3), gl.gather(p7, source, axis=3)
    even = gl.join(gl.join(p0, p4), gl.join(p2, p6))
    odd = gl.join(gl.join(p1, p5), gl.join(p3, p7))
    return gl.join(even, odd).reshape([4, 2, 8, 4, 8])


@gluon.jit
def rotate(x, turns_by):
    """x (64, 64) with row r turned left by 63 - r; `turns_by` of `turning`."""
    flip, first, second = turns_by
    even, odd = pairs(x)
    even, odd = (
        turn_pairs(gl.where(flip, odd, even), first),
        turn_pairs(gl.where(flip, even, odd), second),
    )
    turned = gl.join(even, odd).permute((0, 1, 2, 4, 3, 5)).reshape([64, 64])
    return gl.convert_layout(turned, x.type.layout, assert_trivial=True)
