"""Contracts of NTK-Attention: the prefix, its state and its place beside the softmax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.cells import heads_cell, keys_cell, padded_cell
from attnspec.conformance.contract import Array, Contract, Output, Stream
from attnspec.conformance.values import make_values
from attnspec.reference.conventions import causal_mask
from attnspec.reference.dense.attention import State
from attnspec.reference.linear.ntk_attention import ntk_attend

SIZES = {
    "batch": (1, 2),
    "kv_heads": (1, 2),
    "group": (1, 3),
    "queries": (1, 24),
    "keys": (1, 24),
    "d": (1, 24),
    "dv": (1, 24),
}
POSITIVITY = st.sampled_from(["abs", "softplus"])


def make_k(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Entries of both signs, zeros among them; the first of a head is none, so that den > 0."""
    k = rng.standard_normal(case.shape("heads d"))
    k = np.where(rng.random(k.shape) < 0.2, 0.0, k)
    k[:, :1] = np.where(rng.random((len(k), 1)) < 0.5, -1.0, 1.0) * (0.2 + rng.random((len(k), 1)))
    return k


def make_key_mask(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Padding on one side, up to all of a batch entry's keys; or three keys of four at random."""
    batch, keys = case.shape("batch keys")
    if {"left", "right"} & set(case.options):
        real = np.arange(keys) >= rng.integers(0, keys + 1, (batch, 1))
        return real if "left" in case.options else real[:, ::-1].copy()
    return np.logical_and(rng.random((batch, keys)) < 0.75, rng.random((batch, 1)) < 0.8)


def unseen(case: Case) -> np.ndarray:
    """Rows of a merge whose softmax saw no key."""
    return case.generator("unseen").random(case.shape("batch heads queries")) < 0.2


def make_softmax_out(rng: np.random.Generator, case: Case) -> np.ndarray:
    out = make_values(case.values, rng, case.shape("batch heads queries dv"), "value")
    return np.where(unseen(case)[..., None], 0.0, out)


def make_lse(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Moderate ones, and ones whose exponential leaves float32 on either side."""
    shape = case.shape("batch heads queries")
    lse = rng.standard_normal(shape) * 2
    far = rng.choice([-200.0, -60.0, 60.0, 200.0], shape)
    lse = np.where((rng.random(shape) < 0.3) & ~unbacked(case), far, lse)
    return np.where(unseen(case), -np.inf, lse)


def unbacked(case: Case) -> np.ndarray:
    """Rows of a merge whose den is 0 though num need not be."""
    return case.generator("unbacked").random(case.shape("batch heads queries")) < 0.2


def make_den(rng: np.random.Generator, case: Case) -> np.ndarray:
    den = np.abs(rng.standard_normal(case.shape("batch heads queries"))) + 0.1
    return np.where(unbacked(case), 0.0, den)


def poison_hidden(arguments: dict[str, Any], case: Case) -> dict[str, Any]:
    """NaN in the keys and values that no query of the batch entry may read."""
    allowed: np.ndarray = np.ones(case.shape("batch queries keys"), bool)
    if "key_mask" in arguments:
        allowed &= arguments["key_mask"][:, None]
    if arguments["causal"]:
        allowed &= causal_mask(*allowed.shape[-2:])
    unread: np.ndarray = np.logical_not(allowed.any(axis=1))
    for name in ("K", "V"):
        x: np.ndarray = arguments[name].copy()
        x[np.broadcast_to(unread[:, None], x.shape[:-1])] = np.nan
        arguments[name] = x
    return arguments


def _parameters(sizes: Mapping[str, int]) -> dict[str, st.SearchStrategy[Any]]:
    scale = st.sampled_from([None, 0.5])
    return {"causal": st.booleans(), "scale": scale, "positivity": POSITIVITY}


def _state(rng: np.random.Generator, case: Case) -> State:
    shape = case.shape("batch kv_heads past")
    keys = rng.standard_normal((*shape, case.sizes["d"]))
    return State(keys, rng.standard_normal((*shape, case.sizes["dv"])))


def _feed(whole: Mapping[str, Any], state: Any, first: int, last: int) -> dict[str, Any]:
    tokens = {name: whole[name][..., first:last, :] for name in ("q", "K", "V")}
    return {**whole, **tokens, "state": state}


Q = Array("q", "batch heads queries d", role="query")
K = Array("K", "batch kv_heads keys d", role="key")
V = Array("V", "batch kv_heads keys dv", role="value")
Z = Array("Z", "heads d dv")
SMALL_K = Array("k", "heads d", make=make_k)
STEP = (
    Array("q", "batch heads tokens d", role="query"),
    Array("K", "batch kv_heads tokens d", role="key"),
    Array("V", "batch kv_heads tokens dv", role="value"),
    Z,
    SMALL_K,
)
BAD_STATE = (
    ("Z of another width", "Z", lambda a: a["Z"].repeat(2, axis=1)),
    ("Z of other heads", "Z", lambda a: a["Z"].repeat(2, axis=0)),
    ("Z with a batch", "Z", lambda a: a["Z"][None]),
    ("k of another width", "k", lambda a: a["k"].repeat(2, axis=1)),
    ("k with a last axis of 1", "k", lambda a: a["k"][..., None]),
    ("an integer k", "k", lambda a: np.zeros(a["k"].shape, np.int64)),
    ("an unknown positivity", "positivity", lambda a: "exp"),
)
BAD_TOKENS = (
    ("K of another head size", "K", lambda a: a["K"].repeat(2, axis=-1)),
    ("kv heads that do not divide", "K", lambda a: a["K"].repeat(7, axis=-3)),
    ("V with fewer tokens", "V", lambda a: a["V"][..., :-1, :]),
    ("another batch in V", "V", lambda a: a["V"].repeat(2, axis=0)),
    ("Z of another value width", "Z", lambda a: a["Z"].repeat(2, axis=2)),
)

BAD_SCALE = (
    ("a scale of 0", "scale", lambda a: 0.0),
    ("a scale that is a string", "scale", lambda a: "1"),
)

CONTRACTS = (
    Contract(
        operation="ntk_attention.phi",
        sizes={"batch": (1, 2), "queries": (1, 24), "d": (1, 24)},
        arrays=(Array("x", "batch queries d", role="query"),),
        outputs=(Output("features"),),
    ),
    Contract(
        operation="ntk_attention.prefix_state",
        sizes={"kv_heads": (1, 3), "prefix": (1, 24), "d": (1, 24), "dv": (1, 24)},
        queries="prefix",
        keys="prefix",
        arrays=(
            Array("K_P", "kv_heads prefix d", role="key"),
            Array("V_P", "kv_heads prefix dv", role="value"),
        ),
        outputs=(
            Output("Z", dtype="float32", by_query=False),
            Output("k", dtype="float32", by_query=False),
        ),
        linear_in=("V_P",),
        key_arrays=("K_P", "V_P"),
        bad_inputs=(
            ("V_P of other heads", "V_P", lambda a: a["V_P"].repeat(2, axis=0)),
            ("V_P with fewer tokens", "V_P", lambda a: a["V_P"][:, :-1]),
        ),
    ),
    Contract(
        operation="ntk_attention.prefix_terms",
        sizes={axis: span for axis, span in SIZES.items() if axis != "keys"},
        arrays=(Q, Z, SMALL_K),
        outputs=(Output("num", dtype="float32"), Output("den", dtype="float32", row_axes=0)),
        parameters=lambda sizes: {"positivity": POSITIVITY},
        linear_in=("Z",),
        bad_inputs=BAD_STATE,
    ),
    Contract(
        operation="ntk_attention.ntk_attend",
        sizes=SIZES,
        arrays=(
            Q,
            K,
            V,
            Z,
            SMALL_K,
            Array("key_mask", "batch keys", make=make_key_mask, optional=True),
        ),
        outputs=(Output("out", cancels=True),),
        parameters=_parameters,
        linear_in=("V Z",),
        key_arrays=("K", "V", "key_mask"),
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
            *BAD_TOKENS,
            *BAD_STATE,
            *BAD_SCALE,
            ("an integer key_mask", "key_mask", lambda a: np.ones(a["K"].shape[::2], np.int64)),
            ("a key_mask of one axis", "key_mask", lambda a: np.ones(a["K"].shape[2], bool)),
        ),
    ),
    Contract(
        operation="ntk_attention.merge_prefix",
        sizes={axis: SIZES[axis] for axis in ("batch", "kv_heads", "group", "queries", "dv")},
        arrays=(
            Array("softmax_out", "batch heads queries dv", make=make_softmax_out),
            Array("lse", "batch heads queries", make=make_lse),
            Array("num", "batch heads queries dv", role="value"),
            Array("den", "batch heads queries", make=make_den),
        ),
        outputs=(Output("out"),),
        linear_in=("softmax_out num",),
        bad_inputs=(
            ("an lse with a last axis", "lse", lambda a: a["lse"][..., None]),
            ("den of other rows", "den", lambda a: a["den"].repeat(2, axis=0)),
            ("num of another width", "num", lambda a: a["num"].repeat(2, axis=-1)),
            ("an integer den", "den", lambda a: np.zeros(a["den"].shape, np.int64)),
        ),
    ),
    Contract(
        operation="ntk_attention.step",
        sizes={
            **{axis: span for axis, span in SIZES.items() if axis not in ("queries", "keys")},
            "past": (0, 16),
            "tokens": (1, 4),
        },
        least={"tokens": 1},
        arrays=(Array("state", make=_state), *STEP),
        outputs=(Output("out"), Output("state.k"), Output("state.v")),
        parameters=lambda sizes: {"scale": st.sampled_from([None, 0.5]), "positivity": POSITIVITY},
        stream=Stream(
            arrays=STEP,
            start=lambda whole: State(whole["K"][..., :0, :], whole["V"][..., :0, :]),
            feed=_feed,
            whole=lambda whole: ntk_attend(**whole, causal=True),
        ),
        bad_inputs=(
            ("no state", "state", lambda a: None),
            *BAD_TOKENS,
            *BAD_STATE,
            *BAD_SCALE,
        ),
    ),
)
