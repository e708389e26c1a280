"""The additive kernels on the CPU.

float16 and bfloat16 tensors are widened to float32 and gradients are rounded back; float64 stays
float64. The states are copied to rows of consecutive channels, along which the loops vectorise.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit, prange, types
from numba.extending import overload
from torch import Tensor

from attnspec.fast.backend import count_launch

# Reordered sums vectorise; NaN and Inf keep their meaning. NumPy's error model divides without a
# check for zero, which would keep a loop scalar.
FAST = {"contract", "reassoc", "nsz", "arcp", "afn"}


def _tanh(x):
    """tanh, in a form that vectorises for float32."""
    raise NotImplementedError


@overload(_tanh, jit_options={"fastmath": FAST, "error_model": "numpy"})
def _tanh_overload(x):
    if x != types.float32:
        return lambda x: math.tanh(x)

    def rational(x):
        x = min(max(x, np.float32(-9.02)), np.float32(9.02))
        z = x * x
        p = np.float32(1.331911527950787e-08) * z + np.float32(2.0583515509376204e-05)
        p = (p * z + np.float32(0.0034940367726273365)) * z + np.float32(0.1337971985063695)
        r = np.float32(7.76203805407658e-07) * z + np.float32(0.00032830963646481254)
        r = (r * z + np.float32(0.025871081760678306)) * z + np.float32(0.4671303509484219)
        return x * (p * z + np.float32(1)) / (r * z + np.float32(1))

    return rational


def _array(x: Tensor) -> np.ndarray:
    """`x` as a contiguous array, widened if NumPy or the kernels lack its dtype."""
    x = x.detach()
    return (x.float() if x.dtype in (torch.float16, torch.bfloat16) else x).contiguous().numpy()


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def _score(k: np.ndarray, q: np.ndarray, v: np.ndarray) -> float:
    total = v[0] * 0
    for a in range(len(v)):
        total += v[a] * _tanh(q[a] + k[a])
    return total


@njit(cache=True, nogil=True, parallel=True, error_model="numpy")
def _scores(k: np.ndarray, q: np.ndarray, v: np.ndarray, out: np.ndarray) -> None:
    batch, steps, slots = out.shape
    for index in prange(batch * steps):
        b, i = index // steps, index % steps
        for j in range(slots):
            out[b, i, j] = _score(k[b, j], q[b, i], v)


@njit(cache=True, nogil=True, parallel=True, error_model="numpy")
def _lse(
    k: np.ndarray,
    q: np.ndarray,
    v: np.ndarray,
    target: np.ndarray,
    mask: np.ndarray,
    masked: bool,
    lse: np.ndarray,
    score: np.ndarray,
) -> None:
    batch, steps = lse.shape
    slots = k.shape[1]
    for index in prange(batch * steps):
        b, i = index // steps, index % steps
        row = np.full(slots, -np.inf, q.dtype)
        for j in range(slots):
            if not masked or mask[b, i, j]:
                row[j] = _score(k[b, j], q[b, i], v)
        top = -np.inf
        for j in range(slots):
            top = max(top, row[j])
        total = 0.0
        if top > -np.inf:
            for j in range(slots):
                total += math.exp(row[j] - top)
        lse[b, i] = top + math.log(total) if total > 0 else -np.inf
        score[b, i] = row[target[b, i]]


@njit(cache=True, nogil=True, parallel=True, error_model="numpy")
def _score_gradients(
    dlse: np.ndarray,
    dscore: np.ndarray,
    lse: np.ndarray,
    k: np.ndarray,
    q: np.ndarray,
    v: np.ndarray,
    target: np.ndarray,
    mask: np.ndarray,
    masked: bool,
    out: np.ndarray,
) -> None:
    batch, steps, slots = out.shape
    for index in prange(batch * steps):
        b, i = index // steps, index % steps
        for j in range(slots):
            out[b, i, j] = 0
            if lse[b, i] > -np.inf and (not masked or mask[b, i, j]):
                weight = math.exp(_score(k[b, j], q[b, i], v) - lse[b, i])
                out[b, i, j] = dlse[b, i] * weight
                if j == target[b, i]:
                    out[b, i, j] += dscore[b, i]


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def _add_gradient(
    upstream: float, k: np.ndarray, q: np.ndarray, dq: np.ndarray, dv: np.ndarray
) -> None:
    for a in range(len(k)):
        hidden = _tanh(q[a] + k[a])
        dq[a] += upstream * (1 - hidden * hidden)
        dv[a] += upstream * hidden


@njit(cache=True, nogil=True, parallel=True, error_model="numpy")
def _gradients(
    dout: np.ndarray, k: np.ndarray, q: np.ndarray, v: np.ndarray, dq: np.ndarray, dv: np.ndarray
) -> None:
    """Gradients of q, and of v row by row; with the roles exchanged, those of k."""
    batch, rows, columns = dout.shape
    for index in prange(batch * rows):
        b, i = index // rows, index % rows
        for j in range(columns):
            # An upstream of exactly 0 means that the pair is not read (K11).
            if dout[b, i, j] != 0:
                _add_gradient(dout[b, i, j], k[b, j], q[b, i], dq[b, i], dv[b, i])
        for a in range(len(v)):
            dq[b, i, a] *= v[a]


def scores(k: Tensor, q: Tensor, v: Tensor) -> Tensor:
    keys, queries = _array(k), _array(q)
    out = np.zeros((*queries.shape[:2], keys.shape[1]), queries.dtype)
    if len(v):
        count_launch()
        _scores(keys, queries, _array(v), out)
    return torch.from_numpy(out)


def _mask(mask: Tensor | None) -> np.ndarray:
    return np.ones((1, 1, 1), np.bool_) if mask is None else mask.numpy()


def lse(
    k: Tensor, q: Tensor, v: Tensor, target: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    queries = _array(q)
    out, score = (np.empty(queries.shape[:2], queries.dtype) for _ in range(2))
    count_launch()
    _lse(_array(k), queries, _array(v), target.numpy(), _mask(mask), mask is not None, out, score)
    return torch.from_numpy(out), torch.from_numpy(score)


def score_gradients(
    dlse: Tensor, dscore: Tensor, lse: Tensor, k: Tensor, q: Tensor, v: Tensor, target: Tensor,
    mask: Tensor | None,
) -> Tensor:  # fmt: skip
    queries, keys = _array(q), _array(k)
    out = np.empty((*queries.shape[:2], keys.shape[1]), queries.dtype)
    count_launch()
    _score_gradients(
        _array(dlse), _array(dscore), _array(lse), keys, queries, _array(v), target.numpy(),
        _mask(mask), mask is not None, out,
    )  # fmt: skip
    return torch.from_numpy(out)


def gradients(dout: Tensor, k: Tensor, q: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    upstream, keys, queries, vector = (_array(x) for x in (dout, k, q, v))
    dk, dk_v = np.zeros(keys.shape, keys.dtype), np.zeros(keys.shape, keys.dtype)
    dq, dq_v = np.zeros(queries.shape, keys.dtype), np.zeros(queries.shape, keys.dtype)
    count_launch()
    _gradients(upstream, keys, queries, vector, dq, dq_v)
    count_launch()
    _gradients(upstream.swapaxes(1, 2), queries, keys, vector, dk, dk_v)
    dv = torch.from_numpy(dq_v).sum((0, 1))
    return torch.from_numpy(dk).to(k.dtype), torch.from_numpy(dq).to(q.dtype), dv.to(v.dtype)
