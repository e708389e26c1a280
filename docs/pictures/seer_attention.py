"""SeerAttention: the gate's weights between blocks, and the blocks that are attended to."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.primitives.softmax import softmax
from attnspec.reference.selection.seer_attention_gate import gate_rope, gate_scores, pool_blocks
from attnspec.reference.selection.seer_attention_selection import select_ratio
from pictures import Ink, grid, panels

CAPTION = (
    "256 tokens in 16 blocks. Left: the gate's weight between a block of queries and one of keys. "
    "Right: the blocks kept at a ratio of 0.4; the last two block rows are always dense."
)


def draw(ink: Ink) -> Any:
    tokens, block, d = 256, 16, 16
    rng = np.random.default_rng(5)
    topics = rng.standard_normal((4, d))[rng.integers(0, 4, tokens // block)].repeat(block, 0)
    q, k = (topics + 0.4 * rng.standard_normal((tokens, d)) for _ in range(2))
    pooled = [pool_blocks(x[None], block, ("avg",)) for x in (q, k)]
    cos, sin = gate_rope(tokens // block, block, d)
    scores = gate_scores(*pooled, np.eye(d)[None], np.eye(d)[None], cos, sin)
    figure, axes = panels(2, height=3.6)
    names = {"x": "block of keys", "y": "block of queries"}
    grid(axes[0], softmax(scores)[0], ink.shades, ink, "gate", **names)
    kept = select_ratio(scores, 0.4)[0].astype(int)
    grid(axes[1], kept, ink.palette(ink.second), ink, "attended", **names)
    return figure
