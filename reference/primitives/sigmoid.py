"""The logistic function, and the activation x sigmoid(x) with its slope."""

from __future__ import annotations

import numpy as np


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + e^-x), without overflow.

    >>> sigmoid(np.array([-1000.0, 0.0]))
    array([0. , 0.5])
    """
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e))


def silu(x: np.ndarray) -> np.ndarray:
    """x / (1 + e^-x), which is 0 far below 0.

    >>> silu(np.array([0.0, -1e4]))
    array([ 0., -0.])
    """
    return x * sigmoid(x)


def silu_slope(x: np.ndarray) -> np.ndarray:
    """The derivative of `silu`.

    >>> silu_slope(np.array([0.0]))
    array([0.5])
    """
    gate = sigmoid(x)
    return gate * (1 + x * (1 - gate))
