"""MoA: what two heads see at two lengths, and how their spans grow."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.patterns.moa_masks import cache_sizes, moa_token_mask
from pictures import Ink, grid, panels

CAPTION = (
    "Two heads with rules of their own at two lengths: sinks (orange) and window (blue) of a head "
    "that does not grow with the text and of one that reads three quarters of it; on the right, "
    "how the caches of both grow, beside one that keeps everything."
)
RULES = (("local head", 7.0, 0.0), ("far head", 0.0, 0.75))
SINK = 2


def draw(ink: Ink) -> Any:
    figure, axes = panels(5, height=2.3, gridspec_kw={"width_ratios": [1, 1, 1, 1, 1.25]})
    colours = ink.palette(ink.first, ink.second)
    place = 0
    for title, alpha, beta in RULES:
        for T in (12, 24):
            _, s, c = cache_sizes(np.array([alpha]), np.array([beta]), T, 0, SINK, 4, 1)
            seen = moa_token_mask(T, s, c)[0]
            kind = np.where(seen, np.where(np.arange(T) < s[0], 2, 1), 0)
            grid(axes[place], kind, colours, ink, f"{title}, N = {T}", "key",
                 "query" if place == 0 else "", top=2)  # fmt: skip
            place += 1
    lengths = np.arange(4, 49)
    for (title, alpha, beta), colour in zip(RULES, (ink.first, ink.third), strict=True):
        C = [int(cache_sizes(alpha, beta, int(N), 0, SINK, 4, 1)[0]) for N in lengths]
        axes[4].plot(lengths, C, color=colour, label=title)
    axes[4].plot(lengths, lengths, color=ink.line, linestyle=":", label="all")
    axes[4].set(title="cache", xlabel="length N", ylabel="slots")
    axes[4].legend(frameon=False, fontsize=8)
    axes[4].spines[["top", "right"]].set_visible(False)
    return figure
