"""SnapKV: the window's weights, the scores of the prefix, and the slots that stay."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.cache.snapkv_selection import (
    pool_scores,
    prefix_scores,
    select,
    window_attention,
)
from pictures import Ink, grid, panels

CAPTION = (
    "A prompt of 48 tokens, window w = 4, capacity C = 16. Top: what the window's queries attend "
    "to. Middle: their votes for the prefix, raw (bars) and pooled (line). Bottom: the slots that "
    "stay, chosen in blue and the window in orange."
)


def draw(ink: Ink) -> Any:
    tokens, window, capacity, pooling = 48, 4, 16, 5
    rng = np.random.default_rng(11)
    q, k = rng.standard_normal((1, tokens, 16)), rng.standard_normal((1, tokens, 16))
    q[:, -window:] += 1.1 * (k[:, 9:10] + k[:, 27:28])
    weights = window_attention(q, k, window)
    raw = prefix_scores(weights, window)
    pooled = pool_scores(raw, pooling)
    kept = np.zeros(tokens, int)
    kept[select(pooled, capacity - window)[0]] = 1
    kept[-window:] = 2

    figure, _ = panels(1, height=3.0)
    figure.clear()
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=(4, 6, 1))
    grid(top, weights[0], ink.shades, ink, x="", y="window")
    middle.bar(np.arange(tokens - window) + 0.5, raw[0], width=0.9, color=ink.line)
    middle.plot(np.arange(tokens - window) + 0.5, pooled[0], color=ink.second)
    middle.set(ylabel="votes", yticks=[])
    middle.spines[["top", "right", "left"]].set_visible(False)
    grid(bottom, kept[None], ink.palette(ink.first, ink.second), ink, x="key", y="", top=2)
    for axes in (top, bottom):
        axes.set_aspect("auto")
    return figure
