"""Contracts of DiffQKV attention: head counts that need not divide one another, selected values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.cells import keys_cell, padded_cell
from attnspec.conformance.contract import Array, Contract, Output, Ranking, Stream
from attnspec.conformance.values import feed_tokens
from attnspec.reference.conventions import causal_mask
from attnspec.reference.dense.attention import State
from attnspec.reference.heads.diffqkv import diffqkv_attend, head_maps, selective_attend
from attnspec.reference.heads.diffqkv_steps import allowed, scores, softmax_rows

SIZES = {
    "batch": (1, 2),
    "kv_heads": (1, 4),
    "group": (1, 3),
    "v_heads": (1, 12),
    "queries": (1, 24),
    "keys": (1, 24),
    "d": (1, 24),
    "dv": (1, 24),
}


def fit_heads(sizes: dict[str, int]) -> dict[str, int]:
    """The largest count of value heads that divides the query heads and is not above the drawn."""
    heads = sizes["kv_heads"] * sizes["group"]
    count = max(n for n in range(1, min(sizes["v_heads"], heads) + 1) if heads % n == 0)
    return {**sizes, "v_heads": count}


def without(*axes: str) -> dict[str, tuple[int, int]]:
    return {axis: span for axis, span in SIZES.items() if axis not in axes}


def make_key_mask(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Padding on one side, up to all of a batch entry's keys; or three keys of four at random."""
    batch, keys = case.shape("batch keys")
    if {"left", "right"} & set(case.options):
        real = np.arange(keys) >= rng.integers(0, keys + 1, (batch, 1))
        return real if "left" in case.options else real[:, ::-1].copy()
    return np.logical_and(rng.random((batch, keys)) < 0.75, rng.random((batch, 1)) < 0.8)


def poison_hidden(arguments: dict[str, Any], case: Case) -> dict[str, Any]:
    """NaN in the keys and values that no query of the batch entry may read."""
    seen: np.ndarray = np.ones(case.shape("batch queries keys"), bool)
    if "key_mask" in arguments:
        seen &= arguments["key_mask"][:, None]
    if arguments["causal"]:
        seen &= causal_mask(*seen.shape[-2:])
    unread: np.ndarray = np.logical_not(seen.any(axis=1))
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
        part = {**arguments, "k": arguments["k"][..., keys, :], "v": arguments["v"][..., keys, :]}
        if "key_mask" in arguments:
            part["key_mask"] = arguments["key_mask"][:, keys]
        parts.append(part)
    return parts


def weights_of_rows(a: Mapping[str, Any]) -> Ranking:
    """What a selection of values is judged by: only keys that a row sees compete."""
    hk, _ = head_maps(a["q"].shape[-3], a["k"].shape[-3], 1)
    mask = allowed(a["q"], a["k"], a.get("causal", True), a.get("key_mask"))
    P, _ = softmax_rows(scores(a["q"], a["k"], hk, scale=a.get("scale")), mask)
    c = P.shape[-1] if a["c"] is None else a["c"]
    return Ranking(P, k=c, allowed=np.broadcast_to(mask, P.shape))


def weights_of_step(a: Mapping[str, Any]) -> Ranking:
    """The same over the cached keys and those of the step; without c nothing is chosen."""
    return weights_of_rows({**a, "k": np.concatenate([a["state"].k, a["k"]], axis=-2)})


def _heads(kv_heads: int, group: int, v_heads: int) -> Any:
    sizes = {"kv_heads": kv_heads, "group": group, "v_heads": v_heads}
    return lambda case: case.with_(sizes=sizes)


def _parameters(sizes: Mapping[str, int]) -> dict[str, st.SearchStrategy[Any]]:
    return {"causal": st.booleans(), "scale": st.sampled_from([None, 0.5])}


def _at_once(whole: Mapping[str, Any]) -> np.ndarray:
    """What steps with the same options give for the whole sequence."""
    if whole["c"] is not None:
        return selective_attend(**whole, causal=True)
    tokens = {name: whole[name] for name in ("q", "k", "v", "scale")}
    return diffqkv_attend(**tokens, causal=True)[0]


def _state(rng: np.random.Generator, case: Case) -> State:
    return State(
        rng.standard_normal(case.shape("batch kv_heads past d")),
        rng.standard_normal(case.shape("batch v_heads past dv")),
    )


