"""Contracts of Entropy-ABF: logits and attention at given positions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.cells import heads_cell, keys_cell, padded_cell
from attnspec.conformance.contract import Array, Contract, Output
from attnspec.reference.positions.entropy_abf_masks import visible

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


def _positions(rng: np.random.Generator, case: Case, axes: str, first: int) -> np.ndarray:
    """Positions that rise by one to three, from `first` on or somewhat later."""
    steps = rng.integers(1, 4, case.shape(axes))
    return first + rng.integers(0, 12, (steps.shape[0], 1)) + np.cumsum(steps, axis=-1)


def query_positions(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Some of the first are below 0 and see nothing."""
    return _positions(rng, case, "batch queries", first=-6)


def key_positions(rng: np.random.Generator, case: Case) -> np.ndarray:
    return _positions(rng, case, "batch keys", first=-1)


def real_keys(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Padding among the keys; in the cells "left" and "right" on that side alone."""
    batch, keys = case.shape("batch keys")
    if {"left", "right"} & set(case.options):
        real = np.arange(keys) >= rng.integers(0, max(keys, 1), (batch, 1))
        return real if "left" in case.options else real[:, ::-1].copy()
    return rng.random((batch, keys)) < 0.8


def frequencies(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Some of another scheme, in no order."""
    return float(rng.choice([500000.0, 10000.0, 20.0])) ** -rng.random(case.size("d") // 2)


def parameters(sizes: Mapping[str, int]) -> dict[str, st.SearchStrategy[Any]]:
    """Training lengths within reach of a small case, so that many rows are scaled."""
    return {
        "layer": st.sampled_from([2, 1, 3, 0]),
        "base": st.sampled_from([500000.0, 10000.0, 20.0]),
        "c": st.sampled_from([2.5, 3, 8, 4096, math.inf]),
        "n_exempt": st.sampled_from([2, 3, 0]),
        "floor": st.sampled_from([1.0, 1.25]),
    }


def attention_parameters(sizes: Mapping[str, int]) -> dict[str, st.SearchStrategy[Any]]:
    return {**parameters(sizes), "causal": st.booleans()}


def poison_hidden(arguments: dict[str, Any], case: Case) -> dict[str, Any]:
    """NaN in the keys and values that no query of the batch entry may read."""
    T, S = case.shape("queries keys")
    pq, pk = arguments.get("pq"), arguments.get("pk")
    seen = visible(
        S - T + np.arange(T) if pq is None else pq,
        np.arange(S) if pk is None else pk,
        arguments["causal"],
        arguments.get("key_mask"),
    )
    unread = ~np.broadcast_to(seen.any(axis=-2).reshape(-1, S), (case.sizes["batch"], S))
    for name in ("k", "v"):
        arguments[name] = np.where(unread[:, None, :, None], np.nan, arguments[name])
    return arguments


def placed_halves(arguments: Mapping[str, Any], case: Case) -> list[dict[str, Any]] | None:
    """The keys in two parts, each with its positions, whatever the order."""
    if "pk" not in arguments or "pq" not in arguments:
        return None
    cut = case.sizes["keys"] // 2
    parts = []
    for keys in (slice(None, cut), slice(cut, None)):
        part = {**arguments, **{n: arguments[n][..., keys, :] for n in ("k", "v")}}
        for name in ("pk", "key_mask"):
            if name in arguments:
                part[name] = arguments[name][..., keys]
        parts.append(part)
    return parts


def in_order(case: Case) -> bool:
    """Causal, and without positions, so that later tokens stand later."""
    return bool(case.parameters["causal"]) and not {"pq", "pk"} & set(case.options)


Q = Array("q", "batch heads queries d", role="query")
K = Array("k", "batch kv_heads keys d", role="key")
V = Array("v", "batch kv_heads keys dv", role="value")
PQ = Array("pq", "batch queries", make=query_positions, optional=True)
PK = Array("pk", "batch keys", make=key_positions, optional=True)
FREQS = Array("freqs", "d/2", make=frequencies, optional=True)
KEY_MASK = Array("key_mask", "batch keys", make=real_keys, optional=True)
BAD_OPTIONS: tuple[tuple[str, str, Any], ...] = (
    ("k of another head size", "k", lambda a: a["k"].repeat(2, axis=-1)),
    ("kv heads that do not divide", "k", lambda a: a["k"].repeat(7, axis=-3)),
    ("positions of other queries", "pq", lambda a: np.arange(99)),
    ("positions of other keys", "pk", lambda a: np.arange(99)),
    ("positions that are not whole", "pk", lambda a: np.zeros(a["k"].shape[-2])),
    ("a negative layer", "layer", lambda a: -1),
    ("half a layer", "layer", lambda a: 0.5),
    ("a base that does not slow down", "base", lambda a: 1.0),
    ("a training length of 1", "c", lambda a: 1),
    ("no floor", "floor", lambda a: 0.0),
    ("a negative number of exempt layers", "n_exempt", lambda a: -1),
    ("frequencies of another head size", "freqs", lambda a: np.ones(99)),
)
BAD_KEYS: tuple[tuple[str, str, Any], ...] = (
    ("k with more tokens than v", "v", lambda a: a["v"][..., :-1, :]),
    ("an order that is no choice", "causal", lambda a: 1),
    ("an integer mask", "key_mask", lambda a: np.ones((1, a["k"].shape[-2]), np.int64)),
    ("a mask of other keys", "key_mask", lambda a: np.ones((len(a["k"]), 99), bool)),
)


def _attention(name: str, second: Output, **more: Any) -> Contract:
    return Contract(
        operation=f"entropy_abf.{name}",
        sizes=SIZES,
        fix=even_width,
        arrays=(Q, K, V, PQ, PK, FREQS, KEY_MASK),
        outputs=(Output("out"), second),
        parameters=attention_parameters,
        linear_in=("v",),
        causal=in_order,
        poison=poison_hidden,
        neutral={"key_mask": lambda case: np.ones(case.shape("batch keys"), bool)},
        bad_inputs=(*BAD_OPTIONS, *BAD_KEYS),
        **more,
    )


CONTRACTS = (
    Contract(
        operation="entropy_abf.logits",
        sizes={axis: bounds for axis, bounds in SIZES.items() if axis != "dv"},
        fix=even_width,
        arrays=(Q, K, PQ, PK, FREQS),
        outputs=(Output("z"),),
        parameters=parameters,
        linear_in=("q", "k"),
        bad_inputs=BAD_OPTIONS,
    ),
    _attention("attend", Output("P")),
    _attention(
        "extended_attention",
        Output("lse", dtype="float32", row_axes=0),
        key_arrays=("k", "v", "pk", "key_mask"),
        permutable=lambda case: "pk" in case.options,
        split=placed_halves,
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
    ),
)
