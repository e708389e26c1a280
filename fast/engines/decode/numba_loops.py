"""The inner loops of the Numba decode engine, written so that LLVM vectorises them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from attnspec.fast.engines.numba_math import exp, float32_from_bits

FAST: Any = {"contract", "reassoc", "nsz"}
"""Fast-math flags that leave NaN and infinities alone."""
NATIVE, BFLOAT16, FLOAT16 = 0, 1, 2
"""What a cache holds: numbers to be read as they are, or the bits of 16-bit ones."""


@njit(cache=True, nogil=True, fastmath=FAST)
def _widen_row(halves: Any, kind: int, row: Any) -> None:
    """Bits of bfloat16 or float16 numbers as float32 (`row`)."""
    if kind == BFLOAT16:
        for c in range(halves.shape[0]):
            row[c] = float32_from_bits(np.uint32(np.uint32(halves[c]) << np.uint32(16)))
    else:
        for c in range(halves.shape[0]):
            # A half's exponent is biased by 15, a float's by 127. Its subnormals are a difference
            # of normal floats: float subnormals are slow. The top exponent means Inf or NaN.
            rest = np.uint32((np.uint32(halves[c]) & np.uint32(0x7FFF)) << np.uint32(13))
            value = float32_from_bits(np.uint32(rest + np.uint32(112 << 23)))
            small = float32_from_bits(np.uint32(rest + np.uint32(113 << 23))) - np.float32(2.0**-14)
            special = float32_from_bits(np.uint32(rest | np.uint32(255 << 23)))
            value = small if rest < np.uint32(1 << 23) else value
            value = special if rest >= np.uint32(31 << 23) else value
            row[c] = -value if halves[c] & np.uint16(0x8000) else value


@njit(cache=True, nogil=True, fastmath=FAST)
def widen(cache: Any, at: Any, count: int, width: int, kind: int, buffer: Any) -> None:
    """Rows at offsets `at` of a cache that cannot be read in place, into `buffer`; `at` follows."""
    channels, step = np.uint64(width), np.uint64(cache.channel)
    gathered = np.empty(width, np.uint16)
    for n in range(count):
        first, row = at[n], buffer[n * width : (n + 1) * width]
        at[n] = n * width
        if kind == NATIVE:
            for c in range(channels):
                row[c] = cache.wide[first + c * step]
        elif cache.channel == 1:
            _widen_row(cache.half[np.int64(first) : np.int64(first) + width], kind, row)
        else:
            for c in range(channels):
                gathered[c] = cache.half[first + c * step]
            _widen_row(gathered, kind, row)


@njit(cache=True, nogil=True, fastmath=FAST)
def dots(query: Any, source: Any, at: Any, count: int, d: int, scores: Any) -> None:
    """scores[n] = query . source[at[n] : at[n] + d], four rows at a time.

    Unsigned, because an index that might count from the end keeps LLVM from vectorising.
    """
    zero, channels = query.dtype.type(0), np.uint64(d)
    for n in range(0, count - 3, 4):
        a0, a1, a2, a3 = at[n], at[n + 1], at[n + 2], at[n + 3]
        s0, s1, s2, s3 = zero, zero, zero, zero
        for c in range(channels):
            x = query[c]
            s0 += x * source[a0 + c]
            s1 += x * source[a1 + c]
            s2 += x * source[a2 + c]
            s3 += x * source[a3 + c]
        scores[n], scores[n + 1], scores[n + 2], scores[n + 3] = s0, s1, s2, s3
    for n in range(count - count % 4, count):
        a0, s0 = at[n], zero
        for c in range(channels):
            s0 += query[c] * source[a0 + c]
        scores[n] = s0


@njit(cache=True, nogil=True, fastmath=FAST)
def accumulate(weights: Any, source: Any, at: Any, count: int, dv: int, o: Any) -> None:
    """o += weights[n] source[at[n] : at[n] + dv], four rows at a time."""
    channels = np.uint64(dv)
    for n in range(0, count - 3, 4):
        a0, a1, a2, a3 = at[n], at[n + 1], at[n + 2], at[n + 3]
        w0, w1, w2, w3 = weights[n], weights[n + 1], weights[n + 2], weights[n + 3]
        for c in range(channels):
            first = w0 * source[a0 + c] + w1 * source[a1 + c]
            o[c] += first + (w2 * source[a2 + c] + w3 * source[a3 + c])
    for n in range(count - count % 4, count):
        a0, w0 = at[n], weights[n]
        for c in range(channels):
            o[c] += w0 * source[a0 + c]


@njit(cache=True, nogil=True, fastmath=FAST)
def scale_and_mask(scores: Any, count: int, scale: Any, gain: Any, key: Any, newest: int) -> None:
    """scores * scale + gain, -inf for keys beyond `newest`."""
    hidden, keys = scores.dtype.type(-np.inf), np.uint64(count)
    for n in range(keys):
        score = scores[n] * scale + gain[n]
        scores[n] = score if key[n] <= newest else hidden


@njit(cache=True, nogil=True, fastmath=FAST)
def softmax_row(scores: Any, count: int, m: Any) -> Any:
    """scores become weights below a new maximum; returns it, their sum and the old sum's factor."""
    top = m
    for n in range(count):
        top = max(top, scores[n])
    zero = scores.dtype.type(0)
    shift = zero if top == -np.inf else top
    total = zero
    for n in range(count):
        weight = exp(scores[n] - shift)
        scores[n] = weight
        total += weight
    return top, total, exp(m - shift)
