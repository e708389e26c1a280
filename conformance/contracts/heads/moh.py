"""Contracts of Mixture-of-Head attention: rows that are not active are neither read nor written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.cells import heads_cell, keys_cell
from attnspec.conformance.contract import Array, Contract, Output, Stream
from attnspec.reference.conventions import causal_mask
from attnspec.reference.dense.attention import State
from attnspec.reference.heads.moh_heads import head_outputs

SIZES = {
    "batch": (1, 2),
    "kv_heads": (1, 3),
    "group": (1, 3),
    "queries": (1, 24),
    "keys": (1, 24),
    "d": (1, 24),
    "dv": (1, 24),
}


def choose_rows(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Active rows (batch, tokens, heads): about half, all or none of them; one head may be idle."""
    rows = rng.random(shape) < rng.choice([0.0, 0.5, 0.5, 0.75, 1.0])
    if rng.random() < 0.3 and rows.size:
        rows[..., rng.integers(0, shape[-1])] = False
    return rows


def make_active(axes: str) -> Any:
    return lambda rng, case: choose_rows(rng, case.shape(axes))


def make_gates(rng: np.random.Generator, case: Case) -> np.ndarray:
    shape = case.shape("batch queries heads")
    return np.where(choose_rows(rng, shape), np.exp(0.5 * rng.standard_normal(shape)), 0.0)


