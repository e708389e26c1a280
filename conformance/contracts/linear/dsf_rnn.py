"""Contracts of the gated RNNs of `dsf`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.contract import Array, Contract, Output, Stream
from attnspec.conformance.contracts.linear.dsf import (
    BATCH,
    LAST,
    SELF,
    VALUES,
    feed,
    outputs_without,
)
from attnspec.conformance.values import longer
from attnspec.reference.linear.dsf import qlstm, qlstm_layer, rg_lru

RNN = {"batch": (1, 2), "tokens": (1, 24), "N": (1, 24)}
ALPHA = {"alpha": st.sampled_from([1.0, 2.5, 0.0, -1.0]), "reversed": st.booleans()}
GATES = tuple(Array(name, f"{BATCH} N") for name in ("f", "i", "o", "z"))
BAD_ALPHA = (
    ("alpha that is NaN", "alpha", lambda a: float("nan")),
    ("reversed = 1", "reversed", lambda a: 1),
)
LAYER = (
    Array("x", f"{BATCH} model", role="value"),
    Array("input_weight", "2*N model"),
    Array("conv_weight", "N width"),
    Array("conv_bias", "N"),
    Array("gates_weight", "3*N N"),
    Array("gates_bias", "3*N"),
    Array("output_weight", "model N"),
)


def make_layer_state(rng: np.random.Generator, case: Case) -> tuple[np.ndarray, np.ndarray]:
    rows = case.sizes["batch"], case.sizes["width"] - 1, case.sizes["N"]
    return rng.standard_normal(case.shape("batch N")), rng.standard_normal(rows)


def empty_layer_state(whole: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    hidden, width = whole["conv_weight"].shape
    batch = whole["x"].shape[0]
    return np.zeros((batch, hidden)), np.zeros((batch, width - 1, hidden))


CONTRACTS = (
    Contract(
        operation="dsf.qlstm",
        sizes=RNN,
        queries="tokens",
        keys="tokens",
        arrays=(*GATES, Array("h0", "batch N", optional=True)),
        outputs=(Output("y", cancels=True), LAST),
        parameters=lambda sizes: ALPHA,
        linear_in=("z h0",),
        causal=lambda case: True,
        cancelling=("df", "di", "do", "dz", "dalpha", "dh0"),
        neutral={"h0": lambda case: np.zeros(case.shape("batch N"))},
        stream=Stream(
            arrays=GATES,
            start=lambda whole: np.zeros_like(whole["z"][:, 0]),
            feed=feed("f", "i", "o", "z"),
            whole=outputs_without(qlstm, "h0"),
        ),
        cells=SELF,
        bad_inputs=(*BAD_ALPHA, ("z of other tokens", "z", lambda a: longer(a["z"]))),
    ),
    Contract(
        operation="dsf.qlstm_layer",
        sizes={**RNN, "N": (1, 8), "model": (1, 6), "width": (1, 4)},
        queries="tokens",
        keys="tokens",
        values=VALUES,
        arrays=(*LAYER, Array("state", make=make_layer_state, optional=True)),
        outputs=(
            Output("out", cancels=True),
            Output("h", dtype="float32", by_query=False, cancels=True),
            Output("rows", by_query=False, cancels=True),
        ),
        parameters=lambda sizes: ALPHA,
        causal=lambda case: True,
        cancelling=(*(f"d{array.name}" for array in LAYER), "dalpha", "dstate"),
        stream=Stream(
            arrays=LAYER,
            start=empty_layer_state,
            feed=feed("x", state="state"),
            whole=outputs_without(qlstm_layer, "state"),
        ),
        bad_inputs=(
            *BAD_ALPHA,
            ("weights of one gate", "gates_weight", lambda a: a["gates_weight"][:1]),
            ("a state that is h alone", "state", lambda a: empty_layer_state(a)[0]),
        ),
    ),
    Contract(
        operation="dsf.rg_lru",
        sizes=RNN,
        queries="tokens",
        keys="tokens",
        values=VALUES,
        arrays=(
            *(Array(name, f"{BATCH} N") for name in ("u", "r", "g")),
            Array("lam", "N"),
            Array("h0", "batch N", optional=True),
        ),
        outputs=(Output("y", cancels=True), LAST),
        parameters=lambda sizes: {"c": st.sampled_from([8.0, 1.0])},
        linear_in=("u h0",),
        causal=lambda case: True,
        cancelling=("du", "dr", "dg", "dlam", "dh0"),
        neutral={"h0": lambda case: np.zeros(case.shape("batch N"))},
        stream=Stream(
            arrays=(
                *(Array(name, f"{BATCH} N") for name in ("u", "r", "g")),
                Array("lam", "N"),
            ),
            start=lambda whole: np.zeros_like(whole["u"][:, 0]),
            feed=feed("u", "r", "g"),
            whole=outputs_without(rg_lru, "h0"),
        ),
        bad_inputs=(("c = 0", "c", lambda a: 0.0), ("lam a token", "lam", lambda a: a["r"])),
    ),
)
