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
from attnspec.fast.engines.scan.numba_elementwise import array, start

FLAGS = {"contract", "reassoc", "nsz", "arcp", "afn"}
STRIP = 32
"""Channels of a strip."""


@njit(cache=True, nogil=True, parallel=True, error_model="numpy", fastmath=FLAGS)
def _forward(Delta: Any, A: Any, b: Any, c: Any, u: Any, D: Any, state: Any, y: Any) -> None:
    """state (batch, channels, n) is moved on in place; y (batch, tokens, channels) is filled."""
    batch, tokens, channels = u.shape
    n = A.shape[1]
    strips = (channels + STRIP - 1) // STRIP
    for work in prange(batch * strips):
        row, first = work // strips, work % strips * STRIP
        last = min(first + STRIP, channels)
        for t in range(tokens):
            for e in range(first, last):
                d = Delta[row, t, e]
                into = d * u[row, t, e]
                out = D[e] * u[row, t, e]
                for s in range(n):
                    h = exp(-d * A[e, s]) * state[row, e, s] + into * b[row, t, s]
                    state[row, e, s] = h
                    out += h * c[row, t, s]
                y[row, t, e] = out


@njit(cache=True, nogil=True, parallel=True, error_model="numpy", fastmath=FLAGS)
def _backward(
    dy: Any, carry: Any, Delta: Any, A: Any, b: Any, c: Any, u: Any, D: Any, h0: Any,
    dDelta: Any, dA: Any, db: Any, dc: Any, du: Any,
) -> None:  # fmt: skip
    """carry (batch, channels, n) comes as the gradient of the last state and leaves as that of h0;
    dA (batch, channels, n), db and dc (strips, batch, tokens, n) come as zeros.
    """
    zero = dy.dtype.type(0)
    batch, tokens, channels = u.shape
    n = A.shape[1]
    strips = (channels + STRIP - 1) // STRIP
    for work in prange(batch * strips):
        row, strip = work // strips, work % strips
        first = strip * STRIP
        for e in range(first, min(first + STRIP, channels)):
            past = np.empty((tokens + 1, n), dy.dtype)
            for s in range(n):
                past[0, s] = h0[row, e, s]
            for t in range(tokens):
                d = Delta[row, t, e]
                into = d * u[row, t, e]
                for s in range(n):
                    past[t + 1, s] = exp(-d * A[e, s]) * past[t, s] + into * b[row, t, s]
            for back in range(tokens):
                t = tokens - 1 - back
                d, value, up = Delta[row, t, e], u[row, t, e], dy[row, t, e]
                rate, strength = zero, zero
                for s in range(n):
                    g = carry[row, e, s] + up * c[row, t, s]
                    decay = exp(-d * A[e, s])
                    kept = g * decay * past[t, s]
                    dc[strip, row, t, s] += past[t + 1, s] * up
                    db[strip, row, t, s] += g * d * value
                    dA[row, e, s] -= kept * d
                    rate -= kept * A[e, s]
                    strength += g * b[row, t, s]
                    carry[row, e, s] = decay * g
                dDelta[row, t, e] = rate + strength * value
                du[row, t, e] = strength * d + D[e] * up


def forward(
    Delta: Tensor, A: Tensor, b: Tensor, c: Tensor, u: Tensor, D: Tensor | None, h0: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y in the dtype of u, and the last state."""
    state, skip = start(h0, u, (u.shape[0], *A.shape)), start(D, u, A.shape[:1])
    inputs = [array(x, u) for x in (Delta, A, b, c, u)]
    y = np.empty_like(inputs[4])
    count_launch()
    given = (*inputs, skip, state, y)
    _forward(*given)
    return torch.from_numpy(y).to(u.dtype), torch.from_numpy(state)


def backward(
    dy: Tensor, dlast: Tensor, Delta: Tensor, A: Tensor, b: Tensor, c: Tensor, u: Tensor,
    D: Tensor | None, h0: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """dDelta, dA, db, dc, du and the gradient of the state before the first token."""
    first, skip = start(h0, u, (u.shape[0], *A.shape)), start(D, u, A.shape[:1])
    inputs = [array(x, u) for x in (Delta, A, b, c, u)]
    carry = array(dlast, u).copy()
    strips = -(-u.shape[2] // STRIP)
    dDelta, du = np.empty_like(inputs[4]), np.empty_like(inputs[4])
    dA = np.zeros_like(carry)
    db, dc = np.zeros((2, strips, *b.shape), carry.dtype)
    count_launch()
    given = (array(dy, u), carry, *inputs, skip, first, dDelta, dA, db, dc, du)
    _backward(*given)
    made = (dDelta, dA.sum(0), db.sum(0), dc.sum(0), du)
    kinds = (Delta, A, b, c, u)
    back = [torch.from_numpy(x).to(like.dtype) for x, like in zip(made, kinds, strict=True)]
    return *back, torch.from_numpy(carry)
