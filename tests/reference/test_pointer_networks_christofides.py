"""Pointer networks: Christofides' tours, and the trees and matchings that they are made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnspec.reference.scores.pointer_networks_blossoms import Blossom, Search
from attnspec.reference.scores.pointer_networks_christofides import (
    christofides_tour,
    euler_circuit,
    minimum_spanning_tree,
)
from attnspec.reference.scores.pointer_networks_matching import (
    ProvedMatching,
    minimum_matching,
    prove_matching,
    whole_weights,
)
from attnspec.reference.scores.pointer_networks_metrics import is_permutation, tour_length
from attnspec.reference.scores.pointer_networks_tasks import make_points
from attnspec.reference.scores.pointer_networks_tours import (
    canonical_tour,
    pairwise_distances,
    tsp_target,
)

many = settings(deadline=None, derandomize=True, max_examples=300)
some = settings(deadline=None, derandomize=True, max_examples=40)
seeds = st.integers(0, 1_000_000)
EPS = 1e-12


def tied(rng: np.random.Generator, n: int) -> np.ndarray:
    """Symmetric whole numbers (n, n), few different ones, far from any triangle inequality."""
    upper = np.triu(rng.integers(0, rng.integers(2, 12), (n, n)), 1)
    return (upper + upper.T).astype(float)


def clustered(rng: np.random.Generator, n: int) -> np.ndarray:
    """Distances (n, n) of points three by three, which makes blossoms in blossoms."""
    centers = np.repeat(rng.random((n // 3 + 1, 2)), 3, axis=0)[:n]
    return pairwise_distances(centers + 1e-3 * rng.random((n, 2)))


def lattice(rng: np.random.Generator, n: int) -> np.ndarray:
    """Distances (n, n) along the streets of a town, where many are equal."""
    places = rng.integers(0, 10, (n, 2))
    return np.sum(np.abs(places[:, None] - places), axis=-1).astype(float)


def euclidean(rng: np.random.Generator, n: int) -> np.ndarray:
    return pairwise_distances(rng.random((n, 2)))


DISTANCES = (euclidean, tied, clustered, lattice)


def total(distances: np.ndarray, edges: np.ndarray) -> float:
    return float(np.sum(distances[edges[:, 0], edges[:, 1]]))


def least_matching(distances: np.ndarray) -> float:
    """By trying every partner of the lowest point left."""

    @cache
    def rest(left: frozenset[int]) -> float:
        if not left:
            return 0.0
        i = min(left)
        return min(distances[i, j] + rest(left - {i, j}) for j in left - {i})

    return rest(frozenset(range(len(distances))))


def least_tree(distances: np.ndarray) -> float:
    """By Kruskal: the shortest edge between two pieces, until there is one."""
    piece, length = list(range(len(distances))), 0.0
    for edge in np.argsort(distances, axis=None, kind="stable"):
        i, j = divmod(int(edge), len(distances))
        if piece[i] != piece[j]:
            piece = [piece[i] if x == piece[j] else x for x in piece]
            length += distances[i, j]
    return length


def assert_proved(found: ProvedMatching) -> None:
    """In whole numbers: y and z bound every matching from below, and this one attains the bound."""
    m = len(found.weights)
    slack = found.weights - found.y[:, None] - found.y
    bound = int(np.sum(found.y.astype(object)))
    for points, z in found.blossoms:
        assert z >= 0
        assert len(set(points.tolist())) == len(points)
        assert len(points) % 2
        slack[np.ix_(points, points)] += z
        bound -= z * (len(points) // 2)
    assert np.all(slack[~np.eye(m, dtype=bool)] >= 0)
    assert is_permutation(found.pairs.ravel(), m)
    assert sum(int(found.weights[i, j]) for i, j in found.pairs) == bound


@many
@given(seed=seeds, half=st.integers(1, 5), draw=st.sampled_from(DISTANCES))
def test_matching_is_the_best_of_all(
    seed: int, half: int, draw: Callable[[np.random.Generator, int], np.ndarray]
) -> None:
    distances = draw(np.random.default_rng(seed), 2 * half)
    pairs = minimum_matching(distances)
    assert pairs.shape == (half, 2)
    assert is_permutation(pairs.ravel(), 2 * half)
    assert total(distances, pairs) == pytest.approx(least_matching(distances), rel=EPS, abs=EPS)
    assert np.all(pairs[:, 0] < pairs[:, 1])
    assert np.all(np.diff(pairs[:, 0]) > 0)


@some
@given(seed=seeds, half=st.integers(1, 40), draw=st.sampled_from(DISTANCES))
def test_matching_is_proved(
    seed: int, half: int, draw: Callable[[np.random.Generator, int], np.ndarray]
) -> None:
    distances = draw(np.random.default_rng(seed), 2 * half)
    found = prove_matching(distances)
    np.testing.assert_array_equal(found.weights, whole_weights(distances))
    assert_proved(found)


def test_blossoms_lie_in_blossoms_and_fall_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the tests above would not reach what is hard: an entry at the base or on either way
    round from it, in cycles of points and of cycles."""
    expand, seen = Search._expand, set()

    def watch(search: Search, cycle: Blossom) -> None:
        start = cycle.child_with(cycle.entry[1])
        place = "base" if start == 0 else ("even", "odd")[start % 2]
        seen.add((place, any(child.children for child in cycle.children)))
        expand(search, cycle)

    monkeypatch.setattr(Search, "_expand", watch)
    for seed in range(20):
        for draw in (clustered, euclidean):
            assert_proved(prove_matching(draw(np.random.default_rng(seed), 60)))
    assert len(seen) == 6, seen


