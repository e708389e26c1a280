"""GELU, exactly: not by the formula with tanh."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

ERF: Any = np.frompyfunc(math.erf, 1, 1)
"""The error function as a ufunc, of Python floats."""


def normal_cdf(x: np.ndarray) -> np.ndarray:
    """How likely a standard normal number is below x; any shape, the dtype of x.

    >>> normal_cdf(np.array([-50.0, 0.0, 1.0])).round(4)
    array([0.    , 0.5   , 0.8413])
    """
    return 0.5 * (1 + ERF(x / math.sqrt(2.0)).astype(x.dtype))


def gelu(x: np.ndarray) -> np.ndarray:
    """x times `normal_cdf` of x; any shape.

    >>> gelu(np.array([-50.0, 0.0, 1.0, 50.0])).round(4)
    array([-0.    ,  0.    ,  0.8413, 50.    ])
    """
    return x * normal_cdf(x)


def gelu_slope(x: np.ndarray) -> np.ndarray:
    """The derivative of `gelu`.

    >>> gelu_slope(np.array([0.0, 1.0])).round(4)
    array([0.5   , 1.0833])
    """
    return normal_cdf(x) + x * _density(x)


def gelu_curvature(x: np.ndarray) -> np.ndarray:
    """The second derivative of `gelu`.

    >>> gelu_curvature(np.array([0.0])).round(4)
    array([0.7979])
    """
    return (2 - x * x) * _density(x)


def _density(x: np.ndarray) -> np.ndarray:
    return np.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
