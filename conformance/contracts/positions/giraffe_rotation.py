"""Contracts of Giraffe's positions: frequencies, random positions, rotations and xPos."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.contract import Array, BadValue, Contract, Output
from attnspec.conformance.contracts.positions.giraffe import (
    BAD_DECAY,
    BAD_PLACES,
    decay,
    even_width,
    frequencies,
    rising,
)

WITHOUT_CONTRACT = {
    "relative_kernel": "its answer is a function; the reference's tests cover it",
}
ROTATED = {"batch": (1, 2), "kv_heads": (1, 2), "group": (1, 2), "tokens": (1, 12), "d": (2, 24)}
BAD_ROTATIONS: tuple[tuple[str, str, Any], ...] = (
    ("positions of other tokens", "p", lambda a: np.arange(99)),
    ("positions that are no numbers", "p", lambda a: np.zeros(a["x"].shape[-2], bool)),
    ("other frequencies", "f", lambda a: np.ones(99)),
    ("an odd width", "x", lambda a: a["x"][..., 1:]),
)


def any_positions(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Positions in no order, whole or in quarters, within a context or far out."""
    far = int(rng.choice([3, 60, 5000, 200000]))
    whole = rng.integers(-2 - far // 8, far, case.shape("batch tokens"))
    return whole if rng.random() < 0.5 else whole / 4


def near_positions(axes: str) -> Any:
    return lambda rng, case: rising(rng, case.shape(axes), least=-3)


def draws(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Uniform draws, in some cases so low that nothing need be shrunk; the last below 1."""
    return 0.99 * float(rng.choice([1.0, 0.6])) * rng.random(case.shape("batch tokens"))


def _basis(sizes: Any) -> dict[str, st.SearchStrategy[Any]]:
    return {
        "d": st.integers(1, 64).map(lambda half: 2 * half),
        "base": st.sampled_from([10000.0, 500000.0, 20.0]),
        "scale": st.sampled_from([1.0, 0.5, 4, 16.0]),
        "power": st.sampled_from([0.0, 0.5, 0.1]),
        "truncate": st.sampled_from([0.0, 2048, 4096, 60.0, 2 * math.pi, -1]),
    }


def _rotation(name: str) -> Contract:
    return Contract(
        operation=f"giraffe.{name}",
        sizes=ROTATED,
        fix=even_width,
        arrays=(
            Array("x", "batch heads tokens d", role="query"),
            Array("p", "batch tokens", make=any_positions),
            Array("f", "d/2", make=frequencies),
        ),
        outputs=(Output("out"),),
        linear_in=("x",),
        bad_inputs=BAD_ROTATIONS,
    )


CONTRACTS = (
    Contract(
        operation="giraffe.rope_basis",
        sizes={},
        arrays=(),
        outputs=(Output("f", dtype="float64", row_axes=0),),
        parameters=_basis,
        bad_inputs=(
            ("an odd head size", "d", lambda a: 3),
            ("half a head size", "d", lambda a: 2.5),
            ("a base that does not slow down", "base", lambda a: 1.0),
            ("no scale", "scale", lambda a: 0.0),
            ("a scale that is no number", "scale", lambda a: "4"),
            ("a negative power", "power", lambda a: -0.5),
            ("an endless training length", "truncate", lambda a: math.inf),
        ),
    ),
    Contract(
        operation="giraffe.positions",
        sizes={},
        arrays=(),
        outputs=(Output("p", "exact"),),
        parameters=lambda sizes: {"T": st.integers(0, 40)},
        bad_inputs=(
            ("fewer than no tokens", "T", lambda a: -1),
            ("half a token", "T", lambda a: 2.5),
        ),
    ),
    Contract(
        operation="giraffe.random_positions",
        sizes={"batch": (1, 2), "tokens": (1, 24)},
        arrays=(Array("u", "batch tokens", make=draws),),
        outputs=(Output("p"),),
        bad_inputs=(
            ("a list of draws", "u", lambda a: a["u"].tolist()),
            ("whole numbers", "u", lambda a: np.zeros(a["u"].shape, np.int64)),
            BadValue("a draw of 1", "u", lambda a: np.ones_like(a["u"])),
        ),
    ),
    _rotation("rotate_half_split"),
    _rotation("rotate_interleaved"),
    Contract(
        operation="giraffe.xpos_scale",
        sizes={"batch": (1, 2), "tokens": (1, 24)},
        arrays=(Array("p", "batch tokens", make=near_positions("batch tokens")),),
        outputs=(Output("scale", dtype="float64", row_axes=0),),
        parameters=lambda sizes: {
            "d": st.integers(1, 32).map(lambda half: 2 * half),
            "N": st.sampled_from([32, 7, 24]),
            "b": st.sampled_from([512, 40, 8.5]),
        },
        bad_inputs=(
            ("an odd head size", "d", lambda a: 3),
            ("a list of positions", "p", lambda a: a["p"].tolist()),
            ("one position", "p", lambda a: np.zeros((), np.int64)),
            *BAD_DECAY[:3],
        ),
    ),
    Contract(
        operation="giraffe.xpos",
        sizes={
            "batch": (1, 2),
            "kv_heads": (1, 2),
            "group": (1, 2),
            "queries": (1, 12),
            "keys": (1, 12),
            "d": (2, 24),
        },
        fix=even_width,
        arrays=(
            Array("q", "batch heads queries d", role="query"),
            Array("k", "batch kv_heads keys d", role="key"),
            Array("pq", "batch queries", make=near_positions("batch queries")),
            Array("pk", "batch keys", make=near_positions("batch keys")),
        ),
        outputs=(Output("q_out", wide=True), Output("k_out", wide=True)),
        parameters=decay,
        linear_in=("q",),
        bad_inputs=(*BAD_PLACES, *BAD_DECAY),
    ),
)
