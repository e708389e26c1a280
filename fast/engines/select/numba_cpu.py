"""The select kernels on the CPU.

float16 and bfloat16 tensors are widened to float32 and a result of that dtype is rounded back;
float64 stays float64. The kernels read any strides.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from attnspec.fast.backend import count_launch

# Reordered sums vectorise; NaN and Inf keep their meaning. NumPy's error model divides without a
# check for zero, which would keep a loop scalar.
FAST = {"contract", "reassoc", "nsz", "arcp", "afn"}

MAX, MIN, AVG = 0, 1, 2


def _array(x: Tensor) -> np.ndarray:
    """`x` as an array, widened if NumPy or the kernels lack its dtype."""
    x = x.detach()
    return (x.float() if x.dtype in (torch.float16, torch.bfloat16) else x).numpy()


@njit(cache=True, nogil=True, parallel=True, fastmath=FAST, error_model="numpy")
def _pool(x: np.ndarray, block: int, kinds: np.ndarray, out: np.ndarray) -> None:
    batch, heads, tokens, d = x.shape
    blocks = out.shape[2]
    for index in prange(batch * heads * blocks):
        b, h, n = index // (heads * blocks), index // blocks % heads, index % blocks
        start, stop = n * block, min(tokens, n * block + block)
        for slot in range(len(kinds)):
            row = out[b, h, n, slot * d : slot * d + d]
            kind = kinds[slot]
            for c in range(d):
                row[c] = x[b, h, start, c]
            for t in range(start + 1, stop):
                if kind == AVG:
                    for c in range(d):
                        row[c] += x[b, h, t, c]
                elif kind == MAX:
                    for c in range(d):
                        row[c] = max(row[c], x[b, h, t, c])
                else:
                    for c in range(d):
                        row[c] = min(row[c], x[b, h, t, c])
            if kind == AVG:
                for c in range(d):
                    row[c] /= stop - start


@njit(cache=True, nogil=True, parallel=True, error_model="numpy")
def _pool_backward(
    dout: np.ndarray, x: np.ndarray, block: int, kinds: np.ndarray, dx: np.ndarray
) -> None:
    batch, heads, tokens, d = x.shape
    blocks = dout.shape[2]
    for index in prange(batch * heads * blocks):
        b, h, n = index // (heads * blocks), index // blocks % heads, index % blocks
        start, stop = n * block, min(tokens, n * block + block)
        for slot in range(len(kinds)):
            for c in range(d):
                upstream = dout[b, h, n, slot * d + c]
                if kinds[slot] == AVG:
                    share = upstream / (stop - start)
                    for t in range(start, stop):
                        dx[b, h, t, c] += share
                else:
                    sign = 1 if kinds[slot] == MAX else -1
                    first = start
                    for t in range(start + 1, stop):
                        if sign * x[b, h, t, c] > sign * x[b, h, first, c]:
                            first = t
                    dx[b, h, first, c] += upstream


def pool(x: Tensor, block: int, kinds: list[int]) -> Tensor:
    batch, heads, tokens, d = x.shape
    source = _array(x)
    out = np.empty((batch, heads, -(-tokens // block), len(kinds) * d), source.dtype)
    count_launch()
    _pool(source, block, np.array(kinds), out)
    return torch.from_numpy(out).to(x.dtype)


def pool_backward(dout: Tensor, x: Tensor, block: int, kinds: list[int]) -> Tensor:
    source = _array(x)
    dx = np.zeros(source.shape, source.dtype)
    count_launch()
    _pool_backward(_array(dout), source, block, np.array(kinds), dx)
    return torch.from_numpy(dx).to(x.dtype)


@njit(cache=True, nogil=True, parallel=True, fastmath=FAST, error_model="numpy")
def _scores(
    q: np.ndarray, k: np.ndarray, scale: float, causal: bool, fill: float, out: np.ndarray
) -> None:
    batch, heads, rows, width = q.shape
    columns = k.shape[2]
    group, zero = heads // k.shape[1], scale * 0
    for index in prange(batch * heads * rows):
        b, h, r = index // (heads * rows), index // rows % heads, index % rows
        limit = max(0, min(columns, r + columns - rows + 1)) if causal else columns
        query, line = q[b, h, r], out[b, h, r]
        for c in range(limit):
            key = k[b, h // group, c]
            total = zero
            for e in range(width):
                total += query[e] * key[e]
            line[c] = total * scale
        for c in range(limit, columns):
            line[c] = fill


@njit(cache=True, nogil=True, parallel=True, fastmath=FAST, error_model="numpy")
def _scores_dq(dout: np.ndarray, k: np.ndarray, scale: float, causal: bool, dq: np.ndarray) -> None:
    batch, heads, rows, width = dq.shape
    columns = k.shape[2]
    group = heads // k.shape[1]
    for index in prange(batch * heads * rows):
        b, h, r = index // (heads * rows), index // rows % heads, index % rows
        limit = max(0, min(columns, r + columns - rows + 1)) if causal else columns
        for c in range(limit):
            weight, key = scale * dout[b, h, r, c], k[b, h // group, c]
            for e in range(width):
                dq[b, h, r, e] += weight * key[e]


@njit(cache=True, nogil=True, parallel=True, fastmath=FAST, error_model="numpy")
def _scores_dk(dout: np.ndarray, q: np.ndarray, scale: float, causal: bool, dk: np.ndarray) -> None:
    batch, kv_heads, columns, width = dk.shape
    heads, rows = q.shape[1:3]
    group = heads // kv_heads
    for index in prange(batch * kv_heads * columns):
        b, h, c = index // (kv_heads * columns), index // columns % kv_heads, index % columns
        first = max(0, c - (columns - rows)) if causal else 0
        for g in range(h * group, h * group + group):
            for r in range(first, rows):
                weight, query = scale * dout[b, g, r, c], q[b, g, r]
                for e in range(width):
                    dk[b, h, c, e] += weight * query[e]


def scores(q: Tensor, k: Tensor, scale: float, causal: bool, fill: float) -> Tensor:
    query, key = _array(q), _array(k)
    out = np.zeros((*query.shape[:3], key.shape[2]), query.dtype)
    count_launch()
    _scores(query, key, query.dtype.type(scale), causal, query.dtype.type(fill), out)
    return torch.from_numpy(out)


def scores_backward(
    dout: Tensor, q: Tensor, k: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    upstream, query, key = _array(dout), _array(q), _array(k)
    dq, dk = np.zeros(query.shape, query.dtype), np.zeros(key.shape, key.dtype)
    scale = query.dtype.type(scale)
    count_launch()
    _scores_dq(upstream, key, scale, causal, dq)
    count_launch()
    _scores_dk(upstream, query, scale, causal, dk)
    return torch.from_numpy(dq).to(q.dtype), torch.from_numpy(dk).to(k.dtype)


@njit(cache=True, nogil=True)
def _ordered(bits: Any, width: int) -> Any:
    """A float's bits as an unsigned key of the same order: NaN lowest, -0 equal to +0."""
    one = np.uint64(1)
    sign = one << np.uint64(width - 1)
    infinity = np.uint64(0x7F800000) if width == 32 else np.uint64(0x7FF0000000000000)
    magnitude = bits & (sign - one)
    if magnitude > infinity:
        return np.uint64(0)
    if magnitude == 0:
        return sign
    if bits & sign:
        return sign - magnitude
    return sign | magnitude


