"""The columns kernels on the CPU.

float16 and bfloat16 tensors are widened to float32; float64 stays float64. A tile of keys is
copied and transposed once, so any strides are read, and serves all rows of its head group.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from attnspec.fast.backend import count_launch
from attnspec.fast.engines.numba_math import exp

# Reordered sums vectorise; NaN and Inf keep their meaning. NumPy's error model divides without a
# check for zero, which would keep a loop scalar.
FAST = {"contract", "reassoc", "nsz", "arcp", "afn"}
KEYS = 128
ROWS = 16


def _array(x: Tensor) -> np.ndarray:
    """`x` as an array, widened if NumPy or the kernels lack its dtype."""
    return (x.float() if x.dtype in (torch.float16, torch.bfloat16) else x).numpy()


def _real_keys(key_mask: Tensor | None, k: Tensor) -> np.ndarray:
    if key_mask is None:
        return np.ones((k.shape[0], k.shape[2]), np.bool_)
    return key_mask.numpy()


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def _load_keys(k: np.ndarray, start: int, stop: int, tile: np.ndarray) -> None:
    """Columns start..stop of one head's keys (tokens, d) into `tile` (d + padding, keys)."""
    d = k.shape[1]
    tile[d:] = 0
    for j in range(start, stop):
        for c in range(d):
            tile[c, j - start] = k[j, c]


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def _load_rows(q: np.ndarray, start: int, stop: int, tile: np.ndarray) -> None:
    """Rows start..stop of one head's queries into `tile` (rows, d + padding)."""
    tile[:] = 0
    for i in range(start, stop):
        for c in range(q.shape[1]):
            tile[i - start, c] = q[i, c]


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def _products(rows: np.ndarray, keys: np.ndarray, count: int, width: int, out: np.ndarray) -> None:
    """out[:count, :width] = rows @ keys, four channels to a pass."""
    for m in range(count):
        line = out[m]
        line[:width] = 0
        for c in range(0, rows.shape[1], 4):
            a0, a1, a2, a3 = rows[m, c], rows[m, c + 1], rows[m, c + 2], rows[m, c + 3]
            k0, k1, k2, k3 = keys[c], keys[c + 1], keys[c + 2], keys[c + 3]
            for j in range(width):
                line[j] += a0 * k0[j] + a1 * k1[j] + a2 * k2[j] + a3 * k3[j]


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def _add_tile(
    products: np.ndarray, width: int, m: int, scale: float, top: np.ndarray, total: np.ndarray
) -> None:
    """Row m's largest product and sum of exp(scale * (product - largest)), one tile further."""
    best = top[m]
    for j in range(width):
        best = max(best, products[m, j])
    if best == -np.inf:
        return
    total[m] *= exp((top[m] - best) * scale)
    for j in range(width):
        total[m] += exp((products[m, j] - best) * scale)
    top[m] = best


