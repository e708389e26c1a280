"""Contracts of pointer networks, continued: hulls, triangulations, tours and their scores."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.contract import Array, BadValue, Contract, Output
from attnspec.conformance.contracts.scores.pointer_networks_points import (
    clipped_polygon,
    far_polygons,
    general,
    hull_answer,
    hull_corners,
    lattice,
    polygon,
    sequences,
    some_tours,
    triangles,
    triangulation,
    uniform,
)


def wrong_points(name: str = "points") -> tuple[tuple[str, str, Any], ...]:
    return (
        ("a third coordinate", name, lambda a: a[name].repeat(2, axis=-1)[..., :3]),
        ("a list", name, lambda a: a[name].tolist()),
        ("integers", name, lambda a: np.zeros(a[name].shape, np.int64)),
        ("NaN", name, lambda a: np.full_like(a[name], np.nan)),
        ("Inf", name, lambda a: np.full_like(a[name], np.inf)),
    )


ONE_SET = (
    *wrong_points(),
    ("a batch", "points", lambda a: a["points"][None]),
    ("the same point twice", "points", lambda a: np.append(a["points"], a["points"][:1], 0)),
    ("points on a line", "points", lambda a: a["points"][:, :1].repeat(2, axis=1)),
)
TWO_POINTS = ("two points", "points", lambda a: a["points"][:2])
LATTICE = Array("points", "points 2", make=lambda rng, case: lattice(rng, case.sizes["points"]))
GENERAL = Array("points", "points 2", make=lambda rng, case: general(rng, case.sizes["points"]))
UNIFORM = Array("points", "batch points 2", make=uniform)
YES_OR_NO = Output("out", "exact", plain=True)


def index_errors(name: str) -> tuple[tuple[str, str, Any], ...]:
    return (
        ("an index beyond the points", name, lambda a: np.full((3,) * a[name].ndim, 99)),
        ("a negative index", name, lambda a: np.full((3,) * a[name].ndim, -1)),
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
        # A kernel may take a batch of sets, which the reference does not.
        bad_inputs=(TWO_POINTS, *(wrong for wrong in ONE_SET if wrong[0] != "a batch")),
    ),
    Contract(
        operation="pointer_networks.delaunay_target",
        sizes={"points": (3, 9)},
        least={"points": 3},
        arrays=(GENERAL,),
        outputs=(Output("triangles", "exact"),),
        bad_inputs=(
            *ONE_SET,
            TWO_POINTS,
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
        sizes={"vertices": (3, 8)},
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
        least={"vertices": 3, "corners": 3},
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
            ("a batch of answers", "pred", lambda a: a["pred"][None]),
            ("a batch of hulls", "true", lambda a: a["true"][None]),
        ),
    ),
    Contract(
        operation="pointer_networks.hull_metrics",
        sizes={"points": (3, 10)},
        least={"points": 3},
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
        sizes={"found": (0, 8), "wanted": (1, 8)},
        least={"wanted": 1},
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
        least={"points": 3},
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
        sizes={"batch": (1, 4), "m": (2, 10)},
        keys="m",
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
            BadValue(
                "a stop beyond the points", "tour", lambda a: np.full((len(a["tour"]), 1), 99)
            ),
            BadValue("a negative stop", "tour", lambda a: np.full((len(a["tour"]), 1), -1)),
        ),
    ),
)
