"""EE-MLLM: who sees whom in a prompt with an image, and how many pairs are computed."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.patterns.ee_mllm_attention import composite_mask
from pictures import Ink, grid, panels

CAPTION = (
    "A prompt of three text tokens, an image of ten and six more text tokens. Text (blue) sees all "
    "that stands before it, in one softmax, images (orange) included; an image token sees itself "
    "alone (purple). Right: the same prompt with causal attention of all tokens."
)


def draw(ink: Ink) -> Any:
    before, image, after = 3, 10, 6
    tokens = before + image + after
    position = np.arange(tokens)
    visual = (position >= before) & (position < before + image)
    composite = composite_mask(visual, position)
    causal = composite_mask(np.zeros(tokens, bool), position)
    figure, axes = panels(2, height=3.4)
    colours = ink.palette(ink.first, ink.second, ink.third)
    for axis, mask, title in ((axes[0], composite, "composite"), (axes[1], causal, "causal")):
        kind = np.where(visual[:, None], 3, np.where(visual[None, :], 2, 1))
        grid(axis, np.where(mask, kind, 0), colours, ink,
             f"{title}: {mask[~visual].sum() + (mask[visual].sum() if title == 'causal' else 0)} "
             "pairs computed", "key", "query", top=3)  # fmt: skip
    return figure
