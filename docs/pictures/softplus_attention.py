"""Softplus attention: one row of softmax, LSSA and LSSAR, and how each spreads over a context."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.primitives.softmax import softmax
from attnspec.reference.scores.softplus_attention import (
    lssa_logits,
    lssa_scores,
    lssa_weights,
    reweight,
    row_sum,
)
from pictures import Ink, panels

CAPTION = (
    "Left: the weights of one query over 48 keys times their number, so that 1 is the uniform "
    "weight: LSSA in blue, and in orange LSSAR with p = 3, which drops every key that is not above "
    "the line. Right: the share of the heaviest key as the context grows."
)


def draw(ink: Ink) -> Any:
    rng = np.random.default_rng(2)
    d, sizes = 32, [16, 32, 64, 128, 256, 512, 1024]
    q, k = rng.standard_normal((1, 1, d)), rng.standard_normal((1, sizes[-1], d))
    k[0, 5] += q[0, 0]

    def rows(n: int, p: float) -> tuple[np.ndarray, np.ndarray]:
        scores = lssa_scores(lssa_logits(q, k[:, :n], np.array([n])))
        a = lssa_weights(scores, row_sum(scores))
        return a[0, 0], reweight(a, np.array([n]), p)[0][0, 0]

    a, b = rows(48, 3)
    figure, (left, right) = panels(2, height=2.8, width_ratios=(1.5, 1))
    at = np.arange(48)
    left.bar(at - 0.2, 48 * a, width=0.4, color=ink.first)
    left.bar(at + 0.2, 48 * b, width=0.4, color=ink.second)
    left.axhline(1, color=ink.line, linewidth=0.8)
    left.set(xlabel="key", ylabel="weight x 48", ylim=(0, 8))
    shares = [
        (softmax(q[0] @ k[0, :n].T / d**0.5).max(), rows(n, 3)[0].max(), rows(n, 3)[1].max())
        for n in sizes
    ]
    for share, colour, name in zip(
        np.transpose(shares), (ink.line, ink.first, ink.second), ("softmax", "LSSA", "LSSAR"),
        strict=True,
    ):  # fmt: skip
        right.plot(sizes, share, color=colour, label=name)
    right.set(xscale="log", yscale="log", xlabel="keys", title="largest weight")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure
