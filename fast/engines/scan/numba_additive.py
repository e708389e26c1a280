"""Gates of an additive recurrence and the summary of a sequence, on the CPU.

A head is a thread's work: rows one after the other, channels side by side in vector registers.
16-bit inputs are widened to float32 and results rounded back; float64 stays.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from attnspec.fast.backend import count_launch
from attnspec.fast.engines.flash.numba_lanes import REGISTER_BYTES, address, multiply
from attnspec.fast.engines.numba_math import exp
from attnspec.fast.engines.scan.numba_cpu import Spans, check_offsets

FLAGS = {"contract", "reassoc", "nsz", "arcp", "afn"}
ROWS = 64
"""Rows of a block of the summary."""


@njit(cache=True, nogil=True, error_model="numpy")
def _advance(k: Any, top: Any, total: Any, kbar: Any, log_decay: Any) -> None:
    """One row: its gates from the maximum and sum before it, which are moved on in place."""
    zero = k.dtype.type(0)
    for c in range(k.shape[0]):
        new, before = k[c], top[c]
        masked, first = new == -np.inf, total[c] == zero
        above = max(new, before) if new == new else before
        base = zero if above == -np.inf else above
        old, more = total[c] * np.exp(before - base), np.exp(new - base)
        kbar[c] = zero if masked else more / (old + more)
        unknown = kbar[c] != kbar[c]
        if first or masked or unknown:
            log_decay[c] = zero
        elif more < old:
            log_decay[c] = -np.log1p(more / old)
        else:
            log_decay[c] = -(np.log1p(old / more) + ((new - before) - np.log(total[c])))
        top[c], total[c] = above, old + more


@njit(cache=True, nogil=True, parallel=True, error_model="numpy")
def _gates(
    k: Any, top: Any, total: Any, kbar: Any, log_decay: Any, starts: Any, ends: Any, batches: Any
) -> None:
    """k (batch, heads, tokens, d); top and total (sequences, heads, d) come as those before the
    first tokens.
    """
    heads = k.shape[1]
    for row in prange(top.shape[0] * heads):
        n, head = row // heads, row % heads
        b = batches[n]
        for t in range(starts[n], ends[n]):
            _advance(
                k[b, head, t], top[n, head], total[n, head], kbar[b, head, t],
                log_decay[b, head, t],
            )  # fmt: skip


@njit(cache=True, nogil=True, parallel=True, error_model="numpy")
def _gates_backward(
    dkbar: Any, dlog_decay: Any, dz: Any, kbar: Any, log_decay: Any, dk: Any, starts: Any,
    ends: Any, batches: Any,
) -> None:  # fmt: skip
    """dk; dz (sequences, heads, d) comes as the gradient of the last z and leaves as that of the
    first.
    """
    zero, half = dk.dtype.type(0), dk.dtype.type(0.5)
    heads = dk.shape[1]
    for row in prange(dz.shape[0] * heads):
        n, h = row // heads, row % heads
        b = batches[n]
        for i in range(ends[n] - starts[n]):
            t = ends[n] - 1 - i
            for c in range(dk.shape[3]):
                gate, w = kbar[b, h, t, c], log_decay[b, h, t, c]
                fresh = w == zero and gate > half
                dw = zero if fresh else dlog_decay[b, h, t, c]
                above = dz[n, h, c] - dkbar[b, h, t, c] * gate - dw
                dk[b, h, t, c] = gate * (dkbar[b, h, t, c] + above)
                dz[n, h, c] = zero if fresh else np.exp(w) * above + dw


@njit(cache=True, nogil=True, parallel=True, error_model="numpy", fastmath=FLAGS)
def _summary(k, v, wide, KV, top, total):
    """k (rows, tokens, d), v (rows, tokens, e); total comes as zeros and top as -inf. KV (rows, d,
    wide) ends with columns that mean nothing, to fill vectors. Each block of rows is weighed by its
    own maximum, once, and multiplied in registers.
    """
    kind = KV.dtype
    zero = kind.type(0)
    tokens, d, e = k.shape[1], k.shape[2], v.shape[2]
    for row in prange(k.shape[0]):
        weights, values = np.empty((ROWS, d), kind), np.zeros((ROWS, wide), kind)
        sums, base = np.zeros((d, wide), kind), np.empty(d, kind)
        for first in range(0, tokens, ROWS):
            count = min(ROWS, tokens - first)
            base[:] = top[row]
            for t in range(count):
                for c in range(d):
                    base[c] = max(base[c], k[row, first + t, c])
                for j in range(e):
                    values[t, j] = v[row, first + t, j]
            for c in range(d):
                before, top[row, c] = top[row, c], base[c]
                base[c] = zero if base[c] == -np.inf else base[c]
                old = exp(before - base[c])
                total[row, c] *= old
                for j in range(wide):
                    sums[c, j] *= old
            for t in range(count):
                for c in range(d):
                    weights[t, c] = exp(k[row, first + t, c] - base[c])
                    total[row, c] += weights[t, c]
            multiply(
                address(weights), 1, d, address(values), wide, address(sums), wide, d, count, wide,
                False,
            )  # fmt: skip
        for c in range(d):
            share = zero if total[row, c] == zero else 1 / total[row, c]
            for j in range(wide):
                KV[row, c, j] = sums[c, j] * share


def _array(x: Tensor) -> np.ndarray:
    """x as float32 or float64, contiguous."""
    wide = x if x.dtype == torch.float64 else x.to(torch.float32)
    return np.asarray(wide.detach().contiguous().numpy())


def _rows(x: Tensor) -> np.ndarray:
    """x (batch, heads, ...) as float32 or float64 (batch * heads, ...), contiguous."""
    return _array(x.flatten(0, 1))


def _spans(x: Tensor, offsets: Tensor | None) -> tuple[np.ndarray, ...]:
    """First and end rows of the sequences of x (batch, heads, tokens, d), and their batches."""
    check_offsets(offsets, x.shape[2])
    spans = Spans.of(x.shape[0], x.shape[2], offsets)
    return spans.starts.numpy(), spans.ends.numpy(), spans.batches.numpy()


def gates(k: Tensor, z0: Tensor | None, offsets: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """kbar, log_decay (batch, heads, tokens, d) and z (sequences, heads, d)."""
    spans, rows = _spans(k, offsets), _array(k)
    shape = (len(spans[0]), k.shape[1], k.shape[3])
    top = np.full(shape, -np.inf, rows.dtype)
    if z0 is not None:
        top = _array(z0).astype(rows.dtype)
    total = np.where(np.isneginf(top), 0, 1).astype(rows.dtype)
    kbar, log_decay = np.empty_like(rows), np.empty_like(rows)
    count_launch()
    _gates(rows, top, total, kbar, log_decay, *spans)
    z = torch.from_numpy(top) + torch.from_numpy(total).log()
    return torch.from_numpy(kbar).to(k.dtype), torch.from_numpy(log_decay), z


def gates_backward(
    dkbar: Tensor, dlog_decay: Tensor, dz: Tensor, kbar: Tensor, log_decay: Tensor,
    offsets: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dk, and the gradient of z before the first row."""
    first, gate = _array(dz).copy(), _array(kbar)
    dk = np.empty_like(gate)
    count_launch()
    _gates_backward(
        _array(dkbar), _array(dlog_decay), first, gate, _array(log_decay), dk,
        *_spans(kbar, offsets),
    )  # fmt: skip
    return torch.from_numpy(dk).to(kbar.dtype), torch.from_numpy(first)


