"""Contracts of softplus attention as a whole: LSSA, LSSAR and the decoder's step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.cells import heads_cell, keys_cell
from attnspec.conformance.contract import Array, Contract, Output, Stream
from attnspec.conformance.contracts.dense.attention import SIZES
from attnspec.conformance.contracts.scores.softplus_attention_steps import (
    BAD_EPS,
    BAD_POWERS,
    NO_CHOICE,
    OTHER_KEYS,
    K,
    Q,
    V,
    make_pairs,
    without,
)
from attnspec.conformance.values import feed_tokens
from attnspec.reference.conventions import causal_mask
from attnspec.reference.dense.attention import State
from attnspec.reference.scores.softplus_attention import lssa, lssar


def poison_hidden(arguments: dict[str, Any], case: Case) -> dict[str, Any]:
    """NaN in the keys and values that no query of the batch entry may read."""
    seen: np.ndarray = np.ones(case.shape("batch queries keys"), bool)
    if "mask" in arguments:
        seen &= arguments["mask"]
    if arguments["causal"]:
        seen &= causal_mask(*seen.shape[-2:])
    unread: np.ndarray = np.logical_not(seen.any(axis=1))
    for name in ("k", "v"):
        x: np.ndarray = arguments[name].copy()
        x[np.broadcast_to(unread[:, None], x.shape[:-1])] = np.nan
        arguments[name] = x
    return arguments


def _padded(side: str) -> Any:
    return lambda case: case.with_(options=("mask", side))


def _state(rng: np.random.Generator, case: Case) -> State:
    shape = case.shape("batch kv_heads past")
    return State(
        rng.standard_normal((*shape, case.sizes["d"])),
        rng.standard_normal((*shape, case.sizes["dv"])),
    )


def _whole(arguments: Mapping[str, Any]) -> np.ndarray:
    arguments = dict(arguments)
    p = arguments.pop("p")
    if p is None:
        arguments.pop("warm")
        return lssa(**arguments, causal=True)
    return lssar(**arguments, p=p, causal=True)


def first_stage(sizes: Mapping[str, int]) -> dict[str, st.SearchStrategy[Any]]:
    return {
        "causal": st.booleans(),
        "normalise_qk": st.sampled_from([True, True, False]),
        "eps": st.sampled_from([1e-8, 1e-8, 0.01]),
    }


MASK = Array("mask", "batch queries keys", make=make_pairs, optional=True)
STEP = (
    Array("q", "batch heads tokens d", role="query"),
    Array("k", "batch kv_heads tokens d", role="key"),
    Array("v", "batch kv_heads tokens dv", role="value"),
)
BAD_TOKENS = (
    *OTHER_KEYS,
    ("v with fewer tokens", "v", lambda a: a["v"][..., :-1, :]),
    ("another batch in v", "v", lambda a: a["v"].repeat(2, axis=0)),
)
BAD_ORDERS = (("a number for causal", "causal", lambda a: 1), *NO_CHOICE)
BAD_MASKS = (
    ("an integer mask", "mask", lambda a: np.ones((1, 1), np.int64)),
    ("a mask of other keys", "mask", lambda a: np.ones((1, 99), bool)),
    ("a mask with a head axis", "mask", lambda a: np.ones((1, 1, 1, a["k"].shape[-2]), bool)),
)
SHARED: dict[str, Any] = {
    "sizes": SIZES,
    "arrays": (Q, K, V, MASK),
    "outputs": (Output("out", cancels=True),),
    "linear_in": ("v",),
    "key_arrays": ("k", "v", "mask"),
    "permutable": lambda case: not case.parameters["causal"],
    "causal": lambda case: case.parameters["causal"],
    "poison": poison_hidden,
    "neutral": {"mask": lambda case: np.ones(case.shape("batch queries keys"), bool)},
    "cancelling": ("dq", "dk"),
    "cells": {
        "noncausal self": keys_cell(False, 0),
        "causal self": keys_cell(True, 0),
        "noncausal cross": keys_cell(False, 3),
        "causal cross": keys_cell(True, 3),
        "left": _padded("left"),
        "right": _padded("right"),
        "MHA": heads_cell(2, 1),
        "GQA": heads_cell(2, 3),
        "MQA": heads_cell(1, 4),
    },
}
CONTRACTS = (
    Contract(
        operation="softplus_attention.lssa",
        parameters=first_stage,
        bad_inputs=(*BAD_TOKENS, *BAD_MASKS, *BAD_EPS, *BAD_ORDERS),
        **SHARED,
    ),
    Contract(
        operation="softplus_attention.lssar",
        parameters=lambda sizes: {
            **first_stage(sizes),
            "p": st.sampled_from([15, 15, 1, 2, 2.5]),
            "warm": st.sampled_from([3, 3, 1, 8]),
            "eps_mode": st.sampled_from(["additive", "additive", "logspace"]),
        },
        bad_inputs=(
            *BAD_TOKENS,
            *BAD_MASKS,
            *BAD_EPS,
            *BAD_ORDERS,
            *BAD_POWERS,
            ("another mode of eps", "eps_mode", lambda a: "none"),
            ("a negative dead_tol", "dead_tol", lambda a: -1.0),
        ),
        **SHARED,
    ),
    Contract(
        operation="softplus_attention.step",
        sizes={**without("queries", "keys"), "past": (0, 16), "tokens": (1, 4)},
        least={"tokens": 1},
        arrays=(Array("state", make=_state), *STEP),
        outputs=(Output("out", cancels=True), Output("state.k"), Output("state.v")),
        parameters=lambda sizes: {
            "p": st.sampled_from([None, 2, 15]),
            "warm": st.sampled_from([3, 1]),
            "normalise_qk": st.booleans(),
        },
        stream=Stream(
            arrays=STEP,
            start=lambda whole: State(whole["k"][..., :0, :], whole["v"][..., :0, :]),
            feed=feed_tokens,
            whole=_whole,
        ),
        bad_inputs=(
            *BAD_TOKENS,
            *BAD_EPS,
            *NO_CHOICE,
            *(bad for bad in BAD_POWERS if bad[1] == "p"),
        ),
    ),
)
