"""Contracts of Flowformer: attention in both orders and one decoded token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.cells import padded_cell
from attnspec.conformance.contract import Array, Contract, Output, Stream
from attnspec.conformance.contracts.linear.based import (
    BAD_EPS,
    BAD_HEADS,
    CROSS,
    HEADS,
    K,
    Q,
    V,
    heads_cell,
    make_key_mask,
    wrong_numbers,
)
from attnspec.conformance.values import feed_tokens, longer
from attnspec.reference.linear.flowformer_causal import (
    FlowState,
    empty_state,
    flow_attend_causal,
)

SELF = {**HEADS, "tokens": (1, 24)}
EPS = st.sampled_from([1e-6, 0.0, 1e-3])
KIND = st.sampled_from(["sigmoid", "relu"])
CLAMP = st.sampled_from([(-1.0, 1.0), None, (-0.5, 0.25)])
FIELDS = FlowState._fields
Drawn = dict[str, st.SearchStrategy[Any]]


def make_query_mask(rng: np.random.Generator, case: Case) -> np.ndarray:
    batch, queries = case.shape("batch queries")
    return np.logical_and(rng.random((batch, queries)) < 0.75, rng.random((batch, 1)) < 0.8)


def make_state(rng: np.random.Generator, case: Case) -> FlowState:
    """The state behind some tokens."""
    batch, heads, d, dv = case.shape("batch heads d dv")
    shape = (batch, heads, int(rng.integers(0, 8)))
    q, k = (rng.standard_normal((*shape, d)) for _ in range(2))
    return flow_attend_causal(q, k, rng.standard_normal((*shape, dv)))[1]


def poison_padding(arguments: dict[str, Any], case: Case) -> dict[str, Any]:
    """NaN in every padded token."""
    for mask, names in (("key_mask", "kv"), ("query_mask", "q")):
        if mask in arguments:
            hidden = ~arguments[mask][:, None, :, None]
            for name in names:
                arguments[name] = np.where(hidden, np.nan, arguments[name])
    return arguments


def _cell(extra_keys: int) -> Any:
    return lambda case: case.with_(sizes={"keys": case.sizes["queries"] + extra_keys})


def _plain(sizes: Mapping[str, int]) -> Drawn:
    return {"eps": EPS, "kind": KIND, "clamp": CLAMP}


def bounded(sizes: Mapping[str, int]) -> Drawn:
    """A state sums exp(Oh) itself, which without a clamp may overflow."""
    return {**_plain(sizes), "clamp": st.sampled_from([(-1.0, 1.0), (-0.5, 0.25), (-3.0, 3.0)])}


STREAM: dict[str, Any] = {
    "arrays": (
        Array("q", "batch heads tokens d", role="query"),
        Array("k", "batch kv_heads tokens d", role="key"),
        Array("v", "batch kv_heads tokens dv", role="value"),
    ),
    "start": lambda whole: empty_state(whole["q"], whole["v"]),
    "feed": feed_tokens,
    "whole": lambda whole: flow_attend_causal(**whole)[0],
}
BAD_KIND = wrong_numbers("kind", "elu", None)
BAD_CLAMP = wrong_numbers("clamp", 1.0, (1.0, -1.0), (1.0,), "ab")
BAD_STATE = (
    ("a state of four parts", "state", lambda a: a["state"][:4]),
    ("a state of another width", "state", lambda a: a["state"]._replace(
        KV=a["state"].KV.repeat(2, axis=-1))),
    ("an integer N", "state", lambda a: a["state"]._replace(
        N=a["state"].N.astype(np.int64))),
)  # fmt: skip
STATE = tuple(
    Output(f"state.{name}", dtype="float32", row_axes=0 if name in ("se", "N") else 1,
           by_query=False)
    for name in FIELDS
)  # fmt: skip


CONTRACTS = (
    Contract(
        operation="flowformer.flow_attend",
        sizes=CROSS,
        arrays=(
            Q,
            K,
            V,
            Array("key_mask", "batch keys", make=make_key_mask, optional=True),
            Array("query_mask", "batch queries", make=make_query_mask, optional=True),
        ),
        outputs=(Output("out"),),
        parameters=_plain,
        linear_in=("v",),
        cancelling=("dq", "dk"),
        key_arrays=("k", "v", "key_mask"),
        poison=poison_padding,
        neutral={
            "key_mask": lambda case: np.ones(case.shape("batch keys"), bool),
            "query_mask": lambda case: np.ones(case.shape("batch queries"), bool),
        },
        cells={
            "noncausal self": _cell(0),
            "noncausal cross": _cell(3),
            "left": padded_cell("left"),
            "right": padded_cell("right"),
            "MHA": heads_cell(2, 1),
            "GQA": heads_cell(2, 3),
            "MQA": heads_cell(1, 4),
        },
        bad_inputs=(
            *BAD_HEADS,
            *BAD_EPS,
            *BAD_KIND,
            *BAD_CLAMP,
            ("an integer key_mask", "key_mask", lambda a: np.ones(a["k"].shape[::2], np.int64)),
            ("a query_mask of more", "query_mask", lambda a: np.ones((1, 99), bool)),
        ),
    ),
    Contract(
        operation="flowformer.flow_attend_causal",
        sizes=SELF,
        queries="tokens",
        keys="tokens",
        arrays=(*STREAM["arrays"], Array("state", make=make_state, optional=True)),
        outputs=(Output("out"), *STATE),
        parameters=bounded,
        cancelling=("dq", "dk"),
        causal=lambda case: True,
        stream=Stream(**STREAM),
        cells={
            "causal self": lambda case: case,
            "MHA": heads_cell(2, 1),
            "GQA": heads_cell(2, 3),
            "MQA": heads_cell(1, 4),
        },
        bad_inputs=(
            ("more queries than keys", "q", lambda a: longer(a["q"])),
            ("a list as state", "state", lambda a: [1]),
            *BAD_HEADS,
            *BAD_EPS,
            *BAD_KIND,
            *BAD_CLAMP,
        ),
    ),
    Contract(
        operation="flowformer.flow_decode_step",
        sizes={**HEADS, "tokens": (1, 6)},
        least={"tokens": 1},
        arrays=(
            Array("state", make=make_state),
            Array("q", "batch heads 1 d", role="query"),
            Array("k", "batch kv_heads 1 d", role="key"),
            Array("v", "batch kv_heads 1 dv", role="value"),
        ),
        outputs=(Output("out"), *STATE),
        parameters=bounded,
        stream=Stream(**STREAM, chunked=False),
        bad_inputs=(
            ("two tokens in q", "q", lambda a: longer(a["q"])),
            *BAD_STATE,
            *BAD_HEADS,
            *BAD_EPS,
            *BAD_KIND,
            *BAD_CLAMP,
        ),
    ),
)
