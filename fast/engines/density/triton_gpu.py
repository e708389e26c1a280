"""The density kernels in Triton.

A program looks after one head of a few slices and walks along its chunk: once for the statistics,
once for the sum of the raw weights and once to write. Only the first walk reads from memory as long
as the programs' tiles fit into the caches. Tiles are (entries, slices), and the slices lie side by
side: along the last axis, or along the rows in front of it if that is the axis.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnspec.fast.backend import count_launch
from attnspec.fast.engines.density.configs import config
from attnspec.fast.engines.density.op import Options, saved_shape

COUNTS = ["heads", "tiles", "M"]


@triton.jit
def _load(x, o, first, stop, fibre, fibres, x_o, x_n, x_f, L: tl.constexpr):
    """A tile in float32, 0 beyond the end, and where it has entries."""
    row = first + tl.arange(0, L)
    inside = (row < stop)[:, None] & (fibre < fibres)[None, :]
    place = o * x_o + row.to(tl.int64)[:, None] * x_n + fibre.to(tl.int64)[None, :] * x_f
    return tl.load(x + place, mask=inside, other=0.0).to(tl.float32), inside


@triton.jit
def _place(first, fibre, o, y_o, y_n, y_f, L: tl.constexpr):
    row = first + tl.arange(0, L)
    return o * y_o + row.to(tl.int64)[:, None] * y_n + fibre.to(tl.int64)[None, :] * y_f


@triton.jit
def _real(
    mask, o, first, fibre, inside, m_o, m_n, m_f, MASKED: tl.constexpr, EXACT: tl.constexpr,
    L: tl.constexpr,
):  # fmt: skip
    """Which entries are no padding, and which count."""
    real = inside
    if MASKED:
        place = _place(first, fibre, o, m_o, m_n, m_f, L)
        real = tl.load(mask + place, mask=inside, other=0) != 0
    counted = inside
    if EXACT:
        counted = real
    return real, counted


@triton.jit
def _component(parts):
    return tl.load(parts), tl.load(parts + 1), tl.load(parts + 2), tl.load(parts + 3)


@triton.jit
def _log_density(r, half, a, b, C):
    return C - (a * (r * r) + b) * half[None, :]


@triton.jit
def _energy(z, mu, half, parts, M, SINGLE: tl.constexpr):
    """Log densities of a tile; without C and b if there is one component."""
    away = z - mu[None, :]
    d, a, C, b = _component(parts)
    r = away - d
    if SINGLE:
        energy = -(a * half)[None, :] * (r * r)
    else:
        top = _log_density(r, half, a, b, C)
        total = tl.full(z.shape, 1.0, tl.float32)
        for m in range(1, M):
            d, a, C, b = _component(parts + m * 4)
            one = _log_density(away - d, half, a, b, C)
            new = tl.maximum(top, one)
            total = total * tl.exp(top - new) + tl.exp(one - new)
            top = new
        energy = top + tl.log(total)
    return energy


@triton.jit
def _divisor(top, log, half, parts, log_eps, SINGLE: tl.constexpr, CLAMP: tl.constexpr):
    """The log that weights are divided by, in two parts, and whether it is the clamp's."""
    bound = tl.zeros_like(top) + log_eps
    if SINGLE:
        _d, _a, C, b = _component(parts)
        bound -= C - b * half
    clamped = top + log < bound
    if not CLAMP:
        clamped = clamped & (top != top)
    top = tl.where(clamped, bound, tl.where(top == float("-inf"), 0.0, top))
    return top, tl.where(clamped, 0.0, log), clamped


