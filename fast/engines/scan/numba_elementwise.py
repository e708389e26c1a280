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
def _forward(a: Any, x: Any, ends: Any, state: Any, h: Any) -> None:
    """a, x, h (all tokens, channels); state (sequences, channels) is moved on in place."""
    channels = x.shape[1]
    strips = (channels + STRIP - 1) // STRIP
    for work in prange((ends.size - 1) * strips):
        row, first = work // strips, work % strips * STRIP
        last = min(first + STRIP, channels)
        for t in range(ends[row], ends[row + 1]):
            for c in range(first, last):
                state[row, c] = a[t, c] * state[row, c] + x[t, c]
                h[t, c] = state[row, c]


@njit(cache=True, nogil=True, parallel=True, error_model="numpy")
def _backward(dh: Any, carry: Any, a: Any, h: Any, h0: Any, ends: Any, da: Any, dx: Any) -> None:
    """carry (sequences, channels) comes as the gradient of the last state, leaves as that of h0."""
    channels = h.shape[1]
    strips = (channels + STRIP - 1) // STRIP
    for work in prange((ends.size - 1) * strips):
        row, first = work // strips, work % strips * STRIP
        last = min(first + STRIP, channels)
        start, stop = ends[row], ends[row + 1]
        for n in range(stop - start):
            t = stop - 1 - n
            before = h[t - 1] if t > start else h0[row]
            for c in range(first, last):
                g = dh[t, c] + carry[row, c]
                dx[t, c] = g
                da[t, c] = g * before[c]
                carry[row, c] = a[t, c] * g


def array(x: Tensor, like: Tensor) -> np.ndarray:
    """x as contiguous float64 if `like` is, else as float32."""
    dtype = wide_dtype(like)
    return np.asarray(x.detach().to(dtype).contiguous().numpy())


def start(h0: Tensor | None, like: Tensor, shape: tuple[int, ...]) -> np.ndarray:
    """A copy of h0 that may be written to, or zeros."""
    if h0 is None:
        return np.zeros(shape, np.float64 if like.dtype == torch.float64 else np.float32)
    return array(h0, like).copy()


def rows(x: Tensor, like: Tensor) -> np.ndarray:
    """`array` (all tokens, channels) of x (batch, tokens, channels)."""
    return array(x, like).reshape(x.shape[0] * x.shape[1], x.shape[2])


def ends_of(x: Tensor, offsets: Tensor | None) -> np.ndarray:
    """Where the sequences of a batch, or packed ones, begin and the last ends."""
    if offsets is None:
        return np.arange(x.shape[0] + 1) * x.shape[1]
    return np.asarray(offsets.to(torch.int64).numpy())


def forward(
    a: Tensor, x: Tensor, h0: Tensor | None, offsets: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Every h in the dtype of x, and the last state."""
    values, ends = rows(x, x), ends_of(x, offsets)
    state, h = start(h0, x, (ends.size - 1, x.shape[2])), np.empty_like(values)
    count_launch()
    _forward(rows(a, x), values, ends, state, h)
    return torch.from_numpy(h).view(x.shape).to(x.dtype), torch.from_numpy(state)


def backward(
    dh: Tensor, dlast: Tensor, a: Tensor, h: Tensor, h0: Tensor | None, offsets: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """da, dx and the gradient of the state before the first token."""
    states, ends = rows(h, h), ends_of(h, offsets)
    first = start(h0, h, (ends.size - 1, h.shape[2]))
    carry = array(dlast, h).copy()
    da, dx = np.empty_like(states), np.empty_like(states)
    count_launch()
    _backward(rows(dh, h), carry, rows(a, h), states, first, ends, da, dx)
    return (
        torch.from_numpy(da).view(h.shape).to(a.dtype),
        torch.from_numpy(dx).view(h.shape).to(h.dtype),
        torch.from_numpy(carry),
    )
