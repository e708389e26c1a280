"""Softmax with its normaliser, and the merge of two softmaxes over disjoint keys."""

from __future__ import annotations

import numpy as np


def softmax_lse(
    scores: np.ndarray, mask: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Weights and log normaliser over the last axis.

    `scores` (..., keys); `mask` bool, broadcastable, True = visible. Returns weights (..., keys)
    and lse (...). A forbidden score is never read, whatever it holds (K11); a row without a
    visible key has weights 0 and lse -inf (K4); lse is natural (K5).

    >>> scores, mask = np.array([0.0, np.log(3.0), np.nan]), np.array([True, True, False])
    >>> weights, lse = softmax_lse(scores, mask)
    >>> weights
    array([0.25, 0.75, 0.  ])
    >>> bool(np.isclose(lse, np.log(4.0)))
    True
    """
    if mask is not None:
        scores = np.where(mask, scores, -np.inf)
    if scores.shape[-1] == 0:
        return np.zeros_like(scores), np.full_like(scores, -np.inf, shape=scores.shape[:-1])
    top = np.max(scores, axis=-1, keepdims=True)
    top = np.where(np.isneginf(top), 0.0, top).astype(scores.dtype)
    weights = np.exp(scores - top)
    total = np.sum(weights, axis=-1, keepdims=True)
    empty = total == 0
    lse = np.where(empty, -np.inf, top + np.log(np.where(empty, 1.0, total)))
    weights = weights / np.where(empty, 1.0, total).astype(scores.dtype)
    return weights, lse[..., 0].astype(scores.dtype)


def weights_given_lse(
    scores: np.ndarray, lse: np.ndarray, mask: np.ndarray | None = None
) -> np.ndarray:
    """Weights exp(scores - lse) over the last axis, recomputed from a known normaliser.

    `lse` (...) is that of the row; what is masked, and a row with lse -inf, has weights 0.

    >>> weights_given_lse(np.array([0.0, np.log(3.0)]), np.array(np.log(4.0)))
    array([0.25, 0.75])
    """
    empty = np.isneginf(lse)[..., None]
    hidden = empty if mask is None else empty | ~mask
    shift = np.where(empty, np.zeros_like(lse)[..., None], lse[..., None])
    return np.exp(np.where(hidden, -np.inf, scores - shift).astype(scores.dtype))


def softmax(scores: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """The weights of `softmax_lse`.

    >>> softmax(np.array([1.0, 1.0]))
    array([0.5, 0.5])
    """
    return softmax_lse(scores, mask)[0]


def log_softmax(scores: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Log weights over the last axis; a forbidden key gets -inf.

    >>> log_softmax(np.array([0.0, 0.0, 5.0]), np.array([True, True, False])).round(4)
    array([-0.6931, -0.6931,    -inf])
    """
    _, lse = softmax_lse(scores, mask)
    lse = np.where(np.isneginf(lse), 0.0, lse)[..., None].astype(scores.dtype)
    if mask is not None:
        scores = np.where(mask, scores, -np.inf)
    return scores - lse


def softmax_backward(weights: np.ndarray, dweights: np.ndarray) -> np.ndarray:
    """Gradient of the scores from the gradient of the weights, over the last axis.

    Rows that sum to less than one (a sink takes the rest) follow the same formula.

    >>> softmax_backward(np.array([0.5, 0.5]), np.array([1.0, 0.0]))
    array([ 0.25, -0.25])
    """
    inner = np.einsum("...j,...j->...", weights, dweights)[..., None]
    return weights * (dweights - inner)


def merge(
    out_a: np.ndarray, lse_a: np.ndarray, out_b: np.ndarray, lse_b: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Attention over the union of two disjoint key sets, from each set's own result.

    out (..., dv), lse (...). Associative and commutative; the unit is out 0 with lse -inf.

    >>> merge(np.array([2.0]), np.array(0.0), np.array([4.0]), np.array(0.0))[0]
    array([3.])
    """
    lse = np.logaddexp(lse_a, lse_b)
    finite = np.where(np.isneginf(lse), 0.0, lse)
    weight_a, weight_b = np.exp(lse_a - finite), np.exp(lse_b - finite)
    return weight_a[..., None] * out_a + weight_b[..., None] * out_b, lse
