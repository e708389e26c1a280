r"""Pointer networks, continued: the travelling salesman's targets, exact and approximate.

Definition
----------
S16. **Travelling salesman.** The shortest closed tour in the plane, from index 0 in the direction
in which the second index is below the last; below four points simply 0..n-1. Solver: the Held-Karp
recursion :math:`C(S, j) = \min_{i \in S \setminus j} C(S \setminus j, i) + |P_i P_j|` over the sets
S of visited points and the last one j; exact, :math:`O(2^n n^2)` time, for n <= 20.

Paper and code
--------------
The direction of a tour is ours. The paper's targets for more points come from approximate solvers
that it calls A1 and A2 (both :math:`O(n^2)`) and A3 (Christofides, :math:`O(n^3)`, never more than
1.5 times the optimum). A model trained on them learns their tours and may come out shorter than
they are. A3 is in `pointer_networks_christofides` (S21). A1 and A2 are not here, since our source
does not say what they are: `nearest_neighbour_tour` and `improve_tour` are plain baselines without
a bound, and must not be reported as any of the three.
"""

from __future__ import annotations

import numpy as np

from attnspec.reference.conventions import check_array, check_size
from attnspec.reference.scores.pointer_networks_tasks import check_distinct, check_points

EXACT_LIMIT = 20


def tsp_target(points: np.ndarray) -> np.ndarray:
    """S16: int (..., n), the shortest closed tours of `points` (..., n, 2), n <= 20.

    ValueError for more points, equal points or coordinates that are not finite.

    >>> tsp_target(np.array([[0.0, 0.0], [1.0, 1.0], [1.0, 0.0], [0.0, 1.0]]))
    array([0, 2, 1, 3])
    """
    check_points(points, least=1)
    n = points.shape[-2]
    if n > EXACT_LIMIT:
        raise ValueError(f"points: got n = {n}, expected at most {EXACT_LIMIT}")
    tours = np.zeros((*points.shape[:-2], n), dtype=int)
    for index in np.ndindex(points.shape[:-2]):
        check_distinct(points[index])
        tours[index] = np.arange(n) if n < 4 else _held_karp(pairwise_distances(points[index]))
    return tours


def pairwise_distances(points: np.ndarray) -> np.ndarray:
    """S16: Euclidean distances (..., n, n) of `points` (..., n, 2).

    >>> pairwise_distances(np.array([[0.0, 0.0], [3.0, 4.0]]))
    array([[0., 5.],
           [5., 0.]])
    """
    check_points(points, least=1)
    offsets = points[..., :, None, :] - points[..., None, :, :]
    return np.sqrt(np.sum(offsets * offsets, axis=-1))


def _held_karp(distances: np.ndarray) -> np.ndarray:
    """S16: the shortest tour (n); bit j of a set stands for point j + 1, point 0 is the start."""
    rest = len(distances) - 1
    sets = np.arange(1 << rest)
    members = (sets[:, None] >> np.arange(rest)) & 1 == 1
    sizes = np.sum(members, axis=1)
    cost = np.full_like(distances, np.inf, shape=(1 << rest, rest))
    cost[1 << np.arange(rest), np.arange(rest)] = distances[0, 1:]
    for size in range(2, rest + 1):
        for last in range(rest):
            here = sets[(sizes == size) & members[:, last]]
            paths = cost[here ^ (1 << last)] + distances[1:, last + 1]
            cost[here, last] = np.min(paths, axis=1)

    tour, remaining = [0], (1 << rest) - 1
    while remaining:
        last = int(np.argmin(cost[remaining] + distances[1:, tour[-1]]))
        remaining ^= 1 << last
        tour.append(last + 1)
    return canonical_tour(np.array(tour))


def canonical_tour(tour: np.ndarray) -> np.ndarray:
    """S16: `tour` int (n), a permutation, from index 0 with its second index below its last.

    >>> canonical_tour(np.array([2, 0, 3, 1]))
    array([0, 2, 1, 3])
    """
    check_tour(tour)
    tour = np.roll(tour, -np.argmin(tour))
    keeps = len(tour) < 3 or tour[1] < tour[-1]
    return tour if keeps else np.append(tour[:1], tour[:0:-1])


def nearest_neighbour_tour(points: np.ndarray) -> np.ndarray:
    """A baseline: from index 0 always to the nearest point left, ties to the lower index.

    `points` (n, 2); returns the canonical tour, int (n). :math:`O(n^2)`, no bound.

    >>> nearest_neighbour_tour(np.array([[0.0, 0.0], [9.0, 0.0], [1.0, 0.0], [2.0, 0.0]]))
    array([0, 1, 3, 2])
    """
    check_points(points, least=1)
    check_size("points axes", points.ndim, 2, "n and 2")
    distances, tour = pairwise_distances(points), [0]
    left = np.arange(len(points)) > 0
    while np.any(left):
        nearest = int(np.argmin(np.where(left, distances[tour[-1]], np.inf)))
        left[nearest] = False
        tour.append(nearest)
    return canonical_tour(np.array(tour))


def improve_tour(points: np.ndarray, tour: np.ndarray) -> np.ndarray:
    """A baseline: 2-opt, reversing a stretch of `tour` as long as that makes it shorter.

    `points` (n, 2), `tour` int (n), a permutation; returns the canonical tour, never longer and
    without edges that cross.

    >>> improve_tour(np.array([[0.0, 0.0], [1.0, 1.0], [1.0, 0.0], [0.0, 1.0]]), np.arange(4))
    array([0, 2, 1, 3])
    """
    distances = pairwise_distances(points)
    check_tour(tour)
    check_size("tour", len(tour), len(points), "n, as in points")
    n, tour = len(tour), np.copy(tour)
    # Rounding alone must not count as a gain, or two equal tours could alternate for ever.
    least_gain = 64 * np.finfo(points.dtype).eps * np.max(distances)
    improved = True
    while improved:
        improved = False
        for i in range(n - 2):
            for j in range(i + 2, n):
                a, b, c, d = tour[i], tour[i + 1], tour[j], tour[(j + 1) % n]
                gain = distances[a, b] + distances[c, d] - distances[a, c] - distances[b, d]
                if gain > least_gain:
                    tour[i + 1 : j + 1] = tour[i + 1 : j + 1][::-1].copy()
                    improved = True
    return canonical_tour(tour)


def check_tour(tour: np.ndarray) -> None:
    """S16, K14: `tour` int (n) is a permutation of 0..n-1, n >= 1.

    >>> check_tour(np.array([0, 0]))
    Traceback (most recent call last):
    ValueError: tour: got [0, 0], expected a permutation of 0..1
    """
    check_array("tour", tour, ("n",), dtype="int")
    check_size("tour axes", tour.ndim, 1, "n")
    if len(tour) == 0 or not np.array_equal(np.sort(tour), np.arange(len(tour))):
        raise ValueError(f"tour: got {tour.tolist()}, expected a permutation of 0..{len(tour) - 1}")
