"""LongLoRA: the segments of plain and of shifted heads, and what a roll lets through."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.patterns.longlora_groups import s2_mask
from pictures import Ink, grid, panels

CAPTION = (
    "Sixteen tokens in groups of four. The cuts of shifted heads lie in the middle of the groups "
    "of plain ones; purple is what both kinds see. A rolled head is a shifted one but for the "
    "first two tokens, which see the last two of the text (orange)."
)


def draw(ink: Ink) -> Any:
    tokens, G, heads = 16, 4, 2
    plain, shifted = s2_mask(tokens, G, heads)
    rolled = s2_mask(tokens, G, heads, "roll")[1]
    ahead = rolled & ~np.tri(tokens, dtype=bool)
    figure, axes = panels(3, height=3.4)
    colours = ink.palette(ink.first, ink.third, ink.second)
    both = plain & shifted
    pictures = (
        ("plain heads", np.where(both, 2, plain)),
        ("shifted heads", np.where(both, 2, shifted)),
        ("shifted heads, rolled", np.where(ahead, 3, np.where(rolled & plain, 2, rolled))),
    )
    for n, (title, kind) in enumerate(pictures):
        grid(axes[n], kind, colours, ink, title, "key", "query" if n == 0 else "", top=3)
    return figure
