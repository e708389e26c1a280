"""Entropy-ABF: the scale of a row, and the entropy it holds level."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.positions.entropy_abf import attend
from attnspec.reference.positions.entropy_abf_probe import entropy_growth
from attnspec.reference.positions.entropy_abf_rotation import row_scale
from pictures import Ink, panels

CAPTION = (
    "A training length of 64 (grey). Left: the factor of a query's logits, 1 inside the old window "
    "and a logarithm beyond it. Right: the entropy of the last query's attention to random keys "
    "grows with the prompt; with the scale it grows more slowly."
)
TRAINED, HEADS, WIDTH = 64, 16, 32


def last_row(length: int, layer: int) -> np.ndarray:
    """Weights (documents, layers, heads, length) of the last query of a prompt."""
    rng = np.random.default_rng(length)
    q, k = rng.standard_normal((HEADS, 1, WIDTH)), rng.standard_normal((HEADS, length, WIDTH))
    _, P = attend(1.5 * q, 1.5 * k, k, layer=layer, c=TRAINED)
    return P[None, None, :, 0]


def draw(ink: Ink) -> Any:
    figure, (left, right) = panels(2, height=3.0)
    positions = np.arange(1024)
    left.plot(positions + 1, row_scale(positions, c=TRAINED), color=ink.first)
    left.set(xlabel="tokens before and at the query", ylabel="scale", ylim=(0, None))
    lengths = (8, 16, 32, 64, 128, 256, 512, 1024)
    for layer, colour, name in ((0, ink.second, "exempt"), (2, ink.first, "scaled")):
        seen, E = entropy_growth({n: last_row(n, layer) for n in lengths})
        curve = E.mean(axis=(1, 2))
        right.plot(seen, curve, color=colour, marker="o", markersize=3)
        right.annotate(
            name, (seen[-1], curve[-1]), (6, -3), textcoords="offset points", color=colour
        )
    right.set(xlabel="tokens of the prompt", ylabel="entropy", ylim=(0, None), xlim=(6, 3000))
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks([8, 64, 512])
        axes.set_xticklabels(["8", "64", "512"])
        axes.minorticks_off()
        axes.axvline(TRAINED, color=ink.line)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
