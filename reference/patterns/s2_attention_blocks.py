"""Attention by any pattern of blocks, forward and backward.

The clauses are those of `s2_attention`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.conventions import (
    check_array,
    check_attention_inputs,
    check_size,
    group_size,
)
from attnspec.reference.dense.attention import attend, attend_backward
from attnspec.reference.patterns.s2_attention_patterns import check_pattern, token_mask


def block_sparse_attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    pattern: np.ndarray,
    b: int,
    causal: bool = True,
    scale: float | None = None,
    q_start: int = 0,
    kv_start: int = 0,
    *,
    key_mask: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """S6, S11: output (..., heads, q_tokens, dv) and lse (..., heads, q_tokens) of any pattern.

    q (..., heads, q_tokens, d), k (..., kv_heads, k_tokens, d), v (..., kv_heads, k_tokens, dv);
    `pattern` bool (heads or kv_heads or 1, blocks of queries, blocks of keys), `key_mask` bool
    (..., k_tokens), True = a real key.

    >>> q, v, pattern = np.zeros((1, 4, 1)), np.arange(4.0).reshape(1, 4, 1), np.eye(2) > 0
    >>> block_sparse_attend(q, q, v, pattern[None], 2)[0].ravel()
    array([0. , 0.5, 2. , 2.5])
    """
    mask = _visible(q, k, v, pattern, b, causal, q_start, kv_start, key_mask)
    return attend(q, k, v, mask=mask, scale=scale)


def block_sparse_attend_backward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    pattern: np.ndarray,
    b: int,
    dout: np.ndarray,
    dlse: np.ndarray | None = None,
    causal: bool = True,
    scale: float | None = None,
    q_start: int = 0,
    kv_start: int = 0,
    *,
    key_mask: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S12: gradients dq, dk, dv of `block_sparse_attend`, shaped as q, k, v.

    >>> one = np.ones((1, 2, 1))
    >>> block_sparse_attend_backward(one, one, one, np.ones((1, 1, 1), bool), 2, one)[2].ravel()
    array([1.5, 0.5])
    """
    mask = _visible(q, k, v, pattern, b, causal, q_start, kv_start, key_mask)
    return attend_backward(q, k, v, dout, dlse, mask=mask, scale=scale)


def pattern_of_heads(pattern: np.ndarray, heads: int, kv_heads: int) -> np.ndarray:
    """S11: a pattern of query heads, kv heads or one head as bool (heads, M, N).

    >>> pattern_of_heads(np.ones((1, 2, 3), bool), 4, 2).shape
    (4, 2, 3)
    """
    check_pattern(pattern)
    group_size(heads, kv_heads)
    if pattern.shape[0] not in (1, kv_heads, heads):
        raise ValueError(
            f"pattern: got {pattern.shape[0]} heads, expected {heads} or {kv_heads}, as in q or k, "
            "or 1"
        )
    return np.repeat(pattern, heads // pattern.shape[0], axis=0)


def _visible(
    q: Any, k: Any, v: Any, pattern: Any, b: Any, causal: bool, q_start: Any, kv_start: Any,
    key_mask: Any,
) -> np.ndarray:  # fmt: skip
    """S6: bool, broadcastable to (..., heads, q_tokens, k_tokens)."""
    check_attention_inputs(q, k, v)
    pattern = pattern_of_heads(pattern, q.shape[-3], k.shape[-3])
    mask = token_mask(pattern, b, q.shape[-2], k.shape[-2], causal, q_start, kv_start)
    if key_mask is None:
        return mask
    check_array("key_mask", key_mask, ("k_tokens",), dtype="bool")
    check_size("key_mask", key_mask.shape[-1], k.shape[-2], "k_tokens, as in k")
    if key_mask.shape[:-1] != k.shape[:-3]:
        raise ValueError(
            f"key_mask: got leading axes {key_mask.shape[:-1]}, expected {k.shape[:-3]}, as k"
        )
    return mask & key_mask[..., None, None, :]