def summary(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """softmax_time(k)^T v (batch, heads, d, dv) and the logsumexp of k (batch, heads, d)."""
    batch, heads, _, d = k.shape
    keys, values = _rows(k), _rows(v)
    lanes = REGISTER_BYTES // keys.itemsize
    wide = -(-v.shape[3] // lanes) * lanes
    KV = np.empty((batch * heads, d, wide), keys.dtype)
    top = np.full((batch * heads, d), -np.inf, keys.dtype)
    total = np.zeros_like(top)
    count_launch()
    _summary(keys, values, wide, KV, top, total)
    z = torch.from_numpy(top) + torch.from_numpy(total).log()
    made = torch.from_numpy(np.ascontiguousarray(KV[..., : v.shape[3]]))
    return made.view(batch, heads, d, -1), z.view(batch, heads, d)


def summary_backward(
    dKV: Tensor, KV: Tensor, z: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """dk and dv, in torch: products of the whole sequence with small matrices."""
    z = torch.where(z == -torch.inf, 0.0, z)[:, :, None]
    P = torch.exp(k.to(z.dtype) - z)
    small = dKV.to(v.dtype)
    dv = P.to(v.dtype) @ small
    dP = v.to(z.dtype) @ small.mT.to(z.dtype)
    # Both terms see the same rounded dKV, so that they cancel where one key has all the weight.
    dk = P * (dP - (KV * small.to(z.dtype)).sum(-1)[:, :, None])
    return dk.to(k.dtype).contiguous(), dv.contiguous()


def product_over_time(x: Tensor, y: Tensor) -> Tensor:
    """The sums (batch, heads, d, dv) of x y^T over all rows."""
    return x.mT @ y
