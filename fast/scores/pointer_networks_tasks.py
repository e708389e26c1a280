"""The pointer network's tasks at scale: exact targets and metrics over a batch of point sets.

A function named in the plural takes a batch, whose rows are padded with -1 where lengths differ;
the chapter's own take what they take there. Solvers and polygon tests run on the CPU, one set a
thread; tensors elsewhere raise. Lengths, permutations and triangles are tensor operations on any
device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnspec.fast.backend import check_integer, check_size, count_launch
from attnspec.fast.scores.pointer_networks_points import (
    check_coordinates,
    check_distinct,
    check_hulls,
    check_integers,
    check_points,
    check_range,
    kernels,
)

EXACT_LIMIT = 20


class HullMetrics(NamedTuple):
    """One answer, or tensors (batch). `coverage` is NaN for an invalid one."""

    valid: Any
    accuracy: Any
    coverage: Any


def hull_target(points: Tensor, *, backend: str | None = None) -> Tensor:
    """int64 (vertices): the hull of `points` (n, 2), counter-clockwise from the lowest index.

    ValueError for fewer than 3 points, for equal points or if all lie on one line.
    """
    check_points(points, 3, backend, batched=False)
    (hull,) = _hulls(points[None])
    return hull[: int((hull >= 0).sum())]


def hull_targets(points: Tensor, *, backend: str | None = None) -> Tensor:
    """int64 (batch, n): `hull_target` of each of `points` (batch, n, 2), padded with -1."""
    check_points(points, 3, backend, batched=True)
    return _hulls(points)


def tsp_target(points: Tensor, *, backend: str | None = None) -> Tensor:
    """int64 (..., n): the shortest closed tours, from index 0, its second index below its last.

    Held and Karp's recursion over sets, n <= 20. ValueError for more points or equal points.
    """
    check_points(points, 1, backend)
    n = points.shape[-2]
    if n > EXACT_LIMIT:
        raise ValueError(f"points: got n = {n}, expected at most {EXACT_LIMIT}")
    sets = points if points.dim() == 3 else points[None]
    check_distinct(sets)
    tour = torch.arange(n).repeat(len(sets), 1)
    if n >= 4 and len(sets):
        count_launch()
        kernels().tours(sets.numpy(), tour.numpy())
    return tour.view(points.shape[:-1])


def hull_metrics(
    points: Tensor, pred_indices: Tensor, *, backend: str | None = None
) -> HullMetrics:
    """The answer `pred_indices` int (vertices) to the hull of `points` (n, 2).

    ValueError for an index outside the points.
    """
    check_points(points, 3, backend, batched=False)
    check_integers("pred_indices", pred_indices)
    check_size("pred_indices axes", pred_indices.dim(), 1, "vertices")
    check_range("pred_indices", pred_indices, 0, points.shape[0])
    valid, accuracy, coverage = _score(points[None], pred_indices[None])
    return HullMetrics(bool(valid[0]), float(accuracy[0]), float(coverage[0]))


def hulls_metrics(
    points: Tensor, pred_indices: Tensor, *, backend: str | None = None
) -> HullMetrics:
    """`hull_metrics` of each row of `pred_indices` int (batch, most), padded with -1; tensors."""
    check_points(points, 3, backend, batched=True)
    check_integers("pred_indices", pred_indices)
    if pred_indices.dim() != 2 or len(pred_indices) != len(points):
        raise ValueError(
            f"pred_indices: got shape {tuple(pred_indices.shape)}, expected ({len(points)}, most)"
        )
    check_range("pred_indices", pred_indices, -1, points.shape[1])
    return _score(points, pred_indices)


def polygon_area(polygon: Tensor, *, backend: str | None = None) -> Tensor:
    """Signed areas (...) of polygons (..., vertices, 2), > 0 if counter-clockwise."""
    check_coordinates("polygon", polygon, 0)
    rays = polygon - polygon[..., :1, :]
    ahead = rays.roll(-1, dims=-2)
    return (rays[..., 0] * ahead[..., 1] - rays[..., 1] * ahead[..., 0]).sum(-1) / 2


def incenter(tri: Tensor, *, backend: str | None = None) -> Tensor:
    """Incenters (..., 2) of triangles `tri` (..., 3, 2)."""
    check_coordinates("tri", tri, 3)
    check_size("tri", tri.shape[-2], 3, "corners")
    opposite = tri.roll(-1, dims=-2) - tri.roll(-2, dims=-2)
    sides = opposite.square().sum(-1, keepdim=True).sqrt()
    return (sides * tri).sum(-2) / sides.sum(-2)


def is_permutation(seq: Tensor, n: int, *, backend: str | None = None) -> Tensor:
    """bool (...), whether each of `seq` int (..., m) holds 0..n-1 once each."""
    check_integers("seq", seq)
    check_integer("n", n, least=1)
    if seq.shape[-1] != n:
        return torch.zeros(seq.shape[:-1], dtype=torch.bool, device=seq.device)
    return (seq.sort(-1).values == torch.arange(n, device=seq.device)).all(-1)


def tour_length(points: Tensor, tour: Tensor, *, backend: str | None = None) -> Tensor:
    """Lengths (...) of the closed tours int (..., m) through `points` (..., n, 2)."""
    check_coordinates("points", points, 1)
    check_integers("tour", tour)
    if tour.shape[:-1] != points.shape[:-2]:
        raise ValueError(
            f"tour: got leading axes {tuple(tour.shape[:-1])}, expected {tuple(points.shape[:-2])}"
        )
    check_range("tour", tour, 0, points.shape[-2])
    visited = points.gather(-2, tour.long()[..., None].expand(*tour.shape, 2))
    legs = visited.roll(-1, dims=-2) - visited
    return legs.square().sum(-1).sqrt().sum(-1)


def triangle_coverage(pred: Tensor, true: Tensor, *, backend: str | None = None) -> float:
    """The share of the triangles `true` int (m, 3) that are among `pred` int (l, 3).

    Neither the order of the triangles nor that of a triangle's indices counts; a triangle given
    twice is found once. ValueError if `true` is empty.
    """
    for name, x in (("pred", pred), ("true", true)):
        check_integers(name, x)
        check_size(f"{name} axes", x.dim(), 2, "triangles and 3")
        check_size(name, x.shape[1], 3, "indices of a triangle")
    if not len(true):
        raise ValueError("true: got no triangle, expected at least one")
    return float(triangle_coverages(pred[None], true[None])[0])


def triangle_coverages(pred: Tensor, true: Tensor, *, backend: str | None = None) -> Tensor:
    """float64 (batch): `triangle_coverage` of pred (batch, l, 3) and true (batch, m, 3), int, whose
    missing triangles are padded with -1; NaN for a row without a true triangle.
    """
    for name, x in (("pred", pred), ("true", true)):
        check_integers(name, x)
        if x.dim() != 3 or x.shape[2] != 3 or len(x) != len(true):
            raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected (batch, triangles, 3)")
    wanted, found = (x.sort(-1).values for x in (true, pred))
    real = (wanted >= 0).all(-1)
    same = (wanted[:, :, None] == found[:, None]).all(-1).any(-1)
    earlier = (wanted[:, :, None] == wanted[:, None]).all(-1).tril(-1).any(-1)
    once = real & ~earlier
    return (same & once).sum(-1) / once.sum(-1).double()


def _hulls(sets: Tensor) -> Tensor:
    """int64 (batch, n), padded with -1."""
    hull = torch.full(sets.shape[:2], -1)
    count = torch.empty(len(sets), dtype=torch.int64)
    if len(sets):
        count_launch()
        kernels().hulls(sets.numpy(), hull.numpy(), count.numpy())
    check_hulls(count)
    return hull


def _score(points: Tensor, answers: Tensor) -> HullMetrics:
    hull = _hulls(points)
    valid = torch.empty(len(points), dtype=torch.bool)
    accuracy, coverage = torch.empty(2, len(points), dtype=torch.float64)
    if len(points):
        tensors = (points, hull, answers.long(), valid, accuracy, coverage)
        count_launch()
        kernels().score_hulls(*(x.numpy() for x in tensors))
    return HullMetrics(valid, accuracy, coverage)