Q = Array("q", "batch heads queries d", role="query")
K = Array("k", "batch kv_heads keys d", role="key")
V = Array("v", "batch v_heads keys dv", role="value")
MASK = Array("key_mask", "batch keys", make=make_key_mask, optional=True)
STEP = (
    Array("q", "batch heads tokens d", role="query"),
    Array("k", "batch kv_heads tokens d", role="key"),
    Array("v", "batch v_heads tokens dv", role="value"),
)
CELLS = {
    "noncausal self": keys_cell(False, 0),
    "causal self": keys_cell(True, 0),
    "noncausal cross": keys_cell(False, 3),
    "causal cross": keys_cell(True, 3),
    "left": padded_cell("left"),
    "right": padded_cell("right"),
    "MHA": _heads(4, 1, 4),
    "GQA": _heads(4, 3, 6),
    "MQA": _heads(1, 4, 1),
}
BAD_TOKENS = (
    ("k of another head size", "k", lambda a: a["k"].repeat(2, axis=-1)),
    ("key heads that do not divide", "k", lambda a: a["k"].repeat(13, axis=1)),
    ("value heads that do not divide", "v", lambda a: a["v"].repeat(13, axis=1)),
    ("v with fewer tokens", "v", lambda a: a["v"][..., :-1, :]),
    ("another batch in v", "v", lambda a: a["v"].repeat(2, axis=0)),
)
BAD_MASKS = (
    ("an integer key_mask", "key_mask", lambda a: np.ones(a["k"].shape[::2], np.int64)),
    ("a key_mask of one axis", "key_mask", lambda a: np.ones(a["k"].shape[2], bool)),
)


def bad_integers(name: str) -> tuple[tuple[str, str, Any], ...]:
    """Values that are no integer of at least 1."""
    return tuple(
        (f"{name} = {value}", name, lambda a, value=value: value) for value in (0, 2.5, None, True)
    )


BAD_C = tuple(bad for bad in bad_integers("c") if bad[0] != "c = None")
CONTRACTS = (
    Contract(
        operation="diffqkv.diffqkv_attend",
        sizes=SIZES,
        fix=fit_heads,
        arrays=(Q, K, V, MASK),
        outputs=(Output("out", cancels=True), Output("lse", dtype="float32", row_axes=0)),
        parameters=_parameters,
        linear_in=("v",),
        key_arrays=("k", "v", "key_mask"),
        permutable=lambda case: not case.parameters["causal"],
        causal=lambda case: case.parameters["causal"],
        poison=poison_hidden,
        split=halves,
        neutral={"key_mask": lambda case: np.ones(case.shape("batch keys"), bool)},
        cells=CELLS,
        bad_inputs=(*BAD_TOKENS, *BAD_MASKS),
    ),
    Contract(
        operation="diffqkv.selective_attend",
        sizes=SIZES,
        fix=fit_heads,
        arrays=(Q, K, V, MASK),
        outputs=(Output("out", cancels=True),),
        parameters=lambda sizes: {
            **_parameters(sizes),
            "c": st.sampled_from([1, 2, 3, 5, 8, 24, 100]),
            "renormalise": st.booleans(),
        },
        linear_in=("v",),
        causal=lambda case: case.parameters["causal"],
        poison=poison_hidden,
        hidden=weights_of_rows,
        neutral={"key_mask": lambda case: np.ones(case.shape("batch keys"), bool)},
        cells=CELLS,
        bad_inputs=(*BAD_TOKENS, *BAD_MASKS, *BAD_C, ("no c", "c", lambda a: None)),
    ),
    Contract(
        operation="diffqkv.step",
        sizes={**without("queries", "keys"), "past": (0, 16), "tokens": (1, 4)},
        fix=fit_heads,
        least={"tokens": 1},
        arrays=(Array("state", make=_state), *STEP),
        outputs=(Output("out", cancels=True), Output("state.k"), Output("state.v")),
        parameters=lambda sizes: {
            "scale": st.sampled_from([None, 0.5]),
            "c": st.sampled_from([None, None, None, None, 1, 3, 8, 100]),
            "renormalise": st.booleans(),
        },
        hidden=weights_of_step,
        stream=Stream(
            arrays=STEP,
            start=lambda whole: State(whole["k"][..., :0, :], whole["v"][..., :0, :]),
            feed=feed_tokens,
            whole=_at_once,
            hidden=weights_of_rows,
        ),
        bad_inputs=(*BAD_TOKENS, *BAD_C),
    ),
)