@triton.jit
def _weight(energy, top, log):
    """e^energy over the raw sum, also where it is too small to be normal."""
    ratio = (energy - top[None, :]) - log[None, :]
    low = ratio < -80.0
    return tl.exp(tl.where(low, ratio + 32.0, ratio)) * tl.where(low, 1.2664165549094176e-14, 1.0)


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    x, mask, components, out, w, saved, x_o, x_n, x_f, m_o, m_n, m_f, y_o, y_n, y_f,
    chunk, extra, fibres, heads, tiles, M, eps, log_eps,
    MASKED: tl.constexpr, EXACT: tl.constexpr, CLAMP: tl.constexpr, RESIDUAL: tl.constexpr,
    SINGLE: tl.constexpr, L: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head = program // tiles % heads
    o = (program // (tiles * heads)).to(tl.int64)
    fibre = program % tiles * F + tl.arange(0, F)
    start = head * chunk
    # Plain products, so that the compiler sees a multiple of 16 where there is one.
    stop = start + chunk + extra * ((head + 1) // heads)
    parts = components + head * M * 4

    mu = tl.zeros([F], tl.float32)
    square = tl.zeros([F], tl.float32)
    count = tl.zeros([F], tl.float32)
    for first in range(start, stop, L):
        z, inside = _load(x, o, first, stop, fibre, fibres, x_o, x_n, x_f, L)
        real, counted = _real(mask, o, first, fibre, inside, m_o, m_n, m_f, MASKED, EXACT, L)
        z = tl.where(real, z, 0.0)
        new = tl.sum(counted.to(tl.float32), axis=0)
        mean = tl.sum(z, axis=0) / tl.maximum(new, 1.0)
        away = tl.where(counted, z - mean[None, :], 0.0)
        step = mean - mu
        share = new / tl.maximum(count + new, 1.0)
        square += tl.sum(away * away, axis=0) + step * step * count * share
        mu += step * share
        count += new
    var = square / tl.maximum(count - 1.0, 1.0) + eps
    half = 0.5 / var

    top = tl.full([F], float("-inf"), tl.float32)
    total = tl.zeros([F], tl.float32)
    for first in range(start, stop, L):
        z, inside = _load(x, o, first, stop, fibre, fibres, x_o, x_n, x_f, L)
        real, counted = _real(mask, o, first, fibre, inside, m_o, m_n, m_f, MASKED, EXACT, L)
        energy = tl.where(counted, _energy(z, mu, half, parts, M, SINGLE), float("-inf"))
        highest = tl.maximum(top, tl.max(energy, axis=0))
        safe = tl.where(highest == float("-inf"), 0.0, highest)
        total = total * tl.exp(top - safe) + tl.sum(tl.exp(energy - safe[None, :]), axis=0)
        top = highest
    log = tl.log(tl.where(total == 0.0, 1.0, total))
    own = saved + ((o * heads + head) * fibres + fibre) * 5
    tl.store(own, mu, mask=fibre < fibres)
    tl.store(own + 1, var, mask=fibre < fibres)
    tl.store(own + 2, top, mask=fibre < fibres)
    tl.store(own + 3, log, mask=fibre < fibres)
    tl.store(own + 4, count, mask=fibre < fibres)
    top, log, _clamped = _divisor(top, log, half, parts, log_eps, SINGLE, CLAMP)

    for first in range(start, stop, L):
        z, inside = _load(x, o, first, stop, fibre, fibres, x_o, x_n, x_f, L)
        real, counted = _real(mask, o, first, fibre, inside, m_o, m_n, m_f, MASKED, EXACT, L)
        weight = _weight(_energy(z, mu, half, parts, M, SINGLE), top, log)
        weight = tl.where(counted, weight, 0.0)
        result = tl.where(real, z * weight, z)
        if RESIDUAL:
            result += z
        place = _place(first, fibre, o, y_o, y_n, y_f, L)
        tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)
        tl.store(w + place, weight.to(w.dtype.element_ty), mask=inside)


@triton.jit
def _upstream(
    dout, dw, z, real, counted, o, first, stop, fibre, fibres, d_o, d_n, d_f, w_o, w_n, w_f,
    HAS_DW: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """A tile of dout, and the gradient of the weights: 0 where an entry is left out."""
    upstream, _inside = _load(dout, o, first, stop, fibre, fibres, d_o, d_n, d_f, L)
    of_w = tl.where(real, upstream * z, 0.0)
    if HAS_DW:
        more, _inside = _load(dw, o, first, stop, fibre, fibres, w_o, w_n, w_f, L)
        of_w += tl.where(counted, more, 0.0)
    return upstream, of_w


@triton.jit(do_not_specialize=COUNTS)
def backward_kernel(
    dout, dw, x, mask, components, saved, dx, partial, d_o, d_n, d_f, w_o, w_n, w_f,
    x_o, x_n, x_f, m_o, m_n, m_f, y_o, y_n, y_f, chunk, extra, fibres, heads, tiles, M, log_eps,
    HAS_DW: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr, CLAMP: tl.constexpr,
    RESIDUAL: tl.constexpr, SINGLE: tl.constexpr, L: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head = program // tiles % heads
    o = (program // (tiles * heads)).to(tl.int64)
    fibre = program % tiles * F + tl.arange(0, F)
    start = head * chunk
    # Plain products, so that the compiler sees a multiple of 16 where there is one.
    stop = start + chunk + extra * ((head + 1) // heads)
    parts = components + head * M * 4
    own = saved + ((o * heads + head) * fibres + fibre) * 5
    mu = tl.load(own, mask=fibre < fibres, other=0.0)
    half = 0.5 / tl.load(own + 1, mask=fibre < fibres, other=1.0)
    top = tl.load(own + 2, mask=fibre < fibres, other=0.0)
    log = tl.load(own + 3, mask=fibre < fibres, other=0.0)
    count = tl.load(own + 4, mask=fibre < fibres, other=1.0)
    top, log, clamped = _divisor(top, log, half, parts, log_eps, SINGLE, CLAMP)

    mean = tl.zeros([F], tl.float32)
    for first in range(start, stop, L):
        z, inside = _load(x, o, first, stop, fibre, fibres, x_o, x_n, x_f, L)
        real, counted = _real(mask, o, first, fibre, inside, m_o, m_n, m_f, MASKED, EXACT, L)
        z = tl.where(counted, z, 0.0)
        upstream, of_w = _upstream(
            dout, dw, z, real, counted, o, first, stop, fibre, fibres, d_o, d_n, d_f,
            w_o, w_n, w_f, HAS_DW, L,
        )  # fmt: skip
        weight = _weight(_energy(z, mu, half, parts, M, SINGLE), top, log)
        mean += tl.sum(tl.where(counted, weight * of_w, 0.0), axis=0)
    mean = tl.where(clamped, 0.0, mean)

    slope = tl.zeros([F], tl.float32)
    curve = tl.zeros([F], tl.float32)
    for m in range(M):
        d, a, C, b = _component(parts + m * 4)
        s0 = tl.zeros([F], tl.float32)
        s1 = tl.zeros([F], tl.float32)
        s2 = tl.zeros([F], tl.float32)
        for first in range(start, stop, L):
            z, inside = _load(x, o, first, stop, fibre, fibres, x_o, x_n, x_f, L)
            real, counted = _real(mask, o, first, fibre, inside, m_o, m_n, m_f, MASKED, EXACT, L)
            z = tl.where(counted, z, 0.0)
            upstream, of_w = _upstream(
                dout, dw, z, real, counted, o, first, stop, fibre, fibres, d_o, d_n, d_f,
                w_o, w_n, w_f, HAS_DW, L,
            )  # fmt: skip
            energy = _energy(z, mu, half, parts, M, SINGLE)
            g = _weight(energy, top, log) * (of_w - mean[None, :])
            r = z - mu[None, :] - d
            if not SINGLE:
                g *= tl.exp(_log_density(r, half, a, b, C) - energy)
            g = tl.where(counted, g, 0.0)
            s0 += tl.sum(g, axis=0)
            s1 += tl.sum(g * r, axis=0)
            s2 += tl.sum(g * (r * r), axis=0)
        if SINGLE:
            # Weights that sum to 1 do not depend on a common factor.
            s0 = tl.where(clamped, s0, 0.0)
        slope += a * s1
        curve += a * s2 + b * s0
        at = partial + (((o * tiles + program % tiles) * heads + head) * M + m) * 4
        tl.store(at, tl.sum(2.0 * a * s1 * half, axis=0))
        tl.store(at + 1, -tl.sum(s2 * half, axis=0))
        tl.store(at + 2, tl.sum(s0, axis=0))
        tl.store(at + 3, -tl.sum(s0 * half, axis=0))
    slope = 2.0 * slope * half / tl.maximum(count, 1.0)
    curve = 4.0 * curve * half * half / tl.maximum(count - 1.0, 1.0)

    for first in range(start, stop, L):
        z, inside = _load(x, o, first, stop, fibre, fibres, x_o, x_n, x_f, L)
        real, counted = _real(mask, o, first, fibre, inside, m_o, m_n, m_f, MASKED, EXACT, L)
        z = tl.where(counted, z, 0.0)
        upstream, of_w = _upstream(
            dout, dw, z, real, counted, o, first, stop, fibre, fibres, d_o, d_n, d_f,
            w_o, w_n, w_f, HAS_DW, L,
        )  # fmt: skip
        energy = _energy(z, mu, half, parts, M, SINGLE)
        weight = _weight(energy, top, log)
        g = weight * (of_w - mean[None, :])
        away = z - mu[None, :]
        along = tl.zeros_like(z)
        for m in range(M):
            d, a, C, b = _component(parts + m * 4)
            r = away - d
            if SINGLE:
                along += g * (a * r)
            else:
                along += g * tl.exp(_log_density(r, half, a, b, C) - energy) * (a * r)
        result = tl.where(counted, -2.0 * half[None, :] * along, 0.0)
        result += tl.where(real, upstream * weight, upstream)
        result += tl.where(real, slope[None, :] + curve[None, :] * away, 0.0)
        if RESIDUAL:
            result += upstream
        place = _place(first, fibre, o, y_o, y_n, y_f, L)
        tl.store(dx + place, result.to(dx.dtype.element_ty), mask=inside)


def _side_by_side(x: Tensor) -> Tensor:
    """The slices along the last axis, also if they are rows."""
    return x.transpose(0, 2) if x.shape[2] == 1 else x


def _shapes(x: Tensor, components: Tensor) -> tuple[dict[str, Any], int, int]:
    """Arguments that all kernels share, how many programs run, and tiles of slices."""
    (outer, n, fibres), (heads, M, _) = _side_by_side(x).shape, components.shape
    plan = config()
    chunk, extra = divmod(n, heads)
    longest = triton.next_power_of_2(chunk + extra)
    widest = triton.next_power_of_2(fibres)
    if x.shape[2] == 1:
        L = min(longest, plan.tile)
        F = min(widest, plan.tile // L)
    else:
        F = min(widest, plan.fibres)
        while plan.least < F and outer * heads * triton.cdiv(fibres, F) < plan.programs:
            F //= 2
        L = min(longest, plan.tile // F)
    tiles = triton.cdiv(fibres, F)
    arguments = {
        "chunk": chunk, "extra": extra, "fibres": fibres, "heads": heads, "tiles": tiles, "M": M,
        "SINGLE": M == 1, "L": L, "F": F, "num_warps": plan.num_warps,
    }  # fmt: skip
    return arguments, outer * heads * tiles, outer * tiles


def _operand(x: Tensor | None, like: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """An array and its strides; `like` stands in for one that is absent and never read."""
    if x is None:
        return like, (0, 0, 0)
    x = _side_by_side(x.view(torch.uint8) if x.dtype == torch.bool else x)
    # The stride of a single entry, often 1, would hide that addresses are aligned.
    return x, tuple(s if size > 1 else 0 for s, size in zip(x.stride(), x.shape, strict=True))


def forward(
    x: Tensor, mask: Tensor | None, components: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    out, w = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    saved = torch.empty(saved_shape(x, components), dtype=torch.float32, device=x.device)
    if x.numel():
        count_launch()
        shapes, programs, _ = _shapes(x, components)
        entries, strides = _operand(x, x)
        bytes_, mask_strides = _operand(mask, x)
        forward_kernel[(programs,)](
            entries, bytes_, components.contiguous(), out, w, saved, *strides, *mask_strides,
            *_operand(out, x)[1], eps=options.eps, log_eps=math.log(options.eps),
            MASKED=mask is not None, EXACT=options.exact and mask is not None, CLAMP=options.clamp,
            RESIDUAL=options.residual, **shapes,
        )  # fmt: skip
    return out, w, saved


def backward(
    dout: Tensor,
    dw: Tensor | None,
    x: Tensor,
    mask: Tensor | None,
    components: Tensor,
    saved: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not x.numel():
        return dx, torch.zeros_like(components)
    count_launch()
    shapes, programs, rows = _shapes(x, components)
    partial = torch.empty(rows, *components.shape, dtype=torch.float32, device=x.device)
    arrays, strides = zip(*(_operand(a, x) for a in (dout, dw, x, mask)), strict=True)
    above, above_w, entries, bytes_ = arrays
    backward_kernel[(programs,)](
        above, above_w, entries, bytes_, components.contiguous(), saved, dx, partial,
        *(s for each in strides for s in each), *_operand(dx, x)[1],
        log_eps=math.log(options.eps), HAS_DW=dw is not None, MASKED=mask is not None,
        EXACT=options.exact and mask is not None, CLAMP=options.clamp, RESIDUAL=options.residual,
        **shapes,
    )  # fmt: skip
    return dx, partial.sum(0)
