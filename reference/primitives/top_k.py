"""Selection of the best entries, with the rulebook's tie rule."""

from __future__ import annotations

import numpy as np

from attnspec.reference.conventions import check_integer


def top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """Indices (..., min(k, n)) of the highest of `scores` (..., n), sorted ascending.

    Ties go to the lower index (K6); a `k` beyond n means all (K9).

    >>> top_k(np.array([1.0, 3.0, 3.0, 3.0]), 2)
    array([1, 2])
    """
    check_integer("k", k, least=0)
    # A stable sort of the negated scores keeps equal scores in index order.
    best_first = np.argsort(-scores, axis=-1, kind="stable")
    return np.sort(best_first[..., :k], axis=-1)


def top_k_mask(scores: np.ndarray, k: int) -> np.ndarray:
    """bool, shaped as `scores`: True at the entries `top_k` selects.

    >>> top_k_mask(np.array([1.0, 3.0, 3.0, 3.0]), 2).astype(int)
    array([0, 1, 1, 0])
    """
    mask = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(mask, top_k(scores, k), True, axis=-1)
    return mask
