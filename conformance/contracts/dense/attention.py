"""Contracts of dense softmax attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.cells import heads_cell, keys_cell
from attnspec.conformance.contract import Array, BadValue, Contract, Output, Stream
from attnspec.conformance.packing import Packed
from attnspec.reference.conventions import causal_mask
from attnspec.reference.dense.attention import State, attend

SIZES = {
    "batch": (1, 2),
    "kv_heads": (1, 2),
    "group": (1, 3),
    "queries": (1, 24),
    "keys": (1, 24),
    "d": (1, 24),
    "dv": (1, 24),
}


def make_mask(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Three of four pairs visible; one row in five sees nothing.

    With "left" or "right" among the case's options, padding on that side instead.
    """
    shape = case.shape("batch 1 queries keys")
    if {"left", "right"} & set(case.options):
        keys = case.sizes["keys"]
        real = np.arange(keys) >= rng.integers(0, keys, (shape[0], 1, 1, 1))
        return np.broadcast_to(real if "left" in case.options else real[..., ::-1], shape).copy()
    return np.logical_and(rng.random(shape) < 0.75, rng.random((*shape[:-1], 1)) < 0.8)


def padding_mask(side: str) -> Any:
    """A case whose mask hides some of the keys on one side."""
    return lambda case: case.with_(options=("mask", side))


def parameters(sizes: Mapping[str, int]) -> dict[str, st.SearchStrategy[Any]]:
    return {"causal": st.booleans(), "scale": st.sampled_from([None, 0.5])}


def poison_hidden(arguments: dict[str, Any], case: Case) -> dict[str, Any]:
    """NaN in the keys and values that no query of the batch entry may read."""
    shape = (*case.shape("batch"), 1, *case.shape("queries keys"))
    allowed: np.ndarray = np.ones(shape, bool)
    if "mask" in arguments:
        allowed &= arguments["mask"]
    if arguments["causal"]:
        allowed &= causal_mask(*shape[-2:])
    unread: np.ndarray = np.logical_not(allowed.any(axis=(1, 2)))  # (batch, keys)
    for name in ("k", "v"):
        x: np.ndarray = arguments[name].copy()
        x[np.broadcast_to(unread[:, None], x.shape[:-1])] = np.nan
        arguments[name] = x
    return arguments


def halves(arguments: Mapping[str, Any], case: Case) -> list[dict[str, Any]] | None:
    if arguments["causal"]:
        return None
    cut = case.sizes["keys"] // 2
    parts = []
    for keys in (slice(None, cut), slice(cut, None)):
        part = dict(arguments)
        for name in ("k", "v"):
            part[name] = arguments[name][..., keys, :]
        if "mask" in arguments:
            part["mask"] = arguments["mask"][..., keys]
        parts.append(part)
    return parts


def _offsets(rng: np.random.Generator, case: Case, axis: str) -> np.ndarray:
    cuts = np.sort(rng.integers(0, case.sizes[axis] + 1, case.sizes["sequences"] - 1))
    return np.concatenate([[0], cuts, [case.sizes[axis]]]).astype(np.int64)


def _state(rng: np.random.Generator, case: Case) -> State:
    shape = case.shape("batch kv_heads past")
    return State(
        rng.standard_normal((*shape, case.sizes["d"])),
        rng.standard_normal((*shape, case.sizes["dv"])),
    )


def _feed(whole: Mapping[str, Any], state: Any, first: int, last: int) -> dict[str, Any]:
    tokens = {name: whole[name][..., first:last, :] for name in ("q", "k", "v")}
    return {"state": state, **tokens, "scale": whole["scale"]}


Q = Array("q", "batch heads queries d", role="query")
K = Array("k", "batch kv_heads keys d", role="key")
V = Array("v", "batch kv_heads keys dv", role="value")

