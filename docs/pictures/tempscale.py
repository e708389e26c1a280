"""TempScale: what length does to the filter, and what a temperature below 1 gives back."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.scores.tempscale import attend, scores, softmax_rows, temper
from attnspec.reference.scores.tempscale_collapse import filter_gain, retention
from pictures import Ink, panels

CAPTION = (
    "Attention of random queries and keys. Left: the most it lets through of what differs between "
    "tokens falls with the length, and rises as the temperature falls. Right: what a stack of such "
    "layers leaves of random tokens; the longer text (dashed) collapses sooner."
)
LAYERS, WIDTH = 8, 32


def filters(tokens: int, tau: float) -> np.ndarray:
    """Attention matrices (LAYERS, tokens, tokens), the same but for the temperature."""
    rng = np.random.default_rng(5)
    q, k = (rng.standard_normal((LAYERS, tokens, WIDTH)) for _ in range(2))
    return softmax_rows(temper(scores(q, k), tau))


def left_of_tokens(tokens: int, tau: float) -> np.ndarray:
    """The share of what differs between random tokens, after none to all of the layers."""
    x = np.random.default_rng(6).standard_normal((1, tokens, WIDTH))
    shares = [1.0]
    for P in filters(tokens, tau):
        shares.append(shares[-1] * float(retention(P[None], x)[0]))
        x = attend(P[None], x)
    return np.array(shares)


def draw(ink: Ink) -> Any:
    lengths = (16, 32, 64, 128, 256)
    figure, (left, right) = panels(2, height=3.0)
    for tau, colour in ((1.0, ink.second), (0.8, ink.first), (0.6, ink.third)):
        gains = [np.mean(filter_gain(filters(tokens, tau))) for tokens in lengths]
        left.plot(lengths, gains, color=colour, marker="o", markersize=3)
        place, name = (lengths[-1], gains[-1]), f"τ = {tau:g}"
        left.annotate(name, place, (6, -3), textcoords="offset points", color=colour)
        for tokens, dash in ((16, "-"), (128, "--")):
            right.plot(left_of_tokens(tokens, tau), color=colour, linestyle=dash)
    left.set_xscale("log", base=2)
    left.set(xlabel="tokens", ylabel="filter gain", xticks=lengths, xlim=(14, 450), ylim=(0, None))
    left.set_xticklabels([str(n) for n in lengths])
    left.minorticks_off()
    right.set(xlabel="layers", ylabel="what still differs", yscale="log")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure
