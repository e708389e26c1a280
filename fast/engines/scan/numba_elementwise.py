"""The elementwise scan on the CPU: a strip of channels is a thread's work, rows one by one.

16-bit inputs are widened to float32 and results rounded back; float64 stays.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from attnspec.fast.backend import count_launch, wide_dtype

STRIP = 64
"""Channels of a strip: a few vector registers."""


@njit(cache=True, nogil=True, parallel=True, error_model="numpy")
def _forward(a: Any, x: Any, state: Any, h: Any) -> None:
    """a, x, h (batch, tokens, channels); state (batch, channels) is moved on in place."""
    batch, tokens, channels = x.shape
    strips = (channels + STRIP - 1) // STRIP
    for work in prange(batch * strips):
        row, first = work // strips, work % strips * STRIP
        last = min(first + STRIP, channels)
        for t in range(tokens):
            for c in range(first, last):
                state[row, c] = a[row, t, c] * state[row, c] + x[row, t, c]
                h[row, t, c] = state[row, c]


@njit(cache=True, nogil=True, parallel=True, error_model="numpy")
def _backward(dh: Any, carry: Any, a: Any, h: Any, h0: Any, da: Any, dx: Any) -> None:
    """carry (batch, channels) comes as the gradient of the last state, leaves as that of h0."""
    batch, tokens, channels = h.shape
    strips = (channels + STRIP - 1) // STRIP
    for work in prange(batch * strips):
        row, first = work // strips, work % strips * STRIP
        last = min(first + STRIP, channels)
        for n in range(tokens):
            t = tokens - 1 - n
            before = h[row, t - 1] if t else h0[row]
            for c in range(first, last):
                g = dh[row, t, c] + carry[row, c]
                dx[row, t, c] = g
                da[row, t, c] = g * before[c]
                carry[row, c] = a[row, t, c] * g


def array(x: Tensor, like: Tensor) -> np.ndarray:
    """x as contiguous float64 if `like` is, else as float32."""
    dtype = wide_dtype(like)
    return np.asarray(x.detach().to(dtype).contiguous().numpy())


def start(h0: Tensor | None, like: Tensor, shape: tuple[int, ...]) -> np.ndarray:
    """A copy of h0 that may be written to, or zeros."""
    if h0 is None:
        return np.zeros(shape, np.float64 if like.dtype == torch.float64 else np.float32)
    return array(h0, like).copy()


def forward(a: Tensor, x: Tensor, h0: Tensor | None) -> tuple[Tensor, Tensor]:
    """Every h in the dtype of x, and the last state."""
    values = array(x, x)
    state, h = start(h0, x, (x.shape[0], x.shape[2])), np.empty_like(values)
    count_launch()
    _forward(array(a, x), values, state, h)
    return torch.from_numpy(h).to(x.dtype), torch.from_numpy(state)


def backward(
    dh: Tensor, dlast: Tensor, a: Tensor, h: Tensor, h0: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """da, dx and the gradient of the state before the first token."""
    states = array(h, h)
    first = start(h0, h, (h.shape[0], h.shape[2]))
    carry = array(dlast, h).copy()
    da, dx = np.empty_like(states), np.empty_like(states)
    count_launch()
    _backward(array(dh, h), carry, array(a, h), states, first, da, dx)
    return (
        torch.from_numpy(da).to(a.dtype),
        torch.from_numpy(dx).to(h.dtype),
        torch.from_numpy(carry),
    )
