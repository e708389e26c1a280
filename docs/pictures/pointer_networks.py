"""Pointer networks: an answer made of positions of the input."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.scores.pointer_networks_tasks import delaunay_target, hull_target
from attnspec.reference.scores.pointer_networks_tours import tsp_target
from pictures import Ink, panels

CAPTION = (
    "The targets of the three tasks on the same nine points. An answer is a sequence of positions "
    "of the input (numbers), so its vocabulary has as many words as there are points."
)


def draw(ink: Ink) -> Any:
    points = np.random.default_rng(8).random((9, 2))
    hull, tour = hull_target(points), tsp_target(points)
    figure, axes = panels(3, height=2.7)
    for panel, cycle, title in ((axes[0], hull, "convex hull"), (axes[2], tour, "shortest tour")):
        closed = points[np.append(cycle, cycle[0])]
        panel.plot(*closed.T, color=ink.first, lw=1.6)
        panel.set_title(title)
    for triangle in np.reshape(delaunay_target(points), (-1, 3)):
        axes[1].plot(*points[np.append(triangle, triangle[0])].T, color=ink.first, lw=1.2)
    axes[1].set_title("Delaunay triangulation")
    for panel in axes:
        panel.scatter(*points.T, s=130, color=ink.second, zorder=2)
        for n, (x, y) in enumerate(points):
            panel.text(x, y, n, ha="center", va="center_baseline", size=7, color="white")
        panel.set(xticks=[], yticks=[], aspect="equal")
        panel.margins(0.12)
        panel.spines[:].set_visible(False)
    return figure
