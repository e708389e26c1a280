"""How an array lies in memory: strides, offsets, and a fence of NaN around every buffer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LAYOUTS = ("contiguous", "transposed", "fused", "padded", "offset", "strided", "expanded")
FENCE = 64


@dataclass(frozen=True)
class Placement:
    """A flat buffer and the view of it that is the argument (strides in elements)."""

    buffer: np.ndarray
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int


def place(x: np.ndarray, layout: str) -> Placement:
    """`x` laid out in a fresh buffer whose unused entries are NaN (or a wrong integer).

    "transposed" stores heads inside tokens, "fused" leaves room for two neighbours in each row, as
    a slice of a fused projection does, "padded" pads the rows, "offset" starts at an odd element,
    "strided" takes every second channel, "expanded" shares one copy along the first axis if its
    entries are equal.
    """
    order = list(range(x.ndim))
    room = list(x.shape)
    step, offset, shared = 1, 0, False
    if layout == "transposed" and x.ndim >= 3:
        order[-3], order[-2] = order[-2], order[-3]
    elif layout == "fused" and x.ndim >= 2:
        room[-1] *= 3
        offset = x.shape[-1]
    elif layout == "padded" and x.ndim >= 2:
        room[-1] += 5
    elif layout == "offset":
        offset = 1
    elif layout == "strided":
        room[-1] *= 2
        step = 2
    elif layout == "expanded" and x.ndim >= 2 and x.shape[0] > 1:
        shared = bool(np.all(x == x[:1]))

    strides = [0] * x.ndim
    length = 1
    for axis in reversed(order):
        strides[axis] = length
        length *= room[axis]
    if strides:
        strides[-1] *= step
    if shared:
        strides[0] = 0
    buffer = _fence(length + 2 * FENCE + offset, x.dtype)
    start = FENCE + offset
    view = np.lib.stride_tricks.as_strided(
        buffer[start:], x.shape, [s * buffer.itemsize for s in strides]
    )
    view[...] = x
    return Placement(buffer, x.shape, tuple(strides), start)


def _fence(length: int, dtype: np.dtype) -> np.ndarray:
    if dtype.kind == "f":
        return np.full(length, np.nan, dtype)
    return np.full(length, True if dtype.kind == "b" else 10**6, dtype)
