"""The columns kernels on the CPU.

float16 and bfloat16 tensors are widened to float32; float64 stays float64. A tile of keys is
copied and transposed once, so any strides are read, and serves all rows of its head group.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from attnspec.fast.backend import count_launch
from attnspec.fast.engines.numba_math import exp

# Reordered sums vectorise; NaN and Inf keep their meaning.
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


@njit(cache=True, nogil=True, fastmath=FAST)
def _load_keys(k: np.ndarray, start: int, stop: int, tile: np.ndarray) -> None:
    """Columns start..stop of one head's keys (tokens, d) into `tile` (d + padding, keys)."""
    d = k.shape[1]
    tile[d:] = 0
    for j in range(start, stop):
        for c in range(d):
            tile[c, j - start] = k[j, c]


@njit(cache=True, nogil=True, fastmath=FAST)
def _load_rows(q: np.ndarray, start: int, stop: int, scale: float, tile: np.ndarray) -> None:
    """Rows start..stop of one head's queries, scaled, into `tile` (rows, d + padding)."""
    tile[:] = 0
    for i in range(start, stop):
        for c in range(q.shape[1]):
            tile[i - start, c] = scale * q[i, c]


@njit(cache=True, nogil=True, fastmath=FAST)
def _logits(rows: np.ndarray, keys: np.ndarray, count: int, width: int, out: np.ndarray) -> None:
    """out[:count, :width] = rows @ keys, four channels to a pass."""
    for m in range(count):
        line = out[m]
        line[:width] = 0
        for c in range(0, rows.shape[1], 4):
            a0, a1, a2, a3 = rows[m, c], rows[m, c + 1], rows[m, c + 2], rows[m, c + 3]
            k0, k1, k2, k3 = keys[c], keys[c + 1], keys[c + 2], keys[c + 3]
            for j in range(width):
                line[j] += a0 * k0[j] + a1 * k1[j] + a2 * k2[j] + a3 * k3[j]


