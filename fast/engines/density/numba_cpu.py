"""The density kernels on the CPU.

float16 and bfloat16 entries are widened to float32 and results are rounded back; float64 stays
float64. Neighbouring slices are worked on side by side, as lanes along which the loops vectorise;
entries along the last axis are transposed for that. Sums are taken in float64.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from attnspec.fast.backend import count_launch
from attnspec.fast.engines.density.gaussians import components, gradients
from attnspec.fast.engines.density.op import Options, saved_shape
from attnspec.fast.engines.numba_math import exp

# Reordered sums vectorise; NaN and Inf keep their meaning.
FAST = {"contract", "reassoc", "nsz", "arcp", "afn"}
LANES = 64
INFINITY = np.inf
LOW, SHIFT, SHRINK, ONE = (np.float32(x) for x in (-80, 32, math.exp(-32), 1))


@njit(cache=True, nogil=True, fastmath={"contract"}, error_model="numpy")
def _weight(log):
    """e^log, also where it is too small to be normal."""
    low = log < LOW
    return exp(log + SHIFT if low else log) * (SHRINK if low else ONE)


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def _statistics(z, mask, masked, exact, eps, first, stop, lane, mu, var, count):
    """Mean, variance and number of entries of each slice, in two passes."""
    lanes = len(mu)
    total, size = np.zeros(lanes), np.zeros(lanes)
    for j in range(first, stop):
        for i in range(lanes):
            seen = not masked or mask[j, lane + i]
            total[i] += z[j, lane + i] if seen else 0.0
            size[i] += 1.0 if seen or not exact else 0.0
    for i in range(lanes):
        total[i] /= max(size[i], 1.0)
    square = np.zeros(lanes)
    for j in range(first, stop):
        for i in range(lanes):
            seen = not masked or mask[j, lane + i]
            away = (z[j, lane + i] if seen else 0.0) - total[i]
            square[i] += away * away if seen or not exact else 0.0
    for i in range(lanes):
        mu[i], count[i] = total[i], size[i]
        var[i] = square[i] / max(size[i] - 1.0, 1.0) + eps


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def _energy(row, lane, mu, half, parts, e, top):
    """Log densities e of one entry of each slice; without C and b if there is one component."""
    lanes = len(e)
    if len(parts) == 1:
        d, a = parts[0, 0], parts[0, 1]
        for i in range(lanes):
            r = row[lane + i] - mu[i] - d
            e[i] = -(a * half[i]) * (r * r)
        return
    top[:] = -INFINITY
    for m in range(len(parts)):
        for i in range(lanes):
            r = row[lane + i] - mu[i] - parts[m, 0]
            top[i] = max(top[i], parts[m, 2] - (parts[m, 1] * (r * r) + parts[m, 3]) * half[i])
    e[:] = 0
    for m in range(len(parts)):
        for i in range(lanes):
            r = row[lane + i] - mu[i] - parts[m, 0]
            one = parts[m, 2] - (parts[m, 1] * (r * r) + parts[m, 3]) * half[i]
            e[i] += exp(one - top[i])
    for i in range(lanes):
        e[i] = top[i] + math.log(e[i])


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def _divisor(top, log, half, parts, clamp, log_eps, clamped):
    """The log that weights are divided by becomes top + log; whether it is the clamp's."""
    single = len(parts) == 1
    for i in range(len(top)):
        level = parts[0, 2] - parts[0, 3] * half[i] if single else 0.0
        clamped[i] = clamp and top[i] + log[i] < log_eps - level
        if clamped[i]:
            top[i], log[i] = log_eps - level, 0
        elif top[i] == -INFINITY:
            top[i], log[i] = 0, 0


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def _forward_lanes(
    z, mask, masked, parts, eps, log_eps, clamp, exact, residual, first, stop, lane, lanes,
    out, w, saved,
):  # fmt: skip
    kind = z.dtype
    mu, var, count = np.empty(lanes, kind), np.empty(lanes, kind), np.empty(lanes, kind)
    _statistics(z, mask, masked, exact, eps, first, stop, lane, mu, var, count)
    half = np.empty(lanes, kind)
    for i in range(lanes):
        half[i] = 0.5 / var[i]
    e, room = np.empty(lanes, kind), np.empty(lanes, kind)
    top = np.full(lanes, -INFINITY, kind)
    for j in range(first, stop):
        _energy(z[j], lane, mu, half, parts, e, room)
        for i in range(lanes):
            here = not exact or not masked or mask[j, lane + i]
            top[i] = max(top[i], e[i] if here else -INFINITY)
    total = np.zeros(lanes)
    for j in range(first, stop):
        _energy(z[j], lane, mu, half, parts, e, room)
        for i in range(lanes):
            here = not exact or not masked or mask[j, lane + i]
            # Not read where it is left out: there it may be NaN.
            total[i] += exp(e[i] - top[i]) if here else 0.0
    log = np.empty(lanes, kind)
    for i in range(lanes):
        log[i] = math.log(total[i]) if total[i] != 0 else 0.0
        saved[i, 0], saved[i, 1], saved[i, 4] = mu[i], var[i], count[i]
        saved[i, 2], saved[i, 3] = top[i], log[i]
    _divisor(top, log, half, parts, clamp, log_eps, np.empty(lanes, np.bool_))
    for j in range(first, stop):
        _energy(z[j], lane, mu, half, parts, e, room)
        for i in range(lanes):
            seen = not masked or mask[j, lane + i]
            weight = _weight((e[i] - top[i]) - log[i])
            weight = weight if seen or not exact else kind.type(0)
            w[j, lane + i] = weight
            entry = z[j, lane + i]
            result = entry * weight if seen else entry
            out[j, lane + i] = result + entry if residual else result