def test_matching_of_large_and_small_distances() -> None:
    """Scales, ranges and dtypes at which whole numbers could overflow or lose the difference."""
    distances = tied(np.random.default_rng(3), 10)
    pairs = minimum_matching(distances)
    for scale in (2.0**-1060, 2.0**-30, 2.0**900):
        np.testing.assert_array_equal(minimum_matching(distances * scale), pairs)
    for dtype in (np.float16, np.float32):
        np.testing.assert_array_equal(minimum_matching(distances.astype(dtype)), pairs)
    assert_proved(prove_matching(np.zeros((6, 6))))


def test_matching_sees_one_unit_in_the_last_place() -> None:
    for partner in (1, 2, 3):
        distances = FAR.copy()
        distances[0, partner] = distances[partner, 0] = 1 - 2.0**-53
        assert [0, partner] in minimum_matching(distances).tolist()


def test_largest_slack_is_no_overflow() -> None:
    """Two stars from which all but a pair each must reach out: their centres get the lowest y."""
    star = np.arange(8) // 4
    distances = np.full((8, 8), 1 - 2.0**-53)
    for center in (0, 4):
        distances[center, star == star[center]] = distances[star == star[center], center] = 0
    np.fill_diagonal(distances, 0)
    found = prove_matching(distances)
    assert_proved(found)
    slack = sum(map(int, (found.weights[0, 4], -found.y[0], -found.y[4])))
    assert 1.9 < slack / found.weights[0, 4] <= 2
    assert slack < 2**62


def test_matching_of_points_in_another_order() -> None:
    rng = np.random.default_rng(4)
    distances, order = euclidean(rng, 50), rng.permutation(50)
    moved = minimum_matching(distances[np.ix_(order, order)])
    assert sorted(map(sorted, order[moved].tolist())) == minimum_matching(distances).tolist()


def test_input_is_not_changed() -> None:
    points = np.random.default_rng(5).random((20, 2))
    distances = pairwise_distances(points)
    before = distances.copy(), points.copy()
    minimum_matching(distances)
    minimum_spanning_tree(distances)
    christofides_tour(points)
    np.testing.assert_array_equal(distances, before[0])
    np.testing.assert_array_equal(points, before[1])


