"""TransNormerLLM row by row: clauses S1, S3 and S5 of `lightning_attention_1`.

A norm without weights, a channel mixer without an activation, and a lift of queries and keys whose
products tell how far apart two tokens are; each with its gradient.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from attnspec.reference.conventions import check_array, check_integer, check_shaped, check_size
from attnspec.reference.linear.flowformer_flows import check_eps


def srms_norm(x: np.ndarray, eps: float = 1e-6) -> np.ndarray:
    """S1: x (..., D) over its root mean square; a row of zeros stays zero if eps is 0.

    >>> srms_norm(np.array([[3.0, 4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]), 0.0)
    array([[1.2, 1.6, 0. , 0. ],
           [0. , 0. , 0. , 0. ]])
    """
    check_array("x", x, ("D",))
    check_eps(eps)
    return x * _inverse_rms(x, eps)


def srms_norm_backward(x: np.ndarray, eps: float, dy: np.ndarray) -> np.ndarray:
    """S1: dx of `srms_norm`; 0 for a row of zeros if eps is 0 (ours: there is no gradient).

    >>> x = np.array([[3.0, 4.0]])
    >>> dx = srms_norm_backward(x, 0.0, np.array([[1.0, 0.0]]))
    >>> float(np.abs(np.sum(x * dx)).round(12))
    0.0
    """
    check_array("x", x, ("D",))
    check_eps(eps)
    check_shaped("dy", dy, x.shape)
    inverse = _inverse_rms(x, eps)
    y = x * inverse
    return (dy - y * (np.sum(dy * y, axis=-1, keepdims=True) / max(x.shape[-1], 1))) * inverse


def _inverse_rms(x: np.ndarray, eps: float) -> np.ndarray:
    rms = np.sqrt(np.sum(x * x, axis=-1, keepdims=True) / max(x.shape[-1], 1) + eps)
    return np.where(rms == 0, 0.0, 1.0 / np.where(rms == 0, np.ones_like(rms), rms)).astype(x.dtype)


def sglu(x: np.ndarray, Wv: np.ndarray, Wu: np.ndarray, Wo: np.ndarray) -> np.ndarray:
    """S3: y (..., D) of x (..., D); Wv and Wu (D, F), Wo (F, D).

    >>> one = np.ones((1, 1))
    >>> sglu(np.array([[3.0]]), one, 2 * one, one)
    array([[18.]])
    """
    _check_sglu(x, Wv, Wu, Wo)
    return ((x @ Wv) * (x @ Wu)) @ Wo


def sglu_backward(
    x: np.ndarray, Wv: np.ndarray, Wu: np.ndarray, Wo: np.ndarray, dy: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """S3: dx, dWv, dWu, dWo of `sglu`.

    >>> one = np.ones((1, 1))
    >>> [float(g.squeeze()) for g in sglu_backward(3 * one, one, 2 * one, one, one)]
    [12.0, 18.0, 9.0, 18.0]
    """
    _check_sglu(x, Wv, Wu, Wo)
    check_shaped("dy", dy, (*x.shape[:-1], Wo.shape[-1]))
    v, u = x @ Wv, x @ Wu
    dh = dy @ np.swapaxes(Wo, 0, 1)
    dv, du = dh * u, dh * v
    dx = dv @ np.swapaxes(Wv, 0, 1) + du @ np.swapaxes(Wu, 0, 1)
    return dx, weight_gradient(x, dv), weight_gradient(x, du), weight_gradient(v * u, dy)


def weight_gradient(x: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """The gradient (D, F) of W in x W, of x (..., D) and dy (..., F).

    >>> weight_gradient(np.array([[1.0], [2.0]]), np.array([[3.0], [4.0]]))
    array([[11.]])
    """
    rows = math.prod(x.shape[:-1])
    return np.swapaxes(x.reshape(rows, x.shape[-1]), 0, 1) @ dy.reshape(rows, dy.shape[-1])


def lrpe_frequencies(H: int, d: int, base: float = 10000.0) -> np.ndarray:
    """S5: theta (H, d), float64: the frequencies run on from head to head.

    >>> lrpe_frequencies(2, 2, 100.0)
    array([[1.   , 0.1  ],
           [0.01 , 0.001]])
    """
    check_integer("H", H, least=1)
    check_integer("d", d, least=1)
    if isinstance(base, bool) or not isinstance(base, (int, float)):
        raise TypeError(f"base: got {base!r}, expected a finite number > 1")
    if not (math.isfinite(base) and base > 1):
        raise ValueError(f"base: got {base}, expected a finite number > 1")
    return (float(base) ** (-2.0 * np.arange(H * d) / (H * d))).reshape(H, d)


def lrpe(x: np.ndarray, theta: np.ndarray, offset: int = 0) -> np.ndarray:
    """S5: x (..., H, T, d) lifted to (..., H, T, 2 d); theta (H, d), first position `offset`.

    >>> lrpe(np.array([[[3.0], [2.0]]]), np.array([[np.pi / 2]])).round(3) + 0.0
    array([[[3., 0.],
            [0., 2.]]])
    """
    cos, sin = _phases(x, theta, offset)
    return np.concatenate([x * cos, x * sin], axis=-1)


def lrpe_backward(
    x: np.ndarray, theta: np.ndarray, offset: int, dy: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """S5: dx and dtheta (H, d) of `lrpe`.

    >>> x, dy = np.ones((1, 2, 1)), np.array([[[1.0, 1.0], [1.0, 1.0]]])
    >>> [g.ravel() for g in lrpe_backward(x, np.zeros((1, 1)), 0, dy)]
    [array([1., 1.]), array([1.])]
    """
    cos, sin = _phases(x, theta, offset)
    d = x.shape[-1]
    check_shaped("dy", dy, (*x.shape[:-1], 2 * d))
    places = (offset + np.arange(x.shape[-2])).astype(x.dtype)[:, None]
    of_cos, of_sin = dy[..., :d], dy[..., d:]
    turned = places * x * (of_sin * cos - of_cos * sin)
    dtheta = np.sum(turned, axis=(*range(x.ndim - 3), -2)).astype(theta.dtype)
    return of_cos * cos + of_sin * sin, dtheta


def _phases(x: np.ndarray, theta: np.ndarray, offset: int) -> tuple[np.ndarray, np.ndarray]:
    check_array("x", x, ("H", "T", "d"))
    check_theta(theta, x.shape[-3], x.shape[-1])
    check_integer("offset", offset, least=0)
    places = (offset + np.arange(x.shape[-2])).astype(theta.dtype)
    angles = places[:, None] * theta[:, None, :]
    return np.cos(angles).astype(x.dtype), np.sin(angles).astype(x.dtype)


def check_theta(theta: Any, H: int, d: int) -> None:
    """K14: frequencies (H, d).

    >>> check_theta(np.ones((2, 3)), 2, 4)
    Traceback (most recent call last):
    ValueError: theta: got shape (2, 3), expected (2, 4)
    """
    check_shaped("theta", theta, (H, d))


def check_weight(name: str, W: Any, shape: tuple[int, ...], x: np.ndarray) -> None:
    """K14: a weight of this shape in the dtype of x.

    >>> check_weight("Wo", np.ones((2, 2)), (2, 1), np.ones(2))
    Traceback (most recent call last):
    ValueError: Wo: got shape (2, 2), expected (2, 1)
    """
    check_shaped(name, W, shape)
    if W.dtype != x.dtype:
        raise TypeError(f"{name}: got dtype {W.dtype}, expected {x.dtype}, as x")


def _check_sglu(x: Any, Wv: Any, Wu: Any, Wo: Any) -> None:
    check_array("x", x, ("D",))
    check_array("Wv", Wv, ("D", "F"))
    check_size("Wv", Wv.ndim, 2, "axes")
    D, F = x.shape[-1], Wv.shape[-1]
    check_weight("Wv", Wv, (D, F), x)
    check_weight("Wu", Wu, (D, F), x)
    check_weight("Wo", Wo, (F, D), x)
