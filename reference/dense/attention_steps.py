"""Dense attention, the steps: S1, S2, S4 and S6 of `attention`, which other chapters share."""

from __future__ import annotations

import numpy as np

from attnspec.reference.conventions import (
    causal_mask,
    check_array,
    check_attention_inputs,
    check_bool,
    check_offsets,
    check_scale,
    check_size,
    default_scale,
    repeat_heads,
)


def score(q: np.ndarray, k: np.ndarray, *, scale: float | None = None) -> np.ndarray:
    """S1: scores (..., heads, q_tokens, k_tokens) of q (..., heads, q_tokens, d) against
    k (..., kv_heads, k_tokens, d).

    >>> score(np.ones((1, 1, 4)), np.ones((1, 2, 4)))
    array([[[2., 2.]]])
    """
    check_array("q", q, ("heads", "q_tokens", "d"))
    check_array("k", k, ("kv_heads", "k_tokens", "d"))
    check_size("k", k.shape[-1], q.shape[-1], "d, as in q")
    check_scale(scale)
    scale = default_scale(q.shape[-1]) if scale is None else scale
    return scale * (q @ np.swapaxes(repeat_heads(k, q.shape[-3]), -1, -2))


def visible(
    q_tokens: int, k_tokens: int, *, causal: bool = False, mask: np.ndarray | None = None
) -> np.ndarray:
    """S2: bool, broadcastable to (..., heads, q_tokens, k_tokens), True where a query may look.

    `mask` is bool and broadcastable to the scores; a padding mask (batch, k_tokens) is given as
    ``padding[:, None, None, :]``.

    >>> visible(2, 2, causal=True, mask=np.array([True, False])).astype(int)
    array([[1, 0],
           [1, 0]])
    """
    check_bool("causal", causal)
    allowed = causal_mask(q_tokens, k_tokens) if causal else np.ones((q_tokens, k_tokens), bool)
    if mask is None:
        return allowed
    check_array("mask", mask, ("k_tokens",), dtype="bool")
    for got, expected in zip(mask.shape[::-1], (k_tokens, q_tokens), strict=False):
        if got not in (1, expected):
            raise ValueError(
                f"mask: got shape {mask.shape}, expected (..., {q_tokens}, {k_tokens}) or ones"
            )
    return allowed & mask


def combine(weights: np.ndarray, v: np.ndarray) -> np.ndarray:
    """S4: weighted sum (..., heads, q_tokens, dv) of v (..., kv_heads, k_tokens, dv).

    A value whose weight is exactly 0 is not read, even if it is NaN (K11). A row that reads a value
    that is not finite is NaN there.

    >>> weights = np.array([[[1.0, 0.0], [0.5, 0.5]]])
    >>> combine(weights, np.array([[[4.0], [np.nan]]]))
    array([[[ 4.],
            [nan]]])
    """
    values = repeat_heads(v, weights.shape[-3])
    finite = np.isfinite(values)
    if np.all(finite):
        return weights @ values
    out = weights @ np.where(finite, values, np.zeros_like(values))
    return np.where((weights != 0) @ ~finite, np.nan, out).astype(out.dtype)


def sequences(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, q_offsets: np.ndarray, k_offsets: np.ndarray
) -> list[tuple[slice, slice]]:
    """S6: the query rows and the keys of each sequence, from offsets int (sequences + 1).

    ValueError unless both increase from 0 to the total.

    >>> x, ends = np.zeros((1, 3, 2)), np.array([0, 1, 3])
    >>> sequences(x, x, x, ends, ends)
    [(slice(0, 1, None), slice(0, 1, None)), (slice(1, 3, None), slice(1, 3, None))]
    """
    check_attention_inputs(q, k, v)
    rows = check_offsets("q_offsets", q_offsets, q.shape[-2])
    keys = check_offsets("k_offsets", k_offsets, k.shape[-2])
    check_size("k_offsets", len(k_offsets), len(q_offsets), "as many as q_offsets")
    return list(zip(rows, keys, strict=True))