@njit(cache=True, nogil=True, parallel=True, fastmath=FAST, error_model="numpy")
def _row_norms(
    q: np.ndarray,
    k: np.ndarray,
    real: np.ndarray,
    scale: float,
    causal: bool,
    top: np.ndarray,
    total: np.ndarray,
) -> None:
    batch, heads, rows, d = q.shape
    columns, group = k.shape[2], heads // k.shape[1]
    shift, padded = columns - rows, -(-d // 4) * 4
    chunks = -(-rows // ROWS)
    for index in prange(batch * heads * chunks):
        b, h = index // (heads * chunks), index // chunks % heads
        first = index % chunks * ROWS
        last = min(rows, first + ROWS)
        queries = np.empty((ROWS, padded), q.dtype)
        keys = np.empty((padded, KEYS), q.dtype)
        products = np.empty((ROWS, KEYS), q.dtype)
        _load_rows(q[b, h], first, last, queries)
        limit = max(0, min(columns, last + shift)) if causal else columns
        for start in range(0, limit, KEYS):
            stop = min(limit, start + KEYS)
            _load_keys(k[b, h // group], start, stop, keys)
            _products(queries, keys, last - first, stop - start, products)
            for m in range(last - first):
                for j in range(start, stop):
                    if not real[b, j] or (causal and j > first + m + shift):
                        products[m, j - start] = -np.inf
                row = slice(first, last)
                _add_tile(products, stop - start, m, scale, top[b, h, row], total[b, h, row])


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def _add_weights(
    products: np.ndarray, width: int, norm: float, total: float, scale: float, raw: bool,
    out: np.ndarray,
) -> None:  # fmt: skip
    """Add one row's weights to `out`: norm is an lse, or (raw) its largest product."""
    if norm == -np.inf:
        return
    if raw:
        for j in range(width):
            out[j] += exp((products[j] - norm) * scale) / total
    else:
        for j in range(width):
            out[j] += exp(products[j] * scale - norm)


@njit(cache=True, nogil=True, parallel=True, fastmath=FAST, error_model="numpy")
def _weights(
    q: np.ndarray,
    k: np.ndarray,
    norm: np.ndarray,
    total: np.ndarray,
    real: np.ndarray,
    scale: float,
    causal: bool,
    raw: bool,
    summed: bool,
    out: np.ndarray,
) -> None:
    """Add the weights to `out` (batch, heads, rows, columns), or `summed` (.., 1, columns)."""
    batch, heads, rows, d = q.shape
    kv_heads, columns = k.shape[1], out.shape[3]
    group, shift, padded = heads // kv_heads, k.shape[2] - rows, -(-d // 4) * 4
    tiles = -(-columns // KEYS)
    for index in prange(batch * kv_heads * tiles):
        b, kv_head = index // (kv_heads * tiles), index // tiles % kv_heads
        start = index % tiles * KEYS
        stop = min(columns, start + KEYS)
        queries = np.empty((ROWS, padded), q.dtype)
        keys = np.empty((padded, KEYS), q.dtype)
        products = np.empty((ROWS, KEYS), q.dtype)
        _load_keys(k[b, kv_head], start, stop, keys)
        for h in range(kv_head * group, kv_head * group + group):
            for first in range(max(0, start - shift) if causal else 0, rows, ROWS):
                last = min(rows, first + ROWS)
                _load_rows(q[b, h], first, last, queries)
                _products(queries, keys, last - first, stop - start, products)
                for m in range(last - first):
                    row = first + m
                    seen = min(stop, row + shift + 1) if causal else stop
                    line = out[b, h, 0 if summed else row, start:stop]
                    _add_weights(
                        products[m], seen - start, norm[b, h, row], total[b, h, row], scale, raw,
                        line,
                    )  # fmt: skip
            for j in range(start, stop):
                if not real[b, j]:
                    out[b, h, :, j] = 0


@njit(cache=True, nogil=True, parallel=True, fastmath=FAST, error_model="numpy")
def _block_max(
    q: np.ndarray, k: np.ndarray, block: int, scale: float, causal: bool, out: np.ndarray
) -> None:
    batch, heads, rows, d = q.shape
    columns, group = k.shape[2], heads // k.shape[1]
    shift, padded = columns - rows, -(-d // 4) * 4
    row_blocks, column_blocks = out.shape[2], out.shape[3]
    for index in prange(batch * heads * row_blocks):
        b, h = index // (heads * row_blocks), index // row_blocks % heads
        r = index % row_blocks
        first, last = r * block, min(rows, r * block + block)
        queries = np.empty((block, padded), q.dtype)
        keys = np.empty((padded, block), q.dtype)
        products = np.empty((block, block), q.dtype)
        top = np.full(block, -np.inf, q.dtype)
        total = np.zeros(block, q.dtype)
        _load_rows(q[b, h], first, last, queries)
        # The first sweep finds the norms of the rows, the second the largest weights.
        for sweep in range(2):
            for c in range(column_blocks):
                start, stop = c * block, min(columns, c * block + block)
                best = q.dtype.type(0)
                if not causal or start <= last - 1 + shift:
                    _load_keys(k[b, h // group], start, stop, keys)
                    _products(queries, keys, last - first, stop - start, products)
                    for m in range(last - first):
                        seen = min(stop, first + m + shift + 1) if causal else stop
                        if sweep == 0:
                            _add_tile(products, seen - start, m, scale, top, total)
                        elif seen > start:
                            largest = products[m, 0]
                            for j in range(1, seen - start):
                                largest = max(largest, products[m, j])
                            best = max(best, exp((largest - top[m]) * scale) / total[m])
                if sweep == 1:
                    out[b, h, r, c] = best


@njit(cache=True, nogil=True, parallel=True, error_model="numpy")
def _smooth(s: np.ndarray, half: int, average: bool, mean: bool, out: np.ndarray) -> None:
    batch, heads, n = out.shape
    group, width = s.shape[1] // heads, 2 * half + 1
    for index in prange(batch * heads):
        b, h = index // heads, index % heads
        for g in range(group):
            row = s[b, h * group + g]
            for j in range(n):
                first, last = max(0, j - half), min(n, j + half + 1)
                value = row[first]
                for t in range(first + 1, last):
                    value = value + row[t] if average else max(value, row[t])
                if average:
                    value /= width
                if g == 0:
                    out[b, h, j] = value
                elif mean:
                    out[b, h, j] += value
                else:
                    out[b, h, j] = max(out[b, h, j], value)
        if mean:
            for j in range(n):
                out[b, h, j] /= group


def row_norms(
    q: Tensor, k: Tensor, key_mask: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    query = _array(q)
    top, total = (
        np.full(query.shape[:3], -np.inf, query.dtype),
        np.zeros(query.shape[:3], query.dtype),
    )
    real = _real_keys(key_mask, k)
    count_launch()
    _row_norms(query, _array(k), real, query.dtype.type(scale), causal, top, total)
    return torch.from_numpy(top), torch.from_numpy(total)


def _run_weights(
    q: Tensor, k: Tensor, norm: Tensor, total: Tensor | None, key_mask: Tensor | None,
    scale: float, causal: bool, out: np.ndarray, summed: bool,
) -> Tensor:  # fmt: skip
    raw, query, real = total is not None, _array(q), _real_keys(key_mask, k)
    totals = (norm if total is None else total).numpy()
    scale = out.dtype.type(scale)
    count_launch()
    _weights(query, _array(k), norm.numpy(), totals, real, scale, causal, raw, summed, out)
    return torch.from_numpy(out)


def column_sums(
    q: Tensor, k: Tensor, norm: Tensor, total: Tensor | None, key_mask: Tensor | None,
    scale: float, causal: bool, columns: int,
) -> Tensor:  # fmt: skip
    out = np.zeros((*q.shape[:2], 1, columns), _array(q).dtype)
    return _run_weights(q, k, norm, total, key_mask, scale, causal, out, True)[:, :, 0]


def weight_rows(
    q: Tensor, k: Tensor, norm: Tensor, total: Tensor | None, key_mask: Tensor | None,
    scale: float, causal: bool,
) -> Tensor:  # fmt: skip
    out = np.zeros((*q.shape[:3], k.shape[2]), _array(q).dtype)
    return _run_weights(q, k, norm, total, key_mask, scale, causal, out, False)


def block_max(q: Tensor, k: Tensor, block: int, scale: float, causal: bool) -> Tensor:
    query = _array(q)
    rows, columns = -(-q.shape[2] // block), -(-k.shape[2] // block)
    out = np.zeros((*query.shape[:2], rows, columns), query.dtype)
    count_launch()
    _block_max(query, _array(k), block, query.dtype.type(scale), causal, out)
    return torch.from_numpy(out)


def smooth(s: Tensor, width: int, kind: str, heads: int, reduce: str) -> Tensor:
    source = _array(s)
    out = np.empty((source.shape[0], heads, source.shape[2]), source.dtype)
    count_launch()
    _smooth(source, width // 2, kind == "avg", reduce == "mean", out)
    return torch.from_numpy(out).to(s.dtype)
