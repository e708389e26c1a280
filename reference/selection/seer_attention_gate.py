"""SeerAttention's gate: the clauses S1 to S4 of `seer_attention`.

A tiny attention between blocks of tokens: pooled queries and keys are projected, rotated to the
position of their block and compared.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

from attnspec.reference.conventions import (
    check_array,
    check_integer,
    check_size,
    repeat_heads,
)
from attnspec.reference.dense.attention_gradient import sum_groups
from attnspec.reference.primitives import pooling
from attnspec.reference.primitives.rope import rope_angles

MASKED = -1e9  # S4: the authors' score of a block in the future


def gate_kinds(name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """S1: the poolings of q and of k that a gate type such as "Qavg_Kmaxminavg" names.

    >>> gate_kinds("Qavg_Kmaxmin")
    (('avg',), ('max', 'min'))
    """
    parts = re.fullmatch(r"Q(max)?(min)?(avg)?_K(max)?(min)?(avg)?", name)
    found = parts.groups() if parts else (None,) * 6
    q_kinds = tuple(kind for kind in found[:3] if kind)
    k_kinds = tuple(kind for kind in found[3:] if kind)
    if not q_kinds or not k_kinds:
        raise ValueError(
            f"name: got {name!r}, expected Q and K each with max, min, avg, as 'Qavg_Kmaxmin'"
        )
    return q_kinds, k_kinds


def pool_blocks(x: np.ndarray, b: int, kinds: Sequence[str]) -> np.ndarray:
    """S1: x (..., T, d) pooled over blocks of b tokens: (..., ceil(T/b), len(kinds) * d).

    `kinds` is a choice of "max", "min" and "avg", concatenated along channels in the order given.

    >>> pool_blocks(np.array([[-1.0], [-5.0], [-4.0]]), 2, ("max", "avg"))
    array([[-1., -3.],
           [-4., -4.]])
    """
    check_array("x", x, ("T", "d"))
    check_integer("b", b, least=1)
    check_kinds(kinds)
    return pooling.pool_blocks(x, b, kinds)


def gate_rope(nb: int, b: int, dg: int, base: float = 10000.0) -> tuple[np.ndarray, np.ndarray]:
    """S3: cos and sin (nb, dg), float64, of block n standing at position n b.

    >>> gate_rope(2, 64, 2)[0].round(4)
    array([[1.    , 1.    ],
           [0.3919, 0.3919]])
    """
    check_integer("nb", nb, least=0)
    check_integer("b", b, least=1)
    check_integer("dg", dg, least=2)
    if dg % 2:
        raise ValueError(f"dg: got {dg}, expected an even width for rotary positions")
    angles = rope_angles(b * np.arange(nb), dg, base)
    return np.tile(np.cos(angles), 2), np.tile(np.sin(angles), 2)


def gate_scores(
    pq: np.ndarray,
    pk: np.ndarray,
    Wq: np.ndarray | None,
    Wk: np.ndarray,
    cos: np.ndarray,
    sin: np.ndarray,
) -> np.ndarray:
    """S2, S3, S4: G (..., heads, nb, nb), -1e9 where the key block C > the query block R.

    pq (..., heads, nb, nq d), pk (..., kv_heads, nb, nk d), cos and sin (nb, dg). Wq (heads, nq d,
    dg) with Wk (kv_heads, nk d, dg), or no Wq, for nq = 1 and dg = d, with Wk (heads, nk d, dg).

    >>> one, eye = np.ones((1, 2, 4)), np.eye(4)[None]
    >>> gate_scores(one, one, None, eye, np.ones((2, 4)), np.zeros((2, 4)))
    array([[[ 2.e+00, -1.e+09],
            [ 2.e+00,  2.e+00]]])
    """
    gq, gk = _gate_features(pq, pk, Wq, Wk, cos, sin)
    G = gq @ np.swapaxes(gk, -1, -2) / math.sqrt(Wk.shape[-1])
    masked = G.dtype.type(max(MASKED, np.finfo(G.dtype).min))
    return np.where(np.tri(G.shape[-1], dtype=bool), G, masked)


def gate_scores_backward(
    pq: np.ndarray,
    pk: np.ndarray,
    Wq: np.ndarray | None,
    Wk: np.ndarray,
    cos: np.ndarray,
    sin: np.ndarray,
    dG: np.ndarray,
) -> tuple[np.ndarray | None, np.ndarray]:
    """S10: dWq (None without a Wq) and dWk from dG (..., heads, nb, nb); masked scores give none.

    >>> one, eye = np.ones((1, 1, 2)), np.eye(2)[None]
    >>> gate_scores_backward(one, one, None, eye, one[0], 0 * one[0], np.ones((1, 1, 1)))[1]
    array([[[0.70710678, 0.70710678],
            [0.70710678, 0.70710678]]])
    """
    gq, gk = _gate_features(pq, pk, Wq, Wk, cos, sin)
    check_array("dG", dG, ("heads", "nb", "nb"))
    if dG.shape != (*gq.shape[:-1], gq.shape[-2]):
        expected = (*gq.shape[:-1], gq.shape[-2])
        raise ValueError(f"dG: got shape {dG.shape}, expected {expected}")
    dG = np.where(np.tri(dG.shape[-1], dtype=bool), dG, 0.0) / math.sqrt(Wk.shape[-1])
    dgk = _rotate_back(np.swapaxes(dG, -1, -2) @ gq, cos, sin)
    batch = tuple(range(pq.ndim - 3))
    if Wq is None:
        keys = repeat_heads(pk, pq.shape[-3])
        return None, np.sum(np.swapaxes(keys, -1, -2) @ dgk, axis=batch)
    dgq = _rotate_back(dG @ gk, cos, sin)
    dWk = np.swapaxes(pk, -1, -2) @ sum_groups(dgk, pk.shape[-3])
    return np.sum(np.swapaxes(pq, -1, -2) @ dgq, axis=batch), np.sum(dWk, axis=batch)


def check_kinds(kinds: Sequence[str], name: str = "kinds") -> None:
    """S1, K14: `kinds` is a choice of different poolings, at least one.

    >>> check_kinds(("avg", "avg"))
    Traceback (most recent call last):
    ValueError: kinds: got ('avg', 'avg'), expected different ones of 'max', 'min', 'avg'
    """
    if not kinds or len(set(kinds)) != len(kinds) or not set(kinds) <= set(pooling.REDUCTIONS):
        known = ", ".join(map(repr, pooling.REDUCTIONS))
        raise ValueError(f"{name}: got {kinds!r}, expected different ones of {known}")


def _gate_features(
    pq: np.ndarray,
    pk: np.ndarray,
    Wq: np.ndarray | None,
    Wk: np.ndarray,
    cos: np.ndarray,
    sin: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """S2, S3: gq and gk (..., heads, nb, dg), projected and rotated."""
    check_array("pq", pq, ("heads", "nb", "nq * d"))
    check_array("pk", pk, ("kv_heads", "nb", "nk * d"))
    check_array("Wk", Wk, ("heads", "nk * d", "dg"))
    heads, kv_heads, nb, dg = pq.shape[-3], pk.shape[-3], pq.shape[-2], Wk.shape[-1]
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"pk: got {kv_heads} kv heads, expected a divisor of {heads} (heads)")
    check_size("pk", pk.shape[-2], nb, "nb, as in pq")
    check_size("Wk", Wk.shape[-2], pk.shape[-1], "channels, as in pk")
    for name, table in (("cos", cos), ("sin", sin)):
        check_array(name, table, ("nb", "dg"))
        if table.shape != (nb, dg):
            raise ValueError(f"{name}: got shape {table.shape}, expected {(nb, dg)}")
    if Wq is None:
        check_size("pq", pq.shape[-1], dg, "dg, as there is no Wq")
        check_size("Wk", Wk.shape[-3], heads, "heads, as in pq")
        return _rotate(pq, cos, sin), _rotate(repeat_heads(pk, heads) @ Wk, cos, sin)
    check_array("Wq", Wq, ("heads", "nq * d", "dg"))
    check_size("Wq", Wq.shape[-3], heads, "heads, as in pq")
    check_size("Wq", Wq.shape[-2], pq.shape[-1], "channels, as in pq")
    check_size("Wq", Wq.shape[-1], dg, "dg, as in Wk")
    check_size("Wk", Wk.shape[-3], kv_heads, "kv_heads, as in pk")
    return _rotate(pq @ Wq, cos, sin), repeat_heads(_rotate(pk @ Wk, cos, sin), heads)


def _rotate_half(x: np.ndarray) -> np.ndarray:
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([-second, first], axis=-1)


def _rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """S3: x (..., nb, dg) rotated, the tables in its dtype."""
    return x * cos.astype(x.dtype) + _rotate_half(x) * sin.astype(x.dtype)


def _rotate_back(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """The transpose of `_rotate`, for gradients."""
    return x * cos.astype(x.dtype) - _rotate_half(x * sin.astype(x.dtype))
