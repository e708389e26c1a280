"""Giraffe, continued: who sees whom, and where tokens stand unless it is said.

Definition
----------
S10. **Order.** Causal goes by the index of a token (K3), not by its position: positions drawn at
random may be equal, and a query must not see a later token that stands where it does. The key mask
hides padding besides.

S11. **Places.** Without positions keys stand at 0..S-1 and queries at the last T of them.
"""

from __future__ import annotations

import numpy as np

from attnspec.reference.conventions import causal_mask, check_array, check_bool
from attnspec.reference.positions.giraffe_rotation import check_positions


def visible(T: int, S: int, causal: bool = True, key_mask: np.ndarray | None = None) -> np.ndarray:
    """S10: bool (..., 1, T, S), or (T, S) without `key_mask` bool (..., S), True = a real key.

    >>> visible(2, 3, key_mask=np.array([False, True, True])).astype(int)
    array([[[0, 1, 0],
            [0, 1, 1]]])
    """
    check_bool("causal", causal)
    allowed = causal_mask(T, S) if causal else np.ones((T, S), bool)
    if key_mask is None:
        return allowed
    check_array("key_mask", key_mask, ("S",), dtype="bool")
    if key_mask.shape[-1] != S:
        raise ValueError(f"key_mask: got {key_mask.shape[-1]} keys, expected {S}, as k")
    return allowed & key_mask[..., None, None, :]


def default_positions(
    q: np.ndarray, k: np.ndarray, pq: np.ndarray | None, pk: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """S11: the positions given, checked, or those of the index.

    >>> default_positions(np.ones((1, 1, 2)), np.ones((1, 3, 2)), None, None)
    (array([2]), array([0, 1, 2]))
    """
    T, S = q.shape[-2], k.shape[-2]
    pq = S - T + np.arange(T) if pq is None else pq
    pk = np.arange(S) if pk is None else pk
    check_positions("pq", pq, q)
    check_positions("pk", pk, k)
    return pq, pk
