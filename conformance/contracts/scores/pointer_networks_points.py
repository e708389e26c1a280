"""Points, and answers about them, on which rounding has no say.

Many answers are a yes or a no, or a list of indices, and must be equal. Where one hangs on the side
of a line, points lie on a lattice, so that sides are exact in float32 and points on a line are
frequent; where it hangs on more, points keep away from every case that rounding decides.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np

from attnspec.conformance.case import Case
from attnspec.reference.scores.pointer_networks_metrics import incircle
from attnspec.reference.scores.pointer_networks_polygons import (
    convex_clip_area,
    is_simple_polygon,
    polygon_area,
)
from attnspec.reference.scores.pointer_networks_tasks import (
    cross,
    delaunay_target,
    hull_target,
    incenter,
)

STEP = 1 / 64
SMALLEST_TURN, SMALLEST_CIRCLE, SMALLEST_GAP = 2e-3, 2e-4, 1e-5


def lattice(rng: np.random.Generator, n: int) -> np.ndarray:
    """Distinct points (n, 2) of a lattice, a crowded one half of the time; not all on a line."""
    crowded = int(np.ceil(np.sqrt(2 * n))) + 1
    side = crowded if rng.random() < 0.5 else max(64, crowded)
    while True:
        places = rng.choice(side * side, n, replace=False)
        points = np.stack(np.divmod(places, side), axis=-1) * STEP
        if n < 3 or np.any(cross(points[1] - points[0], points - points[0]) != 0):
            return points


def general(rng: np.random.Generator, n: int) -> np.ndarray:
    """Points (n, 2): no three nearly on a line, no four on a circle, all incenters apart."""
    while True:
        points = rng.random((n, 2))
        a, b, c = points[np.array(list(combinations(range(n), 3)))].swapaxes(0, 1)
        if np.min(np.abs(cross(b - a, c - a))) < SMALLEST_TURN:
            continue
        quads = points[np.array(list(combinations(range(n), 4)), int).reshape(-1, 4)]
        if np.any(np.abs(incircle(quads[:, :3], quads[:, 3])) < SMALLEST_CIRCLE):
            continue
        x = np.sort(incenter(points[delaunay_target(points)])[:, 0])
        if len(x) < 2 or np.min(np.diff(x)) > SMALLEST_GAP:
            return points


def polygon(rng: np.random.Generator, m: int) -> np.ndarray:
    """Lattice points (m, 2) around their centre or in any order; or a point twice or on an edge."""
    points, kind = lattice(rng, m) if m else np.zeros((0, 2)), rng.integers(0, 4)
    if kind and m:
        rays = points - points.mean(axis=0)
        points = points[np.argsort(np.arctan2(rays[:, 1], rays[:, 0]))]
    if kind == 1 and m > 1:
        points[rng.integers(1, m)] = points[0]
    if kind == 2 and m > 4:
        points[0] = (points[2] + points[3]) / 2
    return points[::-1] if rng.random() < 0.4 else points


def hull_corners(rng: np.random.Generator, case: Case) -> np.ndarray:
    points = lattice(rng, case.sizes["corners"])
    return points[hull_target(points)]


def clipped_polygon(rng: np.random.Generator, case: Case) -> np.ndarray:
    """A simple polygon that shares a good part with the hull, or lies far away from it."""
    hull = hull_corners(case.generator("true"), case)
    while True:
        points = polygon(rng, case.sizes["vertices"])
        if not is_simple_polygon(points):
            continue
        if rng.random() < 0.1:
            return points + 4
        if convex_clip_area(points, hull) > STEP * STEP:
            return points


def triangles(rng: np.random.Generator, count: int) -> np.ndarray:
    """int (count, 3): triples of four indices, in any order, some of them equal as sets."""
    return rng.permuted(np.tile(np.arange(4), (count, 1)), axis=-1)[:, :3]


def hull_answer(rng: np.random.Generator, case: Case) -> np.ndarray:
    """The right hull from any start, reversed, or cut short; or indices at random."""
    points = lattice(case.generator("points"), case.sizes["points"])
    hull = np.roll(hull_target(points), rng.integers(0, 9))
    kind = rng.integers(0, 5)
    if kind < 3:
        return (hull, hull[::-1], hull[:-1])[kind]
    return rng.choice(len(points), rng.integers(0, len(points) + 1), replace=bool(kind == 3))


def flipped(points: np.ndarray, found: np.ndarray) -> np.ndarray:
    """A triangulation that is not Delaunay: one edge is exchanged for the other diagonal."""
    for i, j in combinations(range(len(found)), 2):
        shared, ends = np.intersect1d(found[i], found[j]), np.setxor1d(found[i], found[j])
        if len(shared) != 2:
            continue
        other = found.copy()
        other[i], other[j] = np.append(ends, shared[0]), np.append(ends, shared[1])
        before, after = (np.abs(polygon_area(points[t])).sum() for t in (found, other))
        if np.isclose(before, after, rtol=1e-9):
            return other
    return found


def triangulation(rng: np.random.Generator, case: Case) -> np.ndarray:
    """The right triangulation in any order; or one too few, twice, moved; or an edge flipped."""
    points = general(case.generator("points"), case.sizes["points"])
    found = delaunay_target(points)
    kind = rng.integers(0, 7)
    if kind == 6:
        found = flipped(points, found)
    found = rng.permuted(rng.permutation(found), axis=-1)
    if kind == 2:
        return found[1:]
    if kind == 3:
        return np.concatenate([found, found[:1, ::-1]])
    if kind == 4:
        found[0, 0] = rng.integers(0, case.sizes["points"])
    if kind == 5:
        return rng.integers(0, case.sizes["points"], found.shape)
    return found


def sequences(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Permutations, half of them with one or two entries too small or too large by a little."""
    batch, m = case.shape("batch m")
    seq = rng.permuted(np.tile(np.arange(m), (batch, 1)), axis=-1)
    shift = rng.integers(-1, 3, (batch, 1)) * (rng.random((batch, 1)) < 0.7)
    seq[:, :1] += shift
    seq[:, -1:] -= shift * (rng.random((batch, 1)) < 0.5)
    return seq


def some_tours(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Stops in any order, some of them twice."""
    batch, stops, points = case.shape("batch stops points")
    return rng.integers(0, points, (batch, stops))


def far_polygons(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Small polygons, half of the time a long way from the origin."""
    corners = rng.standard_normal(case.shape("batch vertices 2"))
    return corners + 1000.0 * rng.integers(-1, 2, (case.sizes["batch"], 1, 2))


def uniform(rng: np.random.Generator, case: Case) -> np.ndarray:
    return rng.random(case.shape("batch points 2"))