def make_key_mask(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Padding on one side, up to all of a batch entry's keys; or three keys of four at random."""
    batch, keys = case.shape("batch keys")
    if {"left", "right"} & set(case.options):
        real = np.arange(keys) >= rng.integers(0, keys + 1, (batch, 1))
        return real if "left" in case.options else real[:, ::-1].copy()
    return np.logical_and(rng.random((batch, keys)) < 0.75, rng.random((batch, 1)) < 0.8)


def poison_unused(arguments: dict[str, Any], case: Case) -> dict[str, Any]:
    """NaN in the queries of inactive rows, and in keys and values that no active row sees."""
    q, k, v = (arguments[name].copy() for name in "qkv")
    batch, heads, queries, _ = q.shape
    rows: np.ndarray = np.ones((batch, heads, queries), bool)
    if "gates" in arguments:
        rows = np.swapaxes(arguments["gates"] != 0, 1, 2)
    elif arguments.get("active") is not None:
        rows = np.swapaxes(arguments["active"], 1, 2)
    seen: np.ndarray = np.ones((batch, queries, k.shape[2]), bool)
    if "key_mask" in arguments:
        seen &= arguments["key_mask"][:, None]
    if arguments["causal"]:
        seen &= causal_mask(queries, k.shape[2])
    by_group = rows.reshape(batch, k.shape[1], -1, queries)
    of_group: np.ndarray = np.logical_or.reduce(by_group, axis=2)
    unread: np.ndarray = np.logical_not(np.any(of_group[..., None] & seen[:, None], axis=2))
    q[~rows], k[unread], v[unread] = np.nan, np.nan, np.nan
    return {**arguments, "q": q, "k": k, "v": v}


def _padded(side: str) -> Any:
    return lambda case: case.with_(options=(*case.options, "key_mask", side))


def _parameters(sizes: Mapping[str, int]) -> dict[str, st.SearchStrategy[Any]]:
    return {"causal": st.booleans(), "scale": st.sampled_from([None, 0.5])}


def _state(rng: np.random.Generator, case: Case) -> State:
    return State(
        rng.standard_normal(case.shape("batch kv_heads past d")),
        rng.standard_normal(case.shape("batch kv_heads past dv")),
    )


def _feed(whole: Mapping[str, Any], state: Any, first: int, last: int) -> dict[str, Any]:
    tokens = {name: whole[name][..., first:last, :] for name in ("q", "k", "v", "active")}
    return {**whole, **tokens, "state": state}


Q = Array("q", "batch heads queries d", role="query")
K = Array("k", "batch kv_heads keys d", role="key")
V = Array("v", "batch kv_heads keys dv", role="value")
ACTIVE = Array("active", "batch queries heads", make=make_active("batch queries heads"))
MASK = Array("key_mask", "batch keys", make=make_key_mask, optional=True)
GATES = Array("gates", "batch queries heads", make=make_gates)
WO = Array("Wo", "D heads*dv")
BO = Array("bo", "D", optional=True)
STEP = (
    Array("q", "batch heads tokens d", role="query"),
    Array("k", "batch kv_heads tokens d", role="key"),
    Array("v", "batch kv_heads tokens dv", role="value"),
    Array("active", "batch tokens heads", make=make_active("batch tokens heads")),
)
CELLS = {
    "noncausal self": keys_cell(False, 0),
    "causal self": keys_cell(True, 0),
    "noncausal cross": keys_cell(False, 3),
    "causal cross": keys_cell(True, 3),
    "left": _padded("left"),
    "right": _padded("right"),
    "MHA": heads_cell(4, 1),
    "GQA": heads_cell(2, 3),
    "MQA": heads_cell(1, 4),
}
BAD_TOKENS = (
    ("k of another head size", "k", lambda a: a["k"].repeat(2, axis=-1)),
    ("kv heads that do not divide", "k", lambda a: a["k"].repeat(13, axis=1)),
    ("v of other heads", "v", lambda a: a["v"].repeat(2, axis=1)),
    ("v with fewer tokens", "v", lambda a: a["v"][..., :-1, :]),
)
BAD_ACTIVE = (
    ("rows before heads", "active", lambda a: np.ones((*a["q"].shape[:2], 1, 1), bool)),
    ("a row of active too many", "active", lambda a: a["active"].repeat(2, axis=1)),
    ("gates for active", "active", lambda a: a["active"] * 1.0),
)
BAD_MASKS = (
    ("an integer key_mask", "key_mask", lambda a: np.ones(a["k"].shape[::2], np.int64)),
    ("a key_mask of one axis", "key_mask", lambda a: np.ones(a["k"].shape[2], bool)),
)
BAD_MIX = (
    ("gates of more heads", "gates", lambda a: a["gates"].repeat(2, axis=2)),
    ("a mask for gates", "gates", lambda a: a["gates"] != 0),
    ("a wider projection", "Wo", lambda a: a["Wo"].repeat(2, axis=1)),
    ("a projection for each entry", "Wo", lambda a: a["Wo"][None]),
    ("a longer bias", "bo", lambda a: np.zeros(a["Wo"].shape[0] + 1)),
)
CONTRACTS = (
    Contract(
        operation="moh.head_outputs",
        sizes=SIZES,
        arrays=(Q, K, V, ACTIVE, MASK),
        outputs=(Output("out", cancels=True),),
        parameters=_parameters,
        linear_in=("v",),
        key_arrays=("k", "v", "key_mask"),
        permutable=lambda case: not case.parameters["causal"],
        causal=lambda case: case.parameters["causal"],
        poison=poison_unused,
        neutral={
            "key_mask": lambda case: np.ones(case.shape("batch keys"), bool),
            "active": lambda case: np.ones(case.shape("batch queries heads"), bool),
        },
        cells=CELLS,
        bad_inputs=(*BAD_TOKENS, *BAD_ACTIVE, *BAD_MASKS),
    ),
    Contract(
        operation="moh.moh_attend",
        sizes={**SIZES, "D": (1, 24)},
        arrays=(Q, K, V, GATES, WO, BO, MASK),
        outputs=(Output("out", cancels=True),),
        parameters=_parameters,
        linear_in=("v bo",),
        key_arrays=("k", "v", "key_mask"),
        permutable=lambda case: not case.parameters["causal"],
        causal=lambda case: case.parameters["causal"],
        poison=poison_unused,
        neutral={
            "key_mask": lambda case: np.ones(case.shape("batch keys"), bool),
            "bo": lambda case: np.zeros(case.shape("D")),
        },
        cells=CELLS,
        bad_inputs=(*BAD_TOKENS, *BAD_MASKS, *BAD_MIX),
    ),
    Contract(
        operation="moh.mix_heads",
        sizes={axis: SIZES[axis] for axis in ("batch", "kv_heads", "group", "queries", "dv")}
        | {"D": (1, 24)},
        arrays=(
            Array("gates", "batch queries heads"),
            Array("head_outputs", "batch heads queries dv"),
            WO,
            BO,
        ),
        outputs=(Output("out", cancels=True),),
        linear_in=("gates bo", "head_outputs bo", "Wo bo"),
        neutral={"bo": lambda case: np.zeros(case.shape("D"))},
        bad_inputs=BAD_MIX,
    ),
    Contract(
        operation="moh.step",
        sizes={axis: SIZES[axis] for axis in ("batch", "kv_heads", "group", "d", "dv")}
        | {"past": (0, 16), "tokens": (1, 4)},
        least={"tokens": 1},
        arrays=(Array("state", make=_state), *STEP),
        outputs=(Output("out", cancels=True), Output("state.k"), Output("state.v")),
        parameters=lambda sizes: {"scale": st.sampled_from([None, 0.5])},
        stream=Stream(
            arrays=STEP,
            start=lambda whole: State(whole["k"][..., :0, :], whole["v"][..., :0, :]),
            feed=_feed,
            whole=lambda whole: head_outputs(**whole, causal=True),
        ),
        bad_inputs=(*BAD_TOKENS, *BAD_ACTIVE),
    ),
)
