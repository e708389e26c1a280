"""The root-mean-square norm with a gain, and its gradient."""

from __future__ import annotations

import numpy as np


def rms_norm(x: np.ndarray, gain: np.ndarray, eps: float) -> np.ndarray:
    """x (..., D) by its root mean square, times the `gain` (D,).

    >>> rms_norm(np.array([3.0, 4.0]), np.ones(2), 0.0).round(3)
    array([0.849, 1.131])
    """
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + x.dtype.type(eps)) * gain


def rms_norm_backward(
    x: np.ndarray, gain: np.ndarray, eps: float, dout: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Gradients dx (..., D) and dgain (D,) of `rms_norm`, given dout (..., D).

    >>> rms_norm_backward(np.array([1.0, -1.0]), np.ones(2), 0.0, np.array([1.0, 0.0]))
    (array([0.5, 0.5]), array([1., 0.]))
    """
    size = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + x.dtype.type(eps))
    normal, scaled = x / size, gain * dout
    dx = (scaled - normal * np.mean(scaled * normal, axis=-1, keepdims=True)) / size
    return dx, np.sum((dout * normal).reshape(-1, x.shape[-1]), axis=0)
