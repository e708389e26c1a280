"""Music Transformer: the products of queries and table, and where skewing moves them."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.scores.music_transformer import local_visibility, skew
from pictures import Ink, grid, panels

CAPTION = (
    "Eight queries. Left: each one's products with the rows of the table, distances 0 and 3 in "
    "orange; pale ones belong to keys that do not exist. Middle: skewed, each distance lies on its "
    "diagonal. Right: what the local form sees in blocks of two."
)


def draw(ink: Ink) -> Any:
    L = 8
    distance = np.broadcast_to(np.arange(L - 1, -1, -1), (L, L))
    exists = distance <= np.arange(L)[:, None]
    before = np.where(exists, np.where(np.isin(distance, (0, 3)), 2.0, 1.0), 0.0)
    after = np.where(np.tri(L, dtype=bool), skew(before[None])[0], 0.0)

    figure, (left, middle, right) = panels(3, height=2.6)
    shades = ink.palette(ink.first, ink.second)
    grid(left, before, shades, ink, "Q E'", x="row of the table", y="query", top=2)
    grid(middle, after, shades, ink, "skewed", x="key", y="query", top=2)
    grid(right, local_visibility(L, 2).astype(float), shades, ink, "local, b = 2", x="key",
         y="query", top=2)  # fmt: skip
    return figure
