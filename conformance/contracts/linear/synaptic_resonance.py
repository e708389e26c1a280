"""Contracts of Synaptic Resonance: relevance, the memory in two forms, the whole, and its step.

The mechanism's own laws are in `synaptic_resonance_laws`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.cells import heads_cell
from attnspec.conformance.contract import Array, Contract, Output, Stream
from attnspec.conformance.contracts.linear.synaptic_resonance_forms import (
    memory_by_token,
    memory_in_chunks,
    step_by_token,
    trace_held,
    whole_by_token,
)
from attnspec.conformance.values import feed_tokens
from attnspec.reference.linear.synaptic_resonance import synaptic_resonance
from attnspec.reference.linear.synaptic_resonance_decode import State, init_state

SIZES = {
    "batch": (1, 2), "kv_heads": (1, 2), "group": (1, 3), "tokens": (1, 24), "d": (1, 16),
    "dv": (1, 16),
}  # fmt: skip
Drawn = dict[str, st.SearchStrategy[Any]]


def make_valid(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Padding on one side, up to all of it; or three tokens of four at random, seldom none."""
    batch, tokens = case.shape("batch tokens")
    if {"left", "right"} & set(case.options):
        real = np.arange(tokens) >= rng.integers(0, tokens + 1, (batch, 1))
        return real if "left" in case.options else real[:, ::-1].copy()
    return np.logical_and(rng.random((batch, tokens)) < 0.75, rng.random((batch, 1)) < 0.9)


