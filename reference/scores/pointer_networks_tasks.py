r"""Pointer networks, continued: the three geometric tasks and the solvers of their targets.

Every target is a list of POINT indices without an end; `to_slots` makes the training target.

Definition
----------
S13. **Points.** Uniform in the unit square; n fixed, or drawn uniformly from a range for each
example. Two equal points or three on a line have probability 0 and are drawn again. The training
target of indices t is the slots t + 1, flattened, then 0, the end.

S14. **Convex hull.** The vertices counter-clockwise, starting with the lowest INDEX whatever its
coordinates; a point on an edge is no vertex. Solver: monotone chain, :math:`O(n \log n)`.

S15. **Delaunay.** The triangles whose circumcircle holds no other point, :math:`2n - 2 - h` of them
with h hull vertices. The indices of a triangle increase; triangles are sorted by their incenter, x
then y. The incenter is :math:`(a A + b B + c C) / (a + b + c)` with :math:`a = |BC|`, :math:`b =
|CA|`, :math:`c = |AB|`. Four points on a circle leave the answer open and are refused: whoever
draws points draws again. Solver: across each edge, the triangle goes to the point that sees the
edge under the largest angle, :math:`O(n^2)`.

S16, the travelling salesman, is in `pointer_networks_tours`.

Paper and code
--------------
The paper draws 5, 10 or 50 points, or 5 to 50, for hulls and 5 to 20 for tours (unverified). One
implementation starts its hulls anywhere; this follows the paper. Refusing four points on a circle,
rather than choosing a triangulation, is ours.
"""

from __future__ import annotations

import numpy as np

from attnspec.reference.conventions import check_array, check_integer, check_size


def make_points(rng: np.random.Generator, n: int | tuple[int, int]) -> np.ndarray:
    """S13: float64 (n, 2) points; a pair `n` is a range, both ends included.

    >>> make_points(np.random.default_rng(0), 5).shape
    (5, 2)
    """
    if not isinstance(rng, np.random.Generator):
        raise TypeError(f"rng: got {type(rng).__name__}, expected numpy.random.Generator")
    if isinstance(n, tuple):
        check_size("n", len(n), 2, "ends of a range")
        low, high = n
        check_integer("n", low, least=1)
        check_integer("n", high, least=int(low))
        n = int(rng.integers(low, high + 1))
    check_integer("n", n, least=1)
    while True:
        points = rng.random((n, 2))
        if not has_collinear_points(points):
            return points


def has_collinear_points(points: np.ndarray) -> bool:
    """S13: whether three of `points` (n, 2) lie on a line or two are equal.

    >>> has_collinear_points(np.array([[0.0, 0.0], [1.0, 1.0], [3.0, 0.0], [2.0, 2.0]]))
    True
    """
    check_points(points, least=1)
    check_size("points axes", points.ndim, 2, "n and 2")
    for i in range(len(points) - 1):
        offsets = points[i + 1 :] - points[i]
        if np.any(np.all(offsets == 0, axis=-1)):
            return True
        # Offsets on one line through point i are neighbours once sorted by direction modulo pi.
        order = np.argsort(np.arctan2(offsets[:, 1], offsets[:, 0]) % np.pi)
        if len(order) > 1 and np.any(cross(offsets[order], offsets[np.roll(order, -1)]) == 0):
            return True
    return False


def cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """S14: the cross product (...) of vectors (..., 2): > 0 if `b` is to the left of `a`.

    >>> cross(np.array([1.0, 0.0]), np.array([0.0, 1.0]))
    np.float64(1.0)
    """
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def to_slots(indices: np.ndarray) -> np.ndarray:
    """S13: the training target of point `indices` (any shape): int (size + 1), slots, end last.

    >>> to_slots(np.array([[0, 1, 3], [1, 2, 3]]))
    array([1, 2, 4, 2, 3, 4, 0])
    """
    check_array("indices", indices, (), dtype="int")
    return np.append(indices.ravel() + 1, 0)


def from_slots(slots: np.ndarray) -> np.ndarray:
    """S13: the point indices of `slots` int (steps): what stands before the first end, minus 1.

    >>> from_slots(np.array([3, 1, 0, 2]))
    array([2, 0])
    """
    check_array("slots", slots, ("steps",), dtype="int")
    check_size("slots axes", slots.ndim, 1, "steps")
    ends = np.flatnonzero(slots == 0)
    return slots[: ends[0] if len(ends) else None] - 1


def hull_target(points: np.ndarray) -> np.ndarray:
    """S14: int (vertices), the hull of `points` (n, 2), counter-clockwise from the lowest index.

    ValueError for fewer than 3 points, for equal points or if all lie on one line.

    >>> hull_target(np.array([[1.0, 1.0], [0.0, 0.0], [0.5, 0.4], [1.0, 0.0]]))
    array([0, 1, 3])
    """
    check_points(points, least=3)
    check_size("points axes", points.ndim, 2, "n and 2")
    check_distinct(points)
    order = np.lexsort((points[:, 1], points[:, 0]))
    chain = [*_half_hull(points, order)[:-1], *_half_hull(points, order[::-1])[:-1]]
    if len(chain) < 3:
        raise ValueError("points: got points on one line, expected a hull of at least 3 vertices")
    hull = np.array(chain)
    return np.roll(hull, -np.argmin(hull))


