r"""Pointer networks, continued: the exact matching that Christofides' tours need.

Definition
----------
S20. **Matching.** The pairs that cover an even number m of points once each with the smallest sum
of distances; any such matching if there are several. Distances are made whole numbers first: times
the power of 2 that brings the largest to between :math:`2^{59}` and :math:`2^{60}`, rounded, and
doubled, which gives :math:`w_{ij}`. All that follows is exact in int64, so rounding cannot keep the
search from ending. What it costs: the matching is the best for the rounded distances, and longer
than the true one by at most :math:`m\, 2^{-60}` times the largest distance.

Numbers :math:`y_i` and :math:`z_B \ge 0`, for some sets B of an odd number of points, prove that no
matching weighs less than :math:`\sum_i y_i - \sum_B z_B (|B| - 1) / 2` if no *slack*
:math:`w_{ij} - y_i - y_j + \sum_{B \ni i, j} z_B` is negative, since a matching has at most
:math:`(|B| - 1) / 2` pairs inside B. The solver ends with such numbers and a matching that weighs
just that.

Solver: Edmonds' blossom algorithm. A *blossom* is a point, or an odd cycle of smaller blossoms
joined by edges of slack 0; all its points but one, its base, are matched inside it. Trees grow from
the blossoms whose base is unmatched, along edges of slack 0, in turns outside the matching and in
it. A blossom at even depth is *outer*, at odd depth *inner*, in no tree *free*. As time passes, the
y in outer blossoms rise by 1 and the z of outer cycles by 2, those of inner ones fall as much,
which leaves the slacks inside the trees at 0, until one of four things happens.

- *Grow*: the slack from an outer to a free blossom is 0. The free one becomes inner, its partner
  outer.
- *Shrink*: the slack between two outer blossoms of one tree is 0. The cycle that the edge closes
  becomes an outer blossom.
- *Augment*: the slack between two trees is 0. On the way from root to root, the edges outside the
  matching change places with those in it: two more points are matched, and trees start anew.
- *Expand*: the z of an inner blossom is 0. It falls apart; its part that the tree needs to go on
  stays in it, alternately inner and outer, and the rest is free.

There are m/2 rounds of :math:`O(m)` events of :math:`O(m)` each: :math:`O(m^3)` time.

Paper and code
--------------
How the paper's solver matches is not known to us. The scale of the distances, and that a matching
comes with its proof, are ours.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from attnspec.reference.conventions import check_array, check_size
from attnspec.reference.scores.pointer_networks_blossoms import Search

BITS = 60


class ProvedMatching(NamedTuple):
    """S20: `pairs` int (m/2, 2) and their proof: `weights` w int (m, m), `y` int (m) and
    `blossoms`, each the points of a set, int (points), and its z."""

    pairs: np.ndarray
    weights: np.ndarray
    y: np.ndarray
    blossoms: list[tuple[np.ndarray, int]]


def minimum_matching(distances: np.ndarray) -> np.ndarray:
    """S20: int (m/2, 2), the pairs of the least total distance; pairs and rows increase.

    `distances` (m, m) need not obey the triangle inequality. ValueError unless m is even and at
    least 2 and the distances are finite, symmetric, not negative and 0 on the diagonal.

    >>> x = np.array([0.0, 5.0, 1.0, 7.0])
    >>> minimum_matching(np.abs(x[:, None] - x))
    array([[0, 2],
           [1, 3]])
    """
    return prove_matching(distances).pairs


def prove_matching(distances: np.ndarray) -> ProvedMatching:
    """S20: the matching with its proof. `distances` (m, m) and errors as in `minimum_matching`.

    >>> found = prove_matching(np.array([[0.0, 1.0], [1.0, 0.0]]))
    >>> np.sum(found.y) == found.weights[0, 1]
    np.True_
    """
    check_distances(distances, least=2)
    if len(distances) % 2:
        raise ValueError(f"distances: got {len(distances)} points, expected an even number")
    weights = whole_weights(distances)
    search = Search(weights)
    while -1 in search.mate:
        search.match_two_more()
    pairs = [(i, j) for i, j in enumerate(search.mate) if i < j]
    return ProvedMatching(np.array(pairs), weights, search.y, search.blossoms())


def whole_weights(distances: np.ndarray) -> np.ndarray:
    """S20: w, int64 (m, m), of `distances` (m, m).

    >>> whole_weights(np.array([[0.0, 3.0], [3.0, 0.0]]))[0, 1] == 2 * 3 * 2**58
    np.True_
    """
    distances = distances.astype(np.float64)
    _, exponent = np.frexp(np.max(distances))
    return 2 * np.rint(np.ldexp(distances, BITS - exponent)).astype(np.int64)


def check_distances(distances: np.ndarray, least: int) -> None:
    """S20, K14: `distances` float (n, n), n at least `least`, could be distances of n points.

    >>> check_distances(np.array([[0.0, 1.0], [2.0, 0.0]]), least=1)
    Traceback (most recent call last):
    ValueError: distances: got a matrix that is not symmetric, expected one that is
    """
    check_array("distances", distances, ("n", "n"))
    check_size("distances axes", distances.ndim, 2, "n and n")
    check_size("distances", distances.shape[1], distances.shape[0], "columns, as many as rows")
    if len(distances) < least:
        raise ValueError(f"distances: got {len(distances)} points, expected at least {least}")
    if not np.all(np.isfinite(distances)) or np.any(distances < 0):
        raise ValueError("distances: got NaN, Inf or a negative one, expected finite ones >= 0")
    if np.any(np.diagonal(distances) != 0):
        raise ValueError("distances: got a point away from itself, expected 0 on the diagonal")
    if np.any(distances != distances.T):
        raise ValueError("distances: got a matrix that is not symmetric, expected one that is")
