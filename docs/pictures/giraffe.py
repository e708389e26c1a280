"""Giraffe: what each scheme makes of rotary frequencies, and of the distance between two tokens."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.positions.giraffe_rotation import relative_kernel, rope_basis
from attnspec.reference.positions.giraffe_xpos import xpos_scale
from pictures import Ink, panels

CAPTION = (
    "Four schemes on 128 channels and a training length of 2048. Left: the turns that each pair of "
    "channels completes in training; a pair below one turn (grey) meets angles beyond it that it "
    "has never seen. Right: the part of a logit that a distance leaves, averaged over the pairs "
    "and over like distances: linear scaling stretches it, pairs that no longer turn keep it from "
    "falling, and xPos lets it fade."
)
WIDTH, TRAINED = 128, 2048
SCALE, POWER, SCALE_BASE = 4.0, 0.5, 512


EDGES = np.unique(np.geomspace(1, 4 * TRAINED, 40).astype(int))
DISTANCES = np.arange(1, 4 * TRAINED)


def fading(f: np.ndarray) -> np.ndarray:
    """The relative kernel at every distance, under the decay of xPos."""
    weights = xpos_scale(WIDTH, DISTANCES + TRAINED // 2, TRAINED, SCALE_BASE)
    return np.mean(weights * np.cos(DISTANCES[:, None] * f), axis=-1)


def smoothed(curve: np.ndarray) -> np.ndarray:
    """The mean between neighbouring edges of a curve over all distances."""
    return np.add.reduceat(curve, EDGES[:-1] - 1) / np.diff(EDGES)


def draw(ink: Ink) -> Any:
    figure, (left, right) = panels(2, height=3.0)
    theta = rope_basis(WIDTH)
    schemes = (
        ("plain", ink.text, "-", theta),
        ("linear", ink.first, "-", rope_basis(WIDTH, scale=SCALE)),
        ("power", ink.third, "-", rope_basis(WIDTH, power=POWER)),
        ("truncated", ink.second, "--", rope_basis(WIDTH, truncate=TRAINED)),
    )
    pairs = np.arange(WIDTH // 2)
    for name, colour, line, f in schemes:
        turns = np.where(f > 0, f * TRAINED / (2 * np.pi), np.nan)
        left.plot(pairs, turns, color=colour, linestyle=line, label=name)
    left.axhspan(1e-2, 1, color=ink.empty, zorder=0)
    left.set(xlabel="pair of channels", ylabel="turns in training", yscale="log", ylim=(1e-2, 500))
    left.legend(frameon=False, loc="upper right")
    even = np.full(WIDTH // 2, 2 / WIDTH)
    for _, colour, line, f in schemes:
        curve = smoothed(relative_kernel(f, even)(DISTANCES))
        right.plot(EDGES[:-1], curve, color=colour, linestyle=line)
    curve = smoothed(fading(theta))
    right.plot(EDGES[:-1], curve, color=ink.text, linestyle=":", label="xPos")
    right.axvline(TRAINED, color=ink.line)
    right.set(xlabel="distance", ylabel="what is left of a logit", xscale="log")
    right.legend(frameon=False, loc="upper right")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure
