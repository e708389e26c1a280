"""The backward kernels: of a product whose chunk one program walks along, and of all others.

A walk finds sums of each slice and another writes dx; the second finds in the caches what the first
has read, unless the chunk is long. Where few programs would walk, a launch finds the sums of each
part of a chunk and one joins them and writes. What programs leave of the Gaussians' gradients, a
last launch adds up.
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
    kept_at,
    kept_of,
    log_density,
    one_of,
    place_of,
    places,
    raw_of,
    real_of,
    saved_of,
    several,
    unit_of,
)


@triton.jit
def gradients_of(
    dout, dw, x, mask, o, first, stop, tile, fibre, fibres, d_o, d_n, d_f, w_o, w_n, w_f,
    x_o, x_n, x_f, m_o, m_n, m_f, HAS_DW: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr,
    WHOLE: tl.constexpr, EVEN: tl.constexpr, NEAR: tl.constexpr, V: tl.constexpr, L: tl.constexpr,
    F: tl.constexpr,
):  # fmt: skip
    """A tile of x, dout and the gradient of the weights, 0 where an entry is left out, and which
    entries are there, no padding, and count.
    """
    inside = inside_of(first, stop, fibre, fibres, WHOLE, EVEN, L, F)
    at = places(x, o, first, tile, x_o, x_n, x_f, NEAR, V, L, F)
    z = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    at = places(dout, o, first, tile, d_o, d_n, d_f, NEAR, V, L, F)
    upstream = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    real, counted = real_of(
        mask, o, first, tile, inside, m_o, m_n, m_f, MASKED, EXACT, NEAR, V, L, F
    )
    if EXACT:
        z = tl.where(counted, z, 0.0)
    of_w = upstream * z
    if MASKED:
        of_w = tl.where(real, of_w, 0.0)
    if HAS_DW:
        at = places(dw, o, first, tile, w_o, w_n, w_f, NEAR, V, L, F)
        more = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        if EXACT:
            more = tl.where(counted, more, 0.0)
        of_w += more
    return z, upstream, of_w, inside, real, counted


@triton.jit
def push(
    dx, upstream, weight, away, along, real, inside, o, first, tile, y_o, y_n, y_f, slope, curve,
    steep, MASKED: tl.constexpr, RESIDUAL: tl.constexpr, NEAR: tl.constexpr, V: tl.constexpr,
    L: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """A tile of dx: through the result, the mean and the variance, and, `steep` times `along`, the
    log densities.
    """
    direct = upstream * weight
    shared = slope[None, :] + curve[None, :] * away
    if MASKED:
        direct = tl.where(real, direct, upstream)
        shared = tl.where(real, shared, 0.0)
    result = (direct + shared) - steep[None, :] * along
    if RESIDUAL:
        result += upstream
    at = places(dx, o, first, tile, y_o, y_n, y_f, NEAR, V, L, F)
    tl.store(at, result.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def share(partial, one, row, shares, a, half, s0, s1, s2):
    """A program's share of the gradients of a component's (d, a, C, b), one of `shares` in
    `partial` (heads, components, 4, shares).
    """
    at = partial + one.to(tl.int64) * 4 * shares + row
    tl.store(at, tl.sum(2.0 * a * s1 * half, axis=0))
    tl.store(at + shares, -tl.sum(s2 * half, axis=0))
    tl.store(at + 2 * shares, tl.sum(s0, axis=0))
    tl.store(at + 3 * shares, -tl.sum(s0 * half, axis=0))


@triton.jit(do_not_specialize=COUNTS)
def backward_kernel(
    dout, dw, x, mask, delta, c, saved, dx, partial, d_o, d_n, d_f, w_o, w_n, w_f,
    x_o, x_n, x_f, m_o, m_n, m_f, y_o, y_n, y_f, chunk, extra, fibres, heads, tiles, K, shares,
    log_eps, HAS_DW: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr, CLAMP: tl.constexpr,
    RESIDUAL: tl.constexpr, WIDE: tl.constexpr, WHOLE: tl.constexpr, EVEN: tl.constexpr,
    NEAR: tl.constexpr, ONE: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, L: tl.constexpr,
    F: tl.constexpr,
):  # fmt: skip
    """dx and a share of the Gaussians' gradients, of products; ONE tile is a chunk, or several.

    The sums are those of w r and w r^2 (that of w is known) and of g, g r and g r^2, where
    g = w (dw - shift): for a shift near the mean of dw, what all of dw has in common is not summed
    only to be subtracted.
    """
    o, head, _p, tile, fibre, start, stop = place_of(chunk, extra, heads, 1, tiles, 0, F)
    d, a, C, b = gaussian_of(delta, c, head, K, True, KP)
    mu, half, least, total, count = saved_of(saved, o, head, heads, fibres, fibre)
    k = unit_of(half, a, True)
    factor, clamped = factor_of(least, total, half, k, C, b, log_eps, True, CLAMP)
    z, upstream, of_w, inside, real, counted = gradients_of(
        dout, dw, x, mask, o, start, stop, tile, fibre, fibres, d_o, d_n, d_f, w_o, w_n, w_f,
        x_o, x_n, x_f, m_o, m_n, m_f, HAS_DW, MASKED, EXACT, WHOLE, EVEN, NEAR, V, L, F,
    )  # fmt: skip
    if ONE:
        away = z - mu[None, :]
        r = away - d
        weight = tl.where(counted, raw_of(r * r, least, k, WIDE) * factor[None, :], 0.0)
        mean = tl.where(clamped, 0.0, tl.sum(weight * of_w, axis=0))
        along = weight * (of_w - mean[None, :])
        s0 = tl.sum(along, axis=0)
        along *= r
        s1 = tl.sum(along, axis=0)
        s2 = tl.sum(along * r, axis=0)
    else:
        shift = tl.sum(of_w, axis=0) / tl.minimum(stop - start, L)
        r1 = tl.zeros([L, F], tl.float32)
        r2 = tl.zeros([L, F], tl.float32)
        g0 = tl.zeros([L, F], tl.float32)
        g1 = tl.zeros([L, F], tl.float32)
        g2 = tl.zeros([L, F], tl.float32)
        for first in range(start, stop, L):
            z, upstream, of_w, inside, real, counted = gradients_of(
                dout, dw, x, mask, o, first, stop, tile, fibre, fibres, d_o, d_n, d_f, w_o, w_n,
                w_f, x_o, x_n, x_f, m_o, m_n, m_f, HAS_DW, MASKED, EXACT, WHOLE, EVEN, NEAR, V, L,
                F,
            )  # fmt: skip
            r = (z - mu[None, :]) - d
            raw = tl.where(counted, raw_of(r * r, least, k, WIDE), 0.0)
            g = raw * (of_w - shift[None, :])
            r1 += raw * r
            r2 += raw * (r * r)
            g0 += g
            g1 += g * r
            g2 += g * (r * r)
        s0 = tl.sum(g0, axis=0)
        mean = tl.where(clamped, 0.0, factor * (s0 + shift * total))
        off = (shift - mean)[None, :]
        s0 = factor * (s0 + (shift - mean) * total)
        s1 = factor * tl.sum(g1 + off * r1, axis=0)
        s2 = factor * tl.sum(g2 + off * r2, axis=0)
    # Weights that sum to 1 do not depend on a common factor.
    s0 = tl.where(clamped, s0, 0.0)
    share(partial, head, o * tiles + tile, shares, a, half, s0, s1, s2)
    slope = 2.0 * (a * s1) * half / tl.maximum(count, 1.0)
    curve = 4.0 * (a * s2 + b * s0) * half * half / tl.maximum(count - 1.0, 1.0)
    steep = 2.0 * half * a

    if ONE:
        push(
            dx, upstream, weight, away, along, real, inside, o, start, tile, y_o, y_n, y_f,
            slope, curve, steep, MASKED, RESIDUAL, NEAR, V, L, F,
        )  # fmt: skip
    else:
        for first in range(start, stop, L):
            z, upstream, of_w, inside, real, counted = gradients_of(
                dout, dw, x, mask, o, first, stop, tile, fibre, fibres, d_o, d_n, d_f, w_o, w_n,
                w_f, x_o, x_n, x_f, m_o, m_n, m_f, HAS_DW, MASKED, EXACT, WHOLE, EVEN, NEAR, V, L,
                F,
            )  # fmt: skip
            away = z - mu[None, :]
            r = away - d
            weight = raw_of(r * r, least, k, WIDE) * factor[None, :]
            along = weight * (of_w - mean[None, :]) * r
            if EXACT:
                along = tl.where(counted, along, 0.0)
            push(
                dx, upstream, weight, away, along, real, inside, o, first, tile, y_o, y_n, y_f,
                slope, curve, steep, MASKED, RESIDUAL, NEAR, V, L, F,
            )  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def pull_kernel(
    dout, dw, x, mask, delta, c, saved, pulls, d_o, d_n, d_f, w_o, w_n, w_f, x_o, x_n, x_f,
    m_o, m_n, m_f, chunk, extra, fibres, heads, parts, tiles, rows, K, M, log_eps, spread,
    HAS_DW: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr, CLAMP: tl.constexpr,
    PRODUCT: tl.constexpr, WIDE: tl.constexpr, WHOLE: tl.constexpr, EVEN: tl.constexpr,
    NEAR: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, L: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """Of each part: the sum of w dw, a shift, and for each of M components the sums that
    `backward_kernel` takes.
    """
    o, head, part, tile, fibre, start, stop = place_of(chunk, extra, heads, parts, tiles, rows, F)
    d, a, C, b = gaussian_of(delta, c, head, K, PRODUCT, KP)
    mu, half, least, total, _n = saved_of(saved, o, head, heads, fibres, fibre)
    k = unit_of(half, a, PRODUCT)
    factor, _c = factor_of(least, total, half, k, C, b, log_eps, PRODUCT, CLAMP)
    _z, _u, of_w, _i, _r, _c = gradients_of(
        dout, dw, x, mask, o, start, stop, tile, fibre, fibres, d_o, d_n, d_f, w_o, w_n, w_f,
        x_o, x_n, x_f, m_o, m_n, m_f, HAS_DW, MASKED, EXACT, WHOLE, EVEN, NEAR, V, L, F,
    )  # fmt: skip
    shift = tl.sum(of_w, axis=0) / tl.maximum(tl.minimum(stop - start, L), 1)
    pull = tl.zeros([F], tl.float32)
    own = kept_at(pulls, o, head, part, heads, parts, 2 + 6 * M, fibres, fibre)
    for m in range(M):
        r0 = tl.zeros([F], tl.float32)
        r1 = tl.zeros([F], tl.float32)
        r2 = tl.zeros([F], tl.float32)
        g0 = tl.zeros([F], tl.float32)
        g1 = tl.zeros([F], tl.float32)
        g2 = tl.zeros([F], tl.float32)
        for first in range(start, tl.minimum(start + rows, stop), L):
            z, _u, of_w, _i, _r, counted = gradients_of(
                dout, dw, x, mask, o, first, stop, tile, fibre, fibres, d_o, d_n, d_f, w_o, w_n,
                w_f, x_o, x_n, x_f, m_o, m_n, m_f, HAS_DW, MASKED, EXACT, WHOLE, EVEN, NEAR, V, L,
                F,
            )  # fmt: skip
            away = z - mu[None, :]
            depth = depth_of(away, half, d, delta, c, head, K, spread, PRODUCT)
            weight = raw_of(depth, least, k, WIDE) * factor[None, :]
            if PRODUCT:
                r = away - d
            else:
                dm, am, Cm = one_of(delta, c, head, m, K, spread)
                r = away - dm
                weight *= tl.exp2(log_density(r, half, am, Cm) + depth)
            weight = tl.where(counted, weight, 0.0)
            g = weight * (of_w - shift[None, :])
            r0 += tl.sum(weight, axis=0)
            r1 += tl.sum(weight * r, axis=0)
            r2 += tl.sum(weight * (r * r), axis=0)
            g0 += tl.sum(g, axis=0)
            g1 += tl.sum(g * r, axis=0)
            g2 += tl.sum(g * (r * r), axis=0)
        pull += g0 + shift * r0
        at = own + (2 + 6 * m) * fibres
        tl.store(at, r0, mask=fibre < fibres)
        tl.store(at + fibres, r1, mask=fibre < fibres)
        tl.store(at + 2 * fibres, r2, mask=fibre < fibres)
        tl.store(at + 3 * fibres, g0, mask=fibre < fibres)
        tl.store(at + 4 * fibres, g1, mask=fibre < fibres)
        tl.store(at + 5 * fibres, g2, mask=fibre < fibres)
    tl.store(own, pull, mask=fibre < fibres)
    tl.store(own + fibres, shift, mask=fibre < fibres)


@triton.jit
def joined(pulls, o, head, heads, parts, numbers, number, off, fibres, fibre, P: tl.constexpr):
    """A component's sum of w (dw - mean) r^i from those of the parts, `off` their shifts less the
    mean.
    """
    r = kept_of(pulls, o, head, heads, parts, numbers, number, fibres, fibre, P)
    g = kept_of(pulls, o, head, heads, parts, numbers, number + 3, fibres, fibre, P)
    return tl.sum(g + off * r, axis=0)


@triton.jit(do_not_specialize=COUNTS)
def push_kernel(
    dout, dw, x, mask, delta, c, saved, pulls, dx, partial, d_o, d_n, d_f, w_o, w_n, w_f,
    x_o, x_n, x_f, m_o, m_n, m_f, y_o, y_n, y_f, chunk, extra, fibres, heads, parts, tiles, rows,
    K, M, shares, log_eps, spread, HAS_DW: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr,
    CLAMP: tl.constexpr, RESIDUAL: tl.constexpr, PRODUCT: tl.constexpr, WIDE: tl.constexpr,
    WHOLE: tl.constexpr, EVEN: tl.constexpr, NEAR: tl.constexpr, KP: tl.constexpr, P: tl.constexpr,
    V: tl.constexpr, L: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """dx, and of the first part's programs the shares of the Gaussians' gradients."""
    o, head, part, tile, fibre, start, stop = place_of(chunk, extra, heads, parts, tiles, rows, F)
    d, a, C, b = gaussian_of(delta, c, head, K, PRODUCT, KP)
    mu, half, least, total, count = saved_of(saved, o, head, heads, fibres, fibre)
    k = unit_of(half, a, PRODUCT)
    factor, clamped = factor_of(least, total, half, k, C, b, log_eps, PRODUCT, CLAMP)
    numbers = 2 + 6 * M
    pull = kept_of(pulls, o, head, heads, parts, numbers, 0, fibres, fibre, P)
    mean = tl.where(clamped, 0.0, tl.sum(pull, axis=0))
    off = kept_of(pulls, o, head, heads, parts, numbers, 1, fibres, fibre, P) - mean[None, :]
    slope = tl.zeros([F], tl.float32)
    curve = tl.zeros([F], tl.float32)
    for m in range(M):
        s0 = joined(pulls, o, head, heads, parts, numbers, 2 + 6 * m, off, fibres, fibre, P)
        s1 = joined(pulls, o, head, heads, parts, numbers, 3 + 6 * m, off, fibres, fibre, P)
        s2 = joined(pulls, o, head, heads, parts, numbers, 4 + 6 * m, off, fibres, fibre, P)
        if PRODUCT:
            s0 = tl.where(clamped, s0, 0.0)
            sharp = a
            curve += b * s0
        else:
            _d, sharp, _C = one_of(delta, c, head, m, K, spread)
        slope += sharp * s1
        curve += sharp * s2
        if part == 0:
            share(partial, head * M + m, o * tiles + tile, shares, sharp, half, s0, s1, s2)
    slope = 2.0 * slope * half / tl.maximum(count, 1.0)
    curve = 4.0 * curve * half * half / tl.maximum(count - 1.0, 1.0)

    for first in range(start, tl.minimum(start + rows, stop), L):
        z, upstream, of_w, inside, real, counted = gradients_of(
            dout, dw, x, mask, o, first, stop, tile, fibre, fibres, d_o, d_n, d_f, w_o, w_n, w_f,
            x_o, x_n, x_f, m_o, m_n, m_f, HAS_DW, MASKED, EXACT, WHOLE, EVEN, NEAR, V, L, F,
        )  # fmt: skip
        away = z - mu[None, :]
        depth = depth_of(away, half, d, delta, c, head, K, spread, PRODUCT)
        weight = raw_of(depth, least, k, WIDE) * factor[None, :]
        if PRODUCT:
            along = a * (away - d)
        else:
            along = tl.zeros_like(z)
            for m in range(M):
                dm, am, Cm = one_of(delta, c, head, m, K, spread)
                along += tl.exp2(log_density(away - dm, half, am, Cm) + depth) * (am * (away - dm))
        along *= weight * (of_w - mean[None, :])
        if EXACT:
            along = tl.where(counted, along, 0.0)
        push(
            dx, upstream, weight, away, along, real, inside, o, first, tile, y_o, y_n, y_f,
            slope, curve, 2.0 * half, MASKED, RESIDUAL, NEAR, V, L, F,
        )  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def gaussians_kernel(
    partial, delta, c, ddelta, dc, shares, K,
    PRODUCT: tl.constexpr, KP: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Gradients of the offsets and widths of one head, or of one Gaussian of a mixture, from those
    of (d, a, C, b), whose shares are added in a fixed order.
    """
    one = tl.program_id(0)
    of_d = tl.zeros([R], tl.float32)
    of_a = tl.zeros([R], tl.float32)
    of_C = tl.zeros([R], tl.float32)
    of_b = tl.zeros([R], tl.float32)
    for first in range(0, shares, R):
        row = first + tl.arange(0, R)
        at = partial + one.to(tl.int64) * 4 * shares + row
        of_d += tl.load(at, mask=row < shares, other=0.0)
        of_a += tl.load(at + shares, mask=row < shares, other=0.0)
        of_C += tl.load(at + 2 * shares, mask=row < shares, other=0.0)
        of_b += tl.load(at + 3 * shares, mask=row < shares, other=0.0)
    of_d, of_a = tl.sum(of_d, axis=0), tl.sum(of_a, axis=0)
    of_C, of_b = tl.sum(of_C, axis=0), tl.sum(of_b, axis=0)
    if PRODUCT:
        offset, width, sharp, here = several(delta, c, one, K, KP)
        a = tl.sum(sharp, axis=0)
        away = offset - tl.sum(offset * sharp, axis=0) / a
        of_offset = sharp * (of_d / a + 2.0 * of_b * away)
        of_sharp = of_a + (of_d / a) * away + of_b * away * away
        of_width = (-2.0 * sharp * of_sharp - of_C) / width
        at = one * K + tl.arange(0, KP)
        tl.store(ddelta + at, of_offset.to(ddelta.dtype.element_ty), mask=here)
        tl.store(dc + at, of_width.to(dc.dtype.element_ty), mask=here)
    else:
        width = tl.load(c + one).to(tl.float32)
        of_width = (-2.0 * of_a / (width * width) - of_C) / width
        tl.store(ddelta + one, of_d.to(ddelta.dtype.element_ty))
        tl.store(dc + one, of_width.to(dc.dtype.element_ty))
