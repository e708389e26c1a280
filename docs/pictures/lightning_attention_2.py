"""Lightning Attention-2: the decay mask, in blocks and with a state between them."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.patches import Rectangle

from attnspec.reference.linear.lightning_attention_2 import decay_mask
from pictures import Ink, grid, panels

CAPTION = (
    "The decay mask of a slow and of a fast head over 24 tokens. The product is formed inside the "
    "blocks on the diagonal (orange); everything below them reaches a query through one state."
)


def draw(ink: Ink) -> Any:
    tokens, block = 24, 6
    masks = decay_mask(tokens, np.array([0.08, 0.4]))
    figure, axes = panels(2, height=3.6)
    for panel, mask, title in zip(axes, masks, ("slope 0.08", "slope 0.4"), strict=True):
        grid(panel, mask, ink.shades, ink, title, top=1.0)
        for first in range(0, tokens, block):
            panel.add_patch(
                Rectangle((first, first), block, block, fill=False, color=ink.second, lw=1.6)
            )
    return figure
