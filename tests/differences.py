"""Gradients by central differences, for the tests of the reference."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def differences(f: Callable[[], float], x: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """The gradient of f() in every entry of x, which is changed and put back."""
    gradient = np.zeros_like(x)
    for place in np.ndindex(x.shape):
        value = x[place]
        x[place] = value + step
        above = f()
        x[place] = value - step
        gradient[place] = (above - f()) / (2 * step)
        x[place] = value
    return gradient
