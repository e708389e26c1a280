"""The pointer network's tasks and decoders over a batch, against the chapter one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from attnspec.fast.scores import pointer_networks_decoding as decoding
from attnspec.fast.scores import pointer_networks_polygons as polygons
from attnspec.fast.scores import pointer_networks_tasks as fast
from attnspec.fast.scores import pointer_networks_triangles as triangles
from attnspec.reference.scores import pointer_networks_decoding as spec_decoding
from attnspec.reference.scores import pointer_networks_metrics as spec_metrics
from attnspec.reference.scores import pointer_networks_polygons as spec_polygons
from attnspec.reference.scores import pointer_networks_tasks as spec
from attnspec.reference.scores import pointer_networks_tours as spec_tours


def point_sets(batch: int, n: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(n).random((batch, n, 2)))


def unpadded(row: torch.Tensor) -> list[int]:
    return row[row >= 0].tolist()


@pytest.mark.parametrize("n", [3, 4, 10, 60])
def test_hulls(n: int) -> None:
    points = point_sets(6, n)
    for row, one in zip(fast.hull_targets(points), points, strict=True):
        expected = spec.hull_target(one.numpy()).tolist()
        assert unpadded(row) == expected
        assert fast.hull_target(one).tolist() == expected


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 9])
def test_tours(n: int) -> None:
    points = point_sets(4, n)
    tours = fast.tsp_target(points)
    np.testing.assert_array_equal(tours.numpy(), spec_tours.tsp_target(points.numpy()))
    assert fast.tsp_target(points[0]).tolist() == tours[0].tolist()
    lengths = spec_metrics.tour_length(points.numpy(), tours.numpy())
    np.testing.assert_allclose(fast.tour_length(points, tours).numpy(), lengths)


def test_hull_metrics() -> None:
    random = np.random.default_rng(0)
    points = point_sets(40, 8)
    answers = torch.full((40, 9), -1)
    for b, one in enumerate(points):
        target = spec.hull_target(one.numpy())
        given = {
            0: target,
            1: np.roll(target, 1),
            2: target[::-1],
            3: target[:-1],
            4: np.append(target, target[0]),
        }.get(b % 6, random.permutation(8)[: random.integers(1, 9)])
        answers[b, : len(given)] = torch.from_numpy(given.copy())
    got = fast.hulls_metrics(points, answers)
    for b, one in enumerate(points):
        pred = np.array(unpadded(answers[b]))
        expected = spec_polygons.hull_metrics(one.numpy(), pred)
        assert (bool(got.valid[b]), float(got.accuracy[b])) == expected[:2]
        np.testing.assert_allclose(float(got.coverage[b]), expected.coverage)
        alone = fast.hull_metrics(one, torch.from_numpy(pred))
        assert alone.valid == expected.valid


def test_polygons() -> None:
    random = np.random.default_rng(1)
    hull = np.array([[0.0, 0.0], [3.0, 0.0], [4.0, 2.0], [1.0, 4.0]])
    simple = 0
    for _ in range(80):
        points = random.integers(0, 9, (random.integers(2, 6), 2)).astype(np.float64)
        given = torch.from_numpy(points)
        expected = spec_polygons.is_simple_polygon(points)
        assert polygons.is_simple_polygon(given) == expected
        if expected:
            simple += 1
            np.testing.assert_allclose(
                polygons.convex_clip_area(given, torch.from_numpy(hull)),
                spec_polygons.convex_clip_area(points, hull),
            )
    assert 10 < simple < 70


@pytest.mark.parametrize("n", [3, 4, 10, 40])
def test_triangulations(n: int) -> None:
    points = point_sets(4, n)
    found = triangles.delaunay_targets(points)
    assert triangles.are_delaunay(points, found).tolist() == [True] * 4
    for row, one in zip(found, points, strict=True):
        expected = spec.delaunay_target(one.numpy())
        assert row[row[:, 0] >= 0].tolist() == expected.tolist()
        assert triangles.delaunay_target(one).tolist() == expected.tolist()
        assert triangles.delaunay_target(one.float()).tolist() == expected.tolist()
    wrong = found.clone()
    wrong[0, 0] = -1
    wrong[1, 0, 0] = wrong[1, 0, 1]
    wrong[2] = torch.cat([found[2, :1]] * len(wrong[2]))
    expected = [
        spec_metrics.is_delaunay(one.numpy(), row[row[:, 0] >= 0].numpy())
        for row, one in zip(wrong, points, strict=True)
    ]
    assert expected[:2] == [False, False]
    assert triangles.are_delaunay(points, wrong).tolist() == expected


def test_measures() -> None:
    points = point_sets(3, 5)
    array = points.numpy()
    np.testing.assert_allclose(fast.polygon_area(points), spec_polygons.polygon_area(array))
    np.testing.assert_allclose(fast.incenter(points[:, :3]), spec.incenter(array[:, :3]))
    seq = torch.tensor([[2, 0, 1], [2, 0, 2]])
    assert fast.is_permutation(seq, 3).tolist() == [True, False]
    assert fast.is_permutation(seq, 4).tolist() == [False, False]
    true = torch.tensor([[0, 1, 2], [1, 2, 3], [2, 3, 4]])
    pred = torch.tensor([[2, 1, 0], [0, 1, 2], [4, 3, 2]])
    expected = spec_metrics.triangle_coverage(pred.numpy(), true.numpy())
    assert fast.triangle_coverage(pred, true) == expected
    padded = torch.cat([pred, torch.full((1, 3), -1)])[None]
    assert fast.triangle_coverages(padded, true[None]).tolist() == [expected]


Tensors = tuple[torch.Tensor, torch.Tensor]


class Model:
    """Log-probabilities that depend on row, step and last slot, or are all equal."""

    def __init__(self, rows: int, n: int, tied: bool) -> None:
        table = np.random.default_rng(n).random((rows, n + 1, n + 1, n + 1))
        self.table = np.zeros_like(table) if tied else table

    def one(self, state: tuple[int, int], last: int) -> tuple[np.ndarray, tuple[int, int]]:
        row, step = state
        return self.table[row, step, last], (row, step + 1)

    def batch(self, state: Tensors, last: torch.Tensor) -> tuple[torch.Tensor, Tensors]:
        row, step = state
        return torch.from_numpy(self.table)[row, step, last], (row, step + 1)


@pytest.mark.parametrize("constraint", [None, "hull", "tsp"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("n", [1, 4])
def test_decoders(constraint: str | None, tied: bool, n: int) -> None:
    model, steps = Model(5, n, tied), n + 1
    start = torch.arange(5), torch.zeros(5, dtype=torch.long)
    slots, score = decoding.greedy_decode(model.batch, start, n, constraint, steps)
    for row in range(5):
        expected, total = spec_decoding.greedy_decode(model.one, (row, 0), n, constraint, steps)
        assert unpadded(slots[row]) == list(expected)
        np.testing.assert_allclose(float(score[row]), total)
    for width in (1, 3, 40):
        slots, score = decoding.beam_decode(model.batch, start, n, width, constraint, steps)
        for row in range(5):
            beam = spec_decoding.beam_decode(model.one, (row, 0), n, width, constraint, steps)
            assert [unpadded(s) for s in slots[row][: len(beam)]] == [list(s) for s, _ in beam]
            np.testing.assert_allclose(score[row][: len(beam)], [total for _, total in beam])
            assert score[row][len(beam) :].isneginf().all()


@pytest.mark.parametrize("constraint", [None, "hull", "tsp"])
@pytest.mark.parametrize("slots", [(), (2,), (3, 1), (3, 2, 1), (2, 1, 3, 0)])
def test_constraints(constraint: str | None, slots: tuple[int, ...]) -> None:
    allowed = decoding.constraint_mask(slots, 3, constraint)
    assert allowed.dtype == torch.bool
    assert allowed.tolist() == spec_decoding.constraint_mask(slots, 3, constraint).tolist()


POINTS = point_sets(1, 5)[0]
SQUARE = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
TRIANGLE = torch.tensor([[0, 1, 2]])


@pytest.mark.parametrize(
    ("call", "error", "argument"),
    [
        (lambda: fast.hull_target(POINTS[:2]), ValueError, "points"),
        (lambda: fast.hull_target(POINTS[[0, 1, 1]]), ValueError, "points"),
        (lambda: fast.hull_target(POINTS[:1] * torch.arange(3.0)[:, None]), ValueError, "points"),
        (lambda: fast.hull_target(POINTS.half()), TypeError, "points"),
        (lambda: fast.hull_target(POINTS[None]), ValueError, "points"),
        (lambda: fast.hull_targets(POINTS), ValueError, "points"),
        (lambda: fast.tsp_target(point_sets(1, 21)), ValueError, "points"),
        (lambda: fast.tsp_target(POINTS[[0, 0]]), ValueError, "points"),
        (lambda: fast.hull_metrics(POINTS, torch.tensor([0, 1, 5])), ValueError, "pred_indices"),
        (lambda: fast.tour_length(POINTS, torch.tensor([0, -1])), ValueError, "tour"),
        (lambda: polygons.is_simple_polygon(POINTS[None]), ValueError, "polygon"),
        (lambda: polygons.convex_clip_area(POINTS[:2], POINTS[:3]), ValueError, "pred"),
        (lambda: polygons.convex_clip_area(SQUARE, SQUARE.flip(0)), ValueError, "true"),
        (lambda: polygons.convex_clip_area(SQUARE, SQUARE.float()), TypeError, "true"),
        (lambda: triangles.delaunay_target(POINTS[:2]), ValueError, "points"),
        (lambda: triangles.delaunay_target(SQUARE), ValueError, "points"),
        (lambda: triangles.delaunay_target(SQUARE * torch.tensor([1.0, 0])), ValueError, "points"),
        (lambda: triangles.is_delaunay(POINTS, torch.tensor([[0, 1, 5]])), ValueError, "triangles"),
        (lambda: triangles.is_delaunay(POINTS, torch.zeros(1, 2).long()), ValueError, "triangles"),
        (lambda: triangles.is_delaunay(POINTS, TRIANGLE, tol="no"), TypeError, "tol"),
        (lambda: triangles.are_delaunay(POINTS[None], TRIANGLE), ValueError, "triangles"),
        (lambda: fast.is_permutation(POINTS, 2), TypeError, "seq"),
        (lambda: fast.incenter(POINTS), ValueError, "tri"),
        (
            lambda: fast.triangle_coverage(torch.zeros(0, 3).long(), torch.zeros(0, 3).long()),
            ValueError,
            "true",
        ),
        (lambda: decoding.step_limit("tour", 3), ValueError, "task"),
        (lambda: decoding.constraint_mask((), 3, "any"), ValueError, "constraint"),
        (lambda: decoding.constraint_mask((), 0, None), ValueError, "n"),
        (lambda: decoding.constraint_mask((4,), 3, "tsp"), ValueError, "slots"),
        (lambda: decoding.constraint_mask((-1,), 3, "hull"), ValueError, "slots"),
        (lambda: decoding.constraint_mask((True,), 3, "hull"), TypeError, "slots"),
        (lambda: decoding.greedy_decode(None, None, 3, "tsp", 2), ValueError, "max_steps"),
        (lambda: decoding.beam_decode(None, None, 3, 0, None, 2), ValueError, "width"),
        (
            lambda: decoding.greedy_decode(lambda s, last: (POINTS, s), None, 3, None, 2),
            ValueError,
            "step_fn",
        ),
    ],
)
def test_bad_input(call: Any, error: type[Exception], argument: str) -> None:
    with pytest.raises(error, match=f"^{argument}: got "):
        call()
