"""The CPU kernels of the Taylor engine: pairs within ranges of keys, and one decoded token.

Query row i meets the keys lo[i] .. hi[i] - 1, neither of which decreases; row_lo and row_hi are the
rows that meet a key. All arrays are contiguous and of one float dtype, the arithmetic's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange

KEYS = 64
"""Keys whose scores are formed at once."""

options: Any = {
    "cache": True,
    "nogil": True,
    "parallel": True,
    "fastmath": {"contract", "reassoc", "nsz", "arcp"},
}


@njit(**options)
def near_forward(q, kT, v, real, lo, hi, scale, num, den):
    """num (batch, heads, rows, dv) and den (batch, heads, rows); kT (batch, kv_heads, d, keys)."""
    batch, heads, rows, d = q.shape
    group, dv = heads // v.shape[1], v.shape[3]
    one = q.dtype.type(1)
    half = q.dtype.type(0.5)
    for task in prange(batch * heads * rows):
        b, h, i = task // (heads * rows), task // rows % heads, task % rows
        kv = h // group
        w = np.empty(KEYS, q.dtype)
        total = np.zeros(dv, q.dtype)
        mass = q.dtype.type(0)
        for j0 in range(lo[i], hi[i], KEYS):
            n = min(KEYS, hi[i] - j0)
            w[:] = 0
            for c in range(d):
                x = q[b, h, i, c] * scale
                for j in range(n):
                    w[j] += x * kT[b, kv, c, j0 + j]
            for j in range(n):
                w[j] = (one + w[j] + half * w[j] * w[j]) * real[b, j0 + j]
                mass += w[j]
            whole = n // 4 * 4
            for j in range(0, whole, 4):
                w0, w1, w2, w3 = w[j], w[j + 1], w[j + 2], w[j + 3]
                k0 = j0 + j
                for c in range(dv):
                    total[c] += (
                        w0 * v[b, kv, k0, c] + w1 * v[b, kv, k0 + 1, c]
                        + w2 * v[b, kv, k0 + 2, c] + w3 * v[b, kv, k0 + 3, c]
                    )  # fmt: skip
            for j in range(whole, n):
                for c in range(dv):
                    total[c] += w[j] * v[b, kv, j0 + j, c]
        num[b, h, i, :] = total
        den[b, h, i] = mass


@njit(**options)
def near_dq(q, k, v, real, lo, hi, scale, dnum, dden, dq):
    """dq (batch, heads, rows, d) from the gradients of num and den."""
    batch, heads, rows, d = q.shape
    group, dv = heads // v.shape[1], v.shape[3]
    one = q.dtype.type(1)
    for task in prange(batch * heads * rows):
        b, h, i = task // (heads * rows), task // rows % heads, task % rows
        kv = h // group
        total = np.zeros(d, q.dtype)
        for j in range(lo[i], hi[i]):
            s = q.dtype.type(0)
            for c in range(d):
                s += q[b, h, i, c] * k[b, kv, j, c]
            dw = dden[b, h, i]
            for c in range(dv):
                dw += dnum[b, h, i, c] * v[b, kv, j, c]
            ds = dw * (one + scale * s) * scale * real[b, j]
            for c in range(d):
                total[c] += ds * k[b, kv, j, c]
        dq[b, h, i, :] = total


@njit(**options)
def near_dkv(q, k, v, real, row_lo, row_hi, scale, dnum, dden, dk, dv):
    """dk (batch, kv_heads, keys, d) and dv, summed over the query heads of each group."""
    batch, kv_heads, keys, d = k.shape
    group, width = q.shape[1] // kv_heads, v.shape[3]
    one = q.dtype.type(1)
    half = q.dtype.type(0.5)
    for task in prange(batch * kv_heads * keys):
        b, kv, j = task // (kv_heads * keys), task // keys % kv_heads, task % keys
        to_k = np.zeros(d, q.dtype)
        to_v = np.zeros(width, q.dtype)
        if real[b, j] != 0:
            for h in range(kv * group, kv * group + group):
                for i in range(row_lo[j], row_hi[j]):
                    s = q.dtype.type(0)
                    for c in range(d):
                        s += q[b, h, i, c] * k[b, kv, j, c]
                    s *= scale
                    dw = dden[b, h, i]
                    for c in range(width):
                        dw += dnum[b, h, i, c] * v[b, kv, j, c]
                    ds = dw * (one + s) * scale
                    for c in range(d):
                        to_k[c] += ds * q[b, h, i, c]
                    w = one + s + half * s * s
                    for c in range(width):
                        to_v[c] += w * dnum[b, h, i, c]
        dk[b, kv, j, :] = to_k
        dv[b, kv, j, :] = to_v


@njit(**options)
def token_step(S, zk, q, k, v, root, eps, new_S, new_zk, out):
    """One token: S (batch, kv_heads, D, dv), zk (batch, kv_heads, D), q (batch, heads, d), k and v
    (batch, kv_heads, width); root is the square root of the scale. Where scores have cancelled, the
    sums over features are small differences: they are taken in float64.
    """
    batch, kv_heads, d = k.shape
    group, dv = q.shape[1] // kv_heads, v.shape[2]
    one = q.dtype.type(1)
    factor = q.dtype.type(root * root / np.sqrt(2.0))
    for task in prange(batch * kv_heads):
        b, kv = task // kv_heads, task % kv_heads
        num = np.zeros((group, dv), np.float64)
        den = np.zeros(group, np.float64)
        for f in range(S.shape[2]):
            first, second = (f - 1 - d) // d, (f - 1 - d) % d
            if f == 0:
                x = one
            elif f <= d:
                x = root * k[b, kv, f - 1]
            else:
                x = factor * (k[b, kv, first] * k[b, kv, second])
            new_zk[b, kv, f] = zk[b, kv, f] + x
            for c in range(dv):
                new_S[b, kv, f, c] = S[b, kv, f, c] + x * v[b, kv, c]
            for g in range(group):
                h = kv * group + g
                if f == 0:
                    y = one
                elif f <= d:
                    y = root * q[b, h, f - 1]
                else:
                    y = factor * (q[b, h, first] * q[b, h, second])
                den[g] += y * new_zk[b, kv, f]
                for c in range(dv):
                    num[g, c] += y * new_S[b, kv, f, c]
        for g in range(group):
            h = kv * group + g
            if den[g] == 0:
                out[b, h, :] = 0
            else:
                out[b, h, :] = num[g] / (den[g] + eps)