CONTRACTS = (
    Contract(
        operation="attention.attend",
        sizes=SIZES,
        arrays=(Q, K, V, Array("mask", "batch 1 queries keys", make=make_mask, optional=True)),
        outputs=(Output("out"), Output("lse", dtype="float32", row_axes=0)),
        parameters=parameters,
        linear_in=("v",),
        key_arrays=("k", "v", "mask"),
        permutable=lambda case: not case.parameters["causal"],
        causal=lambda case: case.parameters["causal"],
        poison=poison_hidden,
        split=halves,
        neutral={
            "mask": lambda case: np.ones(case.shape("batch 1 queries keys"), bool),
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
            ("k of another head size", "k", lambda a: a["k"].repeat(2, axis=-1)),
            ("k of another dtype", "k", lambda a: a["k"] > 0),
            ("k with more tokens than v", "v", lambda a: a["v"][..., :-1, :]),
            ("kv heads that do not divide", "k", lambda a: a["k"].repeat(7, axis=-3)),
            ("another batch in v", "v", lambda a: a["v"].repeat(2, axis=0)),
            ("an integer mask", "mask", lambda a: np.ones((1, 1, 1, 1), np.int64)),
        ),
    ),
    Contract(
        operation="attention.attend_packed",
        sizes={**{a: s for a, s in SIZES.items() if a != "batch"}, "sequences": (1, 4)},
        arrays=(
            Array("q", "heads queries d", role="query"),
            Array("k", "kv_heads keys d", role="key"),
            Array("v", "kv_heads keys dv", role="value"),
            Array("q_offsets", make=lambda rng, case: _offsets(rng, case, "queries")),
            Array("k_offsets", make=lambda rng, case: _offsets(rng, case, "keys")),
        ),
        outputs=(Output("out"), Output("lse", dtype="float32", row_axes=0)),
        parameters=parameters,
        linear_in=("v",),
        packed=Packed({"q_offsets": {"q": -2}, "k_offsets": {"k": -2, "v": -2}}),
        bad_inputs=(
            ("offsets that stop short", "q_offsets", lambda a: a["q_offsets"][:-1]),
            ("offsets of another number", "k_offsets", lambda a: a["k_offsets"].repeat(2)),
            BadValue("offsets that decrease", "q_offsets", lambda a: a["q_offsets"][::-1].copy()),
            ("offsets as floats", "k_offsets", lambda a: a["k_offsets"] + 0.5),
            ("k of another head size", "k", lambda a: a["k"].repeat(2, axis=-1)),
            ("k with more tokens than v", "v", lambda a: a["v"][..., :-1, :]),
            ("kv heads that do not divide", "k", lambda a: a["k"].repeat(7, axis=-3)),
        ),
    ),
    Contract(
        operation="attention.step",
        sizes={
            "batch": (1, 2),
            "kv_heads": (1, 2),
            "group": (1, 3),
            "past": (0, 16),
            "tokens": (1, 4),
            "d": (1, 24),
            "dv": (1, 24),
        },
        least={"tokens": 1},
        arrays=(
            Array("state", make=_state),
            Array("q", "batch heads tokens d", role="query"),
            Array("k", "batch kv_heads tokens d", role="key"),
            Array("v", "batch kv_heads tokens dv", role="value"),
        ),
        outputs=(Output("out"), Output("state.k"), Output("state.v")),
        parameters=lambda sizes: {"scale": st.sampled_from([None, 0.5])},
        bad_inputs=(
            ("more queries than keys", "k", lambda a: a["k"][..., :-1, :]),
            ("k of another head size", "k", lambda a: a["k"].repeat(2, axis=-1)),
            ("values wider than the state's", "v", lambda a: a["v"].repeat(2, axis=-1)),
            ("another batch in v", "v", lambda a: a["v"].repeat(2, axis=0)),
        ),
        stream=Stream(
            arrays=(
                Array("q", "batch heads tokens d", role="query"),
                Array("k", "batch kv_heads tokens d", role="key"),
                Array("v", "batch kv_heads tokens dv", role="value"),
            ),
            start=lambda whole: State(whole["k"][..., :0, :], whole["v"][..., :0, :]),
            feed=_feed,
            whole=lambda whole: attend(**whole, causal=True)[0],
        ),
    ),
)
