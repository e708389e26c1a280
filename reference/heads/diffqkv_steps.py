"""The steps of DiffQKV attention, one by one: head maps, contraction, scores, weights, outputs.

The clauses are those of `diffqkv`.

Paper and code
--------------
- How the wider query is wired is not verified: S2 takes a wider query *head*. A wider hidden layer
  before the projection would look like S3 to a kernel, with nothing to contract. Recalled, not
  verified: queries of 3072 channels in all for 2048 of the model, 6144 for 4096.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.conventions import (
    check_array,
    check_integer,
    check_size,
    default_scale,
)
from attnspec.reference.dense.attention import visible
from attnspec.reference.heads.diffqkv_values import check_map
from attnspec.reference.primitives.softmax import softmax_lse


def head_maps(Hq: int, Hk: int, Hv: int) -> tuple[np.ndarray, np.ndarray]:
    """S1: the key head and the value head of each query head, int64 (Hq,) each.

    >>> head_maps(12, 4, 6)
    (array([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]), array([0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]))
    """
    check_integer("Hq", Hq, least=1)
    for name, heads in (("Hk", Hk), ("Hv", Hv)):
        check_integer(name, heads, least=1)
        if Hq % heads:
            raise ValueError(f"{name}: got {heads}, expected a divisor of the {Hq} query heads")
    h = np.arange(Hq, dtype=np.int64)
    return h // (Hq // Hk), h // (Hq // Hv)


def contract_query(q: np.ndarray, E: np.ndarray) -> np.ndarray:
    """S2: qe (..., heads, q_tokens, d) of q (..., heads, q_tokens, wide) by E (heads, wide, d).

    >>> contract_query(np.array([[[1.0, 2.0]]]), np.array([[[3.0], [4.0]]]))
    array([[[11.]]])
    """
    check_array("q", q, ("heads", "q_tokens", "wide"))
    check_array("E", E, ("heads", "wide", "d"))
    if E.dtype != q.dtype:
        raise TypeError(f"E: got dtype {E.dtype}, expected {q.dtype}, as q")
    if E.ndim != 3 or E.shape[:2] != (q.shape[-3], q.shape[-1]):
        raise ValueError(f"E: got shape {E.shape}, expected ({q.shape[-3]}, {q.shape[-1]}, d)")
    return q @ E


def contract_query_backward(
    q: np.ndarray, E: np.ndarray, dqe: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """S6: dq and dE, shaped as q and E.

    >>> x = np.ones((1, 3, 2))
    >>> contract_query_backward(x, np.ones((1, 2, 1)), np.ones((1, 3, 1)))[1].ravel()
    array([3., 3.])
    """
    contract_query(q, E)
    check_array("dqe", dqe, ("heads", "q_tokens", "d"))
    dE = np.einsum("...htw,...htd->...hwd", q, dqe)
    return dqe @ np.swapaxes(E, -1, -2), np.sum(dE, axis=tuple(range(q.ndim - 3)))


def scores(
    q: np.ndarray, k: np.ndarray, hk: np.ndarray, *, scale: float | None = None
) -> np.ndarray:
    """S3: s (..., heads, q_tokens, k_tokens) of q (..., heads, q_tokens, d) against
    k (..., k_heads, k_tokens, d), with the map hk (heads,).

    >>> scores(np.ones((2, 1, 4)), np.ones((1, 3, 4)), np.array([0, 0])).shape
    (2, 1, 3)
    """
    check_array("q", q, ("heads", "q_tokens", "d"))
    check_array("k", k, ("k_heads", "k_tokens", "d"))
    if k.dtype != q.dtype:
        raise TypeError(f"k: got dtype {k.dtype}, expected {q.dtype}, as q")
    check_size("k", k.shape[-1], q.shape[-1], "d, as in q")
    check_map("hk", hk, q.shape[-3], k.shape[-3])
    scale = default_scale(k.shape[-1]) if scale is None else scale
    return scale * (q @ np.swapaxes(k[..., hk, :, :], -1, -2))


def softmax_rows(s: np.ndarray, mask: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """S4: weights P, shaped as s (..., k_tokens), and lse (...); `mask` bool, True = visible.

    >>> softmax_rows(np.zeros((1, 3)), np.array([True, True, False]))[0]
    array([[0.5, 0.5, 0. ]])
    """
    check_array("s", s, ("q_tokens", "k_tokens"))
    if mask is not None:
        check_array("mask", mask, ("k_tokens",), dtype="bool")
        try:
            fits = np.broadcast_shapes(mask.shape, s.shape) == s.shape
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(f"mask: got shape {mask.shape}, expected one that fits {s.shape}")
    return softmax_lse(s, mask)


def attend(P: np.ndarray, v: np.ndarray, hv: np.ndarray) -> np.ndarray:
    """S5: outputs (..., heads, q_tokens, dv) of weights P (..., heads, q_tokens, k_tokens) and
    v (..., v_heads, k_tokens, dv), with the map hv (heads,).

    >>> attend(np.array([[[0.5, 0.5]]]), np.array([[[2.0], [4.0]]]), np.array([0]))
    array([[[3.]]])
    """
    check_array("P", P, ("heads", "q_tokens", "k_tokens"))
    check_array("v", v, ("v_heads", "k_tokens", "dv"))
    if v.dtype != P.dtype:
        raise TypeError(f"v: got dtype {v.dtype}, expected {P.dtype}, as P")
    check_size("v", v.shape[-2], P.shape[-1], "k_tokens, as in P")
    check_map("hv", hv, P.shape[-3], v.shape[-3])
    return P @ without_unread(P, v[..., hv, :, :])


def allowed(q: np.ndarray, k: np.ndarray, causal: bool, key_mask: np.ndarray | None) -> np.ndarray:
    """S4: bool, broadcastable to the scores, True where a query may look.

    >>> allowed(np.ones((1, 2, 1)), np.ones((1, 2, 1)), True, None).astype(int)
    array([[1, 0],
           [1, 1]])
    """
    if key_mask is not None:
        check_array("key_mask", key_mask, ("k_tokens",), dtype="bool")
        expected = (*k.shape[:-3], k.shape[-2])
        if key_mask.shape != expected:
            raise ValueError(f"key_mask: got shape {key_mask.shape}, expected {expected}")
        key_mask = key_mask[..., None, None, :]
    return visible(q.shape[-2], k.shape[-2], causal=causal, mask=key_mask)


def check_inputs(q: Any, k: Any, v: Any) -> tuple[np.ndarray, np.ndarray]:
    """S1, K1, K14: q, k and v fit one another; their head maps.

    >>> check_inputs(np.ones((4, 1, 2)), np.ones((3, 1, 2)), np.ones((4, 1, 2)))
    Traceback (most recent call last):
    ValueError: k: got 3 heads, expected a divisor of the 4 query heads
    """
    check_array("q", q, ("heads", "q_tokens", "d"))
    check_array("k", k, ("k_heads", "k_tokens", "d"))
    check_array("v", v, ("v_heads", "k_tokens", "dv"))
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: got dtype {x.dtype}, expected {q.dtype}, as q")
        if x.shape[:-3] != q.shape[:-3]:
            raise ValueError(f"{name}: got leading axes {x.shape[:-3]}, expected {q.shape[:-3]}")
        if x.shape[-3] < 1 or q.shape[-3] % x.shape[-3]:
            raise ValueError(
                f"{name}: got {x.shape[-3]} heads, "
                f"expected a divisor of the {q.shape[-3]} query heads"
            )
    check_size("k", k.shape[-1], q.shape[-1], "d, as in q, contracted if it is wider")
    check_size("v", v.shape[-2], k.shape[-2], "k_tokens, as in k")
    return head_maps(q.shape[-3], k.shape[-3], v.shape[-3])


def without_unread(P: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """K11: `rows` (..., heads, k_tokens, d), 0 where all weights P (..., heads, q_tokens, k_tokens)
    of a key are 0.

    >>> without_unread(np.array([[[0.0, 1.0]]]), np.array([[[np.nan], [2.0]]])).ravel()
    array([0., 2.])
    """
    unread = np.all(P == 0, axis=-2)[..., None]
    return np.where(unread, np.zeros_like(rows), rows)
