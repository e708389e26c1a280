"""StreamingLLM: which tokens are seen, and at which distance."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.cache.streaming_llm_rows import sink_window_distances, sink_window_mask
from pictures import Ink, grid, panels

CAPTION = (
    "A stream of 24 tokens with S = 3 sinks and R = 6 recent tokens. Left: what each token sees, "
    "sinks in orange. Right: the distance at which it sees them; that of a sink stops growing."
)


def draw(ink: Ink) -> Any:
    tokens, sinks, recent = 24, 3, 6
    mask = sink_window_mask(tokens, sinks, recent)
    distance = sink_window_distances(tokens, sinks, recent)
    kind = np.where(mask, np.where(np.arange(tokens) < sinks, 2, 1), 0)
    figure, axes = panels(2, height=3.8)
    grid(axes[0], kind, ink.palette(ink.first, ink.second), ink, "seen", top=2)
    grid(axes[1], distance + 1, ink.shades, ink, "distance")
    for (row, column), value in np.ndenumerate(distance):
        if value >= 0:
            bright = value > 0.45 * distance.max()
            colour = ink.empty if bright else ink.text
            axes[1].text(
                column + 0.5, row + 0.52, value, ha="center", va="center", size=5, color=colour
            )
    return figure
