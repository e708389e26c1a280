"""SnapKV, the selection: which positions of the prefix the end of the prompt votes for.

The clauses S3 to S8 are those of `snapkv`; each function takes what the one before it returns.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.conventions import (
    check_array,
    check_attention_inputs,
    check_choice,
    check_integer,
    check_size,
)
from attnspec.reference.dense.attention import score, visible
from attnspec.reference.primitives.pooling import pool_1d
from attnspec.reference.primitives.softmax import softmax_lse, weights_given_lse
from attnspec.reference.primitives.top_k import top_k

POOLS = ("avg", "max")
REDUCTIONS = ("group_mean", "group_max", "per_query_head")


def window_attention(
    q: np.ndarray, k: np.ndarray, w: int = 32, mask: np.ndarray | None = None
) -> np.ndarray:
    """S3, S4: weights A (..., heads, w, T) of the last `w` queries over all keys.

    q (..., heads, q_tokens, d), k (..., kv_heads, T, d), `mask` bool (..., T), True = real key, for
    prompts padded on the left.

    >>> window_attention(np.zeros((1, 3, 2)), np.zeros((1, 3, 2)), w=2).round(2)
    array([[[0.5 , 0.5 , 0.  ],
            [0.33, 0.33, 0.33]]])
    """
    scores, allowed = _window_logits(q, k, w, mask)
    return weights_given_lse(scores, softmax_lse(scores, allowed)[1], allowed)


def _window_logits(
    q: np.ndarray, k: np.ndarray, w: int, mask: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """S3: the logits L (..., heads, w, T) of the window, and which keys its queries see."""
    check_attention_inputs(q, k, k)
    check_window(w, q.shape[-2], k.shape[-2])
    allowed = visible(w, k.shape[-2], causal=True, mask=key_mask(mask, k))
    return score(q[..., q.shape[-2] - w :, :], k), allowed


def prefix_scores(A: np.ndarray, w: int = 32) -> np.ndarray:
    """S5: scores s (..., heads, T - w) from the window's weights `A` (..., heads, w, T).

    >>> prefix_scores(np.array([[[0.5, 0.5, 0.0], [0.2, 0.4, 0.4]]]), w=2)
    array([[0.7]])
    """
    check_array("A", A, ("heads", "w", "T"))
    check_window(w, A.shape[-2], A.shape[-1])
    check_size("A", A.shape[-2], w, "window queries, as w")
    return np.sum(A[..., : A.shape[-1] - w], axis=-2)


def window_scores(
    q: np.ndarray,
    k: np.ndarray,
    w: int = 32,
    mask: np.ndarray | None = None,
    lse: np.ndarray | None = None,
) -> np.ndarray:
    """S3 to S5 at once: `prefix_scores` of `window_attention`, scores s (..., heads, T - w).

    A kernel need not write A for it. `lse` (..., heads, w) are the log denominators of the window's
    rows over all keys, where attention has left them.

    >>> window_scores(np.zeros((1, 3, 2)), np.zeros((1, 3, 2)), w=2).round(2)
    array([[0.83]])
    """
    if lse is None:
        return prefix_scores(window_attention(q, k, w, mask), w)
    scores, allowed = _window_logits(q, k, w, mask)
    check_array("lse", lse, ("heads", "w"))
    if lse.shape != scores.shape[:-1]:
        raise ValueError(f"lse: got shape {lse.shape}, expected {scores.shape[:-1]}")
    return prefix_scores(weights_given_lse(scores, lse, allowed), w)


def pool_scores(s: np.ndarray, p: int = 5, mode: str = "avg") -> np.ndarray:
    """S6: `s` (..., P) smoothed along the prefix with an odd width `p`, same shape.

    >>> peak = np.array([3.0, 0.0, 0.0])
    >>> pool_scores(peak, 3, "avg"), pool_scores(peak, 3, "max")
    (array([1., 1., 0.]), array([3., 3., 0.]))
    """
    check_array("s", s, ("P",))
    check_pool(p, "mode", mode)
    return pool_1d(s, p, mode)


def reduce_groups(m: np.ndarray, Hk: int, mode: str = "group_mean") -> np.ndarray:
    """S7: `m` (..., heads, P) to (..., Hk, P), or unchanged for ``per_query_head``.

    >>> reduce_groups(np.array([[1.0], [3.0], [5.0], [5.0]]), 2).ravel()
    array([2., 5.])
    """
    check_array("m", m, ("heads", "P"))
    check_integer("Hk", Hk, least=1)
    check_choice("mode", mode, REDUCTIONS)
    *leading, heads, P = m.shape
    if heads % Hk:
        raise ValueError(f"Hk: got {Hk}, expected a divisor of the {heads} query heads")
    if mode == "per_query_head":
        return m
    groups = m.reshape(*leading, Hk, heads // Hk, P)
    return np.mean(groups, axis=-2) if mode == "group_mean" else np.max(groups, axis=-2)


def select(m: np.ndarray, n: int, mask: np.ndarray | None = None) -> np.ndarray:
    """S8: idx int (..., n), ascending, the best positions of `m` (..., heads, P); K6, K9.

    `mask` bool, broadcastable to `m`: a position where it is False comes after all others.

    >>> select(np.array([[1.0, 3.0, 2.0, 2.0]]), 2)
    array([[1, 2]])
    """
    check_array("m", m, ("heads", "P"))
    check_integer("n", n, least=1)
    if mask is not None:
        check_array("mask", mask, ("P",), dtype="bool")
        pairs = zip(mask.shape[::-1], m.shape[::-1], strict=False)
        if mask.ndim > m.ndim or any(got not in (1, size) for got, size in pairs):
            raise ValueError(f"mask: got shape {mask.shape}, expected {m.shape} or ones")
        m = np.where(mask, m, -np.inf)
    return top_k(m, n)


def key_mask(mask: Any, k: np.ndarray) -> np.ndarray | None:
    """S3, K14: `mask` (..., T) of `k` (..., kv_heads, T, d), laid out to broadcast to scores.

    ValueError unless padding comes before every real key.

    >>> key_mask(np.array([True, False]), np.zeros((1, 2, 4)))
    Traceback (most recent call last):
    ValueError: mask: got padding behind a real key, expected left padding only
    """
    if mask is None:
        return None
    check_array("mask", mask, ("T",), dtype="bool")
    expected = (*k.shape[:-3], k.shape[-2])
    if mask.shape != expected:
        raise ValueError(f"mask: got shape {mask.shape}, expected {expected}")
    if np.any(mask[..., :-1] & ~mask[..., 1:]):
        raise ValueError("mask: got padding behind a real key, expected left padding only")
    return mask[..., None, None, :]


def check_window(w: Any, q_tokens: int, T: int) -> None:
    """S2, K14: the window is part of the queries and leaves a prefix.

    >>> check_window(3, 3, 3)
    Traceback (most recent call last):
    ValueError: w: got 3, expected at most 3 query tokens and less than 3 keys
    """
    check_integer("w", w, least=1)
    if w > q_tokens or w >= T:
        raise ValueError(
            f"w: got {w}, expected at most {q_tokens} query tokens and less than {T} keys"
        )


def check_pool(p: Any, name: str, kind: Any) -> None:
    """S6, K14: `p` is odd and the argument called `name` a kind of pooling.

    >>> check_pool(4, "pool", "avg")
    Traceback (most recent call last):
    ValueError: p: got 4, expected an odd integer
    """
    check_integer("p", p, least=1)
    if p % 2 == 0:
        raise ValueError(f"p: got {p}, expected an odd integer")
    check_choice(name, kind, POOLS)
