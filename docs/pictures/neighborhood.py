"""Neighborhood attention: what a query sees, and what windows of several sizes do to an image."""

from __future__ import annotations

from functools import cache
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from attnspec.reference.patterns.neighborhood import na_attend, na_mask
from pictures import Ink, grid

SHAPE = (15, 15)
QUERIES = ((7, 7), (1, 12), (14, 0))
VIEWS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("kernel 5", {}),
    ("stride 4", {"stride": 4}),
    ("dilation 2", {"dilation": 2}),
    ("causal rows", {"causal": (True, False)}),
)
SIDE, NOISE, WIDTH = 48, 0.12, 0.5
FILTERS = ((3, 1), (5, 1), (5, 3), (13, 1))
CAPTION = (
    "Above, three queries (dots) on a grid of 15 x 15 tokens and the 25 keys that each one sees, "
    "in its colour: around it in the interior, pushed inwards at an edge and in a corner. A stride "
    "of 4 gives all queries of a 4 x 4 block (outlined) the window of its leader; dilation 2 takes "
    "every other token; a causal vertical axis shows no later row, and cuts the window at the top. "
    "Below, a noisy image whose pixels attend to those of their window that have similar "
    "surroundings: queries and keys are patches of 3 x 3 pixels, values are colours, nothing is "
    "trained. A wider window finds more to average, and edges stay. Dilation 3 spans the 13 x 13 "
    "pixels of the last image with 25 keys, but three pixels away less is alike, and each "
    "of the nine dilation groups is smoothed by itself. Decibels are the peak signal-to-noise ratio"
    " against the clean image."
)


def draw(ink: Ink) -> Any:
    figure = plt.figure(figsize=(8.4, 4.7))
    top, bottom = figure.subfigures(2, 1, height_ratios=(2.5, 2.1))
    for panel, (title, options) in zip(top.subplots(1, len(VIEWS)), VIEWS, strict=True):
        _draw_windows(panel, title, options, ink)
    clean, noisy = images()
    shown = [("noisy", noisy)]
    for kernel, dilation in FILTERS:
        title = f"kernel {kernel}" + (f", dilation {dilation}" if dilation > 1 else "")
        shown.append((title, smoothed(kernel, dilation)))
    for panel, (title, image) in zip(bottom.subplots(1, len(shown)), shown, strict=True):
        decibels = -10 * np.log10(np.mean((image - clean) ** 2))
        panel.imshow(np.clip(image, 0, 1), interpolation="nearest")
        panel.set(title=title, xlabel=f"{decibels:.1f} dB", xticks=[], yticks=[])
        panel.spines[:].set_visible(False)
    return figure


def _draw_windows(panel: Any, title: str, options: dict[str, Any], ink: Ink) -> None:
    mask = na_mask(SHAPE, 5, **options).reshape(*SHAPE, *SHAPE)
    seen = np.zeros(SHAPE, int)
    for number, query in enumerate(QUERIES, start=1):
        seen[mask[query]] = number
    colours = ink.palette(ink.first, ink.second, ink.third)
    grid(panel, seen, colours, ink, title, x="", y="", top=3)
    step = options.get("stride", 1)
    for row, column in QUERIES:
        panel.plot(column + 0.5, row + 0.5, "o", color=ink.empty, markersize=3.5)
        if step > 1:
            y, x = row // step * step, column // step * step
            bottom, right = min(y + step, SHAPE[0]), min(x + step, SHAPE[1])
            outline = [x, right, right, x, x], [y, y, bottom, bottom, y]
            panel.plot(*outline, color=ink.text, linewidth=1.2)


def images() -> tuple[np.ndarray, np.ndarray]:
    """A house before hills (SIDE, SIDE, 3), clean and with noise, of values from about 0 to 1."""
    y, x = np.mgrid[:SIDE, :SIDE][..., None] / SIDE
    image = y * (0.95, 0.85, 0.7) + (1 - y) * (0.45, 0.65, 0.95)
    wall = (abs(x - 0.32) < 0.18) & (abs(y - 0.58) < 0.19)
    roof = (abs(x - 0.32) < 1.3 * y - 0.26) & (y > 0.2) & (y < 0.39)
    for where, colour in (
        ((x - 0.74) ** 2 + (y - 0.24) ** 2 < 0.012, (1.0, 0.85, 0.3)),
        (y > 0.62 + 0.1 * np.sin(5 * x + 0.5), (0.25, 0.5, 0.3)),
        (wall, (0.75, 0.3, 0.22)),
        (wall & (SIDE * y % 4 < 1), (0.9, 0.8, 0.7)),
        (roof, (0.3, 0.22, 0.3)),
        (y > 0.8 + 0.05 * np.sin(9 * x), (0.15, 0.36, 0.22)),
    ):
        image = np.where(where, colour, image)
    noise = np.random.default_rng(2).standard_normal(image.shape)
    return image.astype(np.float32), (image + NOISE * noise).astype(np.float32)


@cache
def smoothed(kernel: int, dilation: int) -> np.ndarray:
    """The noisy image after attention whose weights fall with the distance of patches,
    exp(-|a_i - a_j|^2 / (2 WIDTH^2)): one more channel makes that distance of a dot product.
    """
    _, noisy = images()
    padded = np.pad(noisy, ((1, 1), (1, 1), (0, 0)), mode="reflect")
    shifted = [padded[i : i + SIDE, j : j + SIDE] for i in range(3) for j in range(3)]
    patches = np.concatenate(shifted, axis=-1).reshape(1, SIDE * SIDE, -1)
    square = np.sum(patches**2, axis=-1, keepdims=True)
    q = np.concatenate([patches, np.ones_like(square)], axis=-1)
    k = np.concatenate([patches, -square / 2], axis=-1)
    v = noisy.reshape(1, SIDE * SIDE, 3)
    out, _ = na_attend(q, k, v, (SIDE, SIDE), kernel, dilation=dilation, scale=WIDTH**-2)
    return out.reshape(noisy.shape)
