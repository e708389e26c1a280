"""Contracts of StreamingLLM, continued: softmax with a sink in its denominator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.contract import Array, Contract, Output
from attnspec.conformance.values import make_values


def partly_hidden(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Logits of which one in five is -inf, and one row in eight nothing but that."""
    shape = case.shape("batch rows entries")
    x = make_values(case.values, rng, shape, "query")
    hidden = (rng.random(shape) < 0.2) | (rng.random((*shape[:-1], 1)) < 0.125)
    return np.where(hidden, -np.inf, x)


def make_mask(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Three of four pairs visible; one row in five and one key in ten are hidden altogether."""
    batch, one, queries, keys = case.shape("batch 1 queries keys")
    shape = (batch, one, queries, keys)
    seen = (rng.random(shape) < 0.75) & (rng.random((batch, one, queries, 1)) < 0.8)
    return seen & (rng.random((batch, one, 1, keys)) < 0.9)


def sink_logits(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Sinks from hardly there to taking nearly everything."""
    return rng.uniform(-8, 8, case.heads)


def poison_hidden(arguments: dict[str, Any], case: Case) -> dict[str, Any]:
    """NaN in the keys and values that no query may read."""
    shape = (*case.shape("batch"), 1, *case.shape("queries keys"))
    unread = np.all(~np.broadcast_to(arguments.get("mask", True), shape), axis=(1, 2))
    for name in ("k", "v"):
        x = arguments[name].copy()
        x[np.broadcast_to(unread[:, None], x.shape[:-1])] = np.nan
        arguments[name] = x
    return arguments


def halves(arguments: Mapping[str, Any], case: Case) -> list[dict[str, Any]]:
    """The sink goes with the first half; a sink of -inf is none."""
    cut, parts = case.sizes["keys"] // 2, []
    for keys in (slice(None, cut), slice(cut, None)):
        part = {name: arguments[name][..., keys, :] for name in ("k", "v")}
        if "mask" in arguments:
            part["mask"] = arguments["mask"][..., keys]
        parts.append({**arguments, **part})
    parts[1]["s_h"] = np.full_like(arguments["s_h"], -np.inf)
    return parts


CONTRACTS = (
    Contract(
        operation="streaming_llm.softmax1",
        sizes={"batch": (1, 3), "rows": (1, 6), "entries": (1, 24)},
        keys="entries",
        arrays=(Array("x", "batch rows entries", role="query", make=partly_hidden),),
        outputs=(Output("out"),),
        parameters=lambda sizes: {"axis": st.sampled_from([-1, -2, 0])},
        bad_inputs=(
            ("a list", "x", lambda a: a["x"].tolist()),
            ("integers", "x", lambda a: np.ones(3, np.int64)),
            ("an axis beyond the array's", "axis", lambda a: 3),
            ("a fractional axis", "axis", lambda a: 0.5),
            ("no axis", "axis", lambda a: None),
        ),
    ),
    Contract(
        operation="streaming_llm.attend_with_sink_logit",
        sizes={
            "batch": (1, 2),
            "kv_heads": (1, 2),
            "group": (1, 3),
            "queries": (1, 24),
            "keys": (1, 24),
            "d": (1, 24),
            "dv": (1, 24),
        },
        arrays=(
            Array("q", "batch heads queries d", role="query"),
            Array("k", "batch kv_heads keys d", role="key"),
            Array("v", "batch kv_heads keys dv", role="value"),
            Array("s_h", "heads", make=sink_logits),
            Array("mask", "batch 1 queries keys", make=make_mask, optional=True),
        ),
        outputs=(Output("out"), Output("lse", dtype="float32", row_axes=0)),
        parameters=lambda sizes: {"scale": st.sampled_from([None, 0.5])},
        linear_in=("v",),
        key_arrays=("k", "v", "mask"),
        poison=poison_hidden,
        split=halves,
        neutral={"mask": lambda case: np.ones(case.shape("batch 1 queries keys"), bool)},
        bad_inputs=(
            ("a sink for each kv head too many", "s_h", lambda a: a["s_h"].repeat(2)),
            ("sinks of integers", "s_h", lambda a: np.zeros(a["s_h"].shape, np.int64)),
            ("no sinks", "s_h", lambda a: None),
            ("k of another head size", "k", lambda a: a["k"].repeat(2, axis=-1)),
            ("k with more tokens than v", "v", lambda a: a["v"][..., :-1, :]),
            ("kv heads that do not divide", "k", lambda a: a["k"].repeat(7, axis=-3)),
            ("another batch in v", "v", lambda a: a["v"].repeat(2, axis=0)),
            ("an integer mask", "mask", lambda a: np.ones((1, 1, 1, 1), np.int64)),
            ("a mask of too many keys", "mask", lambda a: np.ones((a["k"].shape[-2] + 2,), bool)),
        ),
    ),
)