@many
@given(seed=seeds, n=st.integers(1, 30), draw=st.sampled_from(DISTANCES))
def test_tree_is_the_shortest(
    seed: int, n: int, draw: Callable[[np.random.Generator, int], np.ndarray]
) -> None:
    distances = draw(np.random.default_rng(seed), n)
    tree = minimum_spanning_tree(distances)
    assert tree.shape == (n - 1, 2)
    assert total(distances, tree) == pytest.approx(least_tree(distances), rel=EPS, abs=EPS)
    assert np.all(tree[:, 0] < tree[:, 1])
    assert tree.tolist() == sorted(tree.tolist())
    piece = np.arange(n)
    for i, j in tree:
        piece[piece == piece[j]] = piece[i]
    assert np.all(piece == piece[0])


@some
@given(seed=seeds, n=st.integers(2, 12), loops=st.integers(1, 6))
def test_circuit_walks_every_edge_once(seed: int, n: int, loops: int) -> None:
    """Of loops that start where those before have been, some edges twice."""
    rng = np.random.default_rng(seed)
    walks, seen = [], [0]
    for _ in range(loops):
        start = int(rng.choice(seen))
        walk = [start, *rng.permutation(n)[: rng.integers(1, n + 1)].tolist(), start]
        walks += [edge for edge in pairwise(walk) if edge[0] != edge[1]]
        seen += walk
    edges = rng.permuted(rng.permutation(np.array(walks, dtype=int).reshape(-1, 2)), axis=1)
    circuit = euler_circuit(edges, n)
    assert circuit[0] == circuit[-1] == 0
    walked = np.sort(np.stack([circuit[:-1], circuit[1:]], axis=1), axis=1)
    assert Counter(map(tuple, walked.tolist())) == Counter(map(tuple, np.sort(edges).tolist()))


@many
@given(seed=seeds, n=st.integers(1, 9))
def test_tour_keeps_its_bound(seed: int, n: int) -> None:
    """With the two inequalities that prove it."""
    points = make_points(np.random.default_rng(seed), n)
    tour, shortest = christofides_tour(points), tour_length(points, tsp_target(points))
    assert is_permutation(tour, n)
    np.testing.assert_array_equal(canonical_tour(tour), tour)
    assert shortest - EPS <= tour_length(points, tour) <= 1.5 * shortest + EPS
    distances = pairwise_distances(points)
    tree = minimum_spanning_tree(distances)
    odd = np.flatnonzero(np.bincount(tree.ravel(), minlength=n) % 2)
    assert total(distances, tree) <= (1 - 1 / n) * shortest + EPS
    if len(odd):
        matching = odd[minimum_matching(distances[np.ix_(odd, odd)])]
        assert total(distances, matching) <= shortest / 2 + EPS


@some
@given(seed=seeds, n=st.integers(4, 60))
def test_tour_is_no_longer_than_the_walk(seed: int, n: int) -> None:
    points = np.random.default_rng(seed).random((n, 2))
    distances, tour = pairwise_distances(points), christofides_tour(points)
    assert is_permutation(tour, n)
    tree = minimum_spanning_tree(distances)
    odd = np.flatnonzero(np.bincount(tree.ravel(), minlength=n) % 2)
    pairs = minimum_matching(distances[np.ix_(odd, odd)])
    walk = total(distances, tree) + total(distances[np.ix_(odd, odd)], pairs)
    assert tour_length(points, tour) <= walk + EPS


def test_tour_of_a_zigzag_is_nearly_as_long_as_the_bound_allows() -> None:
    """Its sides are shorter than the rows' edges, so it is the tree, and its ends are matched."""
    i, side, shortest = np.arange(15), 0.99, 7 + 6 + 2 * 0.99
    points = np.stack([i / 2, i % 2 * np.sqrt(side**2 - 0.25)], axis=1)
    assert tour_length(points, tsp_target(points)) == pytest.approx(shortest)
    np.testing.assert_array_equal(christofides_tour(points), i)
    assert tour_length(points, i) == pytest.approx(14 * side + 7)
    assert 14 * side + 7 > 1.39 * shortest


