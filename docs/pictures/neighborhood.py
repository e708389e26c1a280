"""Neighborhood attention: what a query sees at the centre, at an edge and in a corner."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.patterns.neighborhood import na_mask
from pictures import Ink, grid, panels

SHAPE = (15, 15)
QUERIES = ((7, 7), (1, 12), (14, 0))
CAPTION = (
    "Three queries (dots) on a grid of 15 x 15 tokens and the 25 keys that each one sees, in its "
    "colour: around it in the interior, pushed inwards at an edge and in a corner. A stride of 4 "
    "gives all queries of a 4 x 4 block (outlined) the window of its leader; dilation 2 takes "
    "every other token; a causal vertical axis shows no later row, and cuts the window at the top."
)


def draw(ink: Ink) -> Any:
    views: tuple[tuple[str, dict[str, Any]], ...] = (
        ("kernel 5", {}),
        ("stride 4", {"stride": 4}),
        ("dilation 2", {"dilation": 2}),
        ("causal rows", {"causal": (True, False)}),
    )
    colours = (ink.first, ink.second, ink.third)
    figure, axes = panels(len(views), height=2.5)
    for panel, (title, options) in zip(axes, views, strict=True):
        mask = na_mask(SHAPE, 5, **options).reshape(*SHAPE, *SHAPE)
        seen = np.zeros(SHAPE, int)
        for number, query in enumerate(QUERIES, start=1):
            seen[mask[query]] = number
        grid(panel, seen, ink.palette(*colours), ink, title, x="", y="", top=3)
        step = options.get("stride", 1)
        for row, column in QUERIES:
            panel.plot(column + 0.5, row + 0.5, "o", color=ink.empty, markersize=3.5)
            if step > 1:
                y, x = row // step * step, column // step * step
                bottom, right = min(y + step, SHAPE[0]), min(x + step, SHAPE[1])
                outline = [x, right, right, x, x], [y, y, bottom, bottom, y]
                panel.plot(*outline, color=ink.text, linewidth=1.2)
    return figure
