"""Contracts of Based: the weights, attention with them, the window and the convolution layer.

What has a state is in `based_state`, the mechanism's own laws are in `based_laws`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.cells import heads_cell, keys_cell, padded_cell
from attnspec.conformance.contract import Array, Contract, Output
from attnspec.reference.conventions import causal_mask

HEADS = {"batch": (1, 2), "kv_heads": (1, 2), "group": (1, 3), "d": (1, 24), "dv": (1, 24)}
CROSS = {**HEADS, "queries": (1, 24), "keys": (1, 24)}
SCALE = st.sampled_from([None, 0.5, 1.0])
EPS = st.sampled_from([1e-12, 1e-6, 0.0, 0.5])
Drawn = dict[str, st.SearchStrategy[Any]]


def make_key_mask(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Padding on one side, up to all of a batch entry's keys; or three keys of four at random."""
    batch, keys = case.shape("batch keys")
    if {"left", "right"} & set(case.options):
        real = np.arange(keys) >= rng.integers(0, keys + 1, (batch, 1))
        return real if "left" in case.options else real[:, ::-1].copy()
    return np.logical_and(rng.random((batch, keys)) < 0.75, rng.random((batch, 1)) < 0.8)


def poison_hidden(arguments: dict[str, Any], case: Case) -> dict[str, Any]:
    """NaN in the keys and values that no query of the batch entry may read."""
    allowed: np.ndarray = np.ones(case.shape("batch queries keys"), bool)
    if "key_mask" in arguments:
        allowed &= arguments["key_mask"][:, None]
    if arguments.get("causal"):
        allowed &= causal_mask(*allowed.shape[-2:])
    unread: np.ndarray = np.logical_not(allowed.any(axis=1))
    for name in ("k", "v"):
        x: np.ndarray = arguments[name].copy()
        x[np.broadcast_to(unread[:, None], x.shape[:-1])] = np.nan
        arguments[name] = x
    return arguments


def wrong_numbers(name: str, *wrong: Any) -> tuple[tuple[str, str, Any], ...]:
    """Values that the number `name` cannot have."""
    return tuple((f"{name} = {value}", name, lambda a, value=value: value) for value in wrong)


def _attend_parameters(sizes: Mapping[str, int]) -> Drawn:
    return {"causal": st.booleans(), "scale": SCALE, "eps": EPS, "use_norm": st.booleans()}


Q = Array("q", "batch heads queries d", role="query")
K = Array("k", "batch kv_heads keys d", role="key")
V = Array("v", "batch kv_heads keys dv", role="value")

BAD_SCALE = wrong_numbers("scale", 0.0, -1.0, float("nan"), "1", True)
BAD_EPS = wrong_numbers("eps", -1e-6, float("inf"), None, True)
BAD_HEADS = (
    ("k of another head size", "k", lambda a: a["k"].repeat(2, axis=-1)),
    ("k with more tokens than v", "v", lambda a: a["v"][..., :-1, :]),
    ("kv heads that do not divide", "k", lambda a: a["k"].repeat(7, axis=-3)),
    ("other kv heads in v", "v", lambda a: a["v"].repeat(2, axis=-3)),
    ("another batch in v", "v", lambda a: a["v"].repeat(2, axis=0)),
)

CONTRACTS = (
    Contract(
        operation="based.taylor_features",
        sizes={"batch": (1, 2), "queries": (1, 24), "d": (1, 24)},
        arrays=(Array("x", "batch queries d", role="query"),),
        outputs=(Output("features"),),
        parameters=lambda sizes: {"packed": st.booleans(), "scale": SCALE},
        bad_inputs=(*BAD_SCALE, *wrong_numbers("packed", 1, None)),
    ),
    Contract(
        operation="based.taylor_weights",
        sizes={axis: span for axis, span in CROSS.items() if axis != "dv"},
        arrays=(Q, K),
        outputs=(Output("w"),),
        parameters=lambda sizes: {"scale": SCALE},
        bad_inputs=(
            ("k of another head size", "k", lambda a: a["k"].repeat(2, axis=-1)),
            ("kv heads that do not divide", "k", lambda a: a["k"].repeat(7, axis=-3)),
            ("another batch in k", "k", lambda a: a["k"].repeat(2, axis=0)),
            *BAD_SCALE,
        ),
    ),
    Contract(
        operation="based.based_attend",
        sizes=CROSS,
        arrays=(Q, K, V, Array("key_mask", "batch keys", make=make_key_mask, optional=True)),
        outputs=(Output("o"),),
        parameters=_attend_parameters,
        linear_in=("v",),
        key_arrays=("k", "v", "key_mask"),
        permutable=lambda case: not case.parameters["causal"],
        causal=lambda case: case.parameters["causal"],
        poison=poison_hidden,
        neutral={"key_mask": lambda case: np.ones(case.shape("batch keys"), bool)},
        cells={
            "noncausal self": keys_cell(False, 0),
            "causal self": keys_cell(True, 0),
            "noncausal cross": keys_cell(False, 3),
            "causal cross": keys_cell(True, 3),
            "left": padded_cell("left"),
            "right": padded_cell("right"),
            "MHA": heads_cell(2, 1),
            "GQA": heads_cell(2, 3),
            "MQA": heads_cell(1, 4),
        },
        bad_inputs=(
            *BAD_HEADS,
            *BAD_SCALE,
            *BAD_EPS,
            *wrong_numbers("causal", 1, None),
            *wrong_numbers("use_norm", 0, "yes"),
            ("an integer key_mask", "key_mask", lambda a: np.ones(a["k"].shape[::2], np.int64)),
            ("a key_mask of one axis", "key_mask", lambda a: np.ones(a["k"].shape[2], bool)),
            ("a key_mask of more keys", "key_mask", lambda a: np.ones((1, 99), bool)),
        ),
    ),
    Contract(
        operation="based.sliding_window_attend",
        sizes=CROSS,
        arrays=(Q, K, V),
        outputs=(Output("o"),),
        parameters=lambda sizes: {"left": st.sampled_from([0, 1, 3, 8, 30])},
        linear_in=("v",),
        causal=lambda case: True,
        bad_inputs=(*BAD_HEADS, *wrong_numbers("left", -1, 1.5, None, True)),
    ),
    Contract(
        operation="based.gated_convolution",
        sizes={
            "batch": (1, 2), "tokens": (1, 24), "width": (1, 16), "inner": (1, 16), "taps": (1, 4),
        },
        queries="tokens",
        keys="tokens",
        arrays=(
            Array("x", "batch tokens width"),
            Array("W_in", "width 2*inner"),
            Array("filters", "inner taps"),
            Array("W_out", "inner width"),
        ),
        outputs=(Output("y"),),
        linear_in=("W_out",),
        causal=lambda case: True,
        bad_inputs=(
            ("W_in of another width", "W_in", lambda a: a["W_in"].repeat(2, axis=0)),
            ("W_in of one half", "W_in", lambda a: a["W_in"][:, :-1]),
            ("W_in with a batch", "W_in", lambda a: a["W_in"][None]),
            ("W_out of another width", "W_out", lambda a: a["W_out"].repeat(2, axis=0)),
            ("filters of one axis", "filters", lambda a: a["filters"][0]),
        ),
    ),
)  # fmt: skip