@njit(cache=True, nogil=True)
def _threshold(row: np.ndarray, k: int, width: int) -> tuple[Any, int]:
    """The k-th largest key of `row`, and how many entries equal to it are selected."""
    prefix, remaining = np.uint64(0), k
    counts = np.empty(256, np.int64)
    for shift in range(width - 8, -1, -8):
        counts[:] = 0
        for j in range(len(row)):
            key = _ordered(np.uint64(row[j]), width)
            if shift == width - 8 or key >> np.uint64(shift + 8) == prefix:
                counts[np.int64(key >> np.uint64(shift) & np.uint64(255))] += 1
        digit = 255
        while counts[digit] < remaining:
            remaining -= counts[digit]
            digit -= 1
        prefix = prefix << np.uint64(8) | np.uint64(digit)
    return prefix, remaining


@njit(cache=True, nogil=True, parallel=True, error_model="numpy")
def _top_k(bits: np.ndarray, k: int, width: int, index: np.ndarray, mask: np.ndarray) -> None:
    batch, heads, rows, n = bits.shape
    for line in prange(batch * heads * rows):
        b, h, r = line // (heads * rows), line // rows % heads, line % rows
        row = bits[b, h, r]
        threshold, ties = _threshold(row, k, width)
        found = 0
        for j in range(n):
            key = _ordered(np.uint64(row[j]), width)
            chosen = key > threshold
            if key == threshold and ties > 0:
                chosen = True
                ties -= 1
            if chosen:
                if index.shape[3]:
                    index[b, h, r, found] = j
                found += 1
            if mask.shape[3]:
                mask[b, h, r, j] = chosen


def _select(scores: Tensor, k: int, index: np.ndarray, mask: np.ndarray) -> None:
    values = _array(scores)
    width = 8 * values.dtype.itemsize
    count_launch()
    _top_k(values.view(np.uint64 if width == 64 else np.uint32), k, width, index, mask)


def top_k(scores: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    kind = np.int64 if dtype == torch.int64 else np.int32
    index = np.empty((*scores.shape[:3], k), kind)
    if k:
        _select(scores, k, index, np.empty((*scores.shape[:3], 0), np.bool_))
    return torch.from_numpy(index)


def top_k_mask(scores: Tensor, k: int) -> Tensor:
    mask = np.zeros(scores.shape, np.bool_)
    if k:
        _select(scores, k, np.empty((*scores.shape[:3], 0), np.int64), mask)
    return torch.from_numpy(mask)


@njit(cache=True, nogil=True, parallel=True, error_model="numpy")
def _mask_lists(mask: np.ndarray, index: np.ndarray, count: np.ndarray) -> None:
    batch, heads, rows, n = mask.shape
    for line in prange(batch * heads * rows):
        b, h, r = line // (heads * rows), line // rows % heads, line % rows
        found = 0
        for j in range(n):
            if mask[b, h, r, j]:
                index[b, h, r, found] = j
                found += 1
        index[b, h, r, found:] = 0
        count[b, h, r] = found


def mask_lists(mask: Tensor) -> tuple[Tensor, Tensor]:
    index, count = np.empty(mask.shape, np.int32), np.empty(mask.shape[:3], np.int32)
    count_launch()
    _mask_lists(mask.numpy(), index, count)
    return torch.from_numpy(index), torch.from_numpy(count)
