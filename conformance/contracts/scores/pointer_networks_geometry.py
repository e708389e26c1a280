"""Contracts of pointer networks, continued: hulls, triangulations, tours and their scores.

Answers here are often a yes or a no, or a list of indices, and must be equal. Where an answer hangs
on the side of a line, points lie on a lattice, so that sides are exact in float32 and points on a
line are frequent; where it hangs on more, points keep away from every case that rounding decides.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.contract import Array, Contract, Output
from attnspec.reference.scores.pointer_networks_metrics import incircle
from attnspec.reference.scores.pointer_networks_polygons import (
    convex_clip_area,
    is_simple_polygon,
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
    """Lattice points (m, 2) around their centre, or in any order, now and then with one twice."""
    points = lattice(rng, m) if m else np.zeros((0, 2))
    if rng.random() < 0.6:
        rays = points - points.mean(axis=0) if m else points
        points = points[np.argsort(np.arctan2(rays[:, 1], rays[:, 0]))]
    if m > 1 and rng.random() < 0.2:
        points[rng.integers(1, m)] = points[0]
    return points[::-1] if rng.random() < 0.3 else points


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
    """int (count, 3): triples of a few indices, in any order, some of them equal as sets."""
    return rng.permuted(np.tile(np.arange(5), (count, 1)), axis=-1)[:, :3]


def hull_answer(rng: np.random.Generator, case: Case) -> np.ndarray:
    """The right hull from any start, reversed, or cut short; or indices at random."""
    points = lattice(case.generator("points"), case.sizes["points"])
    hull = np.roll(hull_target(points), rng.integers(0, 9))
    kind = rng.integers(0, 5)
    if kind < 3:
        return (hull, hull[::-1], hull[:-1])[kind]
    return rng.choice(len(points), rng.integers(0, len(points) + 1), replace=bool(kind == 3))


def triangulation(rng: np.random.Generator, case: Case) -> np.ndarray:
    """The right triangulation in any order; or one too few, one twice, one moved, at random."""
    found = delaunay_target(general(case.generator("points"), case.sizes["points"]))
    found = rng.permuted(rng.permutation(found), axis=-1)
    kind = rng.integers(0, 6)
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
    """Permutations, some of them with an entry that is twice there, negative or too large."""
    batch, m = case.shape("batch m")
    seq = rng.permuted(np.tile(np.arange(m), (batch, 1)), axis=-1)
    if m:
        spoilt = rng.random(batch) < 0.5
        wrong = rng.integers(-1, m + 1, batch)
        seq[:, 0] = np.where(spoilt, wrong, seq[:, 0])
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


def wrong_points(name: str = "points") -> tuple[tuple[str, str, Any], ...]:
    return (
        ("a third coordinate", name, lambda a: a[name].repeat(2, axis=-1)[..., :3]),
        ("a list", name, lambda a: a[name].tolist()),
        ("integers", name, lambda a: np.zeros(a[name].shape, np.int64)),
        ("NaN", name, lambda a: np.full_like(a[name], np.nan, shape=(*a[name].shape[:-2], 4, 2))),
        ("Inf", name, lambda a: np.full_like(a[name], np.inf, shape=(*a[name].shape[:-2], 4, 2))),
    )


ONE_SET = (
    *wrong_points(),
    ("two points", "points", lambda a: a["points"][:2]),
    ("a batch", "points", lambda a: a["points"][None]),
    ("the same point twice", "points", lambda a: a["points"][[0, 1, 2, 0]]),
    ("points on a line", "points", lambda a: np.arange(8.0).repeat(2).reshape(8, 2)),
)
LATTICE = Array("points", "points 2", make=lambda rng, case: lattice(rng, case.sizes["points"]))
GENERAL = Array("points", "points 2", make=lambda rng, case: general(rng, case.sizes["points"]))
UNIFORM = Array("points", "batch points 2", make=uniform)
YES_OR_NO = Output("out", "exact", plain=True)


def index_errors(name: str) -> tuple[tuple[str, str, Any], ...]:
    return (
        ("an index beyond the points", name, lambda a: a[name] * 0 + 99 if a[name].size else None),
        ("a negative index", name, lambda a: a[name] * 0 - 1 if a[name].size else None),
        ("fractional indices", name, lambda a: a[name] + 0.5),
    )


CONTRACTS = (
    Contract(
        operation="pointer_networks.hull_target",
        sizes={"points": (3, 12)},
        least={"points": 3},
        keys="points",
        arrays=(LATTICE,),
        outputs=(Output("hull", "exact"),),
        bad_inputs=ONE_SET,
    ),
    Contract(
        operation="pointer_networks.delaunay_target",
        sizes={"points": (3, 9)},
        arrays=(GENERAL,),
        outputs=(Output("triangles", "exact"),),
        bad_inputs=(
            *ONE_SET,
            ("four on a circle", "points", lambda a: np.array([[0.0, 0], [1, 0], [1, 1], [0, 1]])),
        ),
    ),
    Contract(
        operation="pointer_networks.incenter",
        sizes={"batch": (1, 3), "triangles": (1, 12)},
        values=("normal", "structured"),
        arrays=(Array("tri", "batch triangles 3 2"),),
        outputs=(Output("out"),),
        bad_inputs=(
            ("four corners", "tri", lambda a: a["tri"].repeat(2, axis=-2)[..., :4, :]),
            ("a third coordinate", "tri", lambda a: a["tri"].repeat(2, axis=-1)[..., :3]),
        ),
    ),
    Contract(
        operation="pointer_networks.tsp_target",
        sizes={"batch": (1, 2), "points": (1, 8)},
        arrays=(UNIFORM,),
        outputs=(Output("tour", "exact"),),
        bad_inputs=(
            *wrong_points(),
            ("no points", "points", lambda a: a["points"][..., :0, :]),
            ("too many points", "points", lambda a: a["points"].repeat(21, axis=-2)),
            ("the same point twice", "points", lambda a: a["points"].repeat(2, axis=-2)),
        ),
    ),
    Contract(
        operation="pointer_networks.polygon_area",
        sizes={"batch": (1, 3), "vertices": (1, 12)},
        keys="vertices",
        arrays=(Array("polygon", "batch vertices 2", make=far_polygons),),
        outputs=(Output("out", row_axes=0),),
        bad_inputs=wrong_points("polygon"),
    ),
    Contract(
        operation="pointer_networks.is_simple_polygon",
        sizes={"vertices": (0, 8)},
        keys="vertices",
        arrays=(
            Array(
                "polygon", "vertices 2", make=lambda rng, case: polygon(rng, case.sizes["vertices"])
            ),
        ),
        outputs=(YES_OR_NO,),
        bad_inputs=(*wrong_points("polygon"), ("a batch", "polygon", lambda a: a["polygon"][None])),
    ),
    Contract(
        operation="pointer_networks.convex_clip_area",
        sizes={"vertices": (3, 7), "corners": (3, 8)},
        arrays=(
            Array("pred", "vertices 2", make=clipped_polygon),
            Array("true", make=hull_corners),
        ),
        outputs=(Output("out", row_axes=0),),
        bad_inputs=(
            *wrong_points("pred"),
            *wrong_points("true"),
            ("a corner twice", "pred", lambda a: a["pred"][[0, 0, 1, 2]]),
            ("a line", "pred", lambda a: a["pred"][:2]),
            ("a clockwise hull", "true", lambda a: a["true"][::-1]),
            ("a hull of two corners", "true", lambda a: a["true"][:2]),
        ),
    ),
    Contract(
        operation="pointer_networks.hull_metrics",
        sizes={"points": (3, 10)},
        arrays=(LATTICE, Array("pred_indices", make=hull_answer)),
        outputs=(
            Output("valid", "exact", plain=True),
            Output("accuracy", "exact", plain=True),
            Output("coverage", row_axes=0, plain=True, nan=True),
        ),
        bad_inputs=(
            *ONE_SET,
            *index_errors("pred_indices"),
            ("a batch of answers", "pred_indices", lambda a: np.zeros((2, 3), np.int64)),
        ),
    ),
    Contract(
        operation="pointer_networks.triangle_coverage",
        sizes={"found": (0, 6), "wanted": (1, 6)},
        arrays=(
            Array("pred", make=lambda rng, case: triangles(rng, case.sizes["found"])),
            Array("true", make=lambda rng, case: triangles(rng, case.sizes["wanted"])),
        ),
        outputs=(Output("out", row_axes=0, plain=True),),
        bad_inputs=(
            ("no true triangle", "true", lambda a: a["true"][:0]),
            ("flat triangles", "true", lambda a: a["true"].ravel()),
            ("edges", "pred", lambda a: a["pred"][:, :2]),
            ("fractional indices", "pred", lambda a: a["pred"] + 0.5),
        ),
    ),
    Contract(
        operation="pointer_networks.is_delaunay",
        sizes={"points": (3, 8)},
        arrays=(GENERAL, Array("triangles", make=triangulation)),
        outputs=(YES_OR_NO,),
        bad_inputs=(
            *ONE_SET,
            *index_errors("triangles"),
            ("edges", "triangles", lambda a: a["triangles"][:, :2]),
        ),
    ),
    Contract(
        operation="pointer_networks.is_permutation",
        sizes={"batch": (1, 4), "m": (0, 10)},
        arrays=(Array("seq", "batch m", make=sequences),),
        outputs=(Output("out", "exact"),),
        parameters=lambda sizes: {
            "n": st.sampled_from([max(1, sizes["m"] + extra) for extra in (0, 0, 1, -1)])
        },
        bad_inputs=(
            ("a list", "seq", lambda a: a["seq"].tolist()),
            ("fractions", "seq", lambda a: a["seq"] + 0.5),
            ("no point", "n", lambda a: 0),
            ("half a point", "n", lambda a: 1.5),
        ),
    ),
    Contract(
        operation="pointer_networks.tour_length",
        sizes={"batch": (1, 3), "points": (1, 12), "stops": (0, 16)},
        keys="stops",
        arrays=(UNIFORM, Array("tour", "batch stops", make=some_tours)),
        outputs=(Output("out", row_axes=0),),
        bad_inputs=(
            *wrong_points(),
            ("another batch of tours", "tour", lambda a: a["tour"].repeat(3, axis=0)),
            ("fractional stops", "tour", lambda a: a["tour"] + 0.5),
            ("a stop beyond the points", "tour", lambda a: np.full((len(a["tour"]), 1), 99)),
            ("a negative stop", "tour", lambda a: np.full((len(a["tour"]), 1), -1)),
        ),
    ),
)
