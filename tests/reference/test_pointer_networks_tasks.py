"""Pointer networks: the solvers of the three tasks."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.spatial
from hypothesis import given, settings
from hypothesis import strategies as st

from attnspec.reference.scores.pointer_networks_metrics import (
    is_delaunay,
    is_permutation,
    summarise_tours,
    tour_length,
    triangle_accuracy,
    triangle_coverage,
)
from attnspec.reference.scores.pointer_networks_polygons import (
    hull_metrics,
    is_simple_polygon,
    polygon_area,
)
from attnspec.reference.scores.pointer_networks_tasks import (
    cross,
    delaunay_target,
    from_slots,
    has_collinear_points,
    hull_target,
    incenter,
    make_points,
    to_slots,
)
from attnspec.reference.scores.pointer_networks_tours import (
    canonical_tour,
    improve_tour,
    nearest_neighbour_tour,
    pairwise_distances,
    tsp_target,
)

quick = settings(deadline=None, derandomize=True, max_examples=20)
seeds = st.integers(0, 10_000)
SQUARE = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])


def test_golden_delaunay(golden: Callable[[str], dict[str, Any]]) -> None:
    case = golden("pointer_networks__delaunay")
    for i in range(3):
        points, expected = case[f"points_{i}"], case[f"triangles_sorted_by_incenter_{i}"]
        triangles = delaunay_target(points)
        np.testing.assert_array_equal(triangles, expected)
        np.testing.assert_allclose(incenter(points[triangles]), case[f"incenters_{i}"], rtol=1e-10)
        assert is_delaunay(points, expected)


def test_make_points() -> None:
    rng = np.random.default_rng(0)
    assert {len(make_points(rng, (5, 7))) for _ in range(40)} == {5, 6, 7}
    points = make_points(rng, 200)
    assert np.all((points >= 0) & (points < 1))
    assert not has_collinear_points(points)
    assert has_collinear_points(np.append(points, points[3:4], axis=0))
    assert has_collinear_points(np.append(points, 2 * points[3:4], axis=0)) is False
    assert has_collinear_points(np.array([[1.0, 1.0], [0.0, 5.0], [3.0, 3.0], [2.0, 2.0]]))


def test_slots_and_back() -> None:
    np.testing.assert_array_equal(to_slots(np.array([2, 0])), [3, 1, 0])
    np.testing.assert_array_equal(from_slots(np.array([3, 1])), [2, 0])
    assert from_slots(np.array([0, 1])).size == 0


@quick
@given(seed=seeds, n=st.integers(3, 20))
def test_hull(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    points = make_points(rng, n)
    hull = hull_target(points)
    assert hull[0] == np.min(hull)
    assert set(hull.tolist()) == set(scipy.spatial.ConvexHull(points).vertices.tolist())
    polygon = points[hull]
    edges = np.roll(polygon, -1, axis=0) - polygon
    assert np.all(cross(edges[:, None], points - polygon[:, None]) >= -1e-12)
    assert polygon_area(polygon) > 0
    order = rng.permutation(n)
    np.testing.assert_allclose(
        polygon_area(points[order][hull_target(points[order])]), polygon_area(polygon)
    )
    for answer in (hull, np.roll(hull, 2)):
        valid, accuracy, coverage = hull_metrics(points, answer)
        assert (valid, accuracy, coverage) == (True, 1.0, pytest.approx(1))
    assert hull_metrics(points, hull[::-1])[:2] == (True, 0.0)
    assert hull_metrics(points, hull[::-1]).coverage == pytest.approx(1)
    some = hull_metrics(points, rng.permutation(n)[: rng.integers(1, n + 1)])
    assert some.valid is not bool(np.isnan(some.coverage))
    assert np.isnan(some.coverage) or -1e-12 <= some.coverage <= 1 + 1e-12


def test_hull_drops_points_on_an_edge() -> None:
    points = np.append(np.array([[0.5, 0.0], [1.0, 0.5]]), SQUARE[[2, 3, 0, 1]], axis=0)
    np.testing.assert_array_equal(hull_target(points), [2, 3, 4, 5])


@quick
@given(seed=seeds, n=st.integers(3, 30))
def test_delaunay(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    points = make_points(rng, n)
    triangles, hull = delaunay_target(points), hull_target(points)
    assert len(triangles) == 2 * n - 2 - len(hull)
    assert np.all(np.diff(triangles, axis=1) > 0)
    assert np.all(np.diff(incenter(points[triangles])[:, 0]) >= 0)
    assert triangle_accuracy(triangles, scipy.spatial.Delaunay(points).simplices) == 1
    assert is_delaunay(points, triangles)
    assert not is_delaunay(points, triangles[:-1])
    assert not is_delaunay(points, np.append(triangles, triangles[:1], axis=0))

    angle, order = rng.uniform(0, 6), rng.permutation(n)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    moved = (7 * points @ turn + rng.normal(size=2))[order]
    assert triangle_accuracy(order[delaunay_target(moved)], triangles) == 1

    some = triangles[rng.random(len(triangles)) < 0.5]
    assert triangle_coverage(some, triangles) == len(some) / len(triangles)
    assert triangle_accuracy(some, triangles) == (len(some) == len(triangles))


def test_incenter_is_equally_far_from_the_sides() -> None:
    tri = np.random.default_rng(1).random((6, 3, 2))
    center = incenter(tri)
    sides = np.roll(tri, -1, axis=1) - tri
    heights = cross(sides, center[:, None] - tri) / np.sqrt(np.sum(sides**2, axis=-1))
    np.testing.assert_allclose(heights, np.repeat(heights[:, :1], 3, axis=1), rtol=1e-10)


@quick
@given(seed=seeds, n=st.integers(1, 7))
def test_tour_is_the_shortest_of_all(seed: int, n: int) -> None:
    points = make_points(np.random.default_rng(seed), n)
    tour = tsp_target(points)
    others = np.array([(0, *rest) for rest in itertools.permutations(range(1, n))])
    lengths = tour_length(np.broadcast_to(points, (len(others), n, 2)), others)
    np.testing.assert_allclose(tour_length(points, tour), np.min(lengths))
    assert tour[0] == 0
    assert n < 3 or tour[1] < tour[-1]


@settings(deadline=None, derandomize=True, max_examples=8)
@given(seed=seeds, n=st.integers(4, 11))
def test_tour_shape_and_baselines(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    points = make_points(rng, n)
    tour, hull = tsp_target(points), hull_target(points)
    length = tour_length(points, tour)
    assert is_simple_polygon(points[tour])
    on_hull = tour[np.isin(tour, hull)]
    forward = np.roll(on_hull, -np.argmin(on_hull))
    backward = np.roll(on_hull[::-1], -np.argmin(on_hull[::-1]))
    assert np.array_equal(forward, hull) or np.array_equal(backward, hull)
    for same in (tour[::-1], np.roll(tour, 3)):
        np.testing.assert_allclose(tour_length(points, same), length)
        np.testing.assert_array_equal(canonical_tour(same), tour)
    nearest = nearest_neighbour_tour(points)
    improved = improve_tour(points, nearest)
    assert is_permutation(nearest, n)
    assert is_permutation(improved, n)
    assert length <= tour_length(points, improved) + 1e-12
    assert tour_length(points, improved) <= tour_length(points, nearest) + 1e-12
    assert is_simple_polygon(points[improved])


def test_smallest_tours() -> None:
    for n in (1, 2, 3):
        for solver in (tsp_target, nearest_neighbour_tour):
            np.testing.assert_array_equal(solver(SQUARE[:n]), np.arange(n))
        np.testing.assert_array_equal(improve_tour(SQUARE[:n], np.arange(n)[::-1]), np.arange(n))


def test_tours_of_a_batch() -> None:
    rng = np.random.default_rng(2)
    points = np.stack([[make_points(rng, 6) for _ in range(3)] for _ in range(2)])
    tours = tsp_target(points)
    assert tours.shape == (2, 3, 6)
    np.testing.assert_array_equal(tours[1, 2], tsp_target(points[1, 2]))
    np.testing.assert_allclose(
        tour_length(points, tours)[0, 1], tour_length(points[0, 1], tours[0, 1])
    )
    assert tsp_target(points.astype(np.float32)).shape == (2, 3, 6)
    assert tour_length(points.astype(np.float32), tours).dtype == np.float32
    tours[0, 0, 0] = tours[0, 0, 1]
    summary = summarise_tours(points, tours)
    assert summary.valid_share == pytest.approx(5 / 6)
    lengths = tour_length(points, tours)
    assert summary.mean_length == pytest.approx(np.mean(lengths.ravel()[1:]))
    assert np.isnan(summarise_tours(points[0, 0], tours[0, 0]).mean_length)


LINE, TWICE, NAN = np.arange(6.0).reshape(3, 2), SQUARE[[0, 1, 2, 1]], np.full((4, 2), np.nan)


@pytest.mark.parametrize(
    ("call", "error", "argument"),
    [
        (lambda: make_points(0, 5), TypeError, "rng"),
        (lambda: make_points(np.random.default_rng(0), 0), ValueError, "n"),
        (lambda: make_points(np.random.default_rng(0), (5, 4)), ValueError, "n"),
        (lambda: make_points(np.random.default_rng(0), 5.0), TypeError, "n"),
        (lambda: has_collinear_points(SQUARE[None]), ValueError, "points"),
        (lambda: to_slots(SQUARE), TypeError, "indices"),
        (lambda: from_slots(np.array([[1]])), ValueError, "slots"),
        (lambda: hull_target(SQUARE[:2]), ValueError, "points"),
        (lambda: hull_target(LINE), ValueError, "points"),
        (lambda: hull_target(TWICE), ValueError, "points"),
        (lambda: hull_target(NAN), ValueError, "points"),
        (lambda: hull_target(SQUARE[None]), ValueError, "points"),
        (lambda: incenter(SQUARE), ValueError, "tri"),
        (lambda: delaunay_target(SQUARE), ValueError, "points"),
        (lambda: delaunay_target(LINE), ValueError, "points"),
        (lambda: tsp_target(np.random.default_rng(0).random((21, 2))), ValueError, "points"),
        (lambda: tsp_target(TWICE), ValueError, "points"),
        (lambda: pairwise_distances(np.ones((3, 3))), ValueError, "points"),
        (lambda: canonical_tour(np.array([1, 1])), ValueError, "tour"),
        (lambda: nearest_neighbour_tour(SQUARE[None]), ValueError, "points"),
        (lambda: improve_tour(SQUARE, np.arange(3)), ValueError, "tour"),
    ],
)
def test_bad_input(call: Callable[[], Any], error: type[Exception], argument: str) -> None:
    with pytest.raises(error, match=rf"^{argument}( axes)?: got"):
        call()
