"""The entropy of rows of weights."""

from __future__ import annotations

import numpy as np


def entropy(weights: np.ndarray) -> np.ndarray:
    """-sum p ln p (...) over the last axis of `weights` (..., keys), natural, with 0 ln 0 = 0.

    >>> entropy(np.array([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]])).round(4)
    array([0.6931, 0.    ])
    """
    logs = np.log(np.where(weights == 0, np.ones_like(weights), weights))
    return np.sum(-weights * logs, axis=-1)
