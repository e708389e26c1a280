r"""Pointer networks, continued: how triangulations and tours are scored.

Definition
----------
S18. **Delaunay.** Accurate if the set of triangles is the true set; coverage is the share of the
true triangles that were found. A triangulation is Delaunay if no circumcircle holds another point
and the triangles tile the hull.

S19. **Travelling salesman.** The length of the closed tour, the way back included; an answer is
valid if it is a permutation. Over many answers: the share of valid ones and their mean length.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from attnspec.reference.conventions import check_array, check_integer, check_size
from attnspec.reference.scores.pointer_networks_polygons import polygon_area
from attnspec.reference.scores.pointer_networks_tasks import (
    check_indices,
    check_points,
    check_triangles,
    cross,
    hull_target,
)


class TourSummary(NamedTuple):
    """S19: many answers. `mean_length` is NaN if none is valid."""

    valid_share: float
    mean_length: float


def triangle_coverage(pred: np.ndarray, true: np.ndarray) -> float:
    """S18: the share of the triangles `true` int (m, 3) that are among `pred` int (l, 3).

    Neither the order of the triangles nor that of a triangle's indices counts; a triangle given
    twice is found once. ValueError if `true` is empty.

    >>> triangle_coverage(np.array([[2, 1, 0]]), np.array([[0, 1, 2], [1, 2, 3]]))
    0.5
    """
    wanted = _triangle_set("true", true)
    if not wanted:
        raise ValueError("true: got no triangle, expected at least one")
    return len(_triangle_set("pred", pred) & wanted) / len(wanted)


def triangle_accuracy(pred: np.ndarray, true: np.ndarray) -> float:
    """S18: 1.0 if `pred` int (l, 3) and `true` int (m, 3) are the same set of triangles, else 0.0.

    >>> triangle_accuracy(np.array([[2, 1, 0]]), np.array([[0, 1, 2]]))
    1.0
    """
    return float(_triangle_set("pred", pred) == _triangle_set("true", true))


def _triangle_set(name: str, triangles: np.ndarray) -> set[tuple[int, ...]]:
    check_array(name, triangles, ("triangles", "3"), dtype="int")
    check_size(f"{name} axes", triangles.ndim, 2, "triangles and 3")
    check_size(name, triangles.shape[1], 3, "indices of a triangle")
    return {tuple(row) for row in np.sort(triangles, axis=1).tolist()}


def is_delaunay(points: np.ndarray, triangles: np.ndarray, *, tol: float | None = None) -> bool:
    """S18: whether `triangles` int (m, 3) are a Delaunay triangulation of `points` (n, 2).

    True if none is given twice, no circumcircle holds another point and the areas add up to that of
    the hull. `tol` bounds the rounding of both tests, relative to the extent of the points: the
    incircle determinant by tol * extent^4, the areas by tol * extent^2. The default is 256 times
    the machine epsilon of the points' dtype.

    >>> points = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])
    >>> is_delaunay(points, np.array([[0, 1, 2], [1, 2, 3]]))
    True
    >>> is_delaunay(points, np.array([[0, 1, 3], [0, 2, 3]]))
    False
    """
    hull = hull_target(points)
    distinct = _triangle_set("triangles", triangles)
    check_indices("triangles", triangles, len(points))
    if len(distinct) < len(triangles) or any(len(set(row)) < 3 for row in distinct):
        return False
    if tol is None:
        tol = 256 * float(np.finfo(points.dtype).eps)
    scaled = (points - points[0]) / np.max(np.ptp(points, axis=0))
    areas = polygon_area(scaled[triangles])
    if np.abs(np.sum(np.abs(areas)) - polygon_area(scaled[hull])) > tol:
        return False
    inside = np.sign(areas)[:, None] * incircle(scaled[triangles][:, None], scaled)
    own = np.any(triangles[:, :, None] == np.arange(len(points)), axis=1)
    return bool(np.all((inside <= tol) | own))


def incircle(tri: np.ndarray, point: np.ndarray) -> np.ndarray:
    """S18: determinants (...), > 0 where `point` (..., 2) is in the circumcircle of `tri`
    (..., 3, 2), if the triangle is counter-clockwise; < 0 if it is clockwise.

    >>> tri = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> incircle(tri, np.array([[0.5, 0.5], [1.0, 1.0], [2.0, 2.0]]))
    array([ 0.5,  0. , -4. ])
    """
    check_triangles(tri)
    check_array("point", point, ("2",))
    check_size("point", point.shape[-1], 2, "coordinates")
    a, b, c = (tri[..., i, :] - point for i in range(3))
    lifted = [np.sum(x * x, axis=-1) for x in (a, b, c)]
    return lifted[0] * cross(b, c) + lifted[1] * cross(c, a) + lifted[2] * cross(a, b)


def is_permutation(seq: np.ndarray, n: int) -> np.ndarray:
    """S19: bool (...), whether each of `seq` int (..., m) holds 0..n-1 once each.

    >>> is_permutation(np.array([[2, 0, 1], [2, 0, 2]]), 3)
    array([ True, False])
    """
    check_array("seq", seq, ("m",), dtype="int")
    check_integer("n", n, least=1)
    if seq.shape[-1] != n:
        return np.zeros(seq.shape[:-1], dtype=bool)
    return np.all(np.sort(seq, axis=-1) == np.arange(n), axis=-1)


def tour_length(points: np.ndarray, tour: np.ndarray) -> np.ndarray:
    """S19: lengths (...) of the closed tours int (..., m) through `points` (..., n, 2).

    The way back to the start counts. A tour need not visit every point. ValueError for an index
    outside the points or for other leading axes.

    >>> tour_length(np.array([[0.0, 0.0], [3.0, 0.0], [3.0, 4.0]]), np.array([0, 1, 2]))
    np.float64(12.0)
    """
    check_points(points, least=1)
    check_indices("tour", tour, points.shape[-2])
    if tour.shape[:-1] != points.shape[:-2]:
        raise ValueError(f"tour: got leading axes {tour.shape[:-1]}, expected {points.shape[:-2]}")
    visited = np.take_along_axis(points, tour[..., None], axis=-2)
    legs = np.roll(visited, -1, axis=-2) - visited
    return np.sum(np.sqrt(np.sum(legs * legs, axis=-1)), axis=-1)


def summarise_tours(points: np.ndarray, tours: np.ndarray) -> TourSummary:
    """S19: over `tours` int (..., n) of `points` (..., n, 2), all answers of one size.

    >>> points = np.array([[[0.0, 0.0], [3.0, 0.0], [3.0, 4.0]]] * 2)
    >>> summarise_tours(points, np.array([[0, 1, 2], [0, 1, 1]]))
    TourSummary(valid_share=0.5, mean_length=12.0)
    """
    lengths = tour_length(points, tours)
    if lengths.size == 0:
        raise ValueError("tours: got none, expected at least one")
    valid = is_permutation(tours, points.shape[-2])
    mean_length = float(np.mean(lengths[valid])) if np.any(valid) else float("nan")
    return TourSummary(float(np.mean(valid)), mean_length)