@some
@given(seed=seeds, n=st.integers(4, 40))
def test_tour_is_the_same_where_distances_are(seed: int, n: int) -> None:
    """Coordinates are multiples of 2^-20, so that shifts are exact."""
    rng = np.random.default_rng(seed)
    points = rng.integers(0, 2**20, (n, 2)) / 2**20
    tour = christofides_tour(points)
    for same in (points[:, ::-1], -points, points + np.array([3.0, -5.0]), 8 * points):
        np.testing.assert_array_equal(christofides_tour(same), tour)


def test_smallest_tours_and_equal_points() -> None:
    square = np.array([[0.0, 0.0], [1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    for n in (1, 2, 3):
        np.testing.assert_array_equal(christofides_tour(square[:n]), np.arange(n))
    np.testing.assert_array_equal(christofides_tour(square.astype(np.float32)), [0, 2, 1, 3])
    twice = np.repeat(square, 2, axis=0)
    assert tour_length(twice, christofides_tour(twice)) == 4
    assert is_permutation(christofides_tour(np.zeros((6, 2))), 6)


FAR = 1.0 - np.eye(4)
SHIFTED, NAN, NEGATIVE = FAR + np.eye(4), FAR * np.nan, -FAR
LOPSIDED = FAR + np.triu(FAR)
PAIR = np.array([[0, 1], [0, 1]])


@pytest.mark.parametrize(
    ("call", "error", "argument"),
    [
        (lambda: minimum_matching(FAR.astype(int)), TypeError, "distances"),
        (lambda: minimum_matching(FAR.tolist()), TypeError, "distances"),
        (lambda: minimum_matching(FAR[:3, :3]), ValueError, "distances"),
        (lambda: minimum_matching(FAR[:0, :0]), ValueError, "distances"),
        (lambda: minimum_matching(FAR[:2]), ValueError, "distances"),
        (lambda: minimum_matching(FAR[None]), ValueError, "distances"),
        (lambda: minimum_matching(NAN), ValueError, "distances"),
        (lambda: minimum_matching(NEGATIVE), ValueError, "distances"),
        (lambda: minimum_matching(SHIFTED), ValueError, "distances"),
        (lambda: minimum_matching(LOPSIDED), ValueError, "distances"),
        (lambda: minimum_spanning_tree(LOPSIDED), ValueError, "distances"),
        (lambda: minimum_spanning_tree(FAR[:0, :0]), ValueError, "distances"),
        (lambda: euler_circuit(PAIR, 0), ValueError, "n"),
        (lambda: euler_circuit(PAIR, 2.0), TypeError, "n"),
        (lambda: euler_circuit(PAIR, 1), ValueError, "edges"),
        (lambda: euler_circuit(PAIR - 1, 2), ValueError, "edges"),
        (lambda: euler_circuit(PAIR * 1.0, 2), TypeError, "edges"),
        (lambda: euler_circuit(PAIR[0], 2), ValueError, "edges"),
        (lambda: euler_circuit(PAIR[:1], 2), ValueError, "edges"),
        (lambda: euler_circuit(PAIR[:, [0, 1, 1]], 2), ValueError, "edges"),
        (lambda: euler_circuit(PAIR + 1, 3), ValueError, "edges"),
        (lambda: christofides_tour(np.zeros((0, 2))), ValueError, "points"),
        (lambda: christofides_tour(np.zeros((5, 3))), ValueError, "points"),
        (lambda: christofides_tour(np.zeros((2, 5, 2))), ValueError, "points"),
        (lambda: christofides_tour(np.full((5, 2), np.inf)), ValueError, "points"),
        (lambda: christofides_tour(np.zeros((5, 2), int)), TypeError, "points"),
    ],
)
def test_bad_input(call: Callable[[], Any], error: type[Exception], argument: str) -> None:
    with pytest.raises(error, match=rf"^{argument}( axes)?: got"):
        call()
