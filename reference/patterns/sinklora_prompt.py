"""SinkLoRA at inference: H2O's choice of heavy tokens, simulated on the scores of a whole prompt.

The clauses are those of `sinklora`.
"""

from __future__ import annotations

import numpy as np

from attnspec.reference.conventions import causal_mask, check_array, check_integer, check_size
from attnspec.reference.patterns.sinklora_h2o import check_budgets
from attnspec.reference.primitives.softmax import softmax
from attnspec.reference.primitives.top_k import top_k_mask


def h2o_local_mask(scores: np.ndarray, hh: int) -> np.ndarray:
    """S13: bool (..., T, T), the `hh` tokens that are heavy when each query comes.

    `scores` (..., T, T) are scaled; those above the diagonal are not read. The caller adds the
    recent tokens and cuts causally.

    >>> h2o_local_mask(np.array([[0.0, 9, 9, 9], [9, 0, 9, 9], [0, 0, 0, 9], [0, 0, 0, 0]]), 2)
    array([[ True,  True, False, False],
           [ True,  True, False, False],
           [ True, False,  True, False],
           [ True, False, False,  True]])
    """
    check_array("scores", scores, ("T", "T"))
    check_size("scores", scores.shape[-2], scores.shape[-1], "queries, as many as keys")
    check_integer("hh", hh, least=0)
    T = scores.shape[-1]
    mask = np.zeros(scores.shape, bool)
    if hh == 0:
        return mask
    P = softmax(scores, causal_mask(T, T))
    u = np.arange(T)
    mask[..., :hh, :hh] = True
    kept = np.broadcast_to(u < hh, (*P.shape[:-2], T))
    a = np.sum(P[..., :hh, :], axis=-2)
    for t in range(hh, T):
        kept = top_k_mask(np.where(kept, a, -np.inf), hh - 1) | (u == t)
        a = np.where(kept, a + P[..., t, :], np.zeros_like(a))
        mask[..., t, :] = kept
    return mask


def h2o_global_mask(P: np.ndarray, hh: int, rec: int) -> np.ndarray:
    """S14: bool (..., T, T), heavy columns and recent tokens for causal weights P (..., T, T).

    What P holds above the diagonal is not read. **Looks ahead**: later queries decide as well.

    >>> h2o_global_mask(np.array([[1.0, 0, 0], [0.9, 0.1, 0], [0.8, 0.1, 0.1]]), 1, 0).astype(int)
    array([[1, 0, 0],
           [1, 1, 0],
           [1, 0, 1]])
    """
    check_array("P", P, ("T", "T"))
    check_size("P", P.shape[-2], P.shape[-1], "queries, as many as keys")
    check_budgets(hh, rec)
    T = P.shape[-1]
    seen, u = causal_mask(T, T), np.arange(T)
    received = np.sum(np.where(seen, P, np.zeros_like(P)), axis=-2)
    recent = np.abs(u[:, None] - u) <= rec
    return (top_k_mask(received, hh)[..., None, :] | recent) & seen