def make_rho(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Gates from 0 to 1, both ends among them."""
    rho = rng.random(case.shape("batch kv_heads tokens")) * 1.6 - 0.3
    return np.clip(rho, 0.0, 1.0)


def make_trace(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Some heads have seen nothing: their trace is exactly 0."""
    c = rng.standard_normal(case.shape("batch kv_heads d"))
    return np.where(rng.random(c.shape[:2])[..., None] < 0.25, 0.0, c)


def poison_padding(arguments: dict[str, Any], case: Case) -> dict[str, Any]:
    """NaN in every row and gate of a padded token."""
    if arguments.get("valid") is not None:
        padded = ~arguments["valid"][:, None]
        for name in {"q", "k", "v", "rho"} & set(arguments):
            x = arguments[name]
            rows = padded if name == "rho" else padded[..., None]
            arguments[name] = np.where(rows, np.nan, x)
    return arguments


def _padded(side: str) -> Any:
    return lambda case: case.with_(options=tuple({*case.options, "valid", side}))


def writes(sizes: Mapping[str, int]) -> Drawn:
    return {
        "eta": st.sampled_from([0.125, 1.0, 0.0, 0.5]),
        "lam": st.sampled_from([0.99, 1.0, 0.0, 0.5]),
    }


def traces(sizes: Mapping[str, int]) -> Drawn:
    return {"mu": st.sampled_from([0.9, 0.5, 0.0, 0.99])}


def chunks(sizes: Mapping[str, int]) -> Drawn:
    return {**writes(sizes), "chunk": st.sampled_from([64, 1, 2, 5, 16, 100])}


def everything(sizes: Mapping[str, int]) -> Drawn:
    mix = {
        "beta": st.sampled_from([0.5, 1.0, -2.0]),
        "window": st.sampled_from([None, 1, 2, 5, 40]),
    }
    return {**writes(sizes), **traces(sizes), **mix}


def beyond(name: str, *values: Any) -> tuple[tuple[str, str, Any], ...]:
    """Values that a number must not have."""
    return tuple((f"{name} = {x}", name, lambda a, x=x: x) for x in (*values, float("nan"), "1"))


Q = Array("q", "batch heads tokens d", role="query")
K = Array("k", "batch kv_heads tokens d", role="key")
V = Array("v", "batch kv_heads tokens dv", role="value")
RHO = Array("rho", "batch kv_heads tokens", make=make_rho)
S0 = Array("S0", "batch kv_heads d dv", optional=True)
C0 = Array("c0", "batch kv_heads d", make=make_trace, optional=True)
VALID = Array("valid", "batch tokens", make=make_valid, optional=True)
CELLS = {
    "causal self": lambda case: case,
    "left": _padded("left"),
    "right": _padded("right"),
    "MHA": heads_cell(2, 1),
    "GQA": heads_cell(2, 3),
    "MQA": heads_cell(1, 4),
}
NEUTRAL = {
    "S0": lambda case: np.zeros(case.shape("batch kv_heads d dv")),
    "valid": lambda case: np.ones(case.shape("batch tokens"), bool),
}
FRESH = {"c0": lambda case: np.zeros(case.shape("batch kv_heads d"))}
LAST_S = Output("S", dtype="float32", by_query=False)
LAST_C = Output("c", dtype="float32", by_query=False)
BAD_VALID = (
    ("valid as numbers", "valid", lambda a: np.ones(a["k"].shape[::2], np.int64)),
    ("valid with an axis of heads", "valid", lambda a: np.ones(a["k"].shape[:3], bool)),
    ("valid of more tokens", "valid", lambda a: np.ones((len(a["k"]), 99), bool)),
)
BAD_TRACE = (
    *beyond("mu", 1.0, 1.5, -0.1, None),
    ("a trace of another width", "c0", lambda a: np.zeros((*a["k"].shape[:2], 99))),
    ("a trace without heads", "c0", lambda a: np.zeros(a["k"].shape[::3])),
    ("an integer trace", "c0", lambda a: np.zeros(a["k"][:, :, 0].shape, np.int64)),
)
BAD_TOKENS = (
    ("k of another width", "k", lambda a: np.repeat(a["k"], 2, axis=-1)),
    ("more queries than keys", "q", lambda a: np.repeat(a["q"], 2, axis=-2)),
    ("more values than keys", "v", lambda a: np.repeat(a["v"], 2, axis=-2)),
    ("heads that do not divide", "k", lambda a: np.repeat(a["k"], 7, axis=-3)),
    ("another batch in v", "v", lambda a: np.repeat(a["v"], 2, axis=0)),
    *beyond("eta", -0.1, float("inf"), True),
    *beyond("lam", -0.1, 1.01),
)
BAD_STATE = (
    ("a state of other values", "S0", lambda a: np.zeros((*a["k"].shape[:2], 99, 1))),
    ("a state without heads", "S0", lambda a: np.zeros((len(a["k"]), 1, 1))),
)
BAD_RHO = (
    ("no gates", "rho", lambda a: None),
    ("gates of query heads", "rho", lambda a: np.repeat(a["rho"], 7, axis=1)),
    ("gates with a last axis", "rho", lambda a: a["rho"][..., None]),
    ("integer gates", "rho", lambda a: np.ones(a["rho"].shape, np.int64)),
)
BAD_MIX = (
    *beyond("beta", float("inf"), None),
    *((f"window = {x}", "window", lambda a, x=x: x) for x in (0, -1, 2.5, True)),
)


def memory(name: str, parameters: Any, **rest: Any) -> Contract:
    return Contract(
        operation=f"synaptic_resonance.{name}",
        sizes=SIZES,
        queries="tokens",
        keys="tokens",
        arrays=(Q, K, V, RHO, S0, VALID),
        outputs=(Output("m"), LAST_S),
        parameters=parameters,
        linear_in=("v S0",),
        causal=lambda case: True,
        poison=poison_padding,
        neutral=NEUTRAL,
        cells=CELLS,
        **rest,
    )


BAD_MEMORY = (*BAD_TOKENS, *BAD_STATE, *BAD_RHO, *BAD_VALID)


def _state(rng: np.random.Generator, case: Case) -> State:
    shape = case.shape("batch kv_heads past")
    keys = rng.standard_normal((*shape, case.sizes["d"]))
    S = rng.standard_normal(case.shape("batch kv_heads d dv"))
    return State(keys, rng.standard_normal((*shape, case.sizes["dv"])), S, make_trace(rng, case))


CONTRACTS = (
    Contract(
        operation="synaptic_resonance.relevance",
        sizes={axis: span for axis, span in SIZES.items() if axis not in ("group", "dv")},
        queries="tokens",
        keys="tokens",
        arrays=(K, VALID, C0),
        outputs=(Output("rho", dtype="float32", row_axes=0, by_query=False), LAST_C),
        parameters=traces,
        form=trace_held,
        poison=poison_padding,
        neutral={"valid": NEUTRAL["valid"], **FRESH},
        cells={name: CELLS[name] for name in ("causal self", "left", "right")},
        bad_inputs=(
            ("integer keys", "k", lambda a: np.ones(a["k"].shape, np.int64)),
            *BAD_TRACE,
            *BAD_VALID,
        ),
    ),
    memory("memory_recurrent", writes, form=memory_in_chunks, bad_inputs=BAD_MEMORY),
    memory(
        "memory_chunked",
        chunks,
        form=memory_by_token,
        bad_inputs=(
            *BAD_MEMORY,
            *((f"chunk = {x}", "chunk", lambda a, x=x: x) for x in (0, 2.5, None, True)),
        ),
    ),
    Contract(
        operation="synaptic_resonance.synaptic_resonance",
        sizes=SIZES,
        queries="tokens",
        keys="tokens",
        arrays=(Q, K, V, S0, C0, VALID),
        outputs=(Output("y"), LAST_S, LAST_C),
        parameters=everything,
        form=whole_by_token,
        linear_in=("v S0",),
        causal=lambda case: True,
        poison=poison_padding,
        neutral={**NEUTRAL, **FRESH},
        cells=CELLS,
        bad_inputs=(*BAD_TOKENS, *BAD_STATE, *BAD_TRACE, *BAD_MIX, *BAD_VALID),
    ),
    Contract(
        operation="synaptic_resonance.step",
        sizes={**SIZES, "past": (0, 16), "tokens": (1, 4)},
        least={"tokens": 1},
        queries="tokens",
        keys="tokens",
        arrays=(Array("state", make=_state), Q, K, V),
        outputs=(
            Output("y"),
            Output("state.k"),
            Output("state.v"),
            Output("state.S", dtype="float32", by_query=False),
            Output("state.c", dtype="float32", by_query=False),
        ),
        parameters=everything,
        form=step_by_token,
        stream=Stream(
            arrays=(Q, K, V),
            start=lambda whole: init_state(whole["k"], whole["v"]),
            feed=feed_tokens,
            whole=lambda whole: synaptic_resonance(**whole)[0],
        ),
        bad_inputs=(*BAD_TOKENS, *BAD_TRACE[:6], *BAD_MIX),
    ),
)