@njit(cache=True, nogil=True, parallel=True, fastmath=FAST)
def _row_lse(
    q: np.ndarray, k: np.ndarray, real: np.ndarray, scale: float, causal: bool, out: np.ndarray
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
        logits = np.empty((ROWS, KEYS), q.dtype)
        top = np.full(ROWS, -np.inf, q.dtype)
        total = np.zeros(ROWS, q.dtype)
        _load_rows(q[b, h], first, last, scale, queries)
        limit = max(0, min(columns, last + shift)) if causal else columns
        for start in range(0, limit, KEYS):
            stop = min(limit, start + KEYS)
            _load_keys(k[b, h // group], start, stop, keys)
            _logits(queries, keys, last - first, stop - start, logits)
            for m in range(last - first):
                best = top[m]
                for j in range(start, stop):
                    if not real[b, j] or (causal and j > first + m + shift):
                        logits[m, j - start] = -np.inf
                    best = max(best, logits[m, j - start])
                if best == -np.inf:
                    continue
                total[m] *= exp(top[m] - best)
                for j in range(stop - start):
                    total[m] += exp(logits[m, j] - best)
                top[m] = best
        for m in range(last - first):
            empty = top[m] == -np.inf
            out[b, h, first + m] = top[m] if empty else top[m] + math.log(total[m])


@njit(cache=True, nogil=True, parallel=True, fastmath=FAST)
def _column_sums(
    q: np.ndarray,
    k: np.ndarray,
    lse: np.ndarray,
    real: np.ndarray,
    scale: float,
    causal: bool,
    out: np.ndarray,
) -> None:
    batch, heads, rows, d = q.shape
    kv_heads, columns = k.shape[1], out.shape[2]
    group, shift, padded = heads // kv_heads, k.shape[2] - rows, -(-d // 4) * 4
    tiles = -(-columns // KEYS)
    for index in prange(batch * kv_heads * tiles):
        b, kv_head = index // (kv_heads * tiles), index // tiles % kv_heads
        start = index % tiles * KEYS
        stop = min(columns, start + KEYS)
        queries = np.empty((ROWS, padded), q.dtype)
        keys = np.empty((padded, KEYS), q.dtype)
        logits = np.empty((ROWS, KEYS), q.dtype)
        _load_keys(k[b, kv_head], start, stop, keys)
        for h in range(kv_head * group, kv_head * group + group):
            for first in range(max(0, start - shift) if causal else 0, rows, ROWS):
                last = min(rows, first + ROWS)
                _load_rows(q[b, h], first, last, scale, queries)
                _logits(queries, keys, last - first, stop - start, logits)
                for m in range(last - first):
                    norm = lse[b, h, first + m]
                    seen = min(stop, first + m + shift + 1) if causal else stop
                    if norm > -np.inf:
                        for j in range(start, seen):
                            out[b, h, j] += exp(logits[m, j - start] - norm)
            for j in range(start, stop):
                if not real[b, j]:
                    out[b, h, j] = 0


@njit(cache=True, nogil=True, parallel=True, fastmath=FAST)
def _weight_rows(
    q: np.ndarray,
    k: np.ndarray,
    lse: np.ndarray,
    real: np.ndarray,
    scale: float,
    causal: bool,
    out: np.ndarray,
) -> None:
    batch, heads, rows, d = q.shape
    columns, group = k.shape[2], heads // k.shape[1]
    shift, padded = columns - rows, -(-d // 4) * 4
    tiles = -(-columns // KEYS)
    for index in prange(batch * heads * tiles):
        b, h = index // (heads * tiles), index // tiles % heads
        start = index % tiles * KEYS
        stop = min(columns, start + KEYS)
        queries = np.empty((ROWS, padded), q.dtype)
        keys = np.empty((padded, KEYS), q.dtype)
        logits = np.empty((ROWS, KEYS), q.dtype)
        _load_keys(k[b, h // group], start, stop, keys)
        for first in range(0, rows, ROWS):
            last = min(rows, first + ROWS)
            _load_rows(q[b, h], first, last, scale, queries)
            _logits(queries, keys, last - first, stop - start, logits)
            for m in range(last - first):
                norm = lse[b, h, first + m]
                for j in range(start, stop):
                    hidden = not real[b, j] or (causal and j > first + m + shift)
                    if hidden or norm == -np.inf:
                        out[b, h, first + m, j] = 0
                    else:
                        out[b, h, first + m, j] = exp(logits[m, j - start] - norm)


@njit(cache=True, nogil=True, parallel=True, fastmath=FAST)
def _block_max(
    q: np.ndarray,
    k: np.ndarray,
    lse: np.ndarray,
    block: int,
    scale: float,
    causal: bool,
    out: np.ndarray,
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
        logits = np.empty((block, block), q.dtype)
        _load_rows(q[b, h], first, last, scale, queries)
        for c in range(column_blocks):
            start, stop = c * block, min(columns, c * block + block)
            best = -np.inf
            if not causal or start <= last - 1 + shift:
                _load_keys(k[b, h // group], start, stop, keys)
                _logits(queries, keys, last - first, stop - start, logits)
                for m in range(last - first):
                    norm = lse[b, h, first + m]
                    seen = min(stop, first + m + shift + 1) if causal else stop
                    if norm > -np.inf:
                        for j in range(start, seen):
                            best = max(best, logits[m, j - start] - norm)
            out[b, h, r, c] = exp(best)


@njit(cache=True, nogil=True, parallel=True)
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


def row_lse(q: Tensor, k: Tensor, key_mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    query = _array(q)
    out = np.empty(query.shape[:3], query.dtype)
    count_launch()
    _row_lse(query, _array(k), _real_keys(key_mask, k), query.dtype.type(scale), causal, out)
    return torch.from_numpy(out)


def column_sums(
    q: Tensor, k: Tensor, lse: Tensor, key_mask: Tensor | None, scale: float, causal: bool,
    columns: int,
) -> Tensor:  # fmt: skip
    query, real = _array(q), _real_keys(key_mask, k)
    out = np.zeros((*query.shape[:2], columns), query.dtype)
    count_launch()
    _column_sums(query, _array(k), lse.numpy(), real, query.dtype.type(scale), causal, out)
    return torch.from_numpy(out)


def weight_rows(
    q: Tensor, k: Tensor, lse: Tensor, key_mask: Tensor | None, scale: float, causal: bool
) -> Tensor:
    query, real = _array(q), _real_keys(key_mask, k)
    out = np.empty((*query.shape[:3], k.shape[2]), query.dtype)
    count_launch()
    _weight_rows(query, _array(k), lse.numpy(), real, query.dtype.type(scale), causal, out)
    return torch.from_numpy(out)


def block_max(q: Tensor, k: Tensor, lse: Tensor, block: int, scale: float, causal: bool) -> Tensor:
    query = _array(q)
    rows, columns = -(-q.shape[2] // block), -(-k.shape[2] // block)
    out = np.empty((*query.shape[:2], rows, columns), query.dtype)
    count_launch()
    _block_max(query, _array(k), lse.numpy(), block, query.dtype.type(scale), causal, out)
    return torch.from_numpy(out)


def smooth(s: Tensor, width: int, kind: str, heads: int, reduce: str) -> Tensor:
    source = _array(s)
    out = np.empty((source.shape[0], heads, source.shape[2]), source.dtype)
    count_launch()
    _smooth(source, width // 2, kind == "avg", reduce == "mean", out)
    return torch.from_numpy(out).to(s.dtype)