def _half_hull(points: np.ndarray, order: np.ndarray) -> list[int]:
    chain: list[int] = []
    for i in map(int, order):
        while len(chain) >= 2 and not _turns_left(points, chain[-2], chain[-1], i):
            chain.pop()
        chain.append(i)
    return chain


def _turns_left(points: np.ndarray, a: int, b: int, c: int) -> bool:
    return bool(cross(points[b] - points[a], points[c] - points[a]) > 0)


def incenter(tri: np.ndarray) -> np.ndarray:
    """S15: incenters (..., 2) of triangles `tri` (..., 3, 2).

    >>> incenter(np.array([[0.0, 0.0], [4.0, 0.0], [0.0, 3.0]]))
    array([1., 1.])
    """
    check_triangles(tri)
    opposite = np.roll(tri, -1, axis=-2) - np.roll(tri, -2, axis=-2)
    sides = np.sqrt(np.sum(opposite * opposite, axis=-1, keepdims=True))
    return np.sum(sides * tri, axis=-2) / np.sum(sides, axis=-2)


def delaunay_target(points: np.ndarray) -> np.ndarray:
    """S15: int (triangles, 3) of `points` (n, 2), rows increasing, sorted by incenter.

    ValueError as for `hull_target`, and if four points lie on an empty circle.

    >>> delaunay_target(np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [2.0, 2.0]]))
    array([[0, 1, 2],
           [1, 2, 3]])
    """
    hull = hull_target(points)
    pending = [(int(hull[0]), int(hull[1]))]
    done: set[tuple[int, int]] = set()
    triangles: set[tuple[int, ...]] = set()
    while pending:
        a, b = pending.pop()
        c = None if (a, b) in done else _apex(points, a, b)
        if c is None:
            continue
        triangles.add(tuple(sorted((a, b, c))))
        done |= {(a, b), (b, c), (c, a)}
        pending += [(b, a), (c, b), (a, c)]
    found = np.array(sorted(triangles))
    centers = incenter(points[found])
    return found[np.lexsort((centers[:, 1], centers[:, 0]))]


def _apex(points: np.ndarray, a: int, b: int) -> int | None:
    """The point left of edge a -> b that sees it under the largest angle, None if there is none."""
    to_a, to_b = points[a] - points, points[b] - points
    twice_area = cross(to_a, to_b)
    left = np.flatnonzero(twice_area > 0)
    if len(left) == 0:
        return None
    cotangent = np.sum(to_a * to_b, axis=-1)[left] / twice_area[left]
    best = np.argsort(cotangent, kind="stable")[:2]
    tie = 64 * np.finfo(points.dtype).eps * (1 + np.abs(cotangent[best[0]]))
    if len(best) == 2 and cotangent[best[1]] - cotangent[best[0]] <= tie:
        raise ValueError(
            f"points: got four on a circle, {sorted([a, b, *left[best].tolist()])}, expected none"
        )
    return int(left[best[0]])


def check_points(points: np.ndarray, least: int, name: str = "points") -> None:
    """S13, K14: the argument `name` is finite, (..., n, 2), and n is at least `least`.

    >>> check_points(np.zeros((2, 2)), least=3)
    Traceback (most recent call last):
    ValueError: points: got n = 2, expected at least 3
    """
    check_array(name, points, ("n", "2"))
    check_size(name, points.shape[-1], 2, "coordinates")
    if points.shape[-2] < least:
        raise ValueError(f"{name}: got n = {points.shape[-2]}, expected at least {least}")
    if not np.all(np.isfinite(points)):
        raise ValueError(f"{name}: got NaN or Inf, expected finite coordinates")


def check_triangles(tri: np.ndarray) -> None:
    """S15, K14: `tri` is float (..., 3, 2).

    >>> check_triangles(np.zeros((4, 2)))
    Traceback (most recent call last):
    ValueError: tri: got shape (4, 2), expected (..., 3, 2)
    """
    check_array("tri", tri, ("3", "2"))
    if tri.shape[-2:] != (3, 2):
        raise ValueError(f"tri: got shape {tri.shape}, expected (..., 3, 2)")


def check_distinct(points: np.ndarray) -> None:
    """S13, K14: no two of `points` (n, 2) are equal.

    >>> check_distinct(np.zeros((2, 2)))
    Traceback (most recent call last):
    ValueError: points: got the same point twice, expected distinct points
    """
    if len(np.unique(points, axis=0)) < len(points):
        raise ValueError("points: got the same point twice, expected distinct points")


def check_indices(name: str, indices: np.ndarray, n: int) -> None:
    """S14-S16, K14: every entry of `indices` int is from 0 to n - 1.

    >>> check_indices("tour", np.array([0, 3]), 3)
    Traceback (most recent call last):
    ValueError: tour: got 3, expected an index from 0 to 2
    """
    check_array(name, indices, ("m",), dtype="int")
    outside = (indices < 0) | (indices >= n)
    if np.any(outside):
        raise ValueError(f"{name}: got {indices[outside][0]}, expected an index from 0 to {n - 1}")
