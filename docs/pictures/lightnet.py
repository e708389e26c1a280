"""LightNet: weights that always sum to 1, the decay they need, and positions on a grid."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.linear.lightnet import additive_gates, md_lrpe
from pictures import Ink, grid, panels

CAPTION = (
    "One key channel. Left: the weight of every past token in the mean that a query reads; rows "
    "sum to 1, and a large logit (token 12) takes over from its place on. Middle: the decay that "
    "makes them, which tends to 1 as the past grows. Right: the product of one query's and all "
    "keys' MD-LRPE (base 20) on a 15 x 15 grid tells differences of coordinates alone."
)


def draw(ink: Ink) -> Any:
    rng = np.random.default_rng(3)
    tokens = 24
    k = 0.7 * rng.standard_normal((tokens, 1))
    k[12] = 3.0
    kbar, log_decay, _ = additive_gates(k)
    until = np.cumsum(log_decay[:, 0])
    gap = np.where(np.tri(tokens, dtype=bool), until[:, None] - until, -np.inf)
    weights = np.exp(gap) * kbar[:, 0]
    side, d = 15, 32
    theta = 20.0 ** (-2 * np.arange(d // 2)[None] / d)
    lifted = md_lrpe(np.ones((1, side * side, d)), theta, (side, side))[0]
    scores = (lifted @ lifted[side * 7 + 4]).reshape(side, side) / d

    figure, (mean, decay, near) = panels(3, height=3.0)
    grid(mean, weights, ink.shades, ink, "weights", x="token", y="query")
    decay.plot(np.arange(tokens), np.exp(log_decay[:, 0]), color=ink.first, label="decay")
    decay.bar(np.arange(tokens), kbar[:, 0], color=ink.second, width=0.6, label="new token")
    decay.set(title="decay and gate", ylim=(0, 1.05), xlabel="token")
    decay.legend(frameon=False, labelcolor=ink.text, loc="upper right", bbox_to_anchor=(1.0, 0.85))
    decay.spines[["top", "right"]].set_visible(False)
    grid(near, np.maximum(scores, 0), ink.shades, ink, "query at (7, 4)", x="column", y="row")
    return figure
