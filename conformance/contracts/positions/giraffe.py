"""Contracts of Giraffe: attention and decoding at given positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.cells import heads_cell, keys_cell, padded_cell
from attnspec.conformance.contract import Array, Contract, Output, Stream
from attnspec.conformance.contracts.positions.entropy_abf import placed_halves
from attnspec.reference.positions.giraffe import State, attend
from attnspec.reference.positions.giraffe_masks import visible

SIZES = {
    "batch": (1, 2),
    "kv_heads": (1, 2),
    "group": (1, 3),
    "queries": (1, 20),
    "keys": (1, 20),
    "d": (2, 24),
    "dv": (1, 24),
}


def even_width(sizes: dict[str, int]) -> dict[str, int]:
    return {**sizes, "d": sizes["d"] - sizes["d"] % 2}


def rising(rng: np.random.Generator, shape: tuple[int, ...], least: int = 0) -> np.ndarray:
    """Positions that do not fall, whole numbers or halves; some of the latter are equal."""
    start = least + rng.integers(0, 12, (shape[0], 1))
    if rng.random() < 0.5:
        return np.asarray(start + np.cumsum(rng.integers(1, 4, shape), axis=-1))
    return np.asarray(start + np.cumsum(rng.integers(0, 4, shape) / 2, axis=-1))


def query_positions(rng: np.random.Generator, case: Case) -> np.ndarray:
    return rising(rng, case.shape("batch queries"), least=-3)


def key_positions(rng: np.random.Generator, case: Case) -> np.ndarray:
    return rising(rng, case.shape("batch keys"))


def frequencies(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Falling, the slowest a constant or 0 as a truncation leaves them."""
    half = case.sizes["d"] // 2
    f = float(rng.choice([10000.0, 20.0])) ** (-np.arange(half) / half)
    slow = f < rng.random()
    return np.where(slow, rng.choice([0.0, 0.01]), f)


