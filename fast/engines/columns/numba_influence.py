"""The influence of blocks on the CPU, a block of rows a task.

float16 and bfloat16 tensors are widened to float32; float64 stays float64.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from attnspec.fast.backend import count_launch
from attnspec.fast.engines.columns.numba_cpu import (
    FAST,
    _array,
    _load_keys,
    _load_rows,
    _products,
)
from attnspec.fast.engines.numba_math import exp


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def _add_row(
    products: np.ndarray, slopes: np.ndarray, seen: int, scale: float, sums: np.ndarray
) -> None:
    """A row's largest product, sum of e = exp(scale (product - largest)) and of e slope, one tile
    further: `sums` (3).
    """
    best = sums[0]
    for j in range(seen):
        best = max(best, products[j])
    factor = exp((sums[0] - best) * scale)
    total, slope = sums[1] * factor, sums[2] * factor
    for j in range(seen):
        e = exp((products[j] - best) * scale)
        total += e
        slope += e * slopes[j]
    sums[0], sums[1], sums[2] = best, total, slope


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def _row_influence(
    products: np.ndarray, slopes: np.ndarray, seen: int, scale: float, eps: float,
    sums: np.ndarray, first: bool,
) -> float:  # fmt: skip
    """The sum of the influence of a row's entries in a tile; `first` says that it is row 0."""
    best, share = sums[0], 1 / sums[1]
    mean = sums[2] * share
    total = products.dtype.type(0)
    for j in range(seen):
        weight = exp((products[j] - best) * scale) * share
        rest = 1 - weight + eps
        alone = first or rest == 0
        change = slopes[j] if alone else (slopes[j] - mean) / rest
        total += abs(weight * change)
    return total


@njit(cache=True, nogil=True, parallel=True, fastmath=FAST, error_model="numpy")
def _block_influence(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, g: np.ndarray, block: int, scale: float,
    eps: float, out: np.ndarray,
) -> None:  # fmt: skip
    batch, heads, _, d = q.shape
    dv, group, blocks = v.shape[3], heads // k.shape[1], out.shape[2]
    kind, wide, wide_v = q.dtype, -(-d // 4) * 4, -(-dv // 4) * 4
    for task in prange(batch * heads * blocks):
        # Late blocks of rows have the most to do.
        r = blocks - 1 - task // (batch * heads)
        b, h = task % (batch * heads) // heads, task % heads
        first = r * block
        queries, upstream = np.empty((block, wide), kind), np.empty((block, wide_v), kind)
        keys, values = np.empty((wide, block), kind), np.empty((wide_v, block), kind)
        products, slopes = np.empty((block, block), kind), np.empty((block, block), kind)
        sums = np.zeros((block, 3), kind)
        sums[:, 0] = -np.inf
        _load_rows(q[b, h], first, first + block, queries)
        _load_rows(g[b, h], first, first + block, upstream)
        # The first sweep finds the sums of the rows, the second the influence of the blocks.
        for sweep in range(2):
            for column in range(r + 1):
                start = column * block
                _load_keys(k[b, h // group], start, start + block, keys)
                _load_keys(v[b, h // group], start, start + block, values)
                _products(queries, keys, block, block, products)
                _products(upstream, values, block, block, slopes)
                total = kind.type(0)
                for m in range(block):
                    seen = min(block, first + m + 1 - start)
                    if sweep == 0:
                        _add_row(products[m], slopes[m], seen, scale, sums[m])
                    else:
                        total += _row_influence(
                            products[m], slopes[m], seen, scale, eps, sums[m], first + m == 0
                        )
                if sweep == 1:
                    out[b, h, r, column] = total


def block_influence(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, block: int, eps: float, scale: float
) -> Tensor:
    query, key, value, upstream = (_array(x) for x in (q, k, v, g))
    blocks, number = q.shape[2] // block, query.dtype.type
    out = np.zeros((*query.shape[:2], blocks, blocks), query.dtype)
    count_launch()
    _block_influence(query, key, value, upstream, block, number(scale), number(eps), out)
    return torch.from_numpy(out)
