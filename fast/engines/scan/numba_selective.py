"""The selective scan on the CPU: a strip of channels is a thread's work, tokens one by one.

16-bit inputs are widened to float32 and results rounded back; float64 stays.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from attnspec.fast.backend import count_launch
from attnspec.fast.engines.numba_math import exp
from attnspec.fast.engines.scan.numba_elementwise import array, ends_of, rows, start

FLAGS = {"contract", "reassoc", "nsz", "arcp", "afn"}
STRIP = 32
"""Channels of a strip."""


@njit(cache=True, nogil=True, parallel=True, error_model="numpy", fastmath=FLAGS)
def _forward(
    Delta: Any, A: Any, b: Any, c: Any, u: Any, D: Any, ends: Any, state: Any, y: Any
) -> None:
    """state (sequences, channels, n) is moved on in place; y (all tokens, channels) is filled."""
    channels, n = A.shape
    strips = (channels + STRIP - 1) // STRIP
    for work in prange((ends.size - 1) * strips):
        row, first = work // strips, work % strips * STRIP
        last = min(first + STRIP, channels)
        for t in range(ends[row], ends[row + 1]):
            for e in range(first, last):
                d = Delta[t, e]
                into = d * u[t, e]
                out = D[e] * u[t, e]
                for s in range(n):
                    h = exp(-d * A[e, s]) * state[row, e, s] + into * b[t, s]
                    state[row, e, s] = h
                    out += h * c[t, s]
                y[t, e] = out


@njit(cache=True, nogil=True, parallel=True, error_model="numpy", fastmath=FLAGS)
def _backward(
    dy: Any, carry: Any, Delta: Any, A: Any, b: Any, c: Any, u: Any, D: Any, ends: Any, h0: Any,
    dDelta: Any, dA: Any, db: Any, dc: Any, du: Any,
) -> None:  # fmt: skip
    """carry (sequences, channels, n) comes as the gradient of the last state and leaves as that of
    h0; dA (sequences, channels, n), db and dc (strips, all tokens, n) come as zeros.
    """
    zero = dy.dtype.type(0)
    channels, n = A.shape
    strips = (channels + STRIP - 1) // STRIP
    for work in prange((ends.size - 1) * strips):
        row, strip = work // strips, work % strips
        begin, tokens = ends[row], ends[row + 1] - ends[row]
        first = strip * STRIP
        for e in range(first, min(first + STRIP, channels)):
            past = np.empty((tokens + 1, n), dy.dtype)
            for s in range(n):
                past[0, s] = h0[row, e, s]
            for place in range(tokens):
                t = begin + place
                d = Delta[t, e]
                into = d * u[t, e]
                for s in range(n):
                    past[place + 1, s] = exp(-d * A[e, s]) * past[place, s] + into * b[t, s]
            for back in range(tokens):
                place = tokens - 1 - back
                t = begin + place
                d, value, up = Delta[t, e], u[t, e], dy[t, e]
                rate, strength = zero, zero
                for s in range(n):
                    g = carry[row, e, s] + up * c[t, s]
                    decay = exp(-d * A[e, s])
                    kept = g * decay * past[place, s]
                    dc[strip, t, s] += past[place + 1, s] * up
                    db[strip, t, s] += g * d * value
                    dA[row, e, s] -= kept * d
                    rate -= kept * A[e, s]
                    strength += g * b[t, s]
                    carry[row, e, s] = decay * g
                dDelta[t, e] = rate + strength * value
                du[t, e] = strength * d + D[e] * up


def forward(
    Delta: Tensor, A: Tensor, b: Tensor, c: Tensor, u: Tensor, D: Tensor | None, h0: Tensor | None,
    offsets: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y in the dtype of u, and the last state."""
    ends, skip = ends_of(u, offsets), start(D, u, A.shape[:1])
    state = start(h0, u, (ends.size - 1, *A.shape))
    inputs = [rows(Delta, u), array(A, u), *(rows(x, u) for x in (b, c, u))]
    y = np.empty_like(inputs[4])
    count_launch()
    given = (*inputs, skip, ends, state, y)
    _forward(*given)
    return torch.from_numpy(y).view(u.shape).to(u.dtype), torch.from_numpy(state)


def backward(
    dy: Tensor, dlast: Tensor, Delta: Tensor, A: Tensor, b: Tensor, c: Tensor, u: Tensor,
    D: Tensor | None, h0: Tensor | None, offsets: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """dDelta, dA, db, dc, du and the gradient of the state before the first token."""
    ends, skip = ends_of(u, offsets), start(D, u, A.shape[:1])
    first = start(h0, u, (ends.size - 1, *A.shape))
    inputs = [rows(Delta, u), array(A, u), *(rows(x, u) for x in (b, c, u))]
    carry = array(dlast, u).copy()
    strips = -(-u.shape[2] // STRIP)
    dDelta, du = np.empty_like(inputs[4]), np.empty_like(inputs[4])
    dA = np.zeros_like(carry)
    db, dc = np.zeros((2, strips, *inputs[2].shape), carry.dtype)
    count_launch()
    given = (rows(dy, u), carry, *inputs, skip, ends, first, dDelta, dA, db, dc, du)
    _backward(*given)
    made = (dDelta, dA.sum(0), db.sum(0), dc.sum(0), du)
    kinds = (Delta, A, b, c, u)
    back = [
        torch.from_numpy(x).view(like.shape).to(like.dtype)
        for x, like in zip(made, kinds, strict=True)
    ]
    return *back, torch.from_numpy(carry)
