"""Contracts of S2-Attention: block patterns, ready-made and free, in prefill and in training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.cells import padded_cell
from attnspec.conformance.contract import Array, Contract, Output
from attnspec.conformance.values import bad_integers
from attnspec.reference.patterns.s2_attention_blocks import pattern_of_heads
from attnspec.reference.patterns.s2_attention_patterns import block_pattern, token_mask

SIZES = {
    "batch": (1, 2),
    "kv_heads": (1, 3),
    "group": (1, 3),
    "queries": (1, 24),
    "keys": (1, 24),
    "d": (1, 24),
    "dv": (1, 24),
}
BLOCKS = (2, 16, 8)
"""All divide the starts of chunks, which are multiples of 16."""


def make_key_mask(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Padding on one side, up to all of a batch entry's keys; or three keys of four at random."""
    batch, keys = case.shape("batch keys")
    if {"left", "right"} & set(case.options):
        real = np.arange(keys) >= rng.integers(0, keys + 1, (batch, 1))
        return real if "left" in case.options else real[:, ::-1].copy()
    return np.logical_and(rng.random((batch, keys)) < 0.75, rng.random((batch, 1)) < 0.8)


def make_pattern(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Three blocks of five, for query heads, kv heads or one; one row in six reads nothing."""
    heads = int(rng.choice([1, case.sizes["kv_heads"], case.heads]))
    rows, columns = (-(-n // case.parameters["b"]) for n in case.shape("queries keys"))
    shape = (heads, rows, columns)
    return np.logical_and(rng.random(shape) < 0.6, rng.random((*shape[:-1], 1)) < 0.85)


def ready_parameters(sizes: Mapping[str, int]) -> dict[str, st.SearchStrategy[Any]]:
    """One kv head or two may share their pattern; others may be dense, which excludes it."""
    shared = sizes["kv_heads"] < 3
    return {
        "b": st.sampled_from(BLOCKS),
        "local": st.sampled_from([1, 2, 3]),
        "v_stride": st.sampled_from([3, 2, 4, 1]),
        "step": st.sampled_from([None, 1, 2]),
        "offset": st.sampled_from([0, 1, 5]),
        "num_dense_heads": st.just(0) if shared else st.sampled_from([0, 1, 2, 3]),
        "homo_head": st.sampled_from([False, False, True]) if shared else st.just(False),
        "causal": st.sampled_from([True, False, True]),
        "scale": st.sampled_from([None, 0.5]),
        "q_start": st.sampled_from([0, 0, 16, 48]),
        "kv_start": st.sampled_from([0, 0, 16]),
    }


def free_parameters(sizes: Mapping[str, int]) -> dict[str, st.SearchStrategy[Any]]:
    ready = ready_parameters({"kv_heads": 1})
    return {name: ready[name] for name in ("b", "causal", "scale", "q_start", "kv_start")}


def pairs_read(a: Mapping[str, Any]) -> np.ndarray:
    """bool (batch, heads, queries, keys): the pairs that are read, in either operation."""
    (batch, heads, queries), (kv_heads, keys) = a["q"].shape[:3], a["k"].shape[1:3]
    starts = {"q_start": a["q_start"], "kv_start": a["kv_start"]}
    b = a["b"]
    if "pattern" in a:
        pattern = pattern_of_heads(a["pattern"], heads, kv_heads)
    else:
        pattern = block_pattern(
            -(-queries // b), -(-keys // b), heads, kv_heads, a["local"], a["v_stride"],
            a["num_dense_heads"], a["step"], a["offset"], a["homo_head"], a["causal"],
            a["q_start"] // b, a["kv_start"] // b,
        )  # fmt: skip
    seen = token_mask(pattern, b, queries, keys, a["causal"], **starts)
    padding = a.get("key_mask")
    real = np.ones((batch, keys), bool) if padding is None else padding
    return seen & real[:, None, None, :]


def poison_hidden(arguments: dict[str, Any], case: Case) -> dict[str, Any]:
    """NaN in the keys and values that no query reads."""
    read = pairs_read(arguments).any(axis=2)
    batch, kv_heads, keys = case.shape("batch kv_heads keys")
    unread = np.logical_not(read.reshape(batch, kv_heads, -1, keys).any(axis=2))
    for name in ("k", "v"):
        x: np.ndarray = arguments[name].copy()
        x[unread] = np.nan
        arguments[name] = x
    return arguments


def halves(arguments: Mapping[str, Any], case: Case) -> list[dict[str, Any]]:
    """The keys cut in two by a key mask, not at the border of a block."""
    keys = case.sizes["keys"]
    real = arguments.get("key_mask")
    real = np.ones((case.sizes["batch"], keys), bool) if real is None else real
    first = np.arange(keys) < keys // 2 + keys % 3
    return [{**arguments, "key_mask": real & first}, {**arguments, "key_mask": real & ~first}]


def _cell(causal: bool, ahead: int) -> Any:
    def move(case: Case) -> Case:
        keys = case.sizes["queries"] + ahead
        starts = {"q_start": ahead, "kv_start": 0}
        return case.with_(sizes={"keys": keys}, parameters={"causal": causal, **starts})

    return move


def _heads(kv_heads: int, group: int) -> Any:
    options = {"num_dense_heads": 0, "homo_head": False}

    def move(case: Case) -> Case:
        ready = "homo_head" in case.parameters
        return case.with_(
            sizes={"kv_heads": kv_heads, "group": group}, parameters=options if ready else {}
        )

    return move


Q = Array("q", "batch heads queries d", role="query")
K = Array("k", "batch kv_heads keys d", role="key")
V = Array("v", "batch kv_heads keys dv", role="value")
MASK = Array("key_mask", "batch keys", make=make_key_mask, optional=True)
SHARED: dict[str, Any] = {
    "sizes": SIZES,
    "outputs": (Output("out", cancels=True), Output("lse", dtype="float32", row_axes=0)),
    "linear_in": ("v",),
    "cancelling": ("dq", "dk"),
    "causal": lambda case: (
        case.parameters["causal"] and case.parameters["q_start"] == case.parameters["kv_start"]
    ),
    "poison": poison_hidden,
    "split": halves,
    "neutral": {"key_mask": lambda case: np.ones(case.shape("batch keys"), bool)},
    "cells": {
        "noncausal self": _cell(False, 0),
        "causal self": _cell(True, 0),
        "noncausal cross": _cell(False, 16),
        "causal cross": _cell(True, 16),
        "left": padded_cell("left"),
        "right": padded_cell("right"),
        "MHA": _heads(2, 1),
        "GQA": _heads(2, 3),
        "MQA": _heads(1, 4),
    },
}
BAD: tuple[tuple[str, str, Any], ...] = (
    ("k of another head size", "k", lambda a: a["k"].repeat(2, axis=-1)),
    ("v with fewer tokens", "v", lambda a: a["v"][..., :-1, :]),
    ("kv heads that do not divide", "k", lambda a: a["k"].repeat(7, axis=1)),
    ("an integer key_mask", "key_mask", lambda a: np.ones(a["k"].shape[::2], np.int64)),
    ("a key_mask of one axis", "key_mask", lambda a: np.ones(a["k"].shape[2], bool)),
    *bad_integers("b"),
    ("causal = 1", "causal", lambda a: 1),
    ("a negative start", "q_start", lambda a: -16),
    ("a start that is no integer", "kv_start", lambda a: 16.0),
)
CONTRACTS = (
    Contract(
        operation="s2_attention.s2_attend",
        arrays=(Q, K, V, MASK),
        parameters=ready_parameters,
        bad_inputs=(
            *BAD,
            *bad_integers("v_stride"),
            *bad_integers("step"),
            ("local = -1", "local", lambda a: -1),
            ("a window of three", "local", lambda a: (1, 2, 3)),
            ("homo_head = 1", "homo_head", lambda a: 1),
            ("more dense heads than there are", "num_dense_heads", lambda a: 99),
        ),
        **SHARED,
    ),
    Contract(
        operation="s2_attention.block_sparse_attend",
        arrays=(Q, K, V, Array("pattern", make=make_pattern), MASK),
        parameters=free_parameters,
        bad_inputs=(
            *BAD,
            ("a pattern of integers", "pattern", lambda a: a["pattern"].astype(np.int64)),
            ("a pattern of other heads", "pattern", lambda a: a["pattern"].repeat(29, axis=0)),
            ("a pattern with too many rows", "pattern", lambda a: a["pattern"].repeat(2, axis=1)),
            ("a pattern of two axes", "pattern", lambda a: a["pattern"][0]),
        ),
        **SHARED,
    ),
)
