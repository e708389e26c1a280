"""Based over sequences laid end to end: the clause S16 of `based`.

Each sequence starts from an empty state, so its results and its gradients are those it has alone.
"""

from __future__ import annotations

import numpy as np

from attnspec.reference.conventions import (
    check_attention_inputs,
    check_offsets,
    check_shaped,
    check_size,
)
from attnspec.reference.linear.based_features import feature_count
from attnspec.reference.linear.based_state import based_chunk, based_chunk_backward


def based_packed(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    offsets: np.ndarray,
    *,
    eps: float = 1e-12,
    scale: float | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S16: causal attention inside each of the sequences laid end to end, and their last states.

    q (heads, total, d), k (kv_heads, total, d), v (kv_heads, total, dv), offsets int (sequences +
    1) increasing from 0 to total. Returns o (heads, total, dv), S (sequences, kv_heads, D, dv) and
    zk (sequences, kv_heads, D).

    >>> x = np.ones((1, 2, 1))
    >>> based_packed(x, x, x, np.array([0, 2]))[2].round(2)
    array([[[2.  , 2.  , 1.41]]])
    """
    parts = []
    for rows in _sequences(q, k, v, offsets):
        Q, K, V = (x[..., rows, :] for x in (q, k, v))
        parts.append(based_chunk(Q, K, V, 64, eps=eps, scale=scale))
    outs, states, sums = zip(*parts, strict=True)
    return np.concatenate(outs, axis=-2), np.stack(states), np.stack(sums)


def based_packed_backward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    offsets: np.ndarray,
    do: np.ndarray,
    dS: np.ndarray | None = None,
    dzk: np.ndarray | None = None,
    *,
    eps: float = 1e-12,
    scale: float | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S9, S16: dq, dk, dv of `based_packed`; do, dS and dzk are shaped as its outputs.

    >>> x = np.ones((1, 3, 1))
    >>> based_packed_backward(x, x, x, np.array([0, 1, 3]), x)[2].ravel()
    array([1. , 1.5, 0.5])
    """
    sequences = _sequences(q, k, v, offsets)
    check_shaped("do", do, (*q.shape[:-1], v.shape[-1]))
    sums = (len(sequences), k.shape[-3], feature_count(k.shape[-1]))
    for name, x, shape in (("dS", dS, (*sums, v.shape[-1])), ("dzk", dzk, sums)):
        if x is not None:
            check_shaped(name, x, shape)
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for n, rows in enumerate(sequences):
        Q, K, V, G = (x[..., rows, :] for x in (q, k, v, do))
        R, rz = (None if x is None else x[n] for x in (dS, dzk))
        dq[..., rows, :], dk[..., rows, :], dv[..., rows, :] = based_chunk_backward(
            Q, K, V, 64, None, None, G, R, rz, eps=eps, scale=scale
        )[:3]
    return dq, dk, dv


def _sequences(q: np.ndarray, k: np.ndarray, v: np.ndarray, offsets: np.ndarray) -> list[slice]:
    """K14: the rows of each sequence, once the arguments fit one another."""
    check_attention_inputs(q, k, v)
    check_size("q", q.shape[-2], k.shape[-2], "tokens, as in k")
    return check_offsets("offsets", offsets, q.shape[-2])
