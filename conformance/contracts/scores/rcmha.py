"""Contracts of RCMHA as a whole: its attention, a segment after its memory, decoding.

Its steps are in `rcmha_steps`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.cells import heads_cell, keys_cell
from attnspec.conformance.contract import Array, Contract, Output, Stream
from attnspec.conformance.kernel import Kernel
from attnspec.conformance.laws.base import Law, Strategy, draw_case
from attnspec.conformance.trial import Trial
from attnspec.conformance.values import feed_tokens
from attnspec.reference.scores.rcmha import (
    attend_segment,
    depthwise_causal_conv,
    init_state,
    relative_attention,
)
from attnspec.reference.scores.rcmha_layer import State

SIZES = {
    "batch": (1, 2),
    "kv_heads": (1, 3),
    "queries": (1, 24),
    "keys": (1, 24),
    "d": (1, 24),
    "dv": (1, 24),
}
SEGMENT = {"batch": (1, 2), "kv_heads": (1, 3), "memory": (0, 12), "tokens": (1, 16), "d": (1, 12)}
DECODING = {"batch": (1, 2), "kv_heads": (1, 3), "past": (0, 16), "tokens": (1, 4), "d": (1, 24)}
TOKENS = ("keys", "memory", "past", "tokens")


def fit_queries(sizes: dict[str, int]) -> dict[str, int]:
    """No more queries than keys: those before them are the memory."""
    return {**sizes, "queries": min(sizes["queries"], sizes["keys"])}


def make_table(*axes: str) -> Any:
    """A table (2 P, heads, ...) with P a little above the number of tokens, the least there is."""

    def make(rng: np.random.Generator, case: Case) -> np.ndarray:
        tokens = sum(case.sizes.get(axis, 0) for axis in TOKENS)
        P = tokens + case.seed % 4
        return rng.standard_normal((2 * P, case.heads, *(case.sizes[axis] for axis in axes)))

    return make


def make_normal(axes: str, per: str = "") -> Any:
    """Standard normal numbers, divided by the square root of the size `per`."""

    def make(rng: np.random.Generator, case: Case) -> np.ndarray:
        numbers = rng.standard_normal(case.shape(axes))
        return numbers / np.sqrt(max(case.size(per), 1)) if per else numbers

    return make


def poison_unseen(arguments: dict[str, Any], case: Case) -> dict[str, Any]:
    """NaN in the rows of the tables for distances that no visible pair has."""
    P, (queries, keys) = len(arguments["R"]) // 2, case.shape("queries keys")
    row = np.arange(2 * P)
    ahead = 0 if arguments["causal"] else queries - 1
    unseen = (row <= P - keys) | (row > P + ahead)
    for name in ("R", "b"):
        arguments[name] = arguments[name].copy()
        arguments[name][unseen] = np.nan
    return arguments


def _self(causal: bool) -> Any:
    return keys_cell(causal, 0)


def _state(rng: np.random.Generator, case: Case) -> State:
    rows = (*case.shape("batch heads"), case.sizes["taps"] - 1, case.sizes["d"])
    cache = case.shape("batch heads past d")
    return State(*(rng.standard_normal(shape) for shape in (rows, rows, rows, cache, cache)))


def _whole(whole: Mapping[str, Any]) -> np.ndarray:
    """All tokens at once: convolved from zeros, then attention."""
    q, k, v = (
        depthwise_causal_conv(whole[name], whole["w"][n], whole["c"][n])[0]
        for n, name in enumerate(("q", "k", "v"))
    )
    return relative_attention(q, k, v, whole["R"], whole["b"], whole["u"])


Q = Array("q", "batch heads queries d", role="query")
K = Array("k", "batch heads keys d", role="key")
V = Array("v", "batch heads keys dv", role="value")
R = Array("R", make=make_table("d"))
B = Array("b", make=make_table())
U = Array("u", "heads d", role="query")
FILTERS = Array("w", make=make_normal("3 d taps"))
SHIFTS = Array("c", make=make_normal("3 d"))
NEW = (
    Array("q", "batch heads tokens d", role="query"),
    Array("k", "batch heads tokens d", role="key"),
    Array("v", "batch heads tokens d", role="value"),
    FILTERS,
    SHIFTS,
    R,
    B,
    U,
)
BAD_TABLES = (
    ("an odd number of rows", "R", lambda a: a["R"][1:]),
    ("tables for fewer tokens", "R", lambda a: a["R"][:0]),
    ("a table of other heads", "R", lambda a: a["R"].repeat(2, axis=1)),
    ("a table of another width", "R", lambda a: a["R"].repeat(2, axis=2)),
    ("numbers for fewer distances", "b", lambda a: a["b"][1:]),
    ("a bias of other heads", "u", lambda a: a["u"].repeat(2, axis=0)),
    ("a bias of another width", "u", lambda a: a["u"].repeat(2, axis=1)),
)
BAD_FILTERS = (
    ("two filters", "w", lambda a: a["w"][:2]),
    ("filters of another width", "w", lambda a: a["w"].repeat(2, axis=1)),
    ("two shifts", "c", lambda a: a["c"][:2]),
)
CONTRACTS = (
    Contract(
        operation="rcmha.relative_attention",
        sizes=SIZES,
        fix=fit_queries,
        arrays=(Q, K, V, R, B, U),
        outputs=(Output("out", cancels=True),),
        parameters=lambda sizes: {
            "causal": st.sampled_from([True, True, False]),
            "scale": st.sampled_from([None, 0.125]),
        },
        linear_in=("v",),
        causal=lambda case: case.parameters["causal"],
        poison=poison_unseen,
        cells={
            "causal self": _self(True),
            "noncausal self": _self(False),
            "causal cross": keys_cell(True, 5),
            "MHA": heads_cell(3, 1),
        },
        bad_inputs=(
            ("fewer keys than queries", "k", lambda a: a["k"][..., : a["q"].shape[-2] - 1, :]),
            ("k of another head size", "k", lambda a: a["k"].repeat(2, axis=-1)),
            ("other heads in k", "k", lambda a: a["k"].repeat(2, axis=-3)),
            ("another batch in v", "v", lambda a: a["v"].repeat(2, axis=0)),
            ("v with fewer tokens", "v", lambda a: a["v"][..., :-1, :]),
            *BAD_TABLES,
        ),
        cancelling=("dq", "dk", "dR", "db", "du"),
    ),
    Contract(
        operation="rcmha.attend_segment",
        sizes={**SEGMENT, "taps": (1, 4)},
        queries="tokens",
        keys="tokens",
        arrays=(
            Array("x", "batch tokens kv_heads*d"),
            Array("memory", "batch memory kv_heads*d", optional=True),
            Array("W", make=make_normal("4 kv_heads*d kv_heads*d", "kv_heads*d")),
            Array("biases", make=make_normal("2 kv_heads*d")),
            FILTERS,
            SHIFTS,
            R,
            B,
            U,
        ),
        outputs=(Output("out", cancels=True),),
        parameters=lambda sizes: {"q_conv_state": st.sampled_from(["reset", "carry"])},
        causal=lambda case: True,
        cells={"MHA": heads_cell(3, 1), "causal self": lambda case: case},
        bad_inputs=(
            ("three matrices", "W", lambda a: a["W"][:3]),
            ("one bias", "biases", lambda a: a["biases"][:1]),
            ("a memory of another batch", "memory", lambda a: a["x"].repeat(2, axis=0)),
            ("another state", "q_conv_state", lambda a: "keep"),
            *BAD_FILTERS,
            *BAD_TABLES,
        ),
        cancelling=("dx", "dmemory", "dW", "dbiases", "dw", "dc", "dR", "db", "du"),
    ),
    Contract(
        operation="rcmha.init_state",
        sizes={**DECODING, "taps": (1, 4)},
        queries="tokens",
        keys="tokens",
        arrays=(Array("p", "batch heads tokens d"),),
        outputs=tuple(
            Output(f"state.{name}", kind="exact")
            for name in ("q_rows", "k_rows", "v_rows", "k", "v")
        ),
        parameters=lambda sizes: {"K": st.just(sizes["taps"])},
        bad_inputs=(("no taps", "K", lambda a: 0), ("half a tap", "K", lambda a: 0.5)),
    ),
    Contract(
        operation="rcmha.step",
        sizes={**DECODING, "taps": (1, 4)},
        queries="tokens",
        keys="tokens",
        least={"tokens": 1},
        arrays=(*NEW, Array("state", make=_state)),
        outputs=(
            Output("out", cancels=True),
            *(Output(f"state.{name}", kind="copy") for name in ("q_rows", "k_rows", "v_rows")),
            Output("state.k"),
            Output("state.v"),
        ),
        stream=Stream(
            arrays=NEW,
            start=lambda whole: init_state(whole["q"], whole["w"].shape[-1]),
            feed=feed_tokens,
            whole=_whole,
        ),
        cells={"MHA": heads_cell(3, 1)},
        bad_inputs=(
            ("k with more tokens than q", "k", lambda a: a["k"].repeat(2, axis=-2)),
            ("v of another head size", "v", lambda a: a["v"].repeat(2, axis=-1)),
            ("no state", "state", lambda a: None),
            (
                "a state of other filters",
                "state",
                lambda a: a["state"]._replace(
                    q_rows=np.concatenate([a["state"].q_rows, a["q"][..., :1, :]], axis=-2)
                ),
            ),
            (
                "a cache of fewer keys than values",
                "state",
                lambda a: a["state"]._replace(v=np.concatenate([a["state"].v, a["v"]], axis=-2)),
            ),
            *BAD_FILTERS,
            *BAD_TABLES,
        ),
    ),
)


def _carried(contract: Contract, kernel: Kernel, dtype: str) -> Strategy:
    return draw_case(contract, kernel, dtype, parameters={"q_conv_state": "carry"})


def check_segments(trial: Trial) -> None:
    """With q carried and all earlier tokens in the memory, cuts do not matter."""
    whole = {**trial.arguments(), "memory": None}
    x = whole["x"]
    tokens = x.shape[-2]
    cut = int(trial.case.generator("cut").integers(0, tokens + 1))
    parts = []
    for first, last in ((0, cut), (cut, tokens)):
        rows = {"x": x[..., first:last, :], "memory": x[..., :first, :]}
        parts.append(trial.run({**whole, **rows})["out"])
    trial.judge({"out": np.concatenate(parts, axis=-2)}, whole)


LAWS = (
    Law(
        "rcmha-segments",
        "Two segments, the first in the memory of the second, are one when q is carried.",
        ("K13",),
        _carried,
        check_segments,
        applies=lambda contract, kernel: contract.spec.function is attend_segment,
        examples=0.3,
    ),
)
