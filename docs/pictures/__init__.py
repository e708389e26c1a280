"""Pictures of the mechanisms, drawn by running the reference.

A module named after a mechanism holds `CAPTION`, a sentence on what is seen, and `draw(ink)`, which
returns the figure. Each is drawn twice, for light and for dark pages.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import Colormap, LinearSegmentedColormap, ListedColormap


@dataclass(frozen=True)
class Ink:
    """The colours of a theme: text, lines, an empty cell, three accents."""

    name: str
    text: str
    line: str
    empty: str
    first: str
    second: str
    third: str

    @property
    def shades(self) -> Colormap:
        """From an empty cell (0) to the first accent (1)."""
        return LinearSegmentedColormap.from_list("shades", [self.empty, self.first])

    def palette(self, *colours: str) -> Colormap:
        """Colours by small integers, 0 being an empty cell."""
        return ListedColormap([self.empty, *colours])


INKS = (
    Ink("light", "#24292f", "#d0d7de", "#f3f4f6", "#0b57a4", "#d9730d", "#7a3e9d"),
    Ink("dark", "#d6d9dd", "#3d444d", "#22262b", "#79b8ff", "#f0a050", "#c39be8"),
)


def draw(slug: str, folder: Path) -> str:
    """Draw ``<slug>-light.svg`` and ``<slug>-dark.svg``; the caption, or "" if there is none."""
    if importlib.util.find_spec(f"pictures.{slug}") is None:
        return ""
    module = importlib.import_module(f"pictures.{slug}")
    save(slug, folder, module.draw)
    return str(module.CAPTION)


def save(stem: str, folder: Path, make: Callable[[Ink], Any]) -> None:
    """``<stem>-light.svg`` and ``<stem>-dark.svg`` of the figures that `make` draws."""
    for ink in INKS:
        with mpl.rc_context(_style(ink)):
            figure = make(ink)
            path = folder / f"{stem}-{ink.name}.svg"
            figure.savefig(path, transparent=True, metadata={"Date": None})
            plt.close(figure)


def _style(ink: Ink) -> dict[str, Any]:
    names = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.titlecolor")
    return {
        **dict.fromkeys(names, ink.text),
        "axes.edgecolor": ink.line,
        "axes.facecolor": "none",
        "axes.titlesize": 10,
        "axes.titlepad": 8,
        "axes.labelsize": 9,
        "font.size": 9,
        "font.family": "sans-serif",
        "svg.fonttype": "path",
        "svg.hashsalt": "attnspec",
        "figure.constrained_layout.use": True,
    }


def panels(count: int, height: float = 2.9, **options: Any) -> tuple[Any, list[Any]]:
    """A figure with `count` panels side by side."""
    figure, axes = plt.subplots(1, count, figsize=(8.4, height), squeeze=False, **options)
    return figure, list(axes[0])


def grid(
    axes: Any,
    values: np.ndarray,
    colours: Colormap,
    ink: Ink,
    title: str = "",
    x: str = "key",
    y: str = "query",
    top: float | None = None,
) -> None:
    """A matrix as small squares; rows run downwards."""
    rows, columns = values.shape
    axes.pcolormesh(
        np.arange(columns + 1),
        np.arange(rows + 1),
        values,
        cmap=colours,
        vmin=0,
        vmax=top if top is not None else max(float(values.max()), 1e-9),
        edgecolors=ink.line,
        linewidth=0.4 if max(rows, columns) <= 40 else 0.0,
    )
    axes.set_aspect("equal")
    axes.invert_yaxis()
    axes.set(xlabel=x, ylabel=y, title=title, xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
