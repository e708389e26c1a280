"""Lean attention: the line of tiles and the stretch of each worker."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.parallel.lean_attention_schedule import lean_schedule, segments
from pictures import Ink, panels

CAPTION = (
    "Four outputs of 11, 3, 7 and 6 tiles on one line, cut into equal stretches for five workers. "
    "A worker that holds the first tile of an output is its host and merges the triples of the "
    "others (hatched)."
)


def draw(ink: Ink) -> Any:
    tiles = np.array([11, 3, 7, 6])
    base = np.cumsum(tiles) - tiles
    start, end = lean_schedule(tiles, 5)
    colours = (ink.first, ink.second, ink.third, ink.line)
    figure, (axes,) = panels(1, height=2.3)
    for segment in segments(tiles, start, end):
        first = base[segment.u] + segment.lo_tile
        axes.barh(
            segment.g,
            segment.hi_tile - segment.lo_tile,
            left=first,
            height=0.72,
            color=colours[segment.u],
            alpha=1.0 if segment.host else 0.55,
            hatch=None if segment.host else "////",
            edgecolor=ink.text,
            linewidth=0.6,
        )
    for u, (first, count) in enumerate(zip(base, tiles, strict=True)):
        axes.axvline(first, color=ink.line, lw=0.8, zorder=0)
        axes.text(first + count / 2, -0.75, f"output {u}", ha="center", va="center")
    axes.set(yticks=range(5), ylabel="worker", xlabel="tile on the line", xlim=(0, tiles.sum()))
    axes.set_ylim(4.6, -1.1)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)
    return figure
