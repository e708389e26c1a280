"""Delaunay triangulations: the targets, and whether an answer is one.

Computed in float64 whatever the dtype of the points; what counts as rounding is that of the dtype.
"""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor

from attnspec.fast.backend import check_size, count_launch
from attnspec.fast.scores.pointer_networks_points import (
    check_hulls,
    check_integers,
    check_points,
    check_range,
    kernels,
)


def delaunay_target(points: Tensor, *, backend: str | None = None) -> Tensor:
    """int64 (triangles, 3) of `points` (n, 2), rows increasing, sorted by incenter, x then y.

    ValueError as for `hull_target`, and if four points lie on an empty circle.
    """
    check_points(points, 3, backend, batched=False)
    (triangles,) = _triangulate(points[None])
    return triangles[: int((triangles[:, 0] >= 0).sum())]


def delaunay_targets(points: Tensor, *, backend: str | None = None) -> Tensor:
    """int64 (batch, 2 n - 5, 3): `delaunay_target` of each of `points` (batch, n, 2), padded with
    -1.
    """
    check_points(points, 3, backend, batched=True)
    return _triangulate(points)


def is_delaunay(
    points: Tensor, triangles: Tensor, *, tol: float | None = None, backend: str | None = None
) -> bool:
    """Whether `triangles` int (m, 3) are a Delaunay triangulation of `points` (n, 2).

    True if none is given twice, no circumcircle holds another point and the areas add up to that of
    the hull. `tol` bounds the rounding of both tests, relative to the extent of the points: the
    incircle determinant by tol * extent^4, the areas by tol * extent^2. The default is 256 times
    the machine epsilon of the points' dtype. ValueError for an index outside the points.
    """
    check_points(points, 3, backend, batched=False)
    check_integers("triangles", triangles)
    check_size("triangles axes", triangles.dim(), 2, "triangles and 3")
    check_size("triangles", triangles.shape[1], 3, "indices of a triangle")
    check_range("triangles", triangles, 0, len(points))
    return bool(_judge(points[None], triangles[None], tol)[0])


def are_delaunay(
    points: Tensor, triangles: Tensor, *, tol: float | None = None, backend: str | None = None
) -> Tensor:
    """bool (batch): `is_delaunay` of each of `triangles` int (batch, m, 3), padded with -1."""
    check_points(points, 3, backend, batched=True)
    check_integers("triangles", triangles)
    if triangles.dim() != 3 or triangles.shape[2] != 3 or len(triangles) != len(points):
        raise ValueError(
            f"triangles: got shape {tuple(triangles.shape)}, expected ({len(points)}, triangles, 3)"
        )
    check_range("triangles", triangles, -1, points.shape[1])
    return _judge(points, triangles, tol)


def _triangulate(sets: Tensor) -> Tensor:
    """int64 (batch, 2 n - 5, 3), padded with -1."""
    found = torch.full((len(sets), 2 * sets.shape[1] - 5, 3), -1)
    vertices = torch.empty(len(sets), dtype=torch.int64)
    circle = torch.full((len(sets), 4), -1)
    if len(sets):
        count_launch()
        kernels().triangulations(
            sets.double().contiguous().numpy(),
            64 * torch.finfo(sets.dtype).eps,
            *(x.numpy() for x in (found, vertices, circle)),
        )
    check_hulls(vertices)
    on_a_circle = circle[(circle >= 0).any(-1)]
    if len(on_a_circle):
        raise ValueError(
            f"points: got four on a circle, {on_a_circle[0].sort().values.tolist()}, expected none"
        )
    return found


def _judge(sets: Tensor, triangles: Tensor, tol: float | None) -> Tensor:
    if tol is None:
        tol = 256 * torch.finfo(sets.dtype).eps
    elif isinstance(tol, bool) or not isinstance(tol, Real):
        raise TypeError(f"tol: got {tol!r}, expected a number or None")
    right = torch.empty(len(sets), dtype=torch.bool)
    vertices = torch.empty(len(sets), dtype=torch.int64)
    if len(sets):
        given = (sets.double(), triangles.sort(-1).values.long())
        count_launch()
        kernels().judge_triangulations(
            *(x.contiguous().numpy() for x in given), float(tol), right.numpy(), vertices.numpy()
        )
    check_hulls(vertices)
    return right
