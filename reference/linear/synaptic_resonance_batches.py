"""Synaptic Resonance over sequences laid end to end: the clause S13 of `synaptic_resonance`."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.conventions import check_offsets, check_shaped
from attnspec.reference.dense.attention import attend, attend_backward
from attnspec.reference.linear.synaptic_resonance_decode import check_inputs, recent_tokens
from attnspec.reference.linear.synaptic_resonance_gradients import (
    memory_backward,
    relevance_backward,
)
from attnspec.reference.linear.synaptic_resonance_memory import (
    first_state,
    memory_chunked,
    relevance,
)


def synaptic_resonance_packed(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, offsets: np.ndarray,
    S0: np.ndarray | None = None, c0: np.ndarray | None = None, *, eta: float = 0.1,
    lam: float = 0.99, mu: float = 0.9, beta: float = 0.5, window: int | None = None,
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:  # fmt: skip
    """S13: y (..., heads, total, dv), and the states: S (..., sequences, kv_heads, d, dv),
    c (..., sequences, kv_heads, d).

    q (..., heads, total, d), k (..., kv_heads, total, d), v (..., kv_heads, total, dv); offsets int
    (sequences + 1), increasing from 0 to the total; S0 and c0 are states. The numbers are those of
    `synaptic_resonance`.

    >>> x = np.ones((1, 3, 1))
    >>> ends, numbers = np.array([0, 1, 3]), {"eta": 1.0, "lam": 0.5, "mu": 0.5, "beta": 0.1}
    >>> y, (S, c) = synaptic_resonance_packed(x, x, x, ends, **numbers)
    >>> y.ravel(), S.ravel(), c.ravel()
    (array([1. , 1. , 1.1]), array([1. , 1.5]), array([0.5 , 0.75]))
    """
    check_inputs(q, k, v, beta, window)
    outs, memories, traces = [], [], []
    for rows, S, c in _sequences(q, k, v, offsets, S0, c0):
        Q, K, V = (x[..., rows, :] for x in (q, k, v))
        rho, c = relevance(K, mu, None, c)
        m, S = memory_chunked(Q, K, V, rho, eta, lam, S)
        outs.append(attend(Q, K, V, mask=recent_tokens(K, window, None))[0] + beta * m)
        memories.append(S)
        traces.append(c)
    return np.concatenate(outs, axis=-2), (np.stack(memories, axis=-4), np.stack(traces, axis=-3))


def synaptic_resonance_packed_backward(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, offsets: np.ndarray, S0: np.ndarray | None,
    c0: np.ndarray | None, dy: np.ndarray, dS: np.ndarray | None = None,
    dc: np.ndarray | None = None, *, eta: float = 0.1, lam: float = 0.99, mu: float = 0.9,
    beta: float = 0.5, window: int | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """S12, S13: dq, dk, dv, dS0, dc0 of `synaptic_resonance_packed`, from the gradients of y, S
    and c.

    >>> x = np.ones((1, 3, 1))
    >>> made = synaptic_resonance_packed_backward(x, x, x, np.array([0, 1, 3]), None, None, x,
    ...                                           eta=1.0, beta=0.5)
    >>> made[2].ravel()
    array([1. , 2. , 0.5])
    """
    check_inputs(q, k, v, beta, window)
    check_shaped("dy", dy, (*q.shape[:-1], v.shape[-1]))
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    states = _sequences(q, k, v, offsets, S0, c0)
    upstream = _sequences(q, k, v, offsets, dS, dc, "dS", "dc")
    memories, traces = [], []
    for (rows, S, c), (_, dS_own, dc_own) in zip(states, upstream, strict=True):
        Q, K, V, G = (x[..., rows, :] for x in (q, k, v, dy))
        rho, _ = relevance(K, mu, None, c)
        soft = attend_backward(Q, K, V, G, mask=recent_tokens(K, window, None))
        mq, mk, mv, drho, dS_own = memory_backward(
            Q, K, V, rho, eta, lam, S, None, beta * G, dS_own
        )
        of_trace, dc_own = relevance_backward(K, mu, None, c, drho, dc_own)
        dq[..., rows, :], dv[..., rows, :] = soft[0] + mq, soft[2] + mv
        dk[..., rows, :] = soft[1] + mk + of_trace
        memories.append(dS_own)
        traces.append(dc_own)
    return dq, dk, dv, np.stack(memories, axis=-4), np.stack(traces, axis=-3)


def _sequences(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, offsets: Any, S: Any, c: Any,
    S_name: str = "S0", c_name: str = "c0",
) -> list[tuple[slice, np.ndarray, np.ndarray]]:  # fmt: skip
    """K14: the rows and the state of each sequence, zeros where none are given."""
    sequences = check_offsets("offsets", offsets, q.shape[-2])
    leading = (*k.shape[:-3], len(sequences), k.shape[-3])
    S = first_state(S_name, S, (*leading, k.shape[-1], v.shape[-1]), k)
    c = first_state(c_name, c, (*leading, k.shape[-1]), k)
    return [(rows, S[..., n, :, :, :], c[..., n, :, :]) for n, rows in enumerate(sequences)]
