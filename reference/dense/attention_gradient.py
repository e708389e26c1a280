"""Dense attention, the gradient: the steps of S5 in `attention` that other chapters share."""

from __future__ import annotations

import numpy as np


def score_gradient(
    weights: np.ndarray, values: np.ndarray, dout: np.ndarray, dlse: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """S5: ds (..., heads, q_tokens, k_tokens) and its row term do . o (..., heads, q_tokens).

    `values` (..., heads, k_tokens, dv) are one for each query head. Weights that sum to less than
    one, because a sink takes the rest, follow the same formula.

    >>> score_gradient(np.array([[0.5, 0.5]]), np.eye(2), np.array([[1.0, 0.0]]))[0]
    array([[ 0.25, -0.25]])
    """
    row_term = np.einsum("...d,...d->...", dout, weights @ values)
    lse_term = 0 if dlse is None else dlse[..., None]
    return weights * (dout @ np.swapaxes(values, -1, -2) - row_term[..., None] + lse_term), row_term


def sum_groups(x: np.ndarray, kv_heads: int) -> np.ndarray:
    """S5: (..., heads, tokens, d) to (..., kv_heads, tokens, d), summed over each group (K7).

    >>> sum_groups(np.array([[[1.0]], [[2.0]], [[3.0]], [[4.0]]]), 2).ravel()
    array([3., 7.])
    """
    *leading, heads, tokens, d = x.shape
    grouped = x.reshape(*leading, kv_heads, heads // kv_heads, tokens, d)
    return np.einsum("...kgtd->...ktd", grouped)
