"""Synaptic Resonance: relevance decides how deep a token's trace is, and for how long."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.linear.synaptic_resonance_memory import memory_recurrent, relevance, unit
from pictures import Ink, grid, panels

CAPTION = (
    "Forty keys of two topics, and three that fit neither (dotted). Left, the relevance of each "
    "token with the trace of those before: it falls at the change of topic and grows back as the "
    "trace turns. Right, how much of each written value is left when a later token asks for its "
    "own topic."
)
STRAY = (9, 16, 30)


def draw(ink: Ink) -> Any:
    tokens, change = 40, 20
    rng = np.random.default_rng(4)
    topics = unit(rng.standard_normal((2, 24)))
    keys = topics[(np.arange(tokens) >= change).astype(int)]
    keys = keys + 0.08 * rng.standard_normal(keys.shape)
    for t in STRAY:
        keys[t] = rng.standard_normal(24) / 5
    keys = keys[None]
    rho, _ = relevance(keys, mu=0.8)
    values = np.eye(tokens)[None]
    weights, _ = memory_recurrent(keys, keys, values, rho, eta=1.0, lam=0.96)

    figure, axes = panels(2, height=3.6)
    colours = [ink.first if t < change else ink.second for t in range(tokens)]
    axes[0].bar(np.arange(tokens), rho[0], color=colours, width=0.8)
    for t in STRAY:
        axes[0].axvline(t, color=ink.text, lw=0.8, ls=":")
    axes[0].set(xlabel="token", title="relevance", ylim=(0, 1.05))
    axes[0].spines[["top", "right"]].set_visible(False)
    shown = np.maximum(weights[0], 0)
    grid(axes[1], shown, ink.shades, ink, "what a query reads", "token written", "token reading")
    return figure
