"""S2-Attention: the shards of four heads, and what they cover together."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.patterns.s2_attention_patterns import block_pattern, union_coverage
from pictures import Ink, grid, panels

CAPTION = (
    "Blocks that each of four heads reads, with a window of two blocks (blue) and a stride of four "
    "(orange) that begins one block earlier from head to head; on the right, the heads together."
)


def draw(ink: Ink) -> Any:
    blocks, heads, local = 16, 4, 2
    pattern = block_pattern(blocks, blocks, heads, heads, local, heads)
    row, column = np.indices((blocks, blocks))
    kind = np.where(pattern, np.where(row - column < local, 1, 2), 0)
    figure, axes = panels(heads + 1, height=2.2)
    colours = ink.palette(ink.first, ink.second)
    for h in range(heads):
        grid(axes[h], kind[h], colours, ink, f"head {h}", "block of keys",
             "block of queries" if h == 0 else "", top=2)  # fmt: skip
    grid(axes[heads], 3 * union_coverage(pattern), ink.palette(ink.third), ink, "all heads",
         "block of keys", "", top=3)  # fmt: skip
    return figure
