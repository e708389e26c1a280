"""TempScale, the steps: score, temper, weigh, combine, the clauses S1 to S5 of `tempscale`."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import numpy as np

from attnspec.reference.conventions import check_array, check_shaped, check_size
from attnspec.reference.dense.attention import combine, score, visible
from attnspec.reference.primitives.softmax import softmax


def scores(
    q: np.ndarray, k: np.ndarray, scale: float | None = None, bias: np.ndarray | None = None
) -> np.ndarray:
    """S1: scores z (..., heads, q_tokens, k_tokens) before tempering.

    q (..., heads, q_tokens, d), k (..., kv_heads, k_tokens, d); `bias` broadcasts to the scores,
    `scale` None means 1/sqrt(d), T5 has 1.

    >>> scores(np.ones((1, 1, 4)), np.ones((1, 2, 4)), bias=np.array([0.0, 1.0]))
    array([[[2., 3.]]])
    """
    if scale is not None:
        check_positive("scale", scale)
    z = score(q, k, scale=None if scale is None else float(scale))
    if bias is None:
        return z
    check_array("bias", bias, ("k_tokens",))
    if bias.dtype != z.dtype:
        raise TypeError(f"bias: got dtype {bias.dtype}, expected {z.dtype}, as q")
    shape = (1,) * (z.ndim - bias.ndim) + bias.shape
    if len(shape) > z.ndim or any(b not in (1, n) for b, n in zip(shape, z.shape, strict=True)):
        raise ValueError(f"bias: got shape {bias.shape}, expected one that broadcasts to {z.shape}")
    return z + bias


def temper(scores: np.ndarray, tau: float | np.ndarray = 1.0) -> np.ndarray:
    """S2: scores (..., heads, q_tokens, k_tokens) divided by `tau`, a number or (heads,).

    >>> temper(np.array([[[1.0, 2.0]]]), 0.5)
    array([[[2., 4.]]])
    """
    check_array("scores", scores, ("heads", "q_tokens", "k_tokens"))
    check_temperature(tau, scores.shape[-3], scores.dtype)
    return scores / _over_scores(tau)


def temper_backward(
    scores: np.ndarray, tau: float | np.ndarray, dout: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """S5: the gradients of the scores and of `tau`, from `dout`, that of the tempered scores.

    A score whose gradient is exactly 0, as behind a mask, is not read (K11).

    >>> dscores, dtau = temper_backward(np.array([[[1.0, 2.0]]]), 0.5, np.array([[[1.0, 1.0]]]))
    >>> dscores, dtau
    (array([[[2., 2.]]]), array(-12.))
    """
    check_array("scores", scores, ("heads", "q_tokens", "k_tokens"))
    check_shaped("dout", dout, scores.shape)
    check_temperature(tau, scores.shape[-3], scores.dtype)
    terms = np.where(dout == 0, np.zeros_like(scores), dout * scores)
    slopes = np.sum(terms / _over_scores(tau) / -_over_scores(tau), axis=(-2, -1))
    by_head = isinstance(tau, np.ndarray)
    dtau = np.sum(slopes, axis=tuple(range(slopes.ndim - by_head)))
    return dout / _over_scores(tau), np.asanyarray(dtau)


def softmax_rows(scores: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """S3: weights P (..., heads, q_tokens, k_tokens) of tempered scores.

    `mask` is bool and broadcasts to the scores, True = visible; rows that see nothing are 0 (K4).

    >>> softmax_rows(np.zeros((1, 1, 3)), np.array([True, True, False]))
    array([[[0.5, 0.5, 0. ]]])
    """
    check_array("scores", scores, ("heads", "q_tokens", "k_tokens"))
    return softmax(scores, visible(*scores.shape[-2:], mask=mask))


def attend(P: np.ndarray, v: np.ndarray) -> np.ndarray:
    """S4: outputs (..., heads, q_tokens, dv) of weights P (..., heads, q_tokens, k_tokens).

    v (..., kv_heads, k_tokens, dv); a value that no query weighs is not read (K11).

    >>> attend(np.array([[[0.5, 0.5]]]), np.array([[[2.0], [4.0]]]))
    array([[[3.]]])
    """
    check_array("P", P, ("heads", "q_tokens", "k_tokens"))
    check_array("v", v, ("kv_heads", "k_tokens", "dv"))
    if v.dtype != P.dtype:
        raise TypeError(f"v: got dtype {v.dtype}, expected {P.dtype}, as P")
    if v.shape[:-3] != P.shape[:-3]:
        raise ValueError(f"v: got leading axes {v.shape[:-3]}, expected {P.shape[:-3]}, as P")
    check_size("v", v.shape[-2], P.shape[-1], "k_tokens, as in P")
    if v.shape[-3] < 1 or P.shape[-3] % v.shape[-3]:
        raise ValueError(f"v: got {v.shape[-3]} kv heads, expected a divisor of {P.shape[-3]}")
    return combine(P, v)


def check_positive(name: str, value: Any) -> None:
    """S1, K14: `value` is a finite number above 0."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Real):
        raise TypeError(f"{name}: got {value!r}, expected a finite number > 0")
    if not (float(value) > 0 and math.isfinite(value)):
        raise ValueError(f"{name}: got {value}, expected a finite number > 0")


def check_temperature(tau: Any, heads: int, dtype: np.dtype[Any]) -> None:
    """S2, K14: `tau` is a finite number above 0, or an array (heads,) of them with `dtype`."""
    if not isinstance(tau, np.ndarray):
        check_positive("tau", tau)
        return
    if tau.dtype != dtype:
        raise TypeError(f"tau: got dtype {tau.dtype}, expected {dtype}, as the scores")
    if tau.shape != (heads,):
        raise ValueError(
            f"tau: got shape {tau.shape}, expected ({heads},), one for each head, or a number"
        )
    if not np.all((tau > 0) & np.isfinite(tau)):
        raise ValueError(f"tau: got {tau}, expected finite numbers > 0")


def _over_scores(tau: float | np.ndarray) -> Any:
    """`tau` as it broadcasts against (..., heads, q_tokens, k_tokens), without a wider dtype."""
    return tau[:, None, None] if isinstance(tau, np.ndarray) else float(tau)
