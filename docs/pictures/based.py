"""Based: the polynomial beside exp, and what its state remembers of a far token."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.linear.based import based_attend
from attnspec.reference.linear.based_features import weigh
from attnspec.reference.primitives.softmax import softmax_lse
from pictures import Ink, panels

CAPTION = (
    "Left: the weight of a score. The polynomial follows exp near 0, rises again to the left and "
    "grows slowly to the right. Right: the share of attention a query gives to a key that scores "
    "s among 63 keys that score 0. Softmax singles it out, the polynomial does not, which is why "
    "Based adds a small exact window."
)


def draw(ink: Ink) -> Any:
    figure, axes = panels(2, height=3.4)
    s = np.linspace(-4, 4, 161)
    axes[0].plot(s, np.exp(s), color=ink.second, lw=1.6, label="exp")
    axes[0].plot(s, weigh(s), color=ink.first, lw=1.8, label="1 + s + s²/2")
    axes[0].set(ylim=(0, 14), xlabel="score", ylabel="weight")
    axes[0].legend(frameon=False)
    scores = np.linspace(0, 10, 41)
    value = np.eye(64)[:1].T[None]
    exact, linear = [], []
    for score in scores:
        keys = np.zeros((1, 64, 1))
        keys[0, 0, 0] = score
        linear.append(based_attend(np.ones((1, 1, 1)), keys, value, scale=1.0).item())
        exact.append(softmax_lse(keys[..., 0], np.ones((1, 64), bool))[0][0, 0])
    axes[1].plot(scores, exact, color=ink.second, lw=1.6, label="softmax")
    axes[1].plot(scores, linear, color=ink.first, lw=1.8, label="Based")
    axes[1].set(ylim=(0, 1), xlabel="score of one key among 64", ylabel="its share")
    axes[1].legend(frameon=False)
    return figure
