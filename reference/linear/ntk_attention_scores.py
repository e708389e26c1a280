"""NTK-Attention's tokens: the scores of the keys a query sees, and what must fit one another.

The clauses are those of `ntk_attention`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from attnspec.reference.conventions import check_array, check_size
from attnspec.reference.dense.attention import score, visible


def visible_scores(
    q: np.ndarray,
    K: np.ndarray,
    causal: bool,
    key_mask: np.ndarray | None,
    scale: float | None,
) -> np.ndarray:
    """S1: scores (..., heads, q_tokens, k_tokens), -inf where a key is hidden.

    >>> visible_scores(np.ones((1, 1, 4)), np.ones((1, 2, 4)), False, np.array([True, False]), None)
    array([[[  2., -inf]]])
    """
    if key_mask is not None:
        check_array("key_mask", key_mask, ("k_tokens",), dtype="bool")
        if key_mask.shape != (*K.shape[:-3], K.shape[-2]):
            raise ValueError(
                f"key_mask: got shape {key_mask.shape}, expected {(*K.shape[:-3], K.shape[-2])}"
            )
        key_mask = key_mask[..., None, None, :]
    allowed = visible(q.shape[-2], K.shape[-2], causal=causal, mask=key_mask)
    return np.where(allowed, score(q, K, scale=scale), -np.inf)


def check_inputs(q: Any, K: Any, V: Any, Z: Any, scale: Any = None) -> None:
    """K1, K7, K14: q, K and V fit one another, Z is as wide as V, `scale` is a number above 0.

    >>> check_inputs(*(np.ones((1, 2, d)) for d in (3, 4, 5, 5)))
    Traceback (most recent call last):
    ValueError: K: got 4, expected 3 (d, as in q)
    """
    check_array("q", q, ("heads", "q_tokens", "d"))
    check_array("K", K, ("kv_heads", "k_tokens", "d"))
    check_array("V", V, ("kv_heads", "k_tokens", "dv"))
    for name, x in (("K", K), ("V", V)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: got dtype {x.dtype}, expected {q.dtype}, as q")
        if x.shape[:-3] != q.shape[:-3]:
            raise ValueError(f"{name}: got leading axes {x.shape[:-3]}, expected {q.shape[:-3]}")
    check_size("K", K.shape[-1], q.shape[-1], "d, as in q")
    check_size("V", V.shape[-3], K.shape[-3], "kv_heads, as in K")
    check_size("V", V.shape[-2], K.shape[-2], "k_tokens, as in K")
    check_array("Z", Z, ("heads", "d", "dv"))
    check_size("Z", Z.shape[-1], V.shape[-1], "dv, as in V")
    heads, kv_heads = q.shape[-3], K.shape[-3]
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(
            f"K: got {kv_heads} kv heads for {heads} query heads, expected a divisor of {heads}"
        )
    if scale is None:
        return
    if isinstance(scale, bool) or not isinstance(scale, (int, float, np.floating, np.integer)):
        raise TypeError(f"scale: got {scale!r}, expected a finite number > 0")
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale: got {scale}, expected a finite number > 0")