def real_keys(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Padding among the keys; in the cells "left" and "right" on that side alone."""
    batch, keys = case.shape("batch keys")
    if {"left", "right"} & set(case.options):
        real = np.arange(keys) >= rng.integers(0, max(keys, 1), (batch, 1))
        return real if "left" in case.options else real[:, ::-1].copy()
    return rng.random((batch, keys)) < 0.8


def poison_hidden(arguments: dict[str, Any], case: Case) -> dict[str, Any]:
    """NaN in the keys and values that no query of the batch entry may read."""
    T, S = case.shape("queries keys")
    seen = visible(T, S, arguments["causal"], arguments.get("key_mask"))
    unread = ~np.broadcast_to(seen.any(axis=-2).reshape(-1, S), (case.sizes["batch"], S))
    for name in ("k", "v"):
        arguments[name] = np.where(unread[:, None, :, None], np.nan, arguments[name])
    return arguments


def halves(arguments: Mapping[str, Any], case: Case) -> list[dict[str, Any]] | None:
    """The keys in two parts, each with its positions; causal order needs them whole."""
    return None if arguments["causal"] else placed_halves(arguments, case)


def decay(sizes: Mapping[str, int]) -> dict[str, st.SearchStrategy[Any]]:
    """Scale bases that keep the amplitudes of a small case within float16."""
    return {
        "N": st.sampled_from([32, 7, 24]),
        "b": st.sampled_from([512, 40, 64.5]),
        "base": st.sampled_from([10000.0, 20.0]),
    }


Q = Array("q", "batch heads queries d", role="query")
K = Array("k", "batch kv_heads keys d", role="key")
V = Array("v", "batch kv_heads keys dv", role="value")
PQ = Array("pq", "batch queries", make=query_positions, optional=True)
PK = Array("pk", "batch keys", make=key_positions, optional=True)
F = Array("f", "d/2", make=frequencies, optional=True)
KEY_MASK = Array("key_mask", "batch keys", make=real_keys, optional=True)
BAD_PLACES: tuple[tuple[str, str, Any], ...] = (
    ("k of another head size", "k", lambda a: a["k"].repeat(2, axis=-1)),
    ("kv heads that do not divide", "k", lambda a: a["k"].repeat(7, axis=-3)),
    ("positions of other queries", "pq", lambda a: np.arange(99)),
    ("positions of other keys", "pk", lambda a: np.arange(99)),
    ("positions that are no numbers", "pk", lambda a: np.zeros(a["k"].shape[-2], bool)),
)
BAD_KEYS: tuple[tuple[str, str, Any], ...] = (
    ("k with more tokens than v", "v", lambda a: a["v"][..., :-1, :]),
    ("an order that is no choice", "causal", lambda a: 1),
    ("an integer mask", "key_mask", lambda a: np.ones((1, a["k"].shape[-2]), np.int64)),
    ("a mask of other keys", "key_mask", lambda a: np.ones((len(a["k"]), 99), bool)),
)
BAD_FREQUENCIES: tuple[tuple[str, str, Any], ...] = (
    ("frequencies of another head size", "f", lambda a: np.ones(99)),
    ("a list of frequencies", "f", lambda a: [1.0] * (a["q"].shape[-1] // 2)),
)
BAD_DECAY: tuple[tuple[str, str, Any], ...] = (
    ("an empty table", "N", lambda a: 0),
    ("half a table", "N", lambda a: 2.5),
    ("no scale base", "b", lambda a: 0),
    ("a base that does not slow down", "base", lambda a: 1.0),
)


def _attention(name: str, arrays: tuple[Array, ...], parameters: Any, bad: Any) -> Contract:
    """A turned one-hot row meets a key in two terms, whose errors may cancel in a few runs."""
    return Contract(
        operation=f"giraffe.{name}",
        sizes=SIZES,
        fix=even_width,
        arrays=(Q, K, V, PQ, PK, *arrays, KEY_MASK),
        outputs=(Output("out"), Output("lse", dtype="float32", row_axes=0, cancels=True)),
        parameters=lambda sizes: {**parameters(sizes), "causal": st.booleans()},
        linear_in=("v",),
        key_arrays=("k", "v", "pk", "key_mask"),
        permutable=lambda case: "pk" in case.options and not case.parameters["causal"],
        causal=lambda case: bool(case.parameters["causal"]),
        poison=poison_hidden,
        neutral={
            "key_mask": lambda case: np.ones(case.shape("batch keys"), bool),
            "pk": lambda case: np.arange(case.sizes["keys"]),
        },
        split=halves,
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
        bad_inputs=(*BAD_PLACES, *BAD_KEYS, *bad),
    )


def _state(rng: np.random.Generator, case: Case) -> State:
    return State(
        rng.standard_normal(case.shape("batch kv_heads past d")),
        rng.standard_normal(case.shape("batch kv_heads past dv")),
    )


def _feed(whole: Mapping[str, Any], state: Any, first: int, last: int) -> dict[str, Any]:
    new = {name: whole[name][..., first:last, :] for name in ("q", "k", "v")}
    return {"state": state, **new, "p": whole["p"][..., first:last], "f": whole["f"]}


NEW = (
    Array("q", "batch heads tokens d", role="query"),
    Array("k", "batch kv_heads tokens d", role="key"),
    Array("v", "batch kv_heads tokens dv", role="value"),
    Array(
        "p", "batch tokens", make=lambda rng, case: rising(rng, case.shape("batch tokens"), least=5)
    ),
)

CONTRACTS = (
    _attention("attend", (F,), lambda sizes: {}, BAD_FREQUENCIES),
    _attention("xpos_attend", (), decay, BAD_DECAY),
    Contract(
        operation="giraffe.step",
        sizes={
            "batch": (1, 2),
            "kv_heads": (1, 2),
            "group": (1, 3),
            "past": (0, 16),
            "tokens": (1, 4),
            "d": (2, 24),
            "dv": (1, 24),
        },
        least={"tokens": 1},
        fix=even_width,
        arrays=(Array("state", make=_state), *NEW, F),
        outputs=(Output("out"), Output("state.k"), Output("state.v")),
        stream=Stream(
            arrays=(*NEW, F),
            start=lambda whole: State(whole["k"][..., :0, :], whole["v"][..., :0, :]),
            feed=_feed,
            whole=lambda whole: attend(
                whole["q"], whole["k"], whole["v"], whole["p"], whole["p"], whole["f"]
            )[0],
        ),
        bad_inputs=(
            ("more new keys than queries", "k", lambda a: a["k"].repeat(2, axis=-2)),
            ("values unlike the state's", "v", lambda a: a["v"].repeat(2, axis=-1)),
            ("positions of other tokens", "p", lambda a: np.arange(99)),
            ("a list of positions", "p", lambda a: a["p"].tolist()),
            *BAD_FREQUENCIES,
        ),
    ),
)
