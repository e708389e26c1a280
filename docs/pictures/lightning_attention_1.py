"""TransNormerLLM: how far each layer looks, what LRPE adds, and where the norm stands."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.linear.lightning_attention_1 import layer_slopes, lrpe, lrpe_frequencies
from pictures import Ink, grid, panels

CAPTION = (
    "Left: the number of tokens after which a head's weight has fallen to 1/e, for 8 heads in "
    "24 layers. Low layers look around, the last one sees everything. Middle: the weights of the "
    "past on layer 0, a head that forgets slowly. Right: the same with LRPE, whose phase depends "
    "on the distance alone (queries and keys all ones, orange where the product is negative)."
)


def draw(ink: Ink) -> Any:
    heads, n_layers, tokens, d = 8, 24, 24, 8
    reach = np.log10([1 / layer_slopes(heads, layer, n_layers) for layer in range(n_layers)])
    slope = layer_slopes(heads, 0, n_layers)[3]
    gap = np.arange(tokens)[:, None] - np.arange(tokens)
    decay = np.where(gap >= 0, np.exp(-slope * np.maximum(gap, 0)), 0.0)
    lifted = lrpe(np.ones((1, tokens, d)), lrpe_frequencies(heads, d)[:1])[0]
    phase = decay * (lifted @ lifted.T) / d

    figure, (far, plain, turned) = panels(3, height=3.2)
    for head, colour in ((0, ink.first), (3, ink.second), (7, ink.third)):
        far.plot(np.arange(n_layers), reach[:, head], color=colour, label=f"head {head}")
    far.set(title="reach of a head", xlabel="layer", ylabel="log10 of tokens")
    far.legend(frameon=False, labelcolor=ink.text, loc="upper left")
    far.spines[["top", "right"]].set_visible(False)
    grid(plain, decay, ink.shades, ink, "decay", top=1.0)
    grid(turned, np.maximum(phase, 0), ink.shades, ink, "decay and LRPE", top=1.0)
    turned.scatter(*np.nonzero(phase.T < 0), s=5, color=ink.second, marker="s")
    return figure
