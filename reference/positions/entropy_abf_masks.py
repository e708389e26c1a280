"""Entropy-ABF, continued: who sees whom, and where tokens stand unless it is said.

The clauses are those of `entropy_abf`.
"""

from __future__ import annotations

import numpy as np

from attnspec.reference.conventions import check_array, check_bool
from attnspec.reference.positions.entropy_abf_rotation import check_positions


def visible(
    pq: np.ndarray, pk: np.ndarray, causal: bool = True, key_mask: np.ndarray | None = None
) -> np.ndarray:
    """S6: bool (..., 1, T, S), True where a query at `pq` (..., T) sees a key at `pk` (..., S).

    `key_mask` bool (..., S), True = a real key.

    >>> visible(np.array([0, 4]), np.array([3, 0])).astype(int)
    array([[[0, 1],
            [1, 1]]])
    """
    check_array("pq", pq, ("T",), dtype="int")
    check_array("pk", pk, ("S",), dtype="int")
    allowed = pk[..., None, None, :] <= pq[..., None, :, None]
    check_bool("causal", causal)
    if not causal:
        allowed = np.ones_like(allowed)
    if key_mask is None:
        return allowed
    check_array("key_mask", key_mask, ("S",), dtype="bool")
    if key_mask.shape[-1] != pk.shape[-1]:
        raise ValueError(f"key_mask: got {key_mask.shape[-1]} keys, expected {pk.shape[-1]}, as pk")
    return allowed & key_mask[..., None, None, :]


def default_positions(
    q: np.ndarray, k: np.ndarray, pq: np.ndarray | None, pk: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """S6: the positions given, checked, or keys at 0..S-1 and queries at the last T of them.

    >>> default_positions(np.ones((1, 1, 2)), np.ones((1, 3, 2)), None, None)
    (array([2]), array([0, 1, 2]))
    """
    T, S = q.shape[-2], k.shape[-2]
    pq = S - T + np.arange(T) if pq is None else pq
    pk = np.arange(S) if pk is None else pk
    check_positions("pq", pq, q)
    check_positions("pk", pk, k)
    return pq, pk
