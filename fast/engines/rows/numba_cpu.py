"""The rows kernels on the CPU: a row, or a head, is a thread's work.

16-bit inputs are widened to float32 and results rounded back; float64 stays. Inputs that are not
contiguous are copied. Cosines and sines are a table (heads, tokens, d) made by torch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from attnspec.fast.backend import count_launch, wide
from attnspec.fast.engines.numba_math import exp

FLAGS = {"contract", "reassoc", "nsz", "arcp", "afn"}


def norm(o: Tensor, u: Tensor | None, eps: float) -> Tensor:
    batch, heads, tokens, d = o.shape
    rows = _wide(o)
    gate = rows[:, :0, 0] if u is None else _wide(u)
    y = rows.new_empty(batch, tokens, heads * d)
    _norm(*_numpy(rows, gate, y, rows.numpy().dtype.type(eps), u is not None))
    count_launch()
    return y.to(o.dtype)


def norm_backward(dy: Tensor, o: Tensor, u: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    rows, upstream = _wide(o), _wide(dy)
    gate = rows[:, :0, 0] if u is None else _wide(u)
    do = torch.empty_like(rows)
    du = upstream.new_empty((0, 0, 0)) if u is None else torch.empty_like(upstream)
    small = rows.numpy().dtype.type(eps)
    _norm_backward(*_numpy(upstream, rows, gate, do, du, small, u is not None))
    count_launch()
    return do.to(o.dtype), du.to(o.dtype) if u is not None else o.new_empty(0)


@njit(cache=True, nogil=True, error_model="numpy")
def _inverse(total: Any, many: Any, eps: Any) -> Any:
    """many / many is a 1 of the right type."""
    rms = np.sqrt(total / many + eps)
    return rms if rms == 0 else (many / many) / rms


@njit(cache=True, nogil=True, parallel=True, fastmath=FLAGS, error_model="numpy")
def _norm(o: Any, u: Any, y: Any, eps: Any, gated: Any) -> None:
    batch, heads, tokens, d = o.shape
    many = o.dtype.type(heads * d)
    for row in prange(batch * tokens):
        b, t = row // tokens, row % tokens
        total = o.dtype.type(0)
        for h in range(heads):
            for c in range(d):
                total += o[b, h, t, c] * o[b, h, t, c]
        inverse = _inverse(total, many, eps)
        for h in range(heads):
            for c in range(d):
                y[b, t, h * d + c] = o[b, h, t, c] * inverse
        if gated:
            for c in range(heads * d):
                y[b, t, c] *= u[b, t, c]


@njit(cache=True, nogil=True, parallel=True, fastmath=FLAGS, error_model="numpy")
def _norm_backward(dy: Any, o: Any, u: Any, do: Any, du: Any, eps: Any, gated: Any) -> None:
    batch, heads, tokens, d = o.shape
    many = o.dtype.type(heads * d)
    for row in prange(batch * tokens):
        b, t = row // tokens, row % tokens
        total, along = o.dtype.type(0), o.dtype.type(0)
        for h in range(heads):
            for c in range(d):
                x, g = o[b, h, t, c], dy[b, t, h * d + c]
                if gated:
                    g *= u[b, t, h * d + c]
                total += x * x
                along += x * g
        inverse = _inverse(total, many, eps)
        along *= inverse / many
        for h in range(heads):
            for c in range(d):
                normed, g = o[b, h, t, c] * inverse, dy[b, t, h * d + c]
                if gated:
                    du[b, t, h * d + c] = g * normed
                    g *= u[b, t, h * d + c]
                do[b, h, t, c] = (g - normed * along) * inverse


def lift(
    x: Tensor, theta: Tensor | None, positions: Tensor | None, offset: int, activate: bool
) -> Tensor:
    rows = _wide(x)
    cos, sin, _ = _table(rows, theta, positions, offset)
    y = rows.new_empty(*x.shape[:3], x.shape[3] * (1 if theta is None else 2))
    _lift(*_numpy(rows, cos, sin, y, activate, theta is not None))
    count_launch()
    return y.to(x.dtype)


def lift_backward(
    dy: Tensor,
    x: Tensor,
    theta: Tensor | None,
    positions: Tensor | None,
    offset: int,
    activate: bool,
) -> tuple[Tensor, Tensor]:
    rows = _wide(x)
    cos, sin, places = _table(rows, theta, positions, offset)
    dx, dtheta = torch.empty_like(rows), rows.new_zeros(*x.shape[:2], x.shape[3])
    tables = cos, sin, places
    _lift_backward(*_numpy(_wide(dy), rows, *tables, dx, dtheta, activate, theta is not None))
    count_launch()
    return dx.to(x.dtype), dtheta.sum(0)


def _table(
    x: Tensor, theta: Tensor | None, positions: Tensor | None, offset: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines and sines (heads, tokens, d) and the positions (tokens,), in the dtype of x."""
    if theta is None:
        return x[0, :, :0], x[0, :, :0], x[0, 0, :0, 0]
    if positions is None:
        positions = torch.arange(offset, offset + x.shape[2])
    places = positions.to(x.dtype)
    angles = places[:, None] * theta.to(x.dtype)[:, None]
    return angles.cos(), angles.sin(), places


@njit(cache=True, nogil=True, parallel=True, fastmath=FLAGS, error_model="numpy")
def _lift(x: Any, cos: Any, sin: Any, y: Any, activate: Any, lifted: Any) -> None:
    batch, heads, tokens, d = x.shape
    one = x.dtype.type(1)
    for row in prange(batch * heads * tokens):
        t, h, b = row % tokens, row // tokens % heads, row // tokens // heads
        for c in range(d):
            y[b, h, t, c] = x[b, h, t, c]
        if activate:
            for c in range(d):
                y[b, h, t, c] = x[b, h, t, c] / (one + exp(-x[b, h, t, c]))
        if lifted:
            for c in range(d):
                y[b, h, t, d + c] = y[b, h, t, c] * sin[h, t, c]
            for c in range(d):
                y[b, h, t, c] *= cos[h, t, c]


@njit(cache=True, nogil=True, parallel=True, fastmath=FLAGS, error_model="numpy")
def _lift_backward(
    dy: Any, x: Any, cos: Any, sin: Any, places: Any, dx: Any, dtheta: Any, activate: Any,
    lifted: Any,
) -> None:  # fmt: skip
    batch, heads, tokens, d = x.shape
    one = x.dtype.type(1)
    for row in prange(batch * heads):
        h, b = row % heads, row // heads
        for t in range(tokens):
            for c in range(d):
                value, slope = x[b, h, t, c], one
                if activate:
                    gate = one / (one + exp(-value))
                    slope = gate * (one + value * (one - gate))
                    value *= gate
                up = dy[b, h, t, c]
                if lifted:
                    even, odd = cos[h, t, c], sin[h, t, c]
                    dtheta[b, h, c] += places[t] * value * (dy[b, h, t, d + c] * even - up * odd)
                    up = up * even + dy[b, h, t, d + c] * odd
                dx[b, h, t, c] = up * slope


def _wide(x: Tensor) -> Tensor:
    """Contiguous, float64 as it is and everything else as float32."""
    return wide(x.detach()).contiguous()


def _numpy(*arguments: Any) -> Any:
    """The arguments of a kernel, tensors as arrays that share their memory."""
    return [x.numpy() if isinstance(x, Tensor) else x for x in arguments]
