"""Pointer networks: how the answers to the three tasks are scored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from attnspec.reference.scores.pointer_networks_metrics import (
    incircle,
    is_delaunay,
    is_permutation,
    summarise_tours,
    tour_length,
    triangle_accuracy,
    triangle_coverage,
)
from attnspec.reference.scores.pointer_networks_polygons import (
    HullMetrics,
    convex_clip_area,
    hull_metrics,
    is_simple_polygon,
    polygon_area,
    summarise_hulls,
)
from attnspec.reference.scores.pointer_networks_tasks import (
    hull_target,
)

TOUR, NAN = np.arange(4), np.full((4, 2), np.nan)
SQUARE = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])


def test_golden_hull_metrics(golden: Callable[[str], dict[str, Any]]) -> None:
    case = golden("pointer_networks__hull_metric")
    for i in range(3):
        points, hull = case[f"points_{i}"], case[f"hull_{i}"]
        np.testing.assert_array_equal(np.roll(hull, -np.argmin(hull)), hull_target(points))
        np.testing.assert_allclose(polygon_area(points[hull]), case[f"area_{i}"], rtol=1e-10)
    for i, j, accuracy, share in case["metric_rows_i_j_acc_areafrac"]:
        found = hull_metrics(case[f"points_{i:.0f}"], case[f"pred_{i:.0f}_{j:.0f}"])
        assert found.valid == (accuracy >= 0)
        assert found.accuracy == max(accuracy, 0)
        if found.valid:
            np.testing.assert_allclose(found.coverage, share, rtol=1e-10)
        else:
            assert np.isnan(found.coverage)


def test_clip_area_of_a_polygon_that_is_not_convex() -> None:
    comb = np.array([[0.0, -1], [3, -1], [3, 2], [2, 2], [2, 0], [1, 0], [1, 2], [0, 2]])
    box = np.array([[0.0, 1.0], [3.0, 1.0], [3.0, 3.0], [0.0, 3.0]])
    for pred in (comb, comb[::-1]):
        np.testing.assert_allclose(convex_clip_area(pred, box), 2)
    assert convex_clip_area(SQUARE + 5, SQUARE) == 0


def test_simple_polygons() -> None:
    assert is_simple_polygon(SQUARE)
    assert is_simple_polygon(SQUARE[::-1])
    assert not is_simple_polygon(SQUARE[[0, 2, 1, 3]])
    assert not is_simple_polygon(SQUARE[:2])
    assert not is_simple_polygon(SQUARE[[0, 1, 2, 3, 0]])
    touching = np.array([[0.0, 0.0], [2.0, 0.0], [2.0, 2.0], [1.0, 0.0], [0.0, 2.0]])
    assert not is_simple_polygon(touching)
    folded_back = np.array([[0.0, 0.0], [2.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    assert not is_simple_polygon(folded_back)
    assert not is_simple_polygon(np.array([[0.0, 0.0], [2.0, 0.0], [1.0, 0.0]]))
    straight_on = np.array([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [1.0, 1.0]])
    assert is_simple_polygon(straight_on)


def test_hull_summary() -> None:
    right, invalid = HullMetrics(True, 1.0, 1.0), HullMetrics(False, 0.0, float("nan"))
    summary = summarise_hulls([right] * 99 + [invalid])
    assert summary == (0.99, 0.99, 1.0, False)
    summary = summarise_hulls([right] * 98 + [invalid] * 2)
    assert summary.failed
    assert np.isnan(summary.coverage)
    assert summarise_hulls([invalid]).failed


def test_incircle_and_degenerate_triangulations() -> None:
    np.testing.assert_array_equal(np.sign(incircle(SQUARE[:3], SQUARE + 0.1)), [1, -1, -1, -1])
    points = np.array([[0.0, 0.0], [4.0, 0.0], [4.0, 1.0], [0.1, 1.2]])
    assert is_delaunay(points, np.array([[0, 1, 2], [0, 2, 3]])) != is_delaunay(
        points, np.array([[0, 1, 3], [1, 2, 3]])
    )
    assert not is_delaunay(points, np.array([[0, 1, 1], [0, 2, 3]]))


@pytest.mark.parametrize(
    ("call", "error", "argument"),
    [
        (lambda: polygon_area(NAN), ValueError, "polygon"),
        (lambda: is_simple_polygon(SQUARE[None]), ValueError, "polygon"),
        (lambda: convex_clip_area(SQUARE[[0, 2, 1, 3]], SQUARE), ValueError, "pred"),
        (lambda: convex_clip_area(SQUARE, SQUARE[::-1]), ValueError, "true"),
        (lambda: convex_clip_area(SQUARE, SQUARE[:2]), ValueError, "true"),
        (lambda: hull_metrics(SQUARE, np.array([0, 1, 4])), ValueError, "pred_indices"),
        (lambda: hull_metrics(SQUARE, np.array([0.0, 1.0])), TypeError, "pred_indices"),
        (lambda: summarise_hulls([]), ValueError, "answers"),
        (lambda: triangle_coverage(TOUR[None, :3], np.zeros((0, 3), int)), ValueError, "true"),
        (lambda: triangle_coverage(TOUR[None], TOUR[None, :3]), ValueError, "pred"),
        (lambda: triangle_accuracy(SQUARE, TOUR[None, :3]), TypeError, "pred"),
        (lambda: is_delaunay(SQUARE, np.array([[0, 1, 4]])), ValueError, "triangles"),
        (lambda: incircle(SQUARE, SQUARE[0]), ValueError, "tri"),
        (lambda: incircle(SQUARE[:3], np.ones(3)), ValueError, "point"),
        (lambda: is_permutation(TOUR, 0), ValueError, "n"),
        (lambda: is_permutation(SQUARE, 4), TypeError, "seq"),
        (lambda: tour_length(SQUARE, TOUR + 1), ValueError, "tour"),
        (lambda: tour_length(SQUARE, TOUR[None]), ValueError, "tour"),
        (lambda: summarise_tours(SQUARE[None][:0], TOUR[None][:0]), ValueError, "tours"),
    ],
)
def test_bad_input(call: Callable[[], Any], error: type[Exception], argument: str) -> None:
    with pytest.raises(error, match=rf"^{argument}( axes)?: got"):
        call()
