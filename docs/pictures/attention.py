"""Dense attention: scores, what is visible, weights."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.dense.attention import score, visible
from attnspec.reference.primitives.softmax import softmax_lse
from pictures import Ink, grid, panels

CAPTION = (
    "Six queries and nine keys. Left: scores, darker is higher. Middle: what the causal rule lets "
    "a query see, aligned at the bottom right (K3). Right: the weights, which sum to one in a row."
)


def draw(ink: Ink) -> Any:
    rng = np.random.default_rng(3)
    q, k = rng.standard_normal((1, 6, 8)), rng.standard_normal((1, 9, 8))
    scores = score(1.6 * q, k)
    allowed = visible(6, 9, causal=True)
    weights, _ = softmax_lse(scores, allowed)
    figure, axes = panels(3, height=2.2)
    grid(axes[0], scores[0] - scores.min(), ink.shades, ink, "scores")
    grid(axes[1], allowed.astype(int), ink.palette(ink.second), ink, "visible")
    grid(axes[2], weights[0], ink.shades, ink, "weights", top=1.0)
    return figure
