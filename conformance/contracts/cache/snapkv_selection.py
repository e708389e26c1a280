"""Contracts of SnapKV, the selection: from the window's weights to the positions kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.contract import Array, Contract, Output, Ranking
from attnspec.reference.cache.snapkv_selection import POOLS, REDUCTIONS

HEADS = {"batch": (1, 2), "kv_heads": (1, 2), "group": (1, 3)}
PROMPT = {**HEADS, "window": (1, 6), "queries": (7, 24), "keys": (7, 24), "d": (1, 24)}
Drawn = dict[str, st.SearchStrategy[Any]]


def window_sizes(sizes: Mapping[str, int]) -> Drawn:
    return {"w": st.just(sizes["window"])}


def left_padding(rng: np.random.Generator, case: Case) -> np.ndarray:
    """False at up to all but one of the first keys; at the last keys in the cell "right"."""
    batch, keys = case.shape("batch keys")
    real = np.arange(keys) >= rng.integers(0, max(keys, 1), (batch, 1))
    if case.sizes.get("padding_right"):
        real[:, :2], real[:, -1] = True, False
    return real


def nan_in_padding(*names: str) -> Callable[[dict[str, Any], Case], dict[str, Any]]:
    """NaN in the arrays `names` (batch, kv_heads, keys, ...) where a key is padding."""

    def poison(arguments: dict[str, Any], case: Case) -> dict[str, Any]:
        if "mask" in arguments:
            for name in names:
                real = arguments["mask"][:, None, :, None]
                arguments[name] = np.where(real, arguments[name], np.nan)
        return arguments

    return poison


def poison_window(arguments: dict[str, Any], case: Case) -> dict[str, Any]:
    """NaN in padding keys, and in every query before the window."""
    q = arguments["q"].copy()
    q[..., : q.shape[-2] - arguments["w"], :] = np.nan
    return nan_in_padding("k")({**arguments, "q": q}, case)


def padded(right: bool) -> Callable[[Case], Case]:
    def move(case: Case) -> Case:
        return case.with_(options=("mask",), sizes={"padding_right": int(right)})

    return move


def heads(kv_heads: int, group: int) -> Callable[[Case], Case]:
    return lambda case: case.with_(sizes={"kv_heads": kv_heads, "group": group})


def longer(extra: int) -> Callable[[Case], Case]:
    return lambda case: case.with_(sizes={"keys": case.sizes["queries"] + extra})


CELLS = {
    "causal self": longer(0),
    "causal cross": longer(3),
    "left": padded(right=False),
    "right": padded(right=True),
    "MHA": heads(2, 1),
    "GQA": heads(2, 3),
    "MQA": heads(1, 4),
}


def mask_positions(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Up to all of the first positions hidden, for all heads alike."""
    batch, keys = case.shape("batch keys")
    return np.arange(keys) >= rng.integers(0, keys + 1, (batch, 1, 1))


def nan_where_hidden(arguments: dict[str, Any], case: Case) -> dict[str, Any]:
    if "mask" in arguments:
        arguments["m"] = np.where(arguments["mask"], arguments["m"], np.nan)
    return arguments


def best_positions(arguments: Mapping[str, Any]) -> Ranking:
    """The scores are given, so equal ones are ties; hidden positions come last of all."""
    hidden = ~np.asarray(arguments.get("mask", True))
    scores = np.where(hidden, -np.inf, arguments["m"])
    return Ranking(scores, arguments["n"], exact="always")


