"""What a token gives to the memory of Titans: query, key, value and rates. Clause S11."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from attnspec.reference.conventions import check_array, check_integer, check_size
from attnspec.reference.primitives.sigmoid import sigmoid, silu

EPSILON = 1e-6


def token_inputs(
    x: np.ndarray, W: np.ndarray, filters: np.ndarray | None = None, *, normalise: bool = True
) -> np.ndarray:
    """S11: queries, keys or values (..., T, d) of rows x (..., T, D), with W (D, d).

    `filters` (width, d) is the depthwise causal convolution, its last row the weight of the token
    itself; None is none. Queries and keys are normalised, values are not.

    >>> token_inputs(np.array([[0.0], [1.0]]), np.ones((1, 1)), np.array([[2.0], [0.0]]),
    ...              normalise=False).ravel()
    array([0., 0.])
    """
    check_array("x", x, ("T", "D"))
    _check_matrix("W", W, x)
    y = silu(x @ W)
    if filters is not None:
        check_array("filters", filters, ("width", "d"))
        if filters.ndim != 2:
            raise ValueError(f"filters: got shape {filters.shape}, expected (width, d)")
        check_integer("filters", filters.shape[0], least=1)
        check_size("filters", filters.shape[-1], W.shape[-1], "d, as in W")
        past = filters.shape[0] - 1
        zeros = np.zeros_like(y, shape=(*y.shape[:-2], past, y.shape[-1]))
        rows = np.concatenate([zeros, y], axis=-2)
        y = sum(
            (weight * rows[..., i : i + y.shape[-2], :] for i, weight in enumerate(filters)),
            start=np.zeros_like(y),
        )
    if normalise:
        y = y / np.sqrt(np.sum(y * y, axis=-1, keepdims=True) + EPSILON)
    return y


def token_step_sizes(
    x: np.ndarray, W_theta: np.ndarray, W_eta: np.ndarray, W_alpha: np.ndarray, *,
    theta_max: float = 1.0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """S11: theta, eta, alpha (..., heads, T) of rows x (..., T, D), with W of each (D, heads).

    >>> token_step_sizes(np.zeros((1, 1)), *np.ones((3, 1, 1)), theta_max=0.5)
    (array([[0.25]]), array([[0.5]]), array([[0.5]]))
    """
    check_array("x", x, ("T", "D"))
    for name, W in (("W_theta", W_theta), ("W_eta", W_eta), ("W_alpha", W_alpha)):
        _check_matrix(name, W, x)
    if isinstance(theta_max, bool) or not isinstance(theta_max, (int, float)):
        raise TypeError(f"theta_max: got {theta_max!r}, expected a finite number > 0")
    if not (math.isfinite(theta_max) and theta_max > 0):
        raise ValueError(f"theta_max: got {theta_max}, expected a finite number > 0")
    theta, eta, alpha = (np.swapaxes(sigmoid(x @ W), -1, -2) for W in (W_theta, W_eta, W_alpha))
    return theta_max * theta, eta, alpha


def _check_matrix(name: str, W: Any, x: np.ndarray) -> None:
    check_array(name, W, ("D", "d"))
    if W.ndim != 2:
        raise ValueError(f"{name}: got shape {W.shape}, expected two axes")
    check_size(name, W.shape[0], x.shape[-1], "D, as in x")
    if W.dtype != x.dtype:
        raise TypeError(f"{name}: got dtype {W.dtype}, expected {x.dtype}, as x")
