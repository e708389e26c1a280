"""Gaussian attention: the weights of one slice, and how much of the axis they let through."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.scores.gaussian_attention import multi_head
from pictures import Ink, panels

CAPTION = (
    "One slice of 48 entries in two heads. Left: each head weighs an entry (dot) by a Gaussian "
    "around its own chunk's mean (dashed) plus the learned offset. Right: the same "
    "entries, their area being the weight; a narrow width keeps few of them."
)
ENTRIES = 48
LAYERS = ((1.0, 0.0, "c = 1"), (0.35, 0.7, "c = 0.35, δ = 0.7"))


def entries() -> np.ndarray:
    rng = np.random.default_rng(3)
    wave = np.sin(np.arange(ENTRIES) / 5) + 0.4 * rng.standard_normal(ENTRIES)
    return (wave + np.where(np.arange(ENTRIES) < ENTRIES // 2, 0.0, 2.0))[None]


def weights(width: float, offset: float) -> np.ndarray:
    params = (np.full((2, 1), offset), np.full((2, 1), width))
    return multi_head(entries(), 1, params)[1][0]


def draw(ink: Ink) -> Any:
    x = entries()[0]
    figure, (left, right) = panels(2, height=3.0)
    place = np.arange(ENTRIES)
    for (width, offset, name), colour in zip(LAYERS, (ink.second, ink.first), strict=True):
        w = weights(width, offset)
        for head in range(2):
            own = slice(head * ENTRIES // 2, (head + 1) * ENTRIES // 2)
            order = np.argsort(x[own])
            left.plot(x[own][order], w[own][order], "o-", markersize=3, color=colour,
                      label=name if head == 0 else None)  # fmt: skip
            left.axvline(x[own].mean(), color=ink.line, linestyle="--", linewidth=1)
        right.scatter(place, x, s=900 * w, color=colour, alpha=0.6, linewidths=0)
    right.plot(place, x, color=ink.text, linewidth=0.8)
    right.axvline(ENTRIES // 2 - 0.5, color=ink.line)
    left.legend(frameon=False, loc="upper left", fontsize=8)
    left.set(xlabel="entry", ylabel="weight", ylim=(0, None))
    right.set(xlabel="place along the axis", ylabel="entry")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure
