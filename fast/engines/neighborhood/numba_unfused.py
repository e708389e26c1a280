"""The unfused CPU kernels: every query walks over its window, every entry of which has a place.

Windows move right with their queries, so a key is added to in the order of its queries, one head
after the other: the sums are the same on every run.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import njit, types

from attnspec.fast.engines.flash.numba_lanes import INNER
from attnspec.fast.engines.flash.numba_visible import KERNEL, strided
from attnspec.fast.engines.neighborhood.numba_fused import TABLE, axis_window, token_of

SUM: dict[str, Any] = {**INNER, "fastmath": {"contract", "reassoc"}}
SCORES, VALUES, KEYS = 0, 1, 2


@njit(**SUM)
def dot(a, b):
    """The sum of products of two rows."""
    total = a[0] * b[0]
    for channel in range(1, a.shape[0]):
        total += a[channel] * b[channel]
    return total


@njit(**SUM)
def add_row(sums, row, weight):
    """sums += weight * row."""
    for channel in range(row.shape[0]):
        sums[channel] += weight * row[channel]


@njit(**INNER)
def walk(kind, run, axes, rows, keys, windows, sums):
    """One run of one head: `rows` (tokens, width) are the queries, or what is summed over them;
    `keys` (tokens, width) the keys or values; `windows` (tokens, window) the scores or weights.
    """
    for x in range(run[2], run[3]):
        token = token_of(run[0], run[1], x, run, axes)
        z_start, z_stop = axis_window(run[0], run[4], axes, 0)
        y_start, y_stop = axis_window(run[1], run[5], axes, 1)
        x_start, x_stop = axis_window(x, run[6], axes, 2)
        for z in range(z_start, z_stop):
            for y in range(y_start, y_stop):
                entry = ((z - z_start) * axes[1, 1] + y - y_start) * axes[2, 1]
                for u in range(x_start, x_stop):
                    key = token_of(z, y, u, run, axes)
                    at = entry + u - x_start
                    if kind == SCORES:
                        windows[token, at] = dot(rows[token], keys[key])
                    elif kind == VALUES:
                        add_row(sums[token], keys[key], windows[token, at])
                    else:
                        add_row(sums[key], rows[token], windows[token, at])


def _unfused(kind, rows, keys, windows, sums, axes, runs, part, parts, scratch, spans):
    """One part of the heads: of the queries, or of the keys, whose groups must not be split."""
    heads, kv_heads = windows.shape[1], keys.shape[1] if kind != KEYS else sums.shape[1]
    group = heads // kv_heads
    owners = kv_heads if kind == KEYS else heads
    for task in range(part, windows.shape[0] * owners, parts):
        batch, owner = task // owners, task % owners
        members = group if kind == KEYS else 1
        for head in range(owner * members, (owner + 1) * members):
            for run in range(runs.shape[0]):
                if kind == SCORES:
                    walk(kind, runs[run], axes, rows[batch, head], keys[batch, head // group],
                         windows[batch, head], rows[batch, head])  # fmt: skip
                elif kind == VALUES:
                    walk(kind, runs[run], axes, keys[batch, head // group],
                         keys[batch, head // group], windows[batch, head],
                         sums[batch, head])  # fmt: skip
                else:
                    walk(kind, runs[run], axes, rows[batch, head], rows[batch, head],
                         windows[batch, head], sums[batch, owner])  # fmt: skip


@functools.cache
def unfused_kernel(real: types.Type) -> Any:
    """The compiled kernel for numbers of type `real`: one signature, whatever the strides."""
    tensor = strided(real, 4)
    signature = types.void(
        types.int64, tensor, tensor, tensor, tensor, TABLE, TABLE, types.int64, types.int64,
        real[::1], TABLE,
    )  # fmt: skip
    return njit(signature, **KERNEL)(_unfused)


def empty(like: np.ndarray) -> np.ndarray:
    """A stand-in for an operand that a kind of walk does not use."""
    return np.empty((0,) * like.ndim, like.dtype)
