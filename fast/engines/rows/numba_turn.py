"""The rotation of queries and keys on the CPU: 16 tokens of all heads are a thread's work.

16-bit inputs are widened to float32 and results rounded back; inputs that are not contiguous are
copied. Cosines and sines, with amplitudes and scales, are tables (tokens, pairs) that torch makes
with vector instructions; every head reads them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from numba import njit, prange
from torch import Tensor

from attnspec.fast.backend import count_launch, wide, wide_dtype
from attnspec.fast.engines.rows.turning import Turn

BLOCK = 16


def turn(
    q: Tensor, k: Tensor | None, pq: Tensor | None, pk: Tensor | None, f: Tensor | None, how: Turn
) -> tuple[Tensor, Tensor]:
    T = q.shape[2]
    if k is None:
        return _turned(q, _tables(q, pq, 0, f, how, 1), how), q.new_empty(0, dtype=how.dtype)
    tables = _tables(k, pk, 0, f, how, -1)
    turned_k = _turned(k, tables, how)
    alike = pk is None and how.first >= 0 if pq is None else pq is pk
    if alike and not how.decay and not how.log_c:
        tables = tuple(x[:, x.shape[1] - T :] for x in tables)
    else:
        tables = _tables(q, pq, how.first, f, how, 1)
    return _turned(q, tables, how), turned_k


def _tables(
    x: Tensor, p: Tensor | None, first: int, f: Tensor | None, how: Turn, sign: int
) -> tuple[Tensor, ...]:
    """cos and sin (batch or 1, tokens, pairs), wide, contiguous, for queries or (`sign` -1) keys,
    whose amplitudes are the inverse.
    """
    pair = torch.arange(how.half, dtype=torch.float64)
    if f is None:
        f = math.exp(how.log_base) ** (pair / -how.half)
    if p is None:
        p = torch.arange(first, first + x.shape[2])
    p = (p if p.dim() == 2 else p[None]).double()[..., None]
    angles = p * f.detach().double()
    cos, sin = angles.cos(), angles.sin()
    if how.decay:
        zeta = (2 * pair + 0.8 * how.half) / (2.8 * how.half)
        amplitudes = zeta ** ((p - how.centre) * (sign * how.decay))
        cos, sin = cos * amplitudes, sin * amplitudes
    if how.log_c and sign > 0:
        rows = ((p.clamp(min=0) + 1).log() / how.log_c).clamp(min=how.floor)
        cos, sin = cos * rows, sin * rows
    return cos.to(wide_dtype(x)), (-sin if how.inverse else sin).to(wide_dtype(x))


def _turned(x: Tensor, tables: tuple[Tensor, ...], how: Turn) -> Tensor:
    rows = wide(x.detach()).contiguous()
    y = torch.empty_like(rows)
    cos, sin = (table.numpy() for table in tables)
    _turn(rows.numpy(), y.numpy(), cos, sin, how.neighbours)
    count_launch()
    return y.to(how.dtype)


@njit(cache=True, nogil=True, parallel=True, fastmath={"contract"}, error_model="numpy")
def _turn(x: Any, y: Any, cos: Any, sin: Any, neighbours: Any) -> None:
    batch, heads, tokens, d = x.shape
    half = cos.shape[2]
    blocks = (tokens + BLOCK - 1) // BLOCK
    for part in prange(batch * blocks):
        b, start = part // blocks, part % blocks * BLOCK
        table = b if cos.shape[0] > 1 else 0
        for h in range(heads):
            for t in range(start, min(start + BLOCK, tokens)):
                source, target = x[b, h, t], y[b, h, t]
                even, odd = cos[table, t], sin[table, t]
                if neighbours:
                    for m in range(half):
                        first, second = source[2 * m], source[2 * m + 1]
                        target[2 * m] = first * even[m] - second * odd[m]
                        target[2 * m + 1] = second * even[m] + first * odd[m]
                else:
                    for m in range(half):
                        first, second = source[m], source[half + m]
                        target[m] = first * even[m] - second * odd[m]
                        target[half + m] = second * even[m] + first * odd[m]
                for channel in range(2 * half, d):
                    target[channel] = source[channel]
