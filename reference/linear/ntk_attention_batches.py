"""NTK-Attention over sequences laid end to end: the clause S10 of `ntk_attention`."""

from __future__ import annotations

import numpy as np

from attnspec.reference.conventions import (
    check_array,
    check_offsets,
    check_shaped,
    check_size,
)
from attnspec.reference.dense.attention import combine
from attnspec.reference.linear.ntk_attention_gradients import ntk_backward
from attnspec.reference.linear.ntk_attention_prefix import prefix_terms, shares
from attnspec.reference.linear.ntk_attention_scores import check_inputs, visible_scores


def ntk_packed(
    q: np.ndarray,
    K: np.ndarray,
    V: np.ndarray,
    Z: np.ndarray,
    k: np.ndarray,
    q_offsets: np.ndarray,
    k_offsets: np.ndarray,
    *,
    causal: bool = False,
    scale: float | None = None,
    positivity: str = "abs",
) -> np.ndarray:
    """S4, S10: outputs (..., heads, q_total, dv) of sequences that share one prefix.

    q (..., heads, q_total, d), K (..., kv_heads, k_total, d), V (..., kv_heads, k_total, dv),
    Z (heads, d, dv), k (heads, d); offsets int (sequences + 1), increasing from 0 to the total.

    >>> x, one, ends = np.zeros((1, 2, 1)), np.ones((1, 1, 1)), np.array([0, 1, 2])
    >>> V = np.array([[[5.0], [7.0]]])
    >>> ntk_packed(x, x, V, one, one[0], ends, ends).ravel()
    array([3., 4.])
    """
    sequences = _sequences(q, K, V, Z, q_offsets, k_offsets, scale)
    num, den = prefix_terms(q, Z, k, positivity=positivity)
    outs = []
    for rows, keys in sequences:
        scores = visible_scores(q[..., rows, :], K[..., keys, :], causal, None, scale)
        terms = num[..., rows, :], den[..., rows]
        weights, unit, total, _ = shares(scores, *terms)
        outs.append(
            combine(weights, V[..., keys, :]) + unit[..., None] * terms[0] / total[..., None]
        )
    return np.concatenate(outs, axis=-2)


def ntk_packed_backward(
    q: np.ndarray,
    K: np.ndarray,
    V: np.ndarray,
    Z: np.ndarray,
    k: np.ndarray,
    q_offsets: np.ndarray,
    k_offsets: np.ndarray,
    dout: np.ndarray,
    *,
    causal: bool = False,
    scale: float | None = None,
    positivity: str = "abs",
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """S8, S10: gradients dq, dK, dV, dZ, dk of `ntk_packed`, shaped as q, K, V, Z, k.

    >>> x, one, ends = np.zeros((1, 2, 1)), np.ones((1, 1, 1)), np.array([0, 1, 2])
    >>> dout = np.ones((1, 2, 1))
    >>> ntk_packed_backward(x, x, x, one, one[0], ends, ends, dout)[3]
    array([[[1.]]])
    """
    sequences = _sequences(q, K, V, Z, q_offsets, k_offsets, scale)
    check_shaped("dout", dout, (*q.shape[:-1], V.shape[-1]))
    dq, dK, dV, dZ, dk = (np.zeros_like(x) for x in (q, K, V, Z, k))
    for rows, keys in sequences:
        dq[..., rows, :], dK[..., keys, :], dV[..., keys, :], own_Z, own_k = ntk_backward(
            q[..., rows, :], K[..., keys, :], V[..., keys, :], Z, k, dout[..., rows, :],
            causal=causal, scale=scale, positivity=positivity,
        )  # fmt: skip
        dZ, dk = dZ + own_Z, dk + own_k
    return dq, dK, dV, dZ, dk


def _sequences(
    q: np.ndarray,
    K: np.ndarray,
    V: np.ndarray,
    Z: np.ndarray,
    q_offsets: np.ndarray,
    k_offsets: np.ndarray,
    scale: float | None,
) -> list[tuple[slice, slice]]:
    """K14: the queries and the keys of each sequence, once the arguments fit one another."""
    check_array("q", q, ("heads", "q_total", "d"))
    check_array("K", K, ("kv_heads", "k_total", "d"))
    if q.shape[:-3] != K.shape[:-3]:
        raise ValueError(f"q: got leading axes {q.shape[:-3]}, expected those of K, {K.shape[:-3]}")
    check_inputs(q, K, V, Z, scale)
    rows = check_offsets("q_offsets", q_offsets, q.shape[-2])
    keys = check_offsets("k_offsets", k_offsets, K.shape[-2])
    check_size("k_offsets", len(k_offsets), len(q_offsets), "as many as q_offsets")
    return list(zip(rows, keys, strict=True))
