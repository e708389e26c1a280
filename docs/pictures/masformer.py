"""MASFormer: a schedule, the masks of its layers, and what a token at the top can depend on."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.patterns.masformer_spans import layer_spans, reachability, span_mask
from pictures import Ink, grid, panels

CAPTION = (
    "Sixteen tokens. The lower two of eight layers see everything before them (blue), the others "
    "their own block of four (orange), or alternatively a window of two tokens to the left "
    "(purple). On the right, what a token at the top depends on: with blocks alone the block "
    "(orange), however many layers there are; with the two full layers all that came before."
)


def draw(ink: Ink) -> Any:
    tokens, layers = 16, 8
    full, block, window = (
        span_mask(tokens, span) for span in (("full",), ("block", 4, 0), ("window", 2))
    )
    schedule = layer_spans(layers, 2)
    figure, axes = panels(5, height=2.4, width_ratios=[0.55, 1, 1, 1, 1])
    colours = ink.palette(ink.first, ink.second, ink.third)
    grid(axes[0], np.where(schedule, 1, 2)[::-1, None], colours, ink, "layers", "", "top to bottom",
         top=3)  # fmt: skip
    for n, (title, kind) in enumerate(
        (("full", full), ("block", 2 * block), ("window", 3 * window))
    ):
        grid(axes[n + 1], kind, colours, ink, title, "key", "query" if n == 0 else "", top=3)
    reached = reachability(tokens, [full if whole else block for whole in schedule])
    alone = reachability(tokens, [block] * layers)
    grid(axes[4], np.where(alone, 2, reached), colours, ink, "reaches the top", "key", "", top=3)
    return figure
