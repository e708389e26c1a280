"""DiffQKV attention: two head maps, and the values that a row of weights needs."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.heads.diffqkv import head_maps, scores, select_values, softmax_rows
from pictures import Ink, grid, panels

CAPTION = (
    "Twelve query heads. Left: the key head (blue) and the value head (orange) that each one "
    "reads; neither map follows from the other. Right: the weights of one query over 48 keys; "
    "the eight values it reads are in orange."
)


def draw(ink: Ink) -> Any:
    heads, tokens, c = 12, 48, 8
    hk, hv = head_maps(heads, 4, 6)
    maps = np.concatenate([np.eye(4, dtype=int)[hk], 2 * np.eye(6, dtype=int)[hv]], axis=1)
    rng = np.random.default_rng(5)
    q, k = rng.standard_normal((1, 1, 16)), rng.standard_normal((1, tokens, 16))
    P, _ = softmax_rows(scores(1.5 * q, k, np.array([0])))
    idx, kept = select_values(P, c)
    colours = [ink.line] * tokens
    for j in idx[0, 0]:
        colours[j] = ink.second

    figure, (left, right) = panels(2, height=2.8, width_ratios=(1, 1.6))
    grid(left, maps, ink.palette(ink.first, ink.second), ink, "heads",
         x="key heads, value heads", y="query head", top=2)  # fmt: skip
    right.bar(np.arange(tokens), P[0, 0], width=0.9, color=colours)
    right.set(
        xlabel="key", yticks=[], title=f"{c} of {tokens} values, {kept.item():.0%} of the mass"
    )
    right.spines[["top", "right", "left"]].set_visible(False)
    return figure
