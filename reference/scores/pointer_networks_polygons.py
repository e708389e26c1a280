r"""Pointer networks, continued: how the answers to the convex hull task are scored.

Definition
----------
S17. **Convex hull.** An answer is *valid* if its polygon is simple: at least 3 points, none twice,
edges that are not neighbours without a common point (touching counts), neighbours with only their
vertex in common. It is *accurate* if it is the true cycle of vertices, rotation allowed and
reversal not: the right hull written clockwise is valid and not accurate. Its *coverage* is the area
it shares with the true hull over the area of the true hull, found by clipping the answer against
each edge of the convex hull in turn (Sutherland and Hodgman); the answer need not be convex. An
invalid answer is not accurate and has no coverage. Over many answers: the share of valid ones, the
accuracy over all, the coverage over the valid; more than 1 % invalid is a failure, and then the
coverage is not reported.

Paper and code
--------------
One implementation compares the sets of vertices of a hull instead of the cycles: given a simple
polygon this differs only for a reversed hull, which it counts as right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from attnspec.reference.conventions import check_size
from attnspec.reference.scores.pointer_networks_tasks import (
    check_indices,
    check_points,
    cross,
    hull_target,
)

LARGEST_INVALID_SHARE = 0.01


class HullMetrics(NamedTuple):
    """S17: one answer. `coverage` is NaN for an invalid one."""

    valid: bool
    accuracy: float
    coverage: float


class HullSummary(NamedTuple):
    """S17: many answers. `coverage` is NaN if `failed`."""

    valid_share: float
    accuracy: float
    coverage: float
    failed: bool


def polygon_area(polygon: np.ndarray) -> np.ndarray:
    """S17: signed areas (...) of polygons (..., vertices, 2), > 0 if counter-clockwise.

    >>> polygon_area(np.array([[0.0, 0.0], [2.0, 0.0], [2.0, 1.0]]))
    np.float64(1.0)
    """
    check_points(polygon, least=0, name="polygon")
    # Relative to the first vertex, so that a polygon far from the origin loses no digits.
    rays = polygon - polygon[..., :1, :]
    return np.sum(cross(rays, np.roll(rays, -1, axis=-2)), axis=-1) / 2


def is_simple_polygon(polygon: np.ndarray) -> bool:
    """S17: whether `polygon` (vertices, 2) is simple, that is, a valid answer.

    >>> bow = np.array([[0.0, 0.0], [1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    >>> is_simple_polygon(bow), is_simple_polygon(bow[[0, 2, 1, 3]])
    (False, True)
    """
    check_points(polygon, least=0, name="polygon")
    check_size("polygon axes", polygon.ndim, 2, "vertices and 2")
    m = len(polygon)
    if m < 3 or len(np.unique(polygon, axis=0)) < m:
        return False
    start, end = polygon, np.roll(polygon, -1, axis=0)
    back, ahead = start - end, np.roll(end, -1, axis=0) - end
    if np.any((cross(back, ahead) == 0) & (np.sum(back * ahead, axis=-1) > 0)):
        return False
    i, j = np.triu_indices(m, k=2)
    apart = (j + 1) % m != i
    return not np.any(_segments_meet(start[i], end[i], start[j], end[j])[apart])


def _segments_meet(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> np.ndarray:
    """S17: whether the closed segments ab and cd (..., 2) have a point in common."""
    side_c, side_d = np.sign(cross(b - a, c - a)), np.sign(cross(b - a, d - a))
    side_a, side_b = np.sign(cross(d - c, a - c)), np.sign(cross(d - c, b - c))
    boxes = np.all(
        (np.minimum(a, b) <= np.maximum(c, d)) & (np.minimum(c, d) <= np.maximum(a, b)), axis=-1
    )
    return boxes & (side_c * side_d <= 0) & (side_a * side_b <= 0)


def convex_clip_area(pred: np.ndarray, true: np.ndarray) -> np.ndarray:
    """S17: the area that a simple polygon `pred` (m, 2) shares with the convex `true` (h, 2).

    `pred` may run either way round and need not be convex; `true` is counter-clockwise. ValueError
    if `pred` is not simple or `true` is not convex and counter-clockwise.

    >>> square = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    >>> convex_clip_area(square[::-1] + 0.5, square)
    np.float64(0.25)
    """
    for name, x, least in (("pred", pred, 0), ("true", true, 3)):
        check_points(x, least=least, name=name)
        check_size(f"{name} axes", x.ndim, 2, "vertices and 2")
    if not is_simple_polygon(pred):
        raise ValueError(f"pred: got {pred.tolist()}, expected a simple polygon")
    edges = np.roll(true, -1, axis=0) - true
    rounding = 64 * np.finfo(true.dtype).eps * np.max(edges * edges)
    if np.any(cross(edges, np.roll(edges, -1, axis=0)) < -rounding) or polygon_area(true) <= 0:
        raise ValueError(f"true: got {true.tolist()}, expected convex and counter-clockwise")
    return _shared_area(pred, true)


def _shared_area(pred: np.ndarray, true: np.ndarray) -> np.ndarray:
    """S17: the area of `convex_clip_area` where the polygons are known to be what they must be."""
    for corner, edge in zip(true, np.roll(true, -1, axis=0) - true, strict=True):
        pred = _clip(pred, corner, edge)
    return np.abs(polygon_area(pred))


def _clip(polygon: np.ndarray, corner: np.ndarray, edge: np.ndarray) -> np.ndarray:
    """S17: the part of `polygon` (m, 2) left of the line through `corner` along `edge`."""
    side = cross(edge, polygon - corner)
    kept = []
    for i in range(len(polygon)):
        if side[i - 1] < 0 < side[i] or side[i] < 0 < side[i - 1]:
            share = side[i - 1] / (side[i - 1] - side[i])
            kept.append(polygon[i - 1] + share * (polygon[i] - polygon[i - 1]))
        if side[i] >= 0:
            kept.append(polygon[i])
    return np.stack(kept) if kept else polygon[:0]


def hull_metrics(points: np.ndarray, pred_indices: np.ndarray) -> HullMetrics:
    """S17: the answer `pred_indices` int (vertices) to the convex hull of `points` (n, 2).

    ValueError for an index outside the points.

    >>> corners = np.array([[0.0, 0.0], [2.0, 0.0], [2.0, 2.0], [0.0, 2.0]])
    >>> hull_metrics(corners, np.array([3, 0, 1, 2]))
    HullMetrics(valid=True, accuracy=1.0, coverage=1.0)
    >>> hull_metrics(corners, np.array([2, 1, 0]))
    HullMetrics(valid=True, accuracy=0.0, coverage=0.5)
    """
    target = hull_target(points)
    check_indices("pred_indices", pred_indices, len(points))
    check_size("pred_indices axes", pred_indices.ndim, 1, "vertices")
    polygon = points[pred_indices]
    if not is_simple_polygon(polygon):
        return HullMetrics(valid=False, accuracy=0.0, coverage=float("nan"))
    from_lowest = np.roll(pred_indices, -np.argmin(pred_indices))
    true = points[target]
    coverage = _shared_area(polygon, true) / polygon_area(true)
    return HullMetrics(True, float(np.array_equal(from_lowest, target)), float(coverage))


def summarise_hulls(answers: Sequence[HullMetrics]) -> HullSummary:
    """S17: shares and means over `answers`; ValueError if there are none.

    >>> summarise_hulls([HullMetrics(True, 1.0, 1.0), HullMetrics(True, 0.0, 0.5)])
    HullSummary(valid_share=1.0, accuracy=0.5, coverage=0.75, failed=False)
    """
    if len(answers) == 0:
        raise ValueError("answers: got none, expected at least one")
    valid = [answer for answer in answers if answer.valid]
    failed = len(answers) - len(valid) > LARGEST_INVALID_SHARE * len(answers)
    covered = sum(answer.coverage for answer in valid)
    return HullSummary(
        valid_share=len(valid) / len(answers),
        accuracy=sum(answer.accuracy for answer in answers) / len(answers),
        coverage=float("nan") if failed else covered / len(valid),
        failed=failed,
    )