@njit(cache=True, nogil=True, parallel=True)
def _forward(x, mask, masked, parts, eps, log_eps, clamp, exact, residual, out, w, saved):
    (outer, n, fibres), heads = x.shape, len(parts)
    blocks = (fibres + LANES - 1) // LANES
    for task in prange(outer * heads * blocks):
        o, head, lane = task // (heads * blocks), task // blocks % heads, task % blocks * LANES
        first = head * (n // heads)
        stop = n if head == heads - 1 else first + n // heads
        lanes = min(LANES, fibres - lane)
        _forward_lanes(
            x[o], mask[o] if masked else mask[0], masked, parts[head], eps, log_eps, clamp, exact,
            residual, first, stop, lane, lanes, out[o], w[o], saved[o, head, lane : lane + lanes],
        )  # fmt: skip


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def _upstream(j, lane, z, dout, dw, has_dw, mask, masked, exact, w, up, here):
    """The gradient `up` of the weights w of one entry of each slice; 0 where it is left out."""
    for i in range(len(up)):
        seen = not masked or mask[j, lane + i]
        here[i] = seen or not exact
        up[i] = dout[j, lane + i] * z[j, lane + i] if seen else 0.0
        up[i] += dw[j, lane + i] if has_dw else 0.0
        if not here[i]:
            up[i] = 0
            w[i] = 0


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def _backward_lanes(
    dout, dw, has_dw, z, mask, masked, parts, saved, clamp, log_eps, exact, residual, first, stop,
    lane, lanes, dx, dparts,
):  # fmt: skip
    kind, single = z.dtype, len(parts) == 1
    mu, half = np.empty(lanes, kind), np.empty(lanes, kind)
    top, log, clamped = np.empty(lanes, kind), np.empty(lanes, kind), np.empty(lanes, np.bool_)
    for i in range(lanes):
        mu[i], half[i] = saved[i, 0], 0.5 / saved[i, 1]
        top[i], log[i] = saved[i, 2], saved[i, 3]
    _divisor(top, log, half, parts, clamp, log_eps, clamped)
    e, room = np.empty(lanes, kind), np.empty(lanes, kind)
    w, up, here = np.empty(lanes, kind), np.empty(lanes, kind), np.empty(lanes, np.bool_)
    mean = np.zeros(lanes)
    slope, curve = np.zeros(lanes), np.zeros(lanes)
    s0, s1, s2 = np.zeros(lanes), np.zeros(lanes), np.zeros(lanes)
    for turn in range(-1, len(parts)):
        # The first turn finds the mean gradient, the others the moments of one component.
        s0[:], s1[:], s2[:] = 0, 0, 0
        for j in range(first, stop):
            _energy(z[j], lane, mu, half, parts, e, room)
            for i in range(lanes):
                w[i] = _weight((e[i] - top[i]) - log[i])
            _upstream(j, lane, z, dout, dw, has_dw, mask, masked, exact, w, up, here)
            if turn < 0:
                for i in range(lanes):
                    mean[i] += w[i] * up[i]
                continue
            d, a, C, b = parts[turn, 0], parts[turn, 1], parts[turn, 2], parts[turn, 3]
            for i in range(lanes):
                r = z[j, lane + i] - mu[i] - d if here[i] else 0.0
                g = w[i] * (up[i] - mean[i])
                if not single:
                    g *= exp(C - (a * (r * r) + b) * half[i] - e[i]) if here[i] else 0.0
                s0[i] += g
                s1[i] += g * r
                s2[i] += g * (r * r)
        if turn < 0:
            for i in range(lanes):
                mean[i] = 0.0 if clamped[i] else mean[i]
            continue
        d, a, C, b = parts[turn, 0], parts[turn, 1], parts[turn, 2], parts[turn, 3]
        for i in range(lanes):
            # Weights that sum to 1 do not depend on a common factor.
            zeroth = 0.0 if single and not clamped[i] else s0[i]
            slope[i] += a * s1[i]
            curve[i] += a * s2[i] + b * zeroth
            dparts[turn, 0] += 2 * a * s1[i] * half[i]
            dparts[turn, 1] -= s2[i] * half[i]
            dparts[turn, 2] += zeroth
            dparts[turn, 3] -= zeroth * half[i]
    for i in range(lanes):
        entries = saved[i, 4]
        slope[i] = 2 * slope[i] * half[i] / max(entries, 1.0)
        curve[i] = 4 * curve[i] * half[i] * half[i] / max(entries - 1.0, 1.0)
    along = np.empty(lanes)
    for j in range(first, stop):
        _energy(z[j], lane, mu, half, parts, e, room)
        for i in range(lanes):
            w[i] = _weight((e[i] - top[i]) - log[i])
        _upstream(j, lane, z, dout, dw, has_dw, mask, masked, exact, w, up, here)
        along[:] = 0
        for m in range(len(parts)):
            d, a, C, b = parts[m, 0], parts[m, 1], parts[m, 2], parts[m, 3]
            for i in range(lanes):
                r = z[j, lane + i] - mu[i] - d if here[i] else 0.0
                g = w[i] * (up[i] - mean[i])
                if not single:
                    g *= exp(C - (a * (r * r) + b) * half[i] - e[i]) if here[i] else 0.0
                along[i] += g * (a * r)
        for i in range(lanes):
            seen = not masked or mask[j, lane + i]
            upstream = dout[j, lane + i]
            result = -2 * half[i] * along[i] + (upstream * w[i] if seen else upstream)
            result += slope[i] + curve[i] * (z[j, lane + i] - mu[i]) if seen else 0.0
            dx[j, lane + i] = result + upstream if residual else result


@njit(cache=True, nogil=True, parallel=True)
def _backward(
    dout, dw, has_dw, x, mask, masked, parts, saved, clamp, log_eps, exact, residual, dx, dparts
):
    (outer, n, fibres), heads = x.shape, len(parts)
    blocks = (fibres + LANES - 1) // LANES
    for task in prange(outer * heads * blocks):
        o, head, lane = task // (heads * blocks), task // blocks % heads, task % blocks * LANES
        first = head * (n // heads)
        stop = n if head == heads - 1 else first + n // heads
        lanes = min(LANES, fibres - lane)
        _backward_lanes(
            dout[o], dw[o] if has_dw else dw[0], has_dw, x[o], mask[o] if masked else mask[0],
            masked, parts[head], saved[o, head, lane : lane + lanes], clamp, log_eps, exact,
            residual, first, stop, lane, lanes, dx[o], dparts[o, head, task % blocks],
        )  # fmt: skip


def _array(x: Tensor, swap: bool) -> np.ndarray:
    """`x` as a contiguous array with the slices side by side, widened if NumPy lacks its dtype."""
    x = x.detach().to(torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype)
    return (x.transpose(0, 2) if swap else x).contiguous().numpy()


def _tensor(x: np.ndarray, swap: bool, like: Tensor) -> Tensor:
    out = torch.from_numpy(x)
    return (out.transpose(0, 2) if swap else out).to(like.dtype).contiguous()


def _mask(mask: Tensor | None, swap: bool) -> np.ndarray:
    return np.zeros((1, 1, 1), np.bool_) if mask is None else _array(mask, swap)


def forward(
    x: Tensor, mask: Tensor | None, delta: Tensor, c: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    swap = x.shape[2] == 1
    entries = _array(x, swap)
    parts = components(delta.detach(), c.detach(), options.product).numpy()
    saved = np.empty(saved_shape(x, delta), entries.dtype)
    out, w = np.empty(entries.shape, entries.dtype), np.empty(entries.shape, entries.dtype)
    if entries.size:
        count_launch()
        eps, log_eps, clamp, exact, residual = _numbers(options, entries.dtype)
        _forward(
            entries, _mask(mask, swap), mask is not None, parts, eps, log_eps, clamp, exact,
            residual, out, w, _by_slice(saved, entries, parts),
        )  # fmt: skip
    return _tensor(out, swap, x), _tensor(w, swap, x), torch.from_numpy(saved)


def backward(
    dout: Tensor,
    dw: Tensor | None,
    x: Tensor,
    mask: Tensor | None,
    delta: Tensor,
    c: Tensor,
    saved: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    swap = x.shape[2] == 1
    entries = _array(x, swap)
    dx = np.empty(entries.shape, entries.dtype)
    parts = components(delta.detach(), c.detach(), options.product).numpy()
    heads, M, _ = parts.shape
    blocks = -(-entries.shape[2] // LANES)
    dparts = np.zeros((entries.shape[0], heads, blocks, M, 4))
    if entries.size:
        count_launch()
        _, log_eps, clamp, exact, residual = _numbers(options, entries.dtype)
        weights = entries[:1, :1, :1] if dw is None else _array(dw, swap)
        _backward(
            _array(dout, swap), weights, dw is not None, entries, _mask(mask, swap),
            mask is not None, parts, _by_slice(saved.numpy(), entries, parts), clamp, log_eps,
            exact, residual, dx, dparts,
        )  # fmt: skip
    total = torch.from_numpy(dparts.sum((0, 2)))
    return _tensor(dx, swap, x), *gradients(delta.detach(), c.detach(), options.product, total)


def _by_slice(saved: np.ndarray, entries: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """Of every slice: mean, variance, the log of its greatest raw weight, the log of the sum of all
    in units of that one (a large first log would swallow it), and the number of entries."""
    return saved.reshape(entries.shape[0], parts.shape[0], entries.shape[2], 5)


def _numbers(options: Options, dtype: np.dtype[Any]) -> tuple[Any, ...]:
    kind = dtype.type
    eps = options.eps
    return kind(eps), kind(math.log(eps)), options.clamp, options.exact, options.residual
