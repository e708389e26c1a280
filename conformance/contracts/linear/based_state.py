"""Contracts of Based with a state: update, read, one token, chunks and packed sequences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.contract import Array, Contract, Output, Stream
from attnspec.conformance.contracts.linear.based import (
    BAD_EPS,
    BAD_HEADS,
    BAD_SCALE,
    EPS,
    HEADS,
    SCALE,
    Drawn,
    heads_cell,
    wrong_numbers,
)
from attnspec.conformance.packing import (
    BAD_OFFSETS,
    OFFSETS,
    PACKED,
    Packed,
    cut_rows,
    packed_sizes,
)
from attnspec.conformance.values import longer
from attnspec.reference.linear.based import based_chunk, based_state_update
from attnspec.reference.linear.based_features import feature_count

SELF = {**HEADS, "tokens": (1, 24)}
MOST = 24
"""The widest keys tried: a state has d * d numbers a value channel."""


def narrow(sizes: dict[str, int]) -> dict[str, int]:
    return {**sizes, "d": min(sizes["d"], MOST)}


def past(case: Case, leading: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The state of some earlier tokens: any other may have a denominator of 0."""
    rng = case.generator("past")
    d, dv, tokens = case.sizes["d"], case.sizes["dv"], int(rng.integers(1, 12))
    D = feature_count(d)
    k = rng.standard_normal((*leading, tokens, d))
    v = rng.standard_normal((*leading, tokens, dv))
    S, zk = based_state_update(np.zeros((*leading, D, dv)), np.zeros((*leading, D)), k, v)
    return S, zk


def make_s(rng: np.random.Generator, case: Case) -> np.ndarray:
    return past(case, case.shape("batch kv_heads"))[0]


def make_zk(rng: np.random.Generator, case: Case) -> np.ndarray:
    return past(case, case.shape("batch kv_heads"))[1]


