r"""Pointer networks, continued: approximate tours that keep a bound.

Definition
----------
S21. **Christofides.** A tour of points in the plane that is at most 1.5 times as long as the
shortest one (S16), canonical as that; below four points simply 0..n-1. It joins the minimum
spanning tree (Prim) and the minimum matching (S20) of the points that have an odd degree in it, so
that all degrees are even; walks along every edge once, from point 0 back to it (Hierholzer); and
visits the points in the order in which the walk first meets them.

The bound: the shortest tour without one edge is a spanning tree, so the minimum one is no longer
than that. The shortest tour past the odd points alone is no longer than the one past all, and it is
two matchings in turns, so the minimum one is at most half as long. By the triangle inequality,
leaving out what was visited before makes no walk longer.

Complexity
----------
Time :math:`O(n^3)`, all but :math:`O(n^2)` of it for the matching.

Paper and code
--------------
`christofides_tour` is the paper's A3 by its name, its bound and its order of time. Which of several
minimum trees and matchings and which walk A3 takes is not known to us; the choices here are ours.
Others keep the bound and give other tours, so lengths need not be the paper's. For the same reason
the tour, unlike the bound, depends on the order of the points. They are not the paper's: for 50
points it reports 5.79 for A3 (unverified), where 300 sets take 6.27 on average here, 5.90 once
`improve_tour` has been over them. A3 presumably improves its tours too.
"""

from __future__ import annotations

import numpy as np

from attnspec.reference.conventions import check_integer, check_size
from attnspec.reference.scores.pointer_networks_matching import check_distances, minimum_matching
from attnspec.reference.scores.pointer_networks_tasks import check_indices, check_points
from attnspec.reference.scores.pointer_networks_tours import canonical_tour, pairwise_distances


def christofides_tour(points: np.ndarray) -> np.ndarray:
    """S21: int (n), the canonical tour of `points` (n, 2), at most 1.5 times the shortest.

    Points may be equal, unlike those of `tsp_target`. ValueError for coordinates that are not
    finite or for leading axes.

    >>> christofides_tour(np.array([[0.0, 0.0], [1.0, 1.0], [1.0, 0.0], [0.0, 1.0]]))
    array([0, 2, 1, 3])
    """
    check_points(points, least=1)
    check_size("points axes", points.ndim, 2, "n and 2")
    n = len(points)
    if n < 4:
        return np.arange(n)
    distances = pairwise_distances(points)
    tree = minimum_spanning_tree(distances)
    odd = _odd_points(tree, n)
    matching = odd[minimum_matching(distances[np.ix_(odd, odd)])]
    walk = euler_circuit(np.concatenate([tree, matching]), n)
    _, first = np.unique(walk, return_index=True)
    return canonical_tour(walk[np.sort(first)])


def minimum_spanning_tree(distances: np.ndarray) -> np.ndarray:
    """S21: int (n - 1, 2), the edges of the least total distance that join n points.

    `distances` (n, n) as in `minimum_matching`, n >= 1. The two points of an edge increase, and so
    do the edges.

    >>> x = np.array([0.0, 5.0, 1.0, 7.0])
    >>> minimum_spanning_tree(np.abs(x[:, None] - x))
    array([[0, 2],
           [1, 2],
           [1, 3]])
    """
    check_distances(distances, least=1)
    n = len(distances)
    nearest, outside, edges = np.zeros(n, dtype=int), np.arange(n) > 0, []
    while np.any(outside):
        gaps = np.where(outside, distances[nearest, np.arange(n)], np.inf)
        new = int(np.argmin(gaps))
        edges.append(sorted((int(nearest[new]), new)))
        outside[new] = False
        nearest[distances[new] < gaps] = new
    return np.array(sorted(edges), dtype=int).reshape(-1, 2)


def euler_circuit(edges: np.ndarray, n: int) -> np.ndarray:
    """S21: int (m + 1), the points of a walk from 0 back to 0 along all `edges` int (m, 2) once.

    The edges join points below `n`; the same edge may be given several times. ValueError if a point
    has an odd number of edges or if some edge cannot be reached from 0.

    >>> euler_circuit(np.array([[0, 1], [1, 2], [0, 2], [2, 3], [2, 3]]), 4)
    array([0, 1, 2, 3, 2, 0])
    """
    check_integer("n", n, least=1)
    check_edges(edges, n)
    left: list[list[tuple[int, int]]] = [[] for _ in range(n)]
    for edge, (i, j) in enumerate(edges.tolist()):
        left[i].append((j, edge))
        left[j].append((i, edge))
    walked = np.zeros(len(edges), dtype=bool)
    # Only 0 or a point on the way can be without a way on: a loop is closed there. Going back from
    # it, what is passed is the end of the circuit, until a point with edges left opens a new loop.
    open_walk, circuit = [0], []
    while open_walk:
        at = left[open_walk[-1]]
        while at and walked[at[-1][1]]:
            at.pop()
        if at:
            point, edge = at.pop()
            walked[edge] = True
            open_walk.append(point)
        else:
            circuit.append(open_walk.pop())
    if not np.all(walked):
        raise ValueError("edges: got some that 0 is not joined to, expected one piece")
    return np.array(circuit)


def _odd_points(edges: np.ndarray, n: int) -> np.ndarray:
    return np.flatnonzero(np.bincount(edges.ravel().astype(int), minlength=n) % 2)


def check_edges(edges: np.ndarray, n: int) -> None:
    """S21, K14: `edges` int (m, 2) join points from 0 to n - 1, an even number at each.

    >>> check_edges(np.array([[0, 1]]), 2)
    Traceback (most recent call last):
    ValueError: edges: got an odd number at point 0, expected an even one
    """
    check_indices("edges", edges, n)
    check_size("edges axes", edges.ndim, 2, "m and 2")
    check_size("edges", edges.shape[1], 2, "points of an edge")
    odd = _odd_points(edges, n)
    if len(odd):
        raise ValueError(f"edges: got an odd number at point {odd[0]}, expected an even one")