WINDOW: dict[str, Any] = {
    "sizes": PROMPT,
    "least": {"queries": 7, "keys": 7},
    "arrays": (
        Array("q", "batch heads queries d", role="query"),
        Array("k", "batch kv_heads keys d", role="key"),
        Array("mask", "batch keys", make=left_padding, optional=True),
    ),
    "parameters": window_sizes,
    "poison": poison_window,
    "neutral": {"mask": lambda case: np.ones(case.shape("batch keys"), bool)},
    "cells": CELLS,
    "bad_inputs": (
        ("k of another head size", "k", lambda a: a["k"].repeat(2, axis=-1)),
        ("kv heads that do not divide", "k", lambda a: a["k"].repeat(7, axis=-3)),
        ("another batch in k", "k", lambda a: a["k"].repeat(3, axis=0)),
        ("more window than queries", "w", lambda a: a["q"].shape[-2] + 1),
        ("a window of all the keys", "w", lambda a: a["k"].shape[-2]),
        ("an empty window", "w", lambda a: 0),
        ("half a window", "w", lambda a: 1.5),
        ("an integer mask", "mask", lambda a: np.ones(a["k"].shape[::2], np.int64)),
        ("a mask of another length", "mask", lambda a: np.ones((len(a["k"]), 2), bool)),
    ),
}

CONTRACTS = (
    Contract(
        operation="snapkv.window_attention",
        outputs=(Output("A", wide=True),),
        **WINDOW,
    ),
    Contract(
        operation="snapkv.window_scores",
        outputs=(Output("s", wide=True),),
        **WINDOW,
    ),
    Contract(
        operation="snapkv.prefix_scores",
        sizes={**HEADS, "window": (1, 6), "keys": (7, 24)},
        least={"keys": 7},
        arrays=(Array("A", "batch heads window keys"),),
        outputs=(Output("s", wide=True),),
        parameters=window_sizes,
        linear_in=("A",),
        bad_inputs=(
            ("weights of another window", "w", lambda a: a["w"] + 1),
            ("an empty window", "w", lambda a: 0),
            ("weights of more queries", "A", lambda a: a["A"].repeat(2, axis=-2)),
        ),
    ),
    Contract(
        operation="snapkv.pool_scores",
        sizes={**HEADS, "keys": (1, 24)},
        arrays=(Array("s", "batch heads keys"),),
        outputs=(Output("m", wide=True),),
        parameters=lambda sizes: {
            "p": st.sampled_from([1, 3, 5, 7]),
            "mode": st.sampled_from(POOLS),
        },
        bad_inputs=(
            ("an even width", "p", lambda a: 4),
            ("no width", "p", lambda a: 0),
            ("half a width", "p", lambda a: 2.5),
            ("an unknown pool", "mode", lambda a: "median"),
        ),
    ),
    Contract(
        operation="snapkv.reduce_groups",
        sizes={**HEADS, "keys": (1, 24)},
        arrays=(Array("m", "batch heads keys"),),
        outputs=(Output("out", wide=True),),
        parameters=lambda sizes: {
            "Hk": st.just(sizes["kv_heads"]),
            "mode": st.sampled_from(REDUCTIONS),
        },
        bad_inputs=(
            ("kv heads that do not divide", "Hk", lambda a: a["m"].shape[-2] + 1),
            ("no kv heads", "Hk", lambda a: 0),
            ("an unknown reduction", "mode", lambda a: "first"),
        ),
    ),
    Contract(
        operation="snapkv.select",
        sizes={**HEADS, "keys": (1, 24)},
        arrays=(
            Array("m", "batch heads keys"),
            Array("mask", "batch 1 keys", make=mask_positions, optional=True),
        ),
        outputs=(Output("idx", "selection"),),
        parameters=lambda sizes: {"n": st.integers(1, sizes["keys"] + 2)},
        ranking=best_positions,
        poison=nan_where_hidden,
        neutral={"mask": lambda case: np.ones(case.shape("batch 1 keys"), bool)},
        bad_inputs=(
            ("nothing to select", "n", lambda a: 0),
            ("half a position", "n", lambda a: 1.5),
            ("an integer mask", "mask", lambda a: np.ones(a["m"].shape[-1], np.int64)),
            ("a mask of other positions", "mask", lambda a: np.ones(a["m"].shape[-1] + 2, bool)),
        ),
    ),
)
