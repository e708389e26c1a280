"""Contracts of the mixers of `dsf`: attention and state space models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from attnspec.conformance.case import Case
from attnspec.conformance.contract import Array, Contract, Output, Stream
from attnspec.conformance.contracts.linear.dsf import (
    BATCH,
    LAST,
    SELF,
    VALUES,
    feed,
    outputs_without,
    positive,
)
from attnspec.conformance.contracts.linear.dsf_forms import (
    linear_in_chunks,
    normalised_in_chunks,
    ssd_in_chunks,
)
from attnspec.conformance.values import longer
from attnspec.reference.linear.dsf import (
    linear_attention,
    normalised_attention,
    s6_scan,
    ssd_scan,
)

HEADS = {"batch": (1, 2), "kv_heads": (1, 3), "tokens": (1, 24), "d": (1, 24), "dv": (1, 24)}
ROWS = "batch kv_heads tokens"
Q = Array("q", f"{ROWS} d", role="query")
K = Array("k", f"{ROWS} d", role="key")
V = Array("v", f"{ROWS} dv", role="value")
STATE = "batch kv_heads dv d"


def make_pair(rng: np.random.Generator, case: Case) -> tuple[np.ndarray, np.ndarray]:
    """What a prefix leaves: a sum of features, and values under it."""
    z = 1 + rng.exponential(3.0, case.shape("batch kv_heads d"))
    return rng.standard_normal(case.shape(STATE)) * z[..., None, :], z


def empty_pair(whole: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    q, v = whole["q"], whole["v"]
    return np.zeros((*q.shape[:2], v.shape[3], q.shape[3])), np.zeros((*q.shape[:2], q.shape[3]))


BAD_TOKENS = (
    ("grouped heads", "k", lambda a: a["k"][:, :1].repeat(a["q"].shape[1] + 1, axis=1)),
    ("k of another head size", "k", lambda a: a["k"].repeat(2, axis=-1)),
    ("more values than keys", "v", lambda a: longer(a["v"])),
)
S6 = (
    Array("Delta", make=positive(f"{BATCH} dv")),
    Array("A", make=positive("dv n", size=2.0)),
    Array("b", f"{BATCH} n"),
    Array("c", f"{BATCH} n"),
    Array("u", f"{BATCH} dv", role="value"),
)
SSD = (
    Array("Delta", make=positive(ROWS)),
    Array("a", make=positive("kv_heads", size=1.0)),
    Array("b", f"{ROWS} d", role="key"),
    Array("c", f"{ROWS} d", role="query"),
)
U = Array("u", f"{ROWS} dv", role="value")
BAD_SSD = (
    ("a rate a token", "a", lambda a: a["Delta"]),
    ("a negative rate", "a", lambda a: -1 - a["a"]),
    ("a negative step", "Delta", lambda a: -1 - a["Delta"]),
    ("c of other numbers", "c", lambda a: a["c"].repeat(2, axis=-1)),
)
CONTRACTS = (
    Contract(
        operation="dsf.softmax_attention",
        sizes=HEADS,
        queries="tokens",
        keys="tokens",
        arrays=(Q, K, V),
        outputs=(Output("y"),),
        linear_in=("v",),
        causal=lambda case: True,
        bad_inputs=BAD_TOKENS,
    ),
    Contract(
        operation="dsf.linear_attention",
        sizes=HEADS,
        queries="tokens",
        keys="tokens",
        arrays=(Q, K, V, Array("state", make=make_pair, optional=True)),
        outputs=(Output("y"), LAST, Output("z", dtype="float32", by_query=False)),
        causal=lambda case: True,
        form=linear_in_chunks,
        cancelling=("dq", "dk", "dstate"),
        stream=Stream(
            arrays=(Q, K, V),
            start=empty_pair,
            feed=feed("q", "k", "v", state="state", axis=2),
            whole=outputs_without(linear_attention, "state"),
        ),
        cells=SELF,
        bad_inputs=(
            *BAD_TOKENS,
            ("a state without its normaliser", "state", lambda a: empty_pair(a)[0]),
            ("a state transposed", "state", lambda a: (np.zeros((1, 1, 99, 98)), empty_pair(a)[1])),
        ),
    ),
    Contract(
        operation="dsf.normalised_attention",
        sizes=HEADS,
        queries="tokens",
        keys="tokens",
        arrays=(Q, K, V, Array("n", ROWS), Array("h0", STATE, optional=True)),
        outputs=(Output("y", cancels=True), LAST),
        linear_in=("q", "v h0", "k h0"),
        causal=lambda case: True,
        form=normalised_in_chunks,
        cancelling=("dq", "dk", "dv", "dn", "dh0"),
        neutral={"h0": lambda case: np.zeros(case.shape(STATE))},
        stream=Stream(
            arrays=(Q, K, V, Array("n", ROWS)),
            start=lambda whole: empty_pair(whole)[0],
            feed=feed("q", "k", "v", "n", axis=2),
            whole=outputs_without(normalised_attention, "h0"),
        ),
        cells=SELF,
        bad_inputs=(
            *BAD_TOKENS,
            ("n a channel", "n", lambda a: a["q"]),
            ("a state of another width", "h0", lambda a: empty_pair(a)[0].repeat(2, axis=-1)),
        ),
    ),
    Contract(
        operation="dsf.s6_scan",
        sizes={"batch": (1, 2), "tokens": (1, 24), "dv": (1, 24), "n": (1, 16)},
        queries="tokens",
        keys="tokens",
        values=VALUES,
        arrays=(*S6, Array("D", "dv", optional=True), Array("h0", "batch dv n", optional=True)),
        outputs=(Output("y", cancels=True), LAST),
        linear_in=("u h0", "c D"),
        causal=lambda case: True,
        cancelling=("dDelta", "dA", "db", "dc", "du", "dh0"),
        neutral={
            "D": lambda case: np.zeros(case.shape("dv")),
            "h0": lambda case: np.zeros(case.shape("batch dv n")),
        },
        stream=Stream(
            arrays=(*S6, Array("D", "dv", optional=True)),
            start=lambda whole: np.zeros((whole["u"].shape[0], *whole["A"].shape)),
            feed=feed("Delta", "b", "c", "u"),
            whole=outputs_without(s6_scan, "h0"),
        ),
        cells=SELF,
        bad_inputs=(
            ("a negative step", "Delta", lambda a: -1 - a["Delta"]),
            ("A stored negative", "A", lambda a: -1 - a["A"]),
            ("A of other channels", "A", lambda a: a["A"].repeat(2, axis=0)),
            ("u of other tokens", "u", lambda a: longer(a["u"])),
            ("a state transposed", "h0", lambda a: np.zeros((1, 99, 98))),
        ),
    ),
    Contract(
        operation="dsf.ssd_scan",
        sizes=HEADS,
        queries="tokens",
        keys="tokens",
        arrays=(*SSD, U, Array("h0", STATE, optional=True)),
        outputs=(Output("y", cancels=True), LAST),
        linear_in=("u h0", "b h0", "c"),
        causal=lambda case: True,
        form=ssd_in_chunks,
        cancelling=("dDelta", "da", "db", "dc", "du", "dh0"),
        neutral={"h0": lambda case: np.zeros(case.shape(STATE))},
        stream=Stream(
            arrays=(*SSD, U),
            start=lambda whole: np.zeros(
                (*whole["b"].shape[:2], whole["u"].shape[3], whole["b"].shape[3])
            ),
            feed=feed("Delta", "b", "c", "u", axis=2),
            whole=outputs_without(ssd_scan, "h0"),
        ),
        cells=SELF,
        bad_inputs=(*BAD_SSD, ("u of other tokens", "u", lambda a: longer(a["u"]))),
    ),
    Contract(
        operation="dsf.ssd_as_attention",
        sizes=HEADS,
        queries="tokens",
        keys="tokens",
        arrays=(*SSD, U),
        outputs=(Output("q", "copy"), Output("k", "copy"), Output("v"), Output("log_decay")),
        bad_inputs=BAD_SSD,
    ),
    Contract(
        operation="dsf.ssd_as_normalised",
        sizes={**{axis: span for axis, span in HEADS.items() if axis != "dv"}, "tokens": (1, 6)},
        queries="tokens",
        keys="tokens",
        values=VALUES,
        arrays=(
            Array("Delta", make=positive(ROWS, size=0.05)),
            Array("a", make=positive("kv_heads", size=0.5)),
            *SSD[2:],
        ),
        outputs=(Output("phi", "copy"), Output("psi"), Output("eta", row_axes=0)),
        bad_inputs=BAD_SSD,
    ),
)
