"""Mixture-of-Head attention: the gates of some tokens, and the rows of each head they leave."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.heads.moh import route
from pictures import Ink, grid, panels

CAPTION = (
    "Eight heads, the first two shared, two of the other six active. Left: the gate of each head "
    "for 24 tokens, dark for large; what is blank is not computed. Right: the tokens that each "
    "head works on, gathered, beside the 24 rows of dense attention."
)


def draw(ink: Ink) -> Any:
    tokens, D, hs, hr, k = 24, 6, 2, 6, 2
    rng = np.random.default_rng(3)
    x = rng.standard_normal((tokens, D))
    Wr, Ws, W0 = (rng.standard_normal((n, D)) for n in (hr, hs, 2))
    gates = route(x, Wr, 0.4 * Ws, 0.3 * W0, k)
    counts = np.sum(gates > 0, axis=0)

    figure, (left, right) = panels(2, height=2.8, width_ratios=(2.2, 1))
    levels = np.where(gates > 0, 0.35 + 0.65 * np.minimum(gates / 2, 1), 0).T
    grid(left, levels, ink.shades, ink, "gates", x="token", y="head", top=1)
    heads = np.arange(hs + hr)
    right.barh(heads, np.full(hs + hr, tokens), height=0.8, color=ink.line)
    right.barh(heads[:hs], counts[:hs], height=0.8, color=ink.second)
    right.barh(heads[hs:], counts[hs:], height=0.8, color=ink.first)
    right.set(
        xlabel="rows", yticks=[], ylim=(hs + hr - 0.5, -0.5), xlim=(0, tokens),
        title=f"{counts.sum() / gates.size:.0%} of the rows",
    )  # fmt: skip
    right.spines[["top", "right", "left"]].set_visible(False)
    return figure
