"""Contracts of TempScale: scores, their temperature, and the attention that follows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.cells import heads_cell, keys_cell
from attnspec.conformance.contract import Array, Contract, Output
from attnspec.conformance.contracts.dense.attention import (
    SIZES,
    halves,
    make_mask,
    padding_mask,
    poison_hidden,
)

TEMPERATURES = np.array([0.5, 0.75, 0.875, 1.0, 1.5, 4.0])


def make_temperatures(rng: np.random.Generator, case: Case) -> np.ndarray:
    """One for each head, exact in every dtype."""
    return rng.choice(TEMPERATURES, case.heads)


def make_temperature(rng: np.random.Generator, case: Case) -> Any:
    """One for the model, or one for each head."""
    return float(rng.choice(TEMPERATURES)) if rng.random() < 0.6 else make_temperatures(rng, case)


def make_bias(rng: np.random.Generator, case: Case) -> np.ndarray:
    """A bias of the relative position j - i, other for each head, as T5 learns it."""
    heads, queries, keys = case.shape("heads queries keys")
    table = rng.standard_normal((heads, queries + keys))
    distance = np.arange(keys)[None, :] - np.arange(queries)[:, None] + queries - 1
    return table[:, distance] if table.size else np.zeros((heads, queries, keys))


def poison_behind_mask(arguments: dict[str, Any], case: Case) -> dict[str, Any]:
    """NaN in every score that the mask hides."""
    if "mask" in arguments:
        arguments["scores"] = np.where(arguments["mask"], arguments["scores"], np.nan)
    return arguments


def poison_unweighed(arguments: dict[str, Any], case: Case) -> dict[str, Any]:
    """NaN in the values that no query weighs."""
    unread = np.all(arguments["P"] == 0, axis=(1, 2))
    arguments["v"] = np.where(unread[:, None, :, None], np.nan, arguments["v"])
    return arguments


def make_weights(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Rows that sum to 1; a third of the keys have no weight anywhere."""
    weights = rng.exponential(size=case.shape("batch heads queries keys"))
    weights *= rng.random((weights.shape[0], 1, 1, weights.shape[-1])) < 0.67
    total = weights.sum(axis=-1, keepdims=True)
    return weights / np.where(total == 0, 1.0, total)


