"""The forward kernels: of chunks that fit into registers, of those that one program walks along,
and of all others.

Of these parts are worked on apart: a launch finds the moments of each part, one the sums of its raw
weights, and one writes. A program joins what it needs of all parts of its slices itself, in a fixed
order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.fast.engines.density.triton_parts import (
    COUNTS,
    depth_of,
    factor_of,
    gaussian_of,
    inside_of,
    keep,
    kept_at,
    kept_of,
    known_of,
    place_of,
    places,
    raw_of,
    real_of,
    unit_of,
)


@triton.jit
def entries_of(
    x, mask, o, first, stop, tile, fibre, fibres, x_o, x_n, x_f, m_o, m_n, m_f,
    MASKED: tl.constexpr, EXACT: tl.constexpr, WHOLE: tl.constexpr, EVEN: tl.constexpr,
    NEAR: tl.constexpr, V: tl.constexpr, L: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """A tile in float32, 0 beyond the end; which entries are no padding, count, and exist."""
    inside = inside_of(first, stop, fibre, fibres, WHOLE, EVEN, L, F)
    at = places(x, o, first, tile, x_o, x_n, x_f, NEAR, V, L, F)
    z = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    real, counted = real_of(
        mask, o, first, tile, inside, m_o, m_n, m_f, MASKED, EXACT, NEAR, V, L, F
    )
    return z, real, counted, inside


@triton.jit
def write(
    out, w, z, weight, real, inside, o, first, tile, y_o, y_n, y_f,
    MASKED: tl.constexpr, RESIDUAL: tl.constexpr, NEAR: tl.constexpr, V: tl.constexpr,
    L: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """A tile of the result and the weights."""
    result = z * weight
    if MASKED:
        result = tl.where(real, result, z)
    if RESIDUAL:
        result += z
    at = places(out, o, first, tile, y_o, y_n, y_f, NEAR, V, L, F)
    tl.store(at, result.to(out.dtype.element_ty), mask=inside)
    at = places(w, o, first, tile, y_o, y_n, y_f, NEAR, V, L, F)
    tl.store(at, weight.to(w.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def held_kernel(
    x, mask, delta, c, out, w, saved, x_o, x_n, x_f, m_o, m_n, m_f, y_o, y_n, y_f,
    chunk, extra, fibres, heads, tiles, K, eps, log_eps, spread,
    MASKED: tl.constexpr, EXACT: tl.constexpr, CLAMP: tl.constexpr, RESIDUAL: tl.constexpr,
    PRODUCT: tl.constexpr, WIDE: tl.constexpr, WHOLE: tl.constexpr, EVEN: tl.constexpr,
    NEAR: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, L: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """Result and weights of a head's whole chunk of a few slices, and of each slice what the
    backward pass needs: mean, variance, least depth, sum of raw weights, number of entries.
    """
    o, head, _p, tile, fibre, first, stop = place_of(chunk, extra, heads, 1, tiles, 0, F)
    z, real, counted, inside = entries_of(
        x, mask, o, first, stop, tile, fibre, fibres, x_o, x_n, x_f, m_o, m_n, m_f,
        MASKED, EXACT, WHOLE, EVEN, NEAR, V, L, F,
    )  # fmt: skip
    d, a, C, b = gaussian_of(delta, c, head, K, PRODUCT, KP)

    sample = z
    if MASKED:
        sample = tl.where(real, z, 0.0)
    count = tl.zeros([F], tl.float32) + (stop - first)
    if EXACT:
        count = tl.sum(counted.to(tl.float32), axis=0)
    mu = tl.sum(sample, axis=0) / tl.maximum(count, 1.0)
    away = tl.where(counted, sample - mu[None, :], 0.0)
    var = tl.sum(away * away, axis=0) / tl.maximum(count - 1.0, 1.0) + eps
    half = 0.5 / var

    depth = depth_of(z - mu[None, :], half, d, delta, c, head, K, spread, PRODUCT)
    depth = tl.where(counted, depth, float("inf"))
    least = known_of(tl.min(depth, axis=0))
    k = unit_of(half, a, PRODUCT)
    raw = raw_of(depth, least, k, WIDE)
    total = tl.sum(raw, axis=0)
    keep(saved, o, head, heads, fibres, fibre, mu, var, least, total, count)
    factor, _c = factor_of(least, total, half, k, C, b, log_eps, PRODUCT, CLAMP)
    write(
        out, w, z, raw * factor[None, :], real, inside, o, first, tile, y_o, y_n, y_f,
        MASKED, RESIDUAL, NEAR, V, L, F,
    )  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def walk_kernel(
    x, mask, delta, c, out, w, saved, x_o, x_n, x_f, m_o, m_n, m_f, y_o, y_n, y_f,
    chunk, extra, fibres, heads, tiles, K, eps, log_eps,
    MASKED: tl.constexpr, EXACT: tl.constexpr, CLAMP: tl.constexpr, RESIDUAL: tl.constexpr,
    WIDE: tl.constexpr, WHOLE: tl.constexpr, EVEN: tl.constexpr, NEAR: tl.constexpr,
    KP: tl.constexpr, V: tl.constexpr, L: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """As `held_kernel`, of products: four walks along a chunk, of which the first reads memory and
    the others the caches. Sums are a tile's until their walk ends.
    """
    o, head, _p, tile, fibre, start, stop = place_of(chunk, extra, heads, 1, tiles, 0, F)
    d, a, C, b = gaussian_of(delta, c, head, K, True, KP)
    sums = tl.zeros([L, F], tl.float32)
    seen = tl.zeros([L, F], tl.float32)
    for first in range(start, stop, L):
        z, real, counted, _i = entries_of(
            x, mask, o, first, stop, tile, fibre, fibres, x_o, x_n, x_f, m_o, m_n, m_f,
            MASKED, EXACT, WHOLE, EVEN, NEAR, V, L, F,
        )  # fmt: skip
        if MASKED:
            z = tl.where(real, z, 0.0)
        sums += z
        if EXACT:
            seen += counted.to(tl.float32)
    count = tl.zeros([F], tl.float32) + (stop - start)
    if EXACT:
        count = tl.sum(seen, axis=0)
    mu = tl.sum(sums, axis=0) / tl.maximum(count, 1.0)

    squares = tl.zeros([L, F], tl.float32)
    depths = tl.full([L, F], float("inf"), tl.float32)
    for first in range(start, stop, L):
        z, real, counted, _i = entries_of(
            x, mask, o, first, stop, tile, fibre, fibres, x_o, x_n, x_f, m_o, m_n, m_f,
            MASKED, EXACT, WHOLE, EVEN, NEAR, V, L, F,
        )  # fmt: skip
        away = z - mu[None, :]
        depths = tl.minimum(depths, tl.where(counted, (away - d) * (away - d), float("inf")))
        if MASKED:
            away = tl.where(real, z, 0.0) - mu[None, :]
        away = tl.where(counted, away, 0.0)
        squares += away * away
    var = tl.sum(squares, axis=0) / tl.maximum(count - 1.0, 1.0) + eps
    half = 0.5 / var
    k = unit_of(half, a, True)
    least = known_of(tl.min(depths, axis=0))

    raws = tl.zeros([L, F], tl.float32)
    for first in range(start, stop, L):
        z, _r, counted, _i = entries_of(
            x, mask, o, first, stop, tile, fibre, fibres, x_o, x_n, x_f, m_o, m_n, m_f,
            MASKED, EXACT, WHOLE, EVEN, NEAR, V, L, F,
        )  # fmt: skip
        r = (z - mu[None, :]) - d
        raws += tl.where(counted, raw_of(r * r, least, k, WIDE), 0.0)
    total = tl.sum(raws, axis=0)
    keep(saved, o, head, heads, fibres, fibre, mu, var, least, total, count)
    factor, _c = factor_of(least, total, half, k, C, b, log_eps, True, CLAMP)

    for first in range(start, stop, L):
        z, real, counted, inside = entries_of(
            x, mask, o, first, stop, tile, fibre, fibres, x_o, x_n, x_f, m_o, m_n, m_f,
            MASKED, EXACT, WHOLE, EVEN, NEAR, V, L, F,
        )  # fmt: skip
        r = (z - mu[None, :]) - d
        weight = raw_of(r * r, least, k, WIDE) * factor[None, :]
        if EXACT:
            weight = tl.where(counted, weight, 0.0)
        write(
            out, w, z, weight, real, inside, o, first, tile, y_o, y_n, y_f,
            MASKED, RESIDUAL, NEAR, V, L, F,
        )  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def moments_kernel(
    x, mask, moments, x_o, x_n, x_f, m_o, m_n, m_f, chunk, extra, fibres, heads, parts, tiles, rows,
    MASKED: tl.constexpr, EXACT: tl.constexpr, WHOLE: tl.constexpr, EVEN: tl.constexpr,
    NEAR: tl.constexpr, V: tl.constexpr, L: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """Of each part: mean, sum of squares around it, number of entries."""
    o, head, part, tile, fibre, start, stop = place_of(chunk, extra, heads, parts, tiles, rows, F)
    mu = tl.zeros([F], tl.float32)
    square = tl.zeros([F], tl.float32)
    count = tl.zeros([F], tl.float32)
    for first in range(start, tl.minimum(start + rows, stop), L):
        z, real, counted, _i = entries_of(
            x, mask, o, first, stop, tile, fibre, fibres, x_o, x_n, x_f, m_o, m_n, m_f,
            MASKED, EXACT, WHOLE, EVEN, NEAR, V, L, F,
        )  # fmt: skip
        if MASKED:
            z = tl.where(real, z, 0.0)
        new = tl.zeros([F], tl.float32) + tl.minimum(stop - first, L)
        if EXACT:
            new = tl.sum(counted.to(tl.float32), axis=0)
        mean = tl.sum(z, axis=0) / tl.maximum(new, 1.0)
        away = tl.where(counted, z - mean[None, :], 0.0)
        step = mean - mu
        share = new / tl.maximum(count + new, 1.0)
        square += tl.sum(away * away, axis=0) + step * step * count * share
        mu += step * share
        count += new
    own = kept_at(moments, o, head, part, heads, parts, 3, fibres, fibre)
    tl.store(own, mu, mask=fibre < fibres)
    tl.store(own + fibres, square, mask=fibre < fibres)
    tl.store(own + 2 * fibres, count, mask=fibre < fibres)


@triton.jit
def joined_moments(moments, o, head, heads, parts, fibres, fibre, eps, P: tl.constexpr):
    """Mean, variance and number of entries of slices from those of their parts."""
    count = kept_of(moments, o, head, heads, parts, 3, 2, fibres, fibre, P)
    mean = kept_of(moments, o, head, heads, parts, 3, 0, fibres, fibre, P)
    square = kept_of(moments, o, head, heads, parts, 3, 1, fibres, fibre, P)
    entries = tl.sum(count, axis=0)
    mu = tl.sum(count * mean, axis=0) / tl.maximum(entries, 1.0)
    away = mean - mu[None, :]
    square = tl.sum(square + count * away * away, axis=0)
    return mu, square / tl.maximum(entries - 1.0, 1.0) + eps, entries


@triton.jit(do_not_specialize=COUNTS)
def sums_kernel(
    x, mask, delta, c, moments, sums, x_o, x_n, x_f, m_o, m_n, m_f,
    chunk, extra, fibres, heads, parts, tiles, rows, K, eps, spread,
    MASKED: tl.constexpr, EXACT: tl.constexpr, PRODUCT: tl.constexpr, WIDE: tl.constexpr,
    WHOLE: tl.constexpr, EVEN: tl.constexpr, NEAR: tl.constexpr, KP: tl.constexpr, P: tl.constexpr,
    V: tl.constexpr, L: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """Of each part: the least depth and the sum of raw weights relative to it."""
    o, head, part, tile, fibre, start, stop = place_of(chunk, extra, heads, parts, tiles, rows, F)
    d, a, _C, _b = gaussian_of(delta, c, head, K, PRODUCT, KP)
    mu, var, _n = joined_moments(moments, o, head, heads, parts, fibres, fibre, eps, P)
    half = 0.5 / var
    k = unit_of(half, a, PRODUCT)
    least = tl.full([F], float("inf"), tl.float32)
    total = tl.zeros([F], tl.float32)
    for first in range(start, tl.minimum(start + rows, stop), L):
        z, _r, counted, _i = entries_of(
            x, mask, o, first, stop, tile, fibre, fibres, x_o, x_n, x_f, m_o, m_n, m_f,
            MASKED, EXACT, WHOLE, EVEN, NEAR, V, L, F,
        )  # fmt: skip
        depth = depth_of(z - mu[None, :], half, d, delta, c, head, K, spread, PRODUCT)
        depth = tl.where(counted, depth, float("inf"))
        lower = tl.minimum(least, tl.min(depth, axis=0))
        known = known_of(lower)
        total *= tl.exp2(k * (known - least))
        total += tl.sum(raw_of(depth, known, k, WIDE), axis=0)
        least = lower
    own = kept_at(sums, o, head, part, heads, parts, 2, fibres, fibre)
    tl.store(own, least, mask=fibre < fibres)
    tl.store(own + fibres, total, mask=fibre < fibres)


@triton.jit(do_not_specialize=COUNTS)
def weigh_kernel(
    x, mask, delta, c, moments, sums, out, w, saved, x_o, x_n, x_f, m_o, m_n, m_f, y_o, y_n, y_f,
    chunk, extra, fibres, heads, parts, tiles, rows, K, eps, log_eps, spread,
    MASKED: tl.constexpr, EXACT: tl.constexpr, CLAMP: tl.constexpr, RESIDUAL: tl.constexpr,
    PRODUCT: tl.constexpr, WIDE: tl.constexpr, WHOLE: tl.constexpr, EVEN: tl.constexpr,
    NEAR: tl.constexpr, KP: tl.constexpr, P: tl.constexpr, V: tl.constexpr, L: tl.constexpr,
    F: tl.constexpr,
):  # fmt: skip
    """Result and weights, and of each slice what `held_kernel` keeps."""
    o, head, part, tile, fibre, start, stop = place_of(chunk, extra, heads, parts, tiles, rows, F)
    d, a, C, b = gaussian_of(delta, c, head, K, PRODUCT, KP)
    mu, var, count = joined_moments(moments, o, head, heads, parts, fibres, fibre, eps, P)
    half = 0.5 / var
    k = unit_of(half, a, PRODUCT)
    depths = kept_of(sums, o, head, heads, parts, 2, 0, fibres, fibre, P)
    totals = kept_of(sums, o, head, heads, parts, 2, 1, fibres, fibre, P)
    depths = tl.where((tl.arange(0, P) < parts)[:, None], depths, float("inf"))
    least = known_of(tl.min(depths, axis=0))
    total = tl.sum(totals * tl.exp2(k[None, :] * (least[None, :] - depths)), axis=0)
    if part == 0:
        keep(saved, o, head, heads, fibres, fibre, mu, var, least, total, count)
    factor, _c = factor_of(least, total, half, k, C, b, log_eps, PRODUCT, CLAMP)

    for first in range(start, tl.minimum(start + rows, stop), L):
        z, real, counted, inside = entries_of(
            x, mask, o, first, stop, tile, fibre, fibres, x_o, x_n, x_f, m_o, m_n, m_f,
            MASKED, EXACT, WHOLE, EVEN, NEAR, V, L, F,
        )  # fmt: skip
        depth = depth_of(z - mu[None, :], half, d, delta, c, head, K, spread, PRODUCT)
        if EXACT:
            depth = tl.where(counted, depth, float("inf"))
        weight = raw_of(depth, least, k, WIDE) * factor[None, :]
        write(
            out, w, z, weight, real, inside, o, first, tile, y_o, y_n, y_f,
            MASKED, RESIDUAL, NEAR, V, L, F,
        )  # fmt: skip
