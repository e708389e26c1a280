"""Wrong kernels of pointer networks, continued: wrong hulls, triangulations and tours."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, altering, replacing, right, spoiling
from attnspec.reference.scores import pointer_networks_tours
from attnspec.reference.scores.pointer_networks_metrics import incircle
from attnspec.reference.scores.pointer_networks_polygons import polygon_area
from attnspec.reference.scores.pointer_networks_tasks import (
    check_triangles,
    cross,
)

HULL = right("pointer_networks.hull_target")
DELAUNAY = right("pointer_networks.delaunay_target")
TSP = right("pointer_networks.tsp_target")
COVERAGE = right("pointer_networks.triangle_coverage")
IS_DELAUNAY = right("pointer_networks.is_delaunay")
PERMUTATION = right("pointer_networks.is_permutation")
LENGTH = right("pointer_networks.tour_length")
HELD_KARP = pointer_networks_tours._held_karp


def clockwise(hull: np.ndarray) -> np.ndarray:
    return np.concatenate([hull[:1], hull[:0:-1]])


def from_lowest_point(points: np.ndarray) -> np.ndarray:
    """Starts at the leftmost point, not at the lowest index."""
    hull = HULL(points)
    return np.roll(hull, -np.lexsort((points[hull, 1], points[hull, 0]))[0])


def keeps_points_on_edges(points: np.ndarray, a: int, b: int, c: int) -> bool:
    return bool(cross(points[b] - points[a], points[c] - points[a]) >= 0)


def same_point_twice(points: np.ndarray) -> None:
    """Equal points are not looked for."""


def unsorted_triangles(triangles: np.ndarray) -> np.ndarray:
    return triangles[np.lexsort(triangles.T[::-1])]


def rotated_rows(triangles: np.ndarray) -> np.ndarray:
    return np.roll(triangles, 1, axis=-1)


def centroid(tri: np.ndarray) -> np.ndarray:
    check_triangles(tri)
    return np.mean(tri, axis=-2, dtype=tri.dtype)


def adjacent_sides(tri: np.ndarray) -> np.ndarray:
    """A vertex is weighed by a side that it lies on."""
    check_triangles(tri)
    sides = np.sqrt(np.sum((np.roll(tri, -1, axis=-2) - tri) ** 2, axis=-1, keepdims=True))
    return np.sum(sides * tri, axis=-2) / np.sum(sides, axis=-2)


def nearest_point(points: np.ndarray, a: int, b: int) -> int | None:
    """The third point is the nearest to the edge's middle, not the one of the largest angle."""
    left = np.flatnonzero(cross(points[a] - points, points[b] - points) > 0)
    if len(left) == 0:
        return None
    middle = (points[a] + points[b]) / 2
    return int(left[np.argmin(np.sum((points[left] - middle) ** 2, axis=-1))])


def other_way_round(tours: np.ndarray) -> np.ndarray:
    return np.concatenate([tours[..., :1], tours[..., :0:-1]], axis=-1)


def open_path(distances: np.ndarray) -> np.ndarray:
    """The shortest path: the way back is free."""
    costless = distances.copy()
    costless[0, 1:] = 0
    return HELD_KARP(costless)


def squared_distances(points: np.ndarray) -> np.ndarray:
    offsets = points[..., :, None, :] - points[..., None, :, :]
    return np.sum(offsets * offsets, axis=-1)


def ordered_triples(pred: np.ndarray, true: np.ndarray) -> float:
    COVERAGE(pred, true)
    found, wanted = ({tuple(row) for row in x.tolist()} for x in (pred, true))
    return len(found & wanted) / len(wanted)


def counted_twice(pred: np.ndarray, true: np.ndarray) -> float:
    COVERAGE(pred, true)
    wanted = {tuple(sorted(row)) for row in true.tolist()}
    return sum(tuple(sorted(row)) in wanted for row in pred.tolist()) / len(wanted)


def circles_only(points: np.ndarray, triangles: np.ndarray, **rest: Any) -> bool:
    """Whether the triangles cover the hull is not looked at."""

    covered: list[np.ndarray] = []

    def area(polygon: np.ndarray) -> np.ndarray:
        if polygon.ndim == 2:
            return np.sum(np.abs(covered[-1]))
        covered.append(polygon_area(polygon))
        return covered[-1]

    return replacing(IS_DELAUNAY, polygon_area=area)(points, triangles, **rest)


def counter_clockwise_triangles(triangle: np.ndarray, point: np.ndarray) -> np.ndarray:
    """The sign is right for counter-clockwise triangles, and turned where it should not be."""
    return np.abs(incircle(triangle, point))


def anything_tiled(tri: np.ndarray, point: np.ndarray) -> np.ndarray:
    return incircle(tri, point) * 0