def no_state(a: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    shape = (*a["k"].shape[:-2], feature_count(a["k"].shape[-1]))
    return np.zeros((*shape, a["v"].shape[-1])), np.zeros(shape)


def _tokens(whole: Mapping[str, Any], first: int, last: int) -> dict[str, Any]:
    return {name: whole[name][..., first:last, :] for name in ("q", "k", "v")}


def _feed_as(S: str, zk: str) -> Any:
    return lambda whole, state, first, last: {
        **whole, **_tokens(whole, first, last), S: state[0], zk: state[1],
    }  # fmt: skip


def _whole(whole: Mapping[str, Any]) -> np.ndarray:
    """Token by token: a state in which scores have cancelled is less exact than their sum."""
    chosen = {name: whole[name] for name in ("q", "k", "v", "eps", "scale")}
    return based_chunk(**chosen, chunk=1)[0]


def _numbers(sizes: Mapping[str, int]) -> Drawn:
    return {"eps": EPS, "scale": SCALE}


def _chunks(sizes: Mapping[str, int]) -> Drawn:
    return {"chunk": st.sampled_from([64, 1, 2, 7, 16, 200]), **_numbers(sizes)}


def wider(name: str) -> Any:
    return lambda a: np.zeros((*no_state(a)[name == "zk"].shape[:-1], 99))


Q = Array("q", "batch heads tokens d", role="query")
K = Array("k", "batch kv_heads tokens d", role="key")
V = Array("v", "batch kv_heads tokens dv", role="value")
S = Array("S", "", make=make_s)
ZK = Array("zk", "", make=make_zk)
STATE = (
    Output("S", dtype="float32", by_query=False),
    Output("zk", dtype="float32", by_query=False),
)
BAD_STATE = (
    ("S of another width", "S", wider("S")),
    ("S without a batch", "S", lambda a: a["S"][0]),
    ("an integer S", "S", lambda a: np.zeros(a["S"].shape, np.int64)),
    ("zk of another width", "zk", wider("zk")),
    ("zk with a last axis", "zk", lambda a: a["zk"][..., None]),
    ("no zk", "zk", lambda a: None),
)
BAD_TOKENS = tuple(bad for bad in BAD_HEADS if bad[0] != "kv heads that do not divide")

CONTRACTS = (
    Contract(
        operation="based.based_state_update",
        sizes={axis: span for axis, span in SELF.items() if axis != "group"},
        queries="tokens",
        keys="tokens",
        fix=narrow,
        arrays=(S, ZK, K, V),
        outputs=STATE,
        parameters=lambda sizes: {"scale": SCALE},
        key_arrays=("k", "v"),
        bad_inputs=(
            ("k with more tokens than v", "v", lambda a: a["v"][..., :-1, :]),
            ("other kv heads in v", "v", lambda a: a["v"].repeat(2, axis=-3)),
            *BAD_STATE,
            *BAD_SCALE,
        ),
    ),
    Contract(
        operation="based.based_read",
        sizes={**HEADS, "queries": (1, 24)},
        fix=narrow,
        arrays=(Array("q", "batch heads queries d", role="query"), S, ZK),
        outputs=(Output("o"),),
        parameters=_numbers,
        linear_in=("S",),
        bad_inputs=(
            ("S of a narrower q", "S", lambda a: a["S"][..., :-1, :]),
            ("S of kv heads that do not divide", "S", lambda a: a["S"].repeat(7, axis=1)),
            ("zk of other kv heads", "zk", lambda a: a["zk"].repeat(2, axis=1)),
            ("no zk", "zk", lambda a: None),
            *BAD_SCALE,
            *BAD_EPS,
        ),
    ),
    Contract(
        operation="based.based_decode_step",
        sizes={**HEADS, "tokens": (1, 6)},
        least={"tokens": 1},
        fix=narrow,
        arrays=(
            S,
            ZK,
            Array("q", "batch heads 1 d", role="query"),
            Array("k", "batch kv_heads 1 d", role="key"),
            Array("v", "batch kv_heads 1 dv", role="value"),
        ),
        outputs=(Output("o"), *STATE),
        parameters=_numbers,
        linear_in=("v S",),
        stream=Stream(
            arrays=(Q, K, V),
            start=no_state,
            feed=_feed_as("S", "zk"),
            whole=_whole,
            chunked=False,
        ),
        bad_inputs=(
            ("two tokens in q", "q", lambda a: longer(a["q"])),
            ("two tokens in k and one in v", "v", lambda a: longer(a["v"])),
            *BAD_STATE,
            *BAD_TOKENS,
            *BAD_SCALE,
            *BAD_EPS,
        ),
    ),
    Contract(
        operation="based.based_chunk",
        sizes=SELF,
        queries="tokens",
        keys="tokens",
        fix=narrow,
        arrays=(
            Q,
            K,
            V,
            Array("S0", "", make=make_s, optional=True),
            Array("zk0", "", make=make_zk, optional=True),
        ),
        outputs=(Output("o"), *STATE),
        parameters=_chunks,
        linear_in=("v S0",),
        causal=lambda case: True,
        neutral={
            "S0": lambda case: np.zeros_like(make_s(case.generator(""), case)),
            "zk0": lambda case: np.zeros_like(make_zk(case.generator(""), case)),
        },
        stream=Stream(
            arrays=(Q, K, V),
            start=no_state,
            feed=_feed_as("S0", "zk0"),
            whole=_whole,
        ),
        cells={
            "causal self": lambda case: case,
            "MHA": heads_cell(2, 1),
            "GQA": heads_cell(2, 3),
            "MQA": heads_cell(1, 4),
        },
        bad_inputs=(
            ("more queries than keys", "q", lambda a: longer(a["q"])),
            ("S0 of another width", "S0", wider("S")),
            ("S0 without a batch", "S0", lambda a: no_state(a)[0][0]),
            ("an integer zk0", "zk0", lambda a: no_state(a)[1].astype(np.int64)),
            ("zk0 of another width", "zk0", wider("zk")),
            *wrong_numbers("chunk", 0, 2.5, None, True),
            *BAD_HEADS,
            *BAD_SCALE,
            *BAD_EPS,
        ),
    ),
    Contract(
        operation="based.based_packed",
        sizes=packed_sizes(SELF),
        queries="tokens",
        keys="tokens",
        fix=narrow,
        arrays=(
            Array("q", "heads tokens d", role="query"),
            Array("k", "kv_heads tokens d", role="key"),
            Array("v", "kv_heads tokens dv", role="value"),
            OFFSETS,
        ),
        outputs=(Output("o"), *STATE),
        parameters=_numbers,
        linear_in=("v",),
        causal=lambda case: True,
        packed=Packed(cut_rows("q", "k", "v")),
        cells=PACKED,
        bad_inputs=(
            *BAD_OFFSETS,
            ("more queries than keys", "q", lambda a: longer(a["q"])),
            *(bad for bad in BAD_HEADS if bad[0] != "another batch in v"),
            *BAD_SCALE,
            *BAD_EPS,
        ),
    ),
)
