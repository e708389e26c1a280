"""Based's feature map: the second-order Taylor polynomial of exp as an inner product (S1, S2, S5).

Both layouts are here, the square one and the packed one that keeps each pair of channels once, with
the gradient of the map and the checks the chapter shares.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from attnspec.reference.conventions import (
    check_array,
    check_bool,
    check_shaped,
    check_size,
    default_scale,
    repeat_heads,
)
from attnspec.reference.dense.attention import score


def taylor_features(
    x: np.ndarray, *, packed: bool = False, scale: float | None = None
) -> np.ndarray:
    """S5: features (..., D) of x (..., d), D = 1 + d + d * d, or 1 + d + d (d + 1) / 2 if `packed`.

    >>> taylor_features(np.array([1.0, 2.0]), scale=1.0).round(2)
    array([1.  , 1.  , 2.  , 0.71, 1.41, 1.41, 2.83])
    >>> taylor_features(np.array([1.0, 2.0]), packed=True, scale=1.0).round(2)
    array([1.  , 1.  , 2.  , 0.71, 2.  , 2.83])
    """
    check_array("x", x, ("d",))
    check_bool("packed", packed)
    scale = chosen_scale(scale, x.shape[-1])
    pairs = x[..., :, None] * x[..., None, :] * (scale / math.sqrt(2))
    if packed:
        rows, columns, weights = packed_pairs(x)
        second = pairs[..., rows, columns] * weights
    else:
        second = pairs.reshape(*x.shape[:-1], x.shape[-1] ** 2)
    one = np.ones_like(x, shape=(*x.shape[:-1], 1))
    return np.concatenate([one, math.sqrt(scale) * x, second], axis=-1)


def taylor_features_backward(
    x: np.ndarray, dfeatures: np.ndarray, *, packed: bool = False, scale: float | None = None
) -> np.ndarray:
    """S9: dx (..., d) of `taylor_features`, from dfeatures (..., D).

    >>> taylor_features_backward(np.array([3.0]), np.array([9.0, 1.0, 0.0]), scale=4.0)
    array([2.])
    """
    check_array("x", x, ("d",))
    check_bool("packed", packed)
    d = x.shape[-1]
    scale = chosen_scale(scale, d)
    check_shaped("dfeatures", dfeatures, (*x.shape[:-1], feature_count(d, packed)))
    first, second = dfeatures[..., 1 : 1 + d], dfeatures[..., 1 + d :]
    if packed:
        rows, columns, weights = packed_pairs(x)
        pairs = np.zeros_like(x, shape=(*x.shape, d))
        pairs[..., rows, columns] = second * weights
    else:
        pairs = second.reshape(*x.shape, d)
    pairs = pairs + np.swapaxes(pairs, -1, -2)
    both = (pairs @ x[..., None])[..., 0]
    return math.sqrt(scale) * first + (scale / math.sqrt(2)) * both


def taylor_weights(q: np.ndarray, k: np.ndarray, *, scale: float | None = None) -> np.ndarray:
    """S1, S2: weights w (..., heads, q_tokens, k_tokens) before any mask, never below 1/2.

    q (..., heads, q_tokens, d), k (..., kv_heads, k_tokens, d).

    >>> taylor_weights(np.ones((1, 1, 1)), np.array([[[0.0], [-1.0], [2.0]]]))
    array([[[1. , 0.5, 5. ]]])
    """
    check_array("q", q, ("heads", "q_tokens", "d"))
    check_array("k", k, ("kv_heads", "k_tokens", "d"))
    if k.dtype != q.dtype:
        raise TypeError(f"k: got dtype {k.dtype}, expected {q.dtype}, as q")
    if k.shape[:-3] != q.shape[:-3]:
        raise ValueError(f"k: got leading axes {k.shape[:-3]}, expected {q.shape[:-3]}, as q")
    check_size("k", k.shape[-1], q.shape[-1], "d, as in q")
    return weigh(score(q, k, scale=chosen_scale(scale, q.shape[-1])))


def taylor_weights_backward(
    q: np.ndarray, k: np.ndarray, dw: np.ndarray, *, scale: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """S9: dq and dk of every query head, (..., heads, k_tokens, d), from dw of `taylor_weights`.

    >>> one = np.ones((1, 1, 1))
    >>> [float(g.item()) for g in taylor_weights_backward(one, one, one)]
    [2.0, 2.0]
    """
    scale = chosen_scale(scale, q.shape[-1])
    ds = dw * (1 + score(q, k, scale=scale)) * scale
    return ds @ repeat_heads(k, q.shape[-3]), np.swapaxes(ds, -1, -2) @ q


def weigh(scores: np.ndarray) -> np.ndarray:
    """S2: 1 + s + s^2 / 2 of each score.

    >>> weigh(np.array([-1.0, 2.0]))
    array([0.5, 5. ])
    """
    return 1 + scores + scores * scores / 2


def feature_count(d: int, packed: bool = False) -> int:
    """S5: D, the number of features of a vector of width `d`.

    >>> feature_count(16), feature_count(16, packed=True)
    (273, 153)
    """
    return 1 + d + (d * (d + 1) // 2 if packed else d * d)


def packed_pairs(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S5: rows and columns a <= b of the pairs kept, and their factor: 1 or, if a < b, sqrt(2).

    >>> packed_pairs(np.ones(2))
    (array([0, 0, 1]), array([0, 1, 1]), array([1.        , 1.41421356, 1.        ]))
    """
    rows, columns = np.triu_indices(x.shape[-1])
    factor = np.zeros_like(x, shape=rows.shape) + np.where(rows < columns, math.sqrt(2), 1)
    return rows, columns, factor.astype(x.dtype)


def chosen_scale(scale: Any, d: int) -> float:
    """S1, K14: the scale given, a number above 0, or 1 / sqrt(d).

    >>> chosen_scale(None, 16), chosen_scale(2, 16)
    (0.25, 2.0)
    """
    if scale is None:
        return default_scale(max(d, 1))
    if isinstance(scale, (bool, np.bool_)) or not isinstance(scale, (int, float, np.number)):
        raise TypeError(f"scale: got {scale!r}, expected a number above 0 or None")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale: got {scale}, expected a number above 0")
    return float(scale)


def check_eps(eps: Any) -> None:
    """K14: `eps` is a finite number of at least 0.

    >>> check_eps(-1.0)
    Traceback (most recent call last):
    ValueError: eps: got -1.0, expected a number >= 0
    """
    if isinstance(eps, (bool, np.bool_)) or not isinstance(eps, (int, float, np.number)):
        raise TypeError(f"eps: got {eps!r}, expected a number >= 0")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps: got {eps}, expected a number >= 0")
