"""Contracts of Entropy-ABF's positions and of its entropy probe."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.contract import Array, BadValue, Contract, Output
from attnspec.conformance.contracts.positions.entropy_abf import even_width, frequencies

LENGTHS = (3, 8, 17)


def any_positions(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Positions in no order, a few below 0, within a context or far out."""
    far = int(rng.choice([3, 60, 5000, 200000]))
    return rng.integers(-2 - far // 8, far, case.shape("batch tokens"))


def make_weights(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Rows that sum to 1, some weights exactly 0."""
    shape = case.shape("batch heads queries keys")
    P = rng.exponential(size=shape) * (rng.random(shape) < 0.7)
    total = P.sum(axis=-1, keepdims=True)
    return P / np.where(total == 0, 1.0, total)


def weights_by_length(rng: np.random.Generator, case: Case) -> dict[int, np.ndarray]:
    """The longest prompts first: lengths come in any order."""
    shape = case.shape("documents layers heads")
    rows = {n: rng.exponential(size=(*shape, n)) for n in LENGTHS[::-1]}
    return {n: P / P.sum(axis=-1, keepdims=True) for n, P in rows.items()}


def numbers(**options: Any) -> Any:
    return lambda sizes: options


CONTRACTS = (
    Contract(
        operation="entropy_abf.rope_frequencies",
        sizes={},
        arrays=(),
        outputs=(Output("theta", dtype="float64"),),
        parameters=numbers(
            d=st.integers(1, 64).map(lambda half: 2 * half),
            base=st.sampled_from([500000.0, 10000.0, 20.0]),
        ),
        bad_inputs=(
            ("an odd head size", "d", lambda a: 3),
            ("no head size", "d", lambda a: 0),
            ("half a head size", "d", lambda a: 2.5),
            ("a base that does not slow down", "base", lambda a: 1.0),
            ("a base that is no number", "base", lambda a: "10000"),
        ),
    ),
    Contract(
        operation="entropy_abf.rope_rotate",
        sizes={
            "batch": (1, 2),
            "kv_heads": (1, 2),
            "group": (1, 2),
            "tokens": (1, 12),
            "d": (2, 24),
        },
        fix=even_width,
        arrays=(
            Array("x", "batch heads tokens d", role="query"),
            Array("positions", "batch tokens", make=any_positions),
            Array("freqs", "d/2", make=frequencies),
        ),
        outputs=(Output("out"),),
        linear_in=("x",),
        bad_inputs=(
            ("positions of other tokens", "positions", lambda a: np.arange(99)),
            ("positions that are not whole", "positions", lambda a: a["positions"] / 2),
            ("other frequencies", "freqs", lambda a: np.ones(99)),
        ),
    ),
    Contract(
        operation="entropy_abf.row_scale",
        sizes={"batch": (1, 2), "tokens": (1, 24)},
        arrays=(Array("positions", "batch tokens", make=any_positions),),
        outputs=(Output("lam", dtype="float64", row_axes=0),),
        parameters=numbers(
            c=st.sampled_from([4096, 8, 2.5, math.inf]), floor=st.sampled_from([1.0, 1.25, 0.5])
        ),
        bad_inputs=(
            ("positions that are not whole", "positions", lambda a: a["positions"] / 2),
            ("a list of positions", "positions", lambda a: a["positions"].tolist()),
            ("a training length of 1", "c", lambda a: 1),
            ("a training length that is no number", "c", lambda a: "4096"),
            ("no floor", "floor", lambda a: 0.0),
        ),
    ),
    Contract(
        operation="entropy_abf.layer_is_exempt",
        sizes={},
        arrays=(),
        outputs=(Output("exempt", "exact", plain=True),),
        parameters=numbers(layer=st.integers(0, 5), n_exempt=st.integers(0, 4)),
        bad_inputs=(
            ("a negative layer", "layer", lambda a: -1),
            ("half a layer", "layer", lambda a: 0.5),
            ("a negative number of layers", "n_exempt", lambda a: -1),
        ),
    ),
    Contract(
        operation="entropy_abf.attention_entropy",
        sizes={
            "batch": (1, 2),
            "kv_heads": (1, 2),
            "group": (1, 2),
            "queries": (1, 12),
            "keys": (1, 24),
        },
        arrays=(Array("P", "batch heads queries keys", make=make_weights),),
        outputs=(Output("E", row_axes=0, cancels=True),),
        key_arrays=("P",),
        bad_inputs=(
            ("a list as P", "P", lambda a: a["P"].tolist()),
            ("integers as P", "P", lambda a: np.ones((1, 1), np.int64)),
            BadValue("a weight below 0", "P", lambda a: -np.ones_like(a["P"])),
        ),
    ),
    Contract(
        operation="entropy_abf.entropy_growth",
        sizes={"documents": (1, 4), "layers": (1, 3), "kv_heads": (1, 2), "group": (1, 2)},
        arrays=(Array("P_by_length", make=weights_by_length),),
        outputs=(Output("lengths", "exact"), Output("E", row_axes=0)),
        bad_inputs=(
            ("nothing measured", "P_by_length", lambda a: {}),
            ("weights without a length", "P_by_length", lambda a: a["P_by_length"][LENGTHS[0]]),
            ("a wrong length", "P_by_length", lambda a: {5: a["P_by_length"][LENGTHS[0]]}),
        ),
    ),
)
