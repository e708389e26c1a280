"""What the density kernels have in common: tiles, Gaussians, depths and weights.

Tiles are (entries, slices). An entry's depth is how far its log density lies below that of a mean:
where PRODUCT, a head's Gaussians are one, (d, a, C, b), and the depth is the squared distance from
it, in units of 1/k; else it is minus the log density to base 2, and k is 1. Raw weights are
relative to the entry of least depth.
"""

from __future__ import annotations

import triton
import triton.language as tl

COUNTS = ["heads", "tiles", "parts", "K", "M", "shares"]
LOG2E = tl.constexpr(1.4426950408889634)
HALF_LOG2_2PI = tl.constexpr(1.3257480647361593)


@triton.jit
def place_of(chunk, extra, heads, parts, tiles, rows, F: tl.constexpr):
    """The outer index, the head, the part of its chunk, the tile of slices and its slices of this
    program; where its part of the chunk begins, and where the chunk ends.

    Plain products, so that the compiler sees a multiple of 16 where there is one.
    """
    program = tl.program_id(0)
    tile = program % tiles
    part = program // tiles % parts
    head = program // (tiles * parts) % heads
    o = (program // (tiles * parts * heads)).to(tl.int64)
    begin = head * chunk
    stop = begin + chunk + extra * ((head + 1) // heads)
    return o, head, part, tile, tile * F + tl.arange(0, F), begin + part * rows, stop


@triton.jit
def places(
    x, o, first, tile, x_o, x_n, x_f, NEAR: tl.constexpr, V: tl.constexpr, L: tl.constexpr,
    F: tl.constexpr,
):  # fmt: skip
    """Where a tile's entries lie; offsets inside a tile are short if it is NEAR.

    A thread takes no more than V neighbouring slices, as each costs it the work on whole slices.
    """
    wide = tl.zeros((), tl.int64)
    at = x + o * x_o + (wide + first) * x_n + (wide + tile * F) * x_f
    row = tl.arange(0, L)
    fibre = tl.max_contiguous(tl.arange(0, F), V)
    if not NEAR:
        row, fibre = row.to(tl.int64), fibre.to(tl.int64)
    return at + (row[:, None] * x_n + fibre[None, :] * x_f)


@triton.jit
def inside_of(
    first, stop, fibre, fibres, WHOLE: tl.constexpr, EVEN: tl.constexpr, L: tl.constexpr,
    F: tl.constexpr,
):  # fmt: skip
    """Which entries of a tile exist: all if chunks are WHOLE tiles, slices of EVEN tiles do."""
    inside = tl.full([L, F], True, tl.int1)
    if not WHOLE:
        inside &= (first + tl.arange(0, L) < stop)[:, None]
    if not EVEN:
        inside &= (fibre < fibres)[None, :]
    return inside


@triton.jit
def real_of(
    mask, o, first, tile, inside, m_o, m_n, m_f, MASKED: tl.constexpr, EXACT: tl.constexpr,
    NEAR: tl.constexpr, V: tl.constexpr, L: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """Which entries of a tile are no padding, and which count."""
    real = inside
    if MASKED:
        at = places(mask, o, first, tile, m_o, m_n, m_f, NEAR, V, L, F)
        real = tl.load(at, mask=inside, other=0) != 0
    counted = inside
    if EXACT:
        counted = real
    return real, counted


@triton.jit
def several(delta, c, head, K, KP: tl.constexpr):
    """A head's Gaussians: offsets, widths and sharpnesses, the last 0 beyond the end."""
    k = tl.arange(0, KP)
    here = k < K
    offset = tl.load(delta + head * K + k, mask=here, other=0.0).to(tl.float32)
    width = tl.load(c + head * K + k, mask=here, other=1.0).to(tl.float32)
    return offset, width, tl.where(here, 1.0 / (width * width), 0.0), here


@triton.jit
def gaussian_of(delta, c, head, K, PRODUCT: tl.constexpr, KP: tl.constexpr):
    """The one Gaussian (d, a, C, b) that a product is, C to base 2: completing the square
    leaves a sum of squares, b, so that nothing cancels. Of a mixture, nothing.
    """
    if PRODUCT:
        offset, width, sharp, here = several(delta, c, head, K, KP)
        a = tl.sum(sharp, axis=0)
        d = tl.sum(offset * sharp, axis=0) / a
        C = tl.sum(-tl.where(here, tl.log2(tl.abs(width)) + HALF_LOG2_2PI, 0.0), axis=0)
        b = tl.sum((offset - d) * (offset - d) * sharp, axis=0)
    else:
        d, a, C, b = 0.0, 1.0, 0.0, 0.0
    return d, a, C, b


@triton.jit
def one_of(delta, c, head, m, K, spread):
    """Offset, sharpness and log peak of one Gaussian of a mean of K; `spread` is log K."""
    d = tl.load(delta + head * K + m).to(tl.float32)
    width = tl.load(c + head * K + m).to(tl.float32)
    return d, 1.0 / (width * width), -(tl.log2(tl.abs(width)) + HALF_LOG2_2PI + spread)


@triton.jit
def log_density(r, half, a, C):
    return C - (a * half * LOG2E)[None, :] * (r * r)


@triton.jit
def unit_of(half, a, PRODUCT: tl.constexpr):
    """k: how many powers of two a unit of depth is."""
    k = tl.zeros_like(half) + 1.0
    if PRODUCT:
        k = a * half * LOG2E
    return k


@triton.jit
def depth_of(away, half, d, delta, c, head, K, spread, PRODUCT: tl.constexpr):
    """The depth of a tile of distances from the mean."""
    if PRODUCT:
        depth = (away - d) * (away - d)
    else:
        d, a, C = one_of(delta, c, head, 0, K, spread)
        top = log_density(away - d, half, a, C)
        total = tl.full(away.shape, 1.0, tl.float32)
        for m in range(1, K):
            d, a, C = one_of(delta, c, head, m, K, spread)
            one = log_density(away - d, half, a, C)
            new = tl.maximum(top, one)
            total = total * tl.exp2(top - new) + tl.exp2(one - new)
            top = new
        depth = -(top + tl.log2(total))
    return depth


@triton.jit
def power(x):
    """2^x, also where it is too small to be normal, which the hardware's exponential is not."""
    low = x < -120.0
    return tl.exp2(tl.where(low, x + 64.0, x)) * tl.where(low, 5.421010862427522e-20, 1.0)


@triton.jit
def raw_of(depth, least, k, WIDE: tl.constexpr):
    """Raw weights of a tile: `power`, or for 16 bits its short form, half as exact."""
    if WIDE:
        raw = power(k[None, :] * (least[None, :] - depth))
    else:
        root = tl.exp2((0.5 * k)[None, :] * (least[None, :] - depth))
        raw = root * root
    return raw


@triton.jit
def known_of(least):
    """A depth to count from: 0 if there was no entry."""
    return tl.where(least == float("inf"), 0.0, least)


@triton.jit
def factor_of(least, total, half, k, C, b, log_eps, PRODUCT: tl.constexpr, CLAMP: tl.constexpr):
    """From raw weights to weights, and whether the sum was below eps and was replaced by it."""
    factor = 1.0 / tl.where(total == 0.0, 1.0, total)
    clamped = tl.zeros_like(total) != 0.0
    if CLAMP:
        bound = tl.zeros_like(total) + log_eps
        if PRODUCT:
            bound -= C - b * half * LOG2E
        smaller = power(-k * least - bound)
        clamped = smaller < factor
        factor = tl.where(clamped, smaller, factor)
    return factor, clamped


@triton.jit
def keep(saved, o, head, heads, fibres, fibre, mu, var, least, total, count):
    own = saved + (o * heads + head) * 5 * fibres + fibre
    here = fibre < fibres
    tl.store(own, mu, mask=here)
    tl.store(own + fibres, var, mask=here)
    tl.store(own + 2 * fibres, least, mask=here)
    tl.store(own + 3 * fibres, total, mask=here)
    tl.store(own + 4 * fibres, count, mask=here)


@triton.jit
def saved_of(saved, o, head, heads, fibres, fibre):
    """Mean, half the precision, least depth, sum and number of entries, as kept."""
    own = saved + (o * heads + head) * 5 * fibres + fibre
    mu = tl.load(own, mask=fibre < fibres, other=0.0)
    half = 0.5 / tl.load(own + fibres, mask=fibre < fibres, other=1.0)
    least = tl.load(own + 2 * fibres, mask=fibre < fibres, other=0.0)
    total = tl.load(own + 3 * fibres, mask=fibre < fibres, other=1.0)
    return mu, half, least, total, tl.load(own + 4 * fibres, mask=fibre < fibres, other=1.0)


@triton.jit
def kept_at(kept, o, head, part, heads, parts, numbers, fibres, fibre):
    """Where the first of the `numbers` of this part's slices lies; the next is `fibres` on."""
    return kept + ((o * heads + head) * parts + part) * numbers * fibres + fibre


@triton.jit
def kept_of(kept, o, head, heads, parts, numbers, number, fibres, fibre, P: tl.constexpr):
    """One of the numbers of all parts (parts, slices), 0 beyond the end."""
    part = tl.arange(0, P)
    first = kept_at(kept, o, head, 0, heads, parts, numbers, fibres, fibre) + number * fibres
    at = first[None, :] + part.to(tl.int64)[:, None] * (numbers * fibres)
    return tl.load(at, mask=(part < parts)[:, None] & (fibre < fibres)[None, :], other=0.0)
