"""SeerAttention's selection rules: the clauses S5 to S7 of `seer_attention`.

A threshold on the gate's weights, or a ratio of its scores, gives each block of queries the blocks
of keys it attends to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from attnspec.reference.conventions import check_array, check_integer, check_size
from attnspec.reference.primitives.softmax import softmax
from attnspec.reference.primitives.top_k import top_k_mask
from attnspec.reference.selection.seer_attention_gate import (
    check_kinds,
    gate_rope,
    gate_scores,
    pool_blocks,
)


def select_threshold(
    softmaxed: np.ndarray,
    tau: float = 2e-3,
    last_dense: bool = True,
    force_diagonal: bool = False,
) -> np.ndarray:
    """S5, S7: M bool (..., heads, nb, nb), True where a gate weight of softmax(G) exceeds tau.

    A tau below 0 keeps every block of the past. `force_diagonal` adds a row's own block.

    >>> select_threshold(np.array([[[1.0, 0.0], [0.9, 0.1]]]), 0.1, last_dense=False).astype(int)
    array([[[1, 0],
            [1, 0]]])
    """
    _check_square("softmaxed", softmaxed)
    check_number("tau", tau)
    return _finish(softmaxed > tau, last_dense, force_diagonal)


def ratio_to_k(rho: float, nb: int) -> int:
    """S6: blocks kept in each row, so that about a share rho of the causal triangle is.

    >>> ratio_to_k(0.1, 100), ratio_to_k(1.0, 100), ratio_to_k(1e-3, 100)
    (5, 100, 1)
    """
    check_number("rho", rho)
    check_integer("nb", nb, least=0)
    if not 0 < rho <= 1:
        raise ValueError(f"rho: got {rho}, expected a number in (0, 1]")
    return max(1, int((1 - math.sqrt(1 - rho)) * nb))


def select_ratio(
    G: np.ndarray, rho: float, last_dense: bool = True, force_diagonal: bool = False
) -> np.ndarray:
    """S6, S7: M bool (..., heads, nb, nb), the `ratio_to_k` best of G in each row (K6).

    >>> G = np.array([[[0.0, -1e9], [2.0, 1.0]]])
    >>> select_ratio(G, 0.8, last_dense=False).astype(int)
    array([[[1, 0],
            [1, 0]]])
    """
    _check_square("G", G)
    chosen = top_k_mask(G, ratio_to_k(rho, G.shape[-1]))
    return _finish(chosen, last_dense, force_diagonal)


def select_blocks(
    q: np.ndarray,
    k: np.ndarray,
    Wq: np.ndarray | None,
    Wk: np.ndarray,
    *,
    b: int = 64,
    q_kinds: Sequence[str] = ("avg",),
    k_kinds: Sequence[str] = ("max", "min", "avg"),
    base: float = 10000.0,
    tau: float | None = None,
    rho: float | None = None,
    last_dense: bool = True,
    force_diagonal: bool = False,
) -> np.ndarray:
    """S1-S7: M bool (..., heads, nb, nb) of q (..., heads, T, d) and k (..., kv_heads, T, d).

    q and k come before their rotation; Wq and Wk are those of `gate_scores`. Either `tau` or
    `rho` chooses the rule; neither means the authors' tau = 2e-3.

    >>> x = np.ones((1, 3, 2))
    >>> select_blocks(x, x, None, np.eye(2)[None], b=2, k_kinds=("avg",)).astype(int)
    array([[[1, 0],
            [1, 1]]])
    """
    check_array("q", q, ("heads", "T", "d"))
    check_array("k", k, ("kv_heads", "T", "d"))
    check_size("k", k.shape[-2], q.shape[-2], "tokens, as in q")
    check_array("Wk", Wk, ("heads", "nk * d", "dg"))
    check_kinds(q_kinds, "q_kinds")
    check_kinds(k_kinds, "k_kinds")
    if tau is not None and rho is not None:
        raise ValueError(f"tau: got {tau} beside rho {rho}, expected one of the two")
    pq, pk = pool_blocks(q, b, q_kinds), pool_blocks(k, b, k_kinds)
    cos, sin = gate_rope(pq.shape[-2], b, Wk.shape[-1], base)
    G = gate_scores(pq, pk, Wq, Wk, cos, sin)
    if rho is not None:
        return select_ratio(G, rho, last_dense, force_diagonal)
    return select_threshold(softmax(G), 2e-3 if tau is None else tau, last_dense, force_diagonal)


def _finish(chosen: np.ndarray, last_dense: bool, force_diagonal: bool) -> np.ndarray:
    """S7: the last two block rows, the diagonal if asked for, and nothing of the future."""
    nb = chosen.shape[-1]
    row = np.arange(nb)[:, None]
    kept = chosen | (last_dense & (row >= nb - 2)) | (force_diagonal & np.eye(nb, dtype=bool))
    return kept & np.tri(nb, dtype=bool)


def _check_square(name: str, x: np.ndarray) -> None:
    check_array(name, x, ("heads", "nb", "nb"))
    check_size(name, x.shape[-2], x.shape[-1], "as many query blocks as key blocks")


def check_number(name: str, value: float) -> None:
    """K14: `value` is a number, not a bool and not NaN.

    >>> check_number("tau", "high")
    Traceback (most recent call last):
    TypeError: tau: got 'high', expected a number
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name}: got {value!r}, expected a number")
    if math.isnan(value):
        raise ValueError(f"{name}: got {value}, expected a number")
