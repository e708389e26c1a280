"""Rotary position embedding, half-split convention: channel i is paired with channel i + d/2."""

from __future__ import annotations

import numpy as np


def rope_angles(positions: np.ndarray, d: int, base: float = 10000.0) -> np.ndarray:
    """Angles (..., d/2) of `positions` (...): position * base^(-2i/d) for pair i.

    ValueError for an odd `d` or a base that is not positive.

    >>> rope_angles(np.array([0, 2]), 4).round(4)
    array([[0.  , 0.  ],
           [2.  , 0.02]])
    """
    if d % 2:
        raise ValueError(f"d: got {d}, expected an even head size for rotary positions")
    if not base > 0:
        raise ValueError(f"base: got {base!r}, expected a positive number")
    inverse_frequency = base ** (-np.arange(0, d, 2) / d)
    return np.asarray(positions)[..., None] * inverse_frequency


def rotate(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Rotate each pair (x[i], x[i + d/2]) of `x` (..., d) by `angles` (..., d/2).

    >>> rotate(np.array([1.0, 0.0]), np.array([np.pi / 2])).round(4)
    array([0., 1.])
    """
    cos, sin = np.cos(angles).astype(x.dtype), np.sin(angles).astype(x.dtype)
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def rope(x: np.ndarray, positions: np.ndarray, base: float = 10000.0) -> np.ndarray:
    """`x` (..., tokens, d) rotated to `positions` (tokens).

    >>> rope(np.array([[1.0, 0.0]]), np.array([0]))
    array([[1., 0.]])
    """
    return rotate(x, rope_angles(positions, x.shape[-1], base))