def any_distinct(seq: np.ndarray, n: int) -> np.ndarray:
    """Distinct entries will do, whatever they are."""
    result = PERMUTATION(seq, n)
    if seq.shape[-1] != n:
        return result
    return np.all(np.diff(np.sort(seq, axis=-1), axis=-1) > 0, axis=-1)


def right_sum(seq: np.ndarray, n: int) -> np.ndarray:
    result = PERMUTATION(seq, n)
    if seq.shape[-1] != n:
        return result
    return (seq.sum(axis=-1) == n * (n - 1) // 2) & (seq >= 0).all(axis=-1)


def way_there_only(points: np.ndarray, tour: np.ndarray) -> np.ndarray:
    length = LENGTH(points, tour)
    if tour.shape[-1] == 0:
        return length
    ends = np.take_along_axis(points, tour[..., [0, -1], None], axis=-2)
    back = np.sqrt(np.sum((ends[..., 0, :] - ends[..., 1, :]) ** 2, axis=-1))
    return (length - back).astype(length.dtype)


def along_the_streets(points: np.ndarray, tour: np.ndarray) -> np.ndarray:
    length = LENGTH(points, tour)
    visited = np.take_along_axis(points, tour[..., None], axis=-2)
    legs = np.abs(np.roll(visited, -1, axis=-2) - visited)
    return legs.sum(axis=(-2, -1)).astype(length.dtype)


def first_points(arguments: dict[str, Any]) -> None:
    points = arguments["points"]
    if isinstance(points, np.ndarray) and points.ndim == 3:
        arguments["points"] = np.repeat(points[:1], len(points), axis=0)


def mutant(operation: str, name: str, bug: str, call: Any, law: str = "agreement") -> Mutant:
    full = f"pointer_networks.{operation}"
    return Mutant(f"pointer_networks.{name}", full, law, bug, call)


MUTANTS = (
    mutant("hull_target", "clockwise", "the hull runs clockwise", spoiling(HULL, clockwise)),
    mutant("hull_target", "lowest-point", "the hull starts at the leftmost point",
           from_lowest_point),
    mutant("hull_target", "edge-points", "points on an edge are vertices",
           replacing(HULL, _turns_left=keeps_points_on_edges)),
    mutant("hull_target", "equal-points", "equal points are taken",
           replacing(HULL, check_distinct=same_point_twice), "refusal"),
    mutant("delaunay_target", "unsorted", "triangles are sorted by their indices",
           spoiling(DELAUNAY, unsorted_triangles)),
    mutant("delaunay_target", "by-centroid", "triangles are sorted by their centroid",
           replacing(DELAUNAY, incenter=centroid)),
    mutant("delaunay_target", "rotated-rows", "indices of a triangle do not increase",
           spoiling(DELAUNAY, rotated_rows)),
    mutant("delaunay_target", "nearest-point", "the nearest point completes a triangle",
           replacing(DELAUNAY, _apex=nearest_point)),
    mutant("incenter", "centroid", "all vertices weigh the same", centroid),
    mutant("incenter", "adjacent-sides", "a belongs to a vertex on BC", adjacent_sides),
    mutant("tsp_target", "direction", "the tour runs the other way round",
           spoiling(TSP, other_way_round)),
    mutant("tsp_target", "open-path", "the way back is free",
           replacing(TSP, _held_karp=open_path)),
    mutant("tsp_target", "squared", "the squares of the legs are added up",
           replacing(TSP, pairwise_distances=squared_distances)),
    mutant("tsp_target", "first-points", "every tour is the first example's",
           altering(TSP, first_points), "batch"),
    mutant("triangle_coverage", "ordered", "the order of indices counts", ordered_triples),
    mutant("triangle_coverage", "counted-twice", "a triangle given twice is found twice",
           counted_twice),
    mutant("is_delaunay", "no-tiling", "missing triangles are not missed", circles_only),
    mutant("is_delaunay", "no-circles", "circumcircles are not tested",
           replacing(IS_DELAUNAY, incircle=anything_tiled)),
    mutant("is_delaunay", "unsigned-circles", "a point outside the circle counts too",
           replacing(IS_DELAUNAY, incircle=counter_clockwise_triangles)),
    mutant("is_permutation", "distinct", "distinct numbers will do", any_distinct),
    mutant("is_permutation", "right-sum", "the sum of the entries is tested", right_sum),
    mutant("tour_length", "open-tour", "the way back is left out", way_there_only),
    mutant("tour_length", "city-blocks", "legs are measured along the axes", along_the_streets),
    mutant("tour_length", "first-map", "every tour runs through the first example's points",
           altering(LENGTH, first_points), "batch"),
)  # fmt: skip
