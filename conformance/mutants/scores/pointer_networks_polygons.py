"""Wrong kernels of pointer networks, continued: polygons and hulls that are scored wrongly."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, altering, replacing, right, spoiling
from attnspec.reference.scores import pointer_networks_polygons
from attnspec.reference.scores.pointer_networks_polygons import HullMetrics, polygon_area
from attnspec.reference.scores.pointer_networks_tasks import (
    check_points,
    cross,
    hull_target,
)

AREA = right("pointer_networks.polygon_area")
SIMPLE = right("pointer_networks.is_simple_polygon")
CLIP = right("pointer_networks.convex_clip_area")
METRICS = right("pointer_networks.hull_metrics")


def from_the_origin(polygon: np.ndarray) -> np.ndarray:
    """The shoelace formula on absolute coordinates loses digits far away."""
    check_points(polygon, least=0, name="polygon")
    return np.sum(cross(polygon, np.roll(polygon, -1, axis=-2)), axis=-1) / 2


def crossings_only(a: Any, b: Any, c: Any, d: Any) -> np.ndarray:
    """Segments that touch do not count."""
    sides = [np.sign(cross(b - a, x - a)) for x in (c, d)]
    others = [np.sign(cross(d - c, x - c)) for x in (a, b)]
    return (sides[0] * sides[1] < 0) & (others[0] * others[1] < 0)


def distinct_only(polygon: np.ndarray) -> bool:
    SIMPLE(polygon)
    return len(polygon) >= 3 and len(np.unique(polygon, axis=0)) == len(polygon)


def any_three(polygon: np.ndarray) -> bool:
    """A point that comes twice is left out first."""
    SIMPLE(polygon)
    _, first = np.unique(polygon, axis=0, return_index=True)
    return SIMPLE(polygon[np.sort(first)])


def counter_clockwise_only(pred: np.ndarray, true: np.ndarray) -> np.ndarray:
    """A clockwise answer counts as empty."""
    area = CLIP(pred, true)
    return area * area.dtype.type(polygon_area(pred) > 0)


def hull_of_prediction(pred: np.ndarray, true: np.ndarray) -> np.ndarray:
    """The hull of the points that were answered is clipped, not their polygon."""
    CLIP(pred, true)
    return CLIP(pred[hull_target(pred)], true)


def one_edge_missing(pred: np.ndarray, true: np.ndarray) -> np.ndarray:
    area = CLIP(pred, true)
    for corner, edge in zip(true[1:], (np.roll(true, -1, axis=0) - true)[1:], strict=True):
        pred = pointer_networks_polygons._clip(pred, corner, edge)
    return np.abs(polygon_area(pred)).astype(area.dtype)


def same_vertices(points: np.ndarray, pred_indices: np.ndarray) -> HullMetrics:
    """The sets of vertices are compared: a reversed hull is right."""
    result = METRICS(points, pred_indices)
    equal = np.array_equal(np.sort(pred_indices), np.sort(hull_target(points)))
    return result._replace(accuracy=float(equal and result.valid))


def same_start(points: np.ndarray, pred_indices: np.ndarray) -> HullMetrics:
    result = METRICS(points, pred_indices)
    return result._replace(accuracy=float(np.array_equal(pred_indices, hull_target(points))))


def invalid_covers_nothing(result: HullMetrics) -> HullMetrics:
    return result if result.valid else result._replace(coverage=0.0)


def share_of_answer(points: np.ndarray, pred_indices: np.ndarray) -> HullMetrics:
    """The common area is divided by the answer's."""
    result = METRICS(points, pred_indices)
    if not result.valid:
        return result
    polygon, hull = points[pred_indices], points[hull_target(points)]
    return result._replace(coverage=float(CLIP(polygon, hull) / np.abs(polygon_area(polygon))))


def negative_from_the_end(arguments: dict[str, Any]) -> None:
    indices, n = arguments["pred_indices"], len(arguments["points"])
    if isinstance(indices, np.ndarray) and indices.dtype.kind == "i":
        arguments["pred_indices"] = indices % n


def mutant(operation: str, name: str, bug: str, call: Any, law: str = "agreement") -> Mutant:
    full = f"pointer_networks.{operation}"
    return Mutant(f"pointer_networks.{name}", full, law, bug, call)


MUTANTS = (
    mutant("polygon_area", "unsigned", "areas have no sign", spoiling(AREA, np.abs)),
    mutant("polygon_area", "from-origin", "far polygons lose their digits", from_the_origin),
    mutant("is_simple_polygon", "touching", "edges that touch are let through",
           replacing(SIMPLE, _segments_meet=crossings_only)),
    mutant("is_simple_polygon", "crossing", "edges are not tested", distinct_only),
    mutant("is_simple_polygon", "twice", "a point may come twice", any_three),
    mutant("convex_clip_area", "clockwise-empty", "a clockwise answer has no area",
           counter_clockwise_only),
    mutant("convex_clip_area", "hull-of-answer", "the answer's hull is measured",
           hull_of_prediction),
    mutant("convex_clip_area", "edge-missing", "the first edge does not clip", one_edge_missing),
    mutant("hull_metrics", "vertex-sets", "a reversed hull is accurate", same_vertices),
    mutant("hull_metrics", "fixed-start", "a rotated hull is not accurate", same_start),
    mutant("hull_metrics", "zero-coverage", "an invalid answer covers 0",
           spoiling(METRICS, invalid_covers_nothing)),
    mutant("hull_metrics", "share-of-answer", "the area is divided by the answer's",
           share_of_answer),
    mutant("hull_metrics", "negative-index", "indices count from the end",
           altering(METRICS, negative_from_the_end), "refusal"),
)  # fmt: skip
