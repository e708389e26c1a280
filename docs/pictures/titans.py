"""Titans: surprise, momentum and forgetting write a linear memory, and recall follows."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.linear.titans import titans_coefficients, titans_sequential
from pictures import Ink, grid, panels

CAPTION = (
    "Left, how much of each token's gradient is in the weights when a later token reads: momentum "
    "lets it grow after the store, forgetting fades it, and token 10 forgets everything before. "
    "Right, the error at a stored pair over time, for three ways to learn it."
)


def draw(ink: Ink) -> Any:
    tokens, pair = 24, 5
    rng = np.random.default_rng(2)
    theta, eta, alpha = (np.full(tokens, x) for x in (1.0, 0.6, 0.08))
    alpha[10], eta[10] = 1.0, 0.0
    of = titans_coefficients(theta, eta, alpha)
    figure, axes = panels(2, height=3.6)
    grid(axes[0], of.G, ink.shades, ink, "a gradient's share in the weights", top=of.G.max())
    axes[0].set_xlabel("token stored")
    axes[0].set_ylabel("token reading")

    keys, values = rng.standard_normal((1, tokens, 16)), rng.standard_normal((1, tokens, 8))
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    queries = np.repeat(keys[:, pair : pair + 1], tokens, axis=1)
    ways = (
        ("step alone", (0.25, 0.0, 0.0), ink.text),
        ("with momentum", (0.25, 0.5, 0.0), ink.first),
        ("and forgetting", (0.25, 0.5, 0.15), ink.second),
    )
    for name, rates, colour in ways:
        y, _, _ = titans_sequential((np.zeros((16, 8)),), None, keys, values, queries, rates, 1)
        error = np.linalg.norm(y[0] - values[0, pair], axis=-1)
        axes[1].plot(error / np.linalg.norm(values[0, pair]), color=colour, label=name)
    axes[1].axvline(pair, color=ink.text, lw=0.8, ls=":")
    axes[1].set_xlabel("token")
    axes[1].set_title(f"error at the pair of token {pair}")
    axes[1].set_ylim(bottom=0)
    axes[1].legend(frameon=False)
    return figure
