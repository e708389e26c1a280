"""The neighborhood engine on CPU tensors: plans the runs of queries and calls the Numba kernels.

float32 and float64 are computed as they are; float16 and bfloat16 are widened to a float32 copy and
the results rounded back. All strides are read in place. The number of threads is Numba's
(``numba.set_num_threads``); gradients are bitwise repeatable for a given number of threads.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnspec.fast.engines.flash.numba_cpu import number_type, run_parts, shares_of, widened
from attnspec.fast.engines.flash.numba_lanes import REGISTER_BYTES
from attnspec.fast.engines.flash.numba_visible import KEYS, QUERIES
from attnspec.fast.engines.neighborhood import numba_fused, numba_unfused
from attnspec.fast.engines.neighborhood.grid import Grid, window_size
from attnspec.fast.engines.neighborhood.numba_unfused import empty


@lru_cache(maxsize=64)
def plan(grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """The axes (3, 5) and the runs (runs, RUN) of a grid.

    A run is about as long as a window: a longer one would see ever fewer of the keys it visits.
    """
    axes = np.array(grid, np.int64).reshape(3, 5)
    lanes = REGISTER_BYTES // 4
    longest = min(QUERIES, max(lanes, -(-grid[2].k // lanes) * lanes))
    tables = []
    for group in np.ndindex(*(axis.dil for axis in grid)):
        z, y, x = (len(range(g, axis.X, axis.dil)) for g, axis in zip(group, grid, strict=True))
        firsts = np.arange(0, x, longest)
        rows = np.stack(np.meshgrid(np.arange(z), np.arange(y), firsts, indexing="ij"), axis=-1)
        rows = rows.reshape(-1, 3)
        lasts = np.minimum(rows[:, 2:] + longest, x)
        tables.append(np.hstack([rows, lasts, np.tile(group, (len(rows), 1))]))
    return axes, np.ascontiguousarray(np.concatenate(tables), np.int64)


def most_spans(grid: Grid, extra: int) -> int:
    """Most pieces of rows of keys that a run sees."""
    row = -(-(grid[2].k + grid[2].s + QUERIES) // KEYS) + 1
    return grid[0].k * grid[1].k * row + extra // KEYS + 1


def forward(q: Tensor, k: Tensor, v: Tensor, grid: Grid, scale: float) -> tuple[Tensor, Tensor]:
    """out (batch, heads, tokens, dv) in q's dtype and lse (batch, heads, tokens) in float32,
    float64 for float64 inputs.
    """
    wide = widened(q)
    batch, heads, tokens, d = q.shape
    out = torch.empty(batch, heads, tokens, v.shape[3], dtype=wide.dtype)
    lse = torch.empty(batch, heads, tokens, dtype=wide.dtype)
    axes, runs = plan(grid)
    arguments = [
        wide.numpy(), widened(k).numpy(), widened(v).numpy(), out.numpy(), lse.numpy(), scale, axes,
        runs,
    ]  # fmt: skip
    work = batch * heads * tokens * window_size(grid) * (d + v.shape[3])
    run_parts(
        numba_fused.forward_kernel(number_type(wide)), arguments, batch * heads * len(runs), work,
        wide.dtype, numba_fused.forward_scratch(d, v.shape[3]),
        2 * most_spans(grid, k.shape[2] - tokens),
    )  # fmt: skip
    return out.to(q.dtype), lse


def backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grid: Grid,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv in the inputs' dtype."""
    wide, wide_dout = widened(q), widened(dout)
    batch, heads, tokens, d = q.shape
    kv_heads, dv_size = k.shape[1], v.shape[3]
    shift = dlse.detach() - (wide_dout * widened(out)).sum(-1)
    lanes = REGISTER_BYTES // wide.element_size()
    padded = [-(-n // lanes) * lanes for n in (d, dv_size)]
    axes, runs = plan(grid)
    shares = shares_of(batch * kv_heads, len(runs))
    dq = torch.empty(batch, heads, tokens, d, dtype=wide.dtype)
    dk, dv = (torch.zeros(shares, batch, kv_heads, k.shape[2], n, dtype=wide.dtype) for n in padded)
    arguments = [
        wide.numpy(), widened(k).numpy(), widened(v).numpy(), wide_dout.numpy(),
        lse.detach().numpy(),
        shift.numpy(), dq.numpy(), dk.numpy(), dv.numpy(), scale, axes, runs,
    ]  # fmt: skip
    work = 2 * batch * heads * tokens * window_size(grid) * (d + dv_size)
    run_parts(
        numba_fused.backward_kernel(number_type(wide)), arguments, shares * batch * kv_heads, work,
        wide.dtype, numba_fused.backward_scratch(*padded),
        2 * most_spans(grid, k.shape[2] - tokens),
    )  # fmt: skip
    dk, dv = dk.sum(0)[..., :d], dv.sum(0)[..., :dv_size]
    return dq.to(q.dtype), dk.to(k.dtype).contiguous(), dv.to(v.dtype).contiguous()


def scores(q: Tensor, k: Tensor, grid: Grid, scale: float) -> Tensor:
    """Scaled scores (batch, heads, tokens, window) in window order, -inf where nothing is."""
    wide = widened(q)
    s = torch.full((*q.shape[:3], window_size(grid)), -math.inf, dtype=wide.dtype)
    queries = (wide * scale).numpy()
    operands = [queries, widened(k).numpy(), s.numpy(), empty(queries)]
    _unfused(numba_unfused.SCORES, operands, grid, wide, q.shape[0] * q.shape[1])
    return s.to(q.dtype)


def values(p: Tensor, v: Tensor, grid: Grid, scale: float) -> Tensor:
    """scale * weighted values (batch, heads, tokens, dv) of each window."""
    wide = widened(p)
    out = torch.zeros(*p.shape[:3], v.shape[3], dtype=wide.dtype)
    operands = [empty(wide.numpy()), widened(v).numpy(), wide.numpy(), out.numpy()]
    _unfused(numba_unfused.VALUES, operands, grid, wide, p.shape[0] * p.shape[1])
    return (out * scale).to(p.dtype)


def keys(p: Tensor, x: Tensor, grid: Grid, kv_heads: int, scale: float) -> Tensor:
    """scale * the weighted rows (batch, kv_heads, tokens, width) that see each key."""
    wide = widened(p)
    out = torch.zeros(x.shape[0], kv_heads, *x.shape[2:], dtype=wide.dtype)
    operands = [widened(x).numpy(), empty(wide.numpy()), wide.numpy(), out.numpy()]
    _unfused(numba_unfused.KEYS, operands, grid, wide, x.shape[0] * kv_heads)
    return (out * scale).to(x.dtype)


def _unfused(kind: int, operands: list[Any], grid: Grid, wide: Tensor, tasks: int) -> None:
    axes, runs = plan(grid)
    windows, width = operands[2], max(x.shape[3] for x in (operands[0], operands[1], operands[3]))
    run_parts(
        numba_unfused.unfused_kernel(number_type(wide)), [kind, *operands, axes, runs], tasks,
        windows.size * width, wide.dtype, 1, 1,
    )  # fmt: skip