def _whole(name: str, size: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    return {axis: bounds for axis, bounds in size.items() if axis != name}


SCORES = Array("scores", "batch heads queries keys", role="query")
Q = Array("q", "batch heads queries d", role="query")
K = Array("k", "batch kv_heads keys d", role="key")
V = Array("v", "batch kv_heads keys dv", role="value")
BIAS = Array("bias", "heads queries keys", make=make_bias, optional=True)
MASK = Array("mask", "batch 1 queries keys", make=make_mask, optional=True)
NO_TEMPERATURES = (
    ("no temperature", "tau", lambda a: 0.0),
    ("a negative temperature", "tau", lambda a: -1.0),
    ("an infinite temperature", "tau", lambda a: float("inf")),
    ("a temperature that is no number", "tau", lambda a: "0.8"),
    ("a temperature that is not a number", "tau", lambda a: float("nan")),
    ("temperatures of other heads", "tau", lambda a: np.ones(99)),
)
OTHER_KEYS = (
    ("k of another head size", "k", lambda a: a["k"].repeat(2, axis=-1)),
    ("kv heads that do not divide", "k", lambda a: a["k"].repeat(7, axis=-3)),
)
NO_SCALES = (
    ("no scale", "scale", lambda a: 0.0),
    ("a scale that is no number", "scale", lambda a: "1"),
)
NO_BIASES = (
    ("an integer bias", "bias", lambda a: np.zeros((1, 1), np.int64)),
    ("a bias of other keys", "bias", lambda a: np.ones((1, 99))),
)

CONTRACTS = (
    Contract(
        operation="tempscale.scores",
        sizes=_whole("dv", SIZES),
        arrays=(Q, K, BIAS),
        outputs=(Output("z"),),
        parameters=lambda sizes: {"scale": st.sampled_from([None, 1.0])},
        neutral={"bias": lambda case: np.zeros(case.shape("heads queries keys"))},
        bad_inputs=(*OTHER_KEYS, *NO_SCALES, *NO_BIASES),
    ),
    Contract(
        operation="tempscale.temper",
        sizes=_whole("d", _whole("dv", SIZES)),
        arrays=(SCORES, Array("tau", "heads", make=make_temperatures)),
        outputs=(Output("out"),),
        linear_in=("scores",),
        bad_inputs=NO_TEMPERATURES,
        cancelling=("dtau",),
    ),
    Contract(
        operation="tempscale.softmax_rows",
        sizes=_whole("d", _whole("dv", SIZES)),
        arrays=(SCORES, MASK),
        outputs=(Output("P"),),
        poison=poison_behind_mask,
        neutral={"mask": lambda case: np.ones(case.shape("batch 1 queries keys"), bool)},
        bad_inputs=(
            ("an integer mask", "mask", lambda a: np.ones((1, 1, 1, 1), np.int64)),
            ("a mask of other keys", "mask", lambda a: np.ones((1, 99), bool)),
        ),
    ),
    Contract(
        operation="tempscale.attend",
        sizes=_whole("d", SIZES),
        arrays=(Array("P", "batch heads queries keys", make=make_weights), V),
        outputs=(Output("o"),),
        linear_in=("v", "P"),
        key_arrays=("P", "v"),
        poison=poison_unweighed,
        bad_inputs=(
            ("a list of weights", "P", lambda a: a["P"].tolist()),
            ("v with more tokens than P", "v", lambda a: np.repeat(a["v"], 7, axis=-2)),
            ("kv heads that do not divide", "v", lambda a: np.repeat(a["v"], 7, axis=-3)),
            ("another batch in v", "v", lambda a: np.repeat(a["v"], 3, axis=0)),
        ),
    ),
    Contract(
        operation="tempscale.tempered_attention",
        sizes=SIZES,
        arrays=(Q, K, V, Array("tau", "heads", make=make_temperature), MASK, BIAS),
        outputs=(Output("out"), Output("lse", dtype="float32", row_axes=0)),
        parameters=lambda sizes: {
            "causal": st.booleans(),
            "scale": st.sampled_from([None, 1.0]),
        },
        linear_in=("v",),
        key_arrays=("k", "v", "mask", "bias"),
        permutable=lambda case: not case.parameters["causal"],
        causal=lambda case: case.parameters["causal"],
        poison=poison_hidden,
        split=lambda arguments, case: None if "bias" in arguments else halves(arguments, case),
        neutral={
            "mask": lambda case: np.ones(case.shape("batch 1 queries keys"), bool),
            "bias": lambda case: np.zeros(case.shape("heads queries keys")),
            "tau": lambda case: 1.0,
        },
        cells={
            "noncausal self": keys_cell(False, 0),
            "causal self": keys_cell(True, 0),
            "noncausal cross": keys_cell(False, 3),
            "causal cross": keys_cell(True, 3),
            "left": padding_mask("left"),
            "right": padding_mask("right"),
            "MHA": heads_cell(2, 1),
            "GQA": heads_cell(2, 3),
            "MQA": heads_cell(1, 4),
        },
        bad_inputs=(
            *OTHER_KEYS,
            ("k with more tokens than v", "v", lambda a: a["v"][..., :-1, :]),
            ("another batch in v", "v", lambda a: a["v"].repeat(2, axis=0)),
            ("an integer mask", "mask", lambda a: np.ones((1, 1, 1, 1), np.int64)),
            *NO_TEMPERATURES,
            *NO_SCALES,
            *NO_BIASES,
        ),
    ),
)
