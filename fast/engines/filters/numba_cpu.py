"""The filter kernels on the CPU: one task a head, rows in order.

float32 and float64 are computed as they are; float16 and bfloat16 are widened to a float32 copy and
the results rounded back. Sums over tokens are taken in float64. Inputs with gaps are copied: loops
over channels fill vector registers only where the compiler knows that there are none.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from numba import njit, types
from torch import Tensor

from attnspec.fast.engines.flash import numba_cpu as flash_host
from attnspec.fast.engines.flash.numba_visible import KERNEL, work_types


def _forward(p, w, b, state, y, part, parts, scratch, spans):
    """y of every head congruent to `part`; w is (K, d) and y contiguous."""
    batches, heads, tokens, d = p.shape
    K = w.shape[0]
    for task in range(part, batches * heads, parts):
        n, h = task // heads, task % heads
        for t in range(tokens):
            row = y[n, h, t]
            for c in range(d):
                row[c] = b[c]
            for tap in range(K):
                met = t + tap - (K - 1)
                if met >= 0:
                    for c in range(d):
                        row[c] += w[tap, c] * p[n, h, met, c]
                elif state.size:
                    for c in range(d):
                        row[c] += w[tap, c] * state[n, h, met + K - 1, c]


def _backward(dy, p, w, state, dp, dstate, sums, part, parts, scratch, spans):
    """dp and dstate, zero before, and sums (batches, heads, K + 1, d) in float64, zero before."""
    batches, heads, tokens, d = p.shape
    K = w.shape[0]
    for task in range(part, batches * heads, parts):
        n, h = task // heads, task % heads
        for t in range(tokens):
            grad = dy[n, h, t]
            for tap in range(K):
                met = t + tap - (K - 1)
                if met >= 0:
                    for c in range(d):
                        dp[n, h, met, c] += w[tap, c] * grad[c]
                        sums[n, h, tap, c] += p[n, h, met, c] * grad[c]
                elif state.size:
                    for c in range(d):
                        dstate[n, h, met + K - 1, c] += w[tap, c] * grad[c]
                        sums[n, h, tap, c] += state[n, h, met + K - 1, c] * grad[c]
            for c in range(d):
                sums[n, h, K, c] += grad[c]


@functools.cache
def _kernel(real: types.Type, backward: bool) -> Any:
    """The compiled kernel for numbers of type `real`."""
    rows, filters, tail = real[:, :, :, ::1], real[:, ::1], work_types(real)[1:]
    if backward:
        sums = types.float64[:, :, :, ::1]
        signature = types.void(rows, rows, filters, rows, rows, rows, sums, *tail)
        return njit(signature, **KERNEL)(_backward)
    signature = types.void(rows, filters, real[::1], rows, rows, *tail)
    return njit(signature, **KERNEL)(_forward)


def _run(backward: bool, arguments: list[Any], p: Tensor, dtype: torch.dtype, taps: int) -> None:
    real = types.float64 if dtype == torch.float64 else types.float32
    tasks = p.shape[0] * p.shape[1]
    flash_host.run_parts(_kernel(real, backward), arguments, tasks, p.numel() * taps, dtype, 0, 0)


def _inputs(p: Tensor, w: Tensor, state: Tensor | None) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """p, the filters as (K, d) and the state, empty if absent, widened."""
    wide = flash_host.widened(p).contiguous()
    filters = np.ascontiguousarray(flash_host.widened(w).numpy().T)
    return wide, filters, np.ascontiguousarray(flash_host.option_array(state, 4, wide.dtype))


def forward(p: Tensor, w: Tensor, b: Tensor, state: Tensor | None) -> Tensor:
    """y, contiguous, in p's dtype."""
    wide, filters, before = _inputs(p, w, state)
    y = torch.empty(p.shape, dtype=wide.dtype)
    bias = np.ascontiguousarray(flash_host.widened(b).numpy())
    _run(False, [wide.numpy(), filters, bias, before, y.numpy()], p, wide.dtype, w.shape[1])
    return y.to(p.dtype)


def backward(
    dy: Tensor, p: Tensor, w: Tensor, b: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dp, dw, db and dstate in the inputs' dtype."""
    wide, filters, before = _inputs(p, w, state)
    K, d = w.shape[1], p.shape[3]
    dp = torch.zeros(p.shape, dtype=wide.dtype)
    dstate = torch.zeros(before.shape, dtype=wide.dtype)
    sums = torch.zeros(*p.shape[:2], K + 1, d, dtype=torch.float64)
    upstream = flash_host.widened(dy).contiguous().numpy()
    _run(
        True,
        [upstream, wide.numpy(), filters, before, *(x.numpy() for x in (dp, dstate, sums))],
        p, wide.dtype, 2 * K,
    )  # fmt: skip
    total = sums.sum((0, 1))
    dw, db = w.new_empty(w.shape).copy_(total[:K].mT), b.new_empty(b.shape).copy_(total[K])
    return dp.to(p.dtype), dw, db, p.new_empty(0) if state is None else dstate.to(p.dtype)
