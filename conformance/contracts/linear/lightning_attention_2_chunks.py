"""Contracts of Lightning Attention-2 inside a block: states, outputs and gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from attnspec.conformance.case import Case
from attnspec.conformance.contract import Array, Contract, Output
from attnspec.conformance.contracts.linear.lightning_attention_2 import (
    BAD_HEADS,
    S0,
    SELF,
    STATE,
    K,
    Q,
    V,
    blocks,
    wrong_integers,
)
from attnspec.reference.linear.lightning_attention_2_chunks import chunk_states


def make_log_decays(rng: np.random.Generator, case: Case) -> np.ndarray:
    """A rate of its own for every token; some heads forget at once, some tokens not at all."""
    shape = case.shape("batch heads tokens")
    g = -rng.exponential(0.3, shape)
    strong = rng.random((*shape[:-1], 1)) < 0.15
    return np.where(rng.random(shape) < 0.2, 0.0, np.where(strong, -50.0, g))


def _entering(rng: np.random.Generator, case: Case) -> np.ndarray:
    count = -(-case.sizes["tokens"] // case.parameters["block"])
    batch, heads, d, dv = case.shape("batch heads d dv")
    return rng.standard_normal((batch, heads, count, d, dv))


def _states(a: Mapping[str, Any]) -> tuple[int, ...]:
    return (*a["g"].shape[:-1], a["k"].shape[-1], a["v"].shape[-1])


def _states_in_chunks(block: int, **a: Any) -> tuple[np.ndarray, np.ndarray]:
    """The states at the ends of blocks, and the last one as chunks of 64 tokens give it."""
    return chunk_states(**a, block=block)[0], chunk_states(**a, block=64)[1]


G = Array("g", "batch heads tokens", make=make_log_decays)
BAD_DECAYS = (
    ("a log decay above 0", "g", lambda a: 1.0 - a["g"]),
    ("a log decay that is NaN", "g", lambda a: a["g"] + np.nan),
    ("a log decay of -inf", "g", lambda a: a["g"] - np.inf),
    ("log decays of more tokens", "g", lambda a: a["g"].repeat(2, axis=-1)),
    ("log decays without a batch", "g", lambda a: a["g"][0]),
    ("no log decays", "g", lambda a: None),
)
BAD_STATE = (
    ("a state of another width", "S0", lambda a: np.zeros((*_states(a)[:-1], 99))),
    ("an integer state", "S0", lambda a: np.zeros(_states(a), np.int64)),
)
BAD_QUERIES = (
    ("more queries than keys", "q", lambda a: a["q"].repeat(2, axis=-2)),
    ("q of another head size", "q", lambda a: a["q"].repeat(2, axis=-1)),
)
# The heads and the width are those of g and k: k has nothing to disagree with.
BAD_KEYS = tuple(bad for bad in BAD_HEADS if bad[0] != "k of another head size")

CONTRACTS = (
    Contract(
        operation="lightning_attention_2.chunk_states",
        sizes=SELF,
        arrays=(K, V, G, S0),
        outputs=(Output("S_entering", dtype="float32"), STATE),
        form=_states_in_chunks,
        parameters=blocks,
        linear_in=("v S0", "k S0"),
        neutral={"S0": lambda case: np.zeros(case.shape("batch heads d dv"))},
        bad_inputs=(*BAD_KEYS, *BAD_DECAYS, *BAD_STATE, *wrong_integers("block")),
    ),
    Contract(
        operation="lightning_attention_2.chunk_output",
        sizes=SELF,
        queries="tokens",
        keys="tokens",
        arrays=(Q, K, V, G, Array("S_entering", make=_entering)),
        outputs=(Output("o"),),
        parameters=blocks,
        linear_in=("q", "v S_entering", "k S_entering"),
        bad_inputs=(
            ("a state too many", "S_entering", lambda a: a["S_entering"].repeat(2, axis=-3)),
            ("no states", "S_entering", lambda a: None),
            *BAD_QUERIES,
            *BAD_KEYS,
            *BAD_DECAYS,
            *wrong_integers("block"),
        ),
    ),
    Contract(
        operation="lightning_attention_2.backward_chunk",
        sizes=SELF,
        queries="tokens",
        keys="tokens",
        arrays=(
            Q,
            K,
            V,
            G,
            Array("do", "batch heads tokens dv"),
            Array("dS_final", "batch heads d dv", optional=True),
            S0,
        ),
        outputs=(
            Output("dq"),
            Output("dk"),
            Output("dv"),
            Output("dg", cancels=True),
            Output("dS0", dtype="float32"),
        ),
        parameters=blocks,
        linear_in=("do dS_final",),
        neutral={
            "S0": lambda case: np.zeros(case.shape("batch heads d dv")),
            "dS_final": lambda case: np.zeros(case.shape("batch heads d dv")),
        },
        bad_inputs=(
            ("an upstream of more tokens", "do", lambda a: a["do"].repeat(2, axis=-2)),
            ("an upstream of another width", "do", lambda a: a["do"].repeat(2, axis=-1)),
            ("a final gradient of another shape", "dS_final", lambda a: np.zeros((1, 1))),
            *BAD_QUERIES,
            *BAD_KEYS,
            *BAD_DECAYS,
            *BAD_STATE,
            *wrong_integers("block"),
        ),
    ),
)
