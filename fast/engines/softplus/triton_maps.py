"""From base-2 scores to weights, and the derivatives on the way back.

Softplus is taken in base 2, log2(1 + 2**y) with y = x / ln 2, which is softplus(x) / ln 2: the
factor cancels in every normaliser once eps is divided by it too. It is max(y, 0) plus
log2(1 + e) with e = 2**-|y| in (0, 1]; as e times a polynomial in e that keeps its relative
precision down to the smallest e, and costs no second special function.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def soft_of(e, y, PRECISE: tl.constexpr):
    """`soft` of y, given e = 2**-|y|."""
    if PRECISE:
        series = e * 0.00739540211 - 0.0419450088
        series = series * e + 0.111832074
        series = series * e - 0.196238952
        series = series * e + 0.275221212
        series = series * e - 0.35829907
        series = series * e + 0.48067889
        series = series * e - 0.721339513
        series = series * e + 1.44269499
    else:
        series = e * 0.02001665 - 0.0946268097
        series = series * e + 0.213943212
        series = series * e - 0.338377198
        series = series * e + 0.477496364
        series = series * e - 0.721144092
        series = series * e + 1.44269298
    return tl.fma(series, e, tl.maximum(y, 0.0))


@triton.jit
def soft(y, PRECISE: tl.constexpr):
    """softplus(y ln 2) / ln 2, with a relative error of 1.4e-6, or 1.4e-7 if PRECISE."""
    return soft_of(tl.exp2(-tl.abs(y)), y, PRECISE)


@triton.jit
def soft_and_slope(y, PRECISE: tl.constexpr):
    """`soft` and its derivative, the logistic function of y ln 2. No y makes a slope NaN."""
    e = tl.exp2(-tl.abs(y))
    upper = 1.0 / (1.0 + e)
    return soft_of(e, y, PRECISE), tl.where(y > 0.0, upper, e * upper)


@triton.jit
def raised(x, power, WHOLE: tl.constexpr):
    """x ** power for x >= 0, where 0 ** 0 is 0; WHOLE is the power if it is a small integer.

    For a gradient, which is 0 at a clipped weight also if the power is 1.
    """
    if WHOLE >= 0:
        result = tl.where(x > 0.0, 1.0, 0.0)
        square = x
        left: tl.constexpr = WHOLE
        for bit in tl.static_range(6):
            if (left >> bit) & 1:
                result *= square
            if (left >> bit) > 1:
                square *= square
    else:
        result = tl.where(x > 0.0, tl.exp2(power * tl.log2(tl.where(x > 0.0, x, 1.0))), 0.0)
    return result


@triton.jit
def first_terms(total, eps):
    """One over the first normaliser of rows, 0 for rows without any mass."""
    mass = total + eps * LOG2E
    some = mass > 0.0
    return tl.where(some, 1.0 / tl.where(some, mass, 1.0), 0.0)


@triton.jit
def second_terms(total, peak, count, eps, warm, dead, PRECISE: tl.constexpr):
    """The second stage of rows: excess over the largest one is max(gain * soft - cut, 0).

    Returns gain, cut and the largest excess of each row, all 0 for dead rows.
    """
    offset = tl.where(count > warm, 1.0, 0.0)
    gain = count * first_terms(total, eps)
    most = gain * soft(peak, PRECISE) - offset
    alive = (most > dead) & (count > 0.0)
    inverse = tl.where(alive, 1.0 / tl.where(alive, most, 1.0), 0.0)
    return gain * inverse, offset * inverse, tl.where(alive, most, 0.0)


@triton.jit
def added_eps(most, eps, power):
    """The eps of the second normaliser, on the scale on which a row's largest weight is 1."""
    there = (eps > 0.0) & (most > 0.0)
    log_eps = tl.log2(tl.where(there, eps, 1.0))
    return tl.where(there, tl.exp2(log_eps - power * tl.log2(tl.where(there, most, 1.0))), 0.0)
