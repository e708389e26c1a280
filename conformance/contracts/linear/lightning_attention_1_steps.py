"""Contracts of TransNormerLLM's steps: slopes, norm, lift, attention and channel mixer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.contract import Array, BadValue, Contract, Output, Stream
from attnspec.conformance.contracts.linear.lightning_attention_2 import (
    blocks,
    in_chunks,
    make_slopes,
    state_shape,
    wrong_integers,
)
from attnspec.conformance.values import longer
from attnspec.reference.linear.lightning_attention_1 import decay_attend, decay_attend_tiled

Drawn = dict[str, st.SearchStrategy[Any]]
ROWS = {"batch": (1, 3), "tokens": (1, 24), "D": (1, 40)}
HEADS = {"batch": (1, 2), "kv_heads": (1, 3), "tokens": (1, 24), "d": (1, 24), "dv": (1, 24)}


def not_two_channels(sizes: dict[str, int]) -> dict[str, int]:
    """One channel for two: two are spread by far strides, and NumPy sums such rows differently."""
    if sizes.get("D", sizes.get("kv_heads", 1) * sizes.get("d", 1)) != 2:
        return sizes
    return {**sizes, **{axis: 1 for axis in ("D", "kv_heads", "d") if axis in sizes}}


def _matrix(axes: str) -> Any:
    def make(rng: np.random.Generator, case: Case) -> np.ndarray:
        shape = case.shape(axes)
        return rng.standard_normal(shape) / np.sqrt(max(shape[0], 1))

    return make


def _theta(rng: np.random.Generator, case: Case) -> np.ndarray:
    return rng.uniform(0.0, 1.0, case.shape("heads d"))


def _tokens(whole: Mapping[str, Any], first: int, last: int) -> dict[str, Any]:
    return {name: whole[name][..., first:last, :] for name in ("q", "k", "v")}


def _rows_with_zeros(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Rows of any size; one in eight is zero."""
    x = rng.standard_normal(case.shape("batch tokens D"))
    size = 10.0 ** rng.uniform(-2, 2, (*x.shape[:2], 1))
    return np.where(rng.random((*x.shape[:2], 1)) < 0.125, 0.0, size * x)


def _start(whole: Mapping[str, Any]) -> np.ndarray:
    return np.zeros(state_shape(whole))


def _stream(operation: Any) -> Stream:
    return Stream(
        arrays=(*QKV, SLOPES),
        start=_start,
        feed=lambda whole, state, first, last: {
            **whole,
            **_tokens(whole, first, last),
            "S0": state,
        },
        whole=lambda whole: operation(
            *(whole[name] for name in ("q", "k", "v", "slopes")),
            *([whole["block"]] if "block" in whole else []),
        )[0],
    )


QKV = (
    Array("q", "batch heads tokens d", role="query"),
    Array("k", "batch heads tokens d", role="key"),
    Array("v", "batch heads tokens dv", role="value"),
)
SLOPES = Array("slopes", "heads", make=make_slopes)
S0 = Array("S0", "batch heads d dv", optional=True)
STATE = Output("S", dtype="float32", by_query=False)
BAD_QKV = (
    ("more queries than keys", "q", lambda a: longer(a["q"])),
    ("k of another head size", "k", lambda a: a["k"].repeat(2, axis=-1)),
    ("k with more tokens than v", "v", lambda a: a["v"][..., :-1, :]),
    ("another batch in v", "v", lambda a: a["v"].repeat(2, axis=0)),
)
BAD_SLOPES = (
    BadValue("a negative slope", "slopes", lambda a: -1.0 - a["slopes"]),
    BadValue("a slope that is NaN", "slopes", lambda a: a["slopes"] + np.nan),
    ("a slope too many", "slopes", lambda a: np.append(a["slopes"], 0.5)),
    ("slopes of two axes", "slopes", lambda a: a["slopes"][None]),
    ("one number for all heads", "slopes", lambda a: 0.5),
)
BAD_STATE = (
    ("a state of another width", "S0", lambda a: np.zeros((*state_shape(a)[:-1], 99))),
    ("a state without a batch", "S0", lambda a: np.zeros(state_shape(a)[1:])),
)

CONTRACTS = (
    Contract(
        operation="lightning_attention_1.slopes",
        sizes={},
        arrays=(),
        outputs=(Output("s", dtype="float64"),),
        parameters=lambda sizes: {"H": st.integers(1, 80)},
        bad_inputs=wrong_integers("H"),
    ),
    Contract(
        operation="lightning_attention_1.layer_slopes",
        sizes={"L": (1, 40)},
        arrays=(),
        outputs=(Output("s", dtype="float64"),),
        parameters=lambda sizes: {
            "H": st.integers(1, 24),
            "l": st.integers(0, sizes["L"] - 1),
            "L": st.just(sizes["L"]),
            "decay_rule": st.sampled_from(["geometric", "linear"]),
        },
        bad_inputs=(
            ("a layer beyond the last", "l", lambda a: a["L"]),
            ("a negative layer", "l", lambda a: -1),
            ("an unknown rule", "decay_rule", lambda a: "quadratic"),
            *wrong_integers("H"),
            *wrong_integers("L"),
        ),
    ),
    Contract(
        operation="lightning_attention_1.srms_norm",
        sizes=ROWS,
        queries="tokens",
        keys="tokens",
        fix=not_two_channels,
        arrays=(Array("x", make=_rows_with_zeros),),
        outputs=(Output("y"),),
        parameters=lambda sizes: {"eps": st.sampled_from([1e-6, 0.0, 0.1])},
        causal=lambda case: True,
        bad_inputs=(
            ("a negative eps", "eps", lambda a: -1.0),
            ("an eps that is infinite", "eps", lambda a: float("inf")),
            ("no eps", "eps", lambda a: None),
        ),
    ),
    Contract(
        operation="lightning_attention_1.sglu",
        sizes={**ROWS, "F": (1, 24)},
        fix=not_two_channels,
        queries="tokens",
        keys="tokens",
        arrays=(
            Array("x", "batch tokens D"),
            Array("Wv", make=_matrix("D F")),
            Array("Wu", make=_matrix("D F")),
            Array("Wo", make=_matrix("F D")),
        ),
        outputs=(Output("y"),),
        linear_in=("Wv", "Wu", "Wo"),
        causal=lambda case: True,
        bad_inputs=(
            ("a matrix of another width", "Wv", lambda a: a["Wv"].repeat(2, axis=0)),
            ("Wu of another width", "Wu", lambda a: a["Wu"].repeat(2, axis=1)),
            ("Wo the wrong way", "Wo", lambda a: a["Wo"].repeat(2, axis=0)),
        ),
    ),
    Contract(
        operation="lightning_attention_1.lrpe_frequencies",
        sizes={},
        arrays=(),
        outputs=(Output("theta", dtype="float64"),),
        parameters=lambda sizes: {
            "H": st.integers(1, 12),
            "d": st.integers(1, 40),
            "base": st.sampled_from([10000.0, 100.0, 500000.0]),
        },
        bad_inputs=(
            ("a base of 1", "base", lambda a: 1.0),
            ("a base that is infinite", "base", lambda a: float("inf")),
            *wrong_integers("H"),
            *wrong_integers("d"),
        ),
    ),
    Contract(
        operation="lightning_attention_1.lrpe",
        sizes={axis: HEADS[axis] for axis in ("batch", "kv_heads", "tokens", "d")},
        queries="tokens",
        keys="tokens",
        arrays=(Array("x", "batch heads tokens d", role="query"), Array("theta", make=_theta)),
        outputs=(Output("y"),),
        parameters=lambda sizes: {"offset": st.sampled_from([0, 1, 7, 1000])},
        linear_in=("x",),
        causal=lambda case: True,
        cancelling=("dtheta",),
        bad_inputs=(
            ("theta of other heads", "theta", lambda a: a["theta"].repeat(2, axis=0)),
            ("half as many frequencies", "theta", lambda a: a["theta"][:, :0]),
            ("a negative offset", "offset", lambda a: -1),
            ("an offset that is no integer", "offset", lambda a: 0.5),
        ),
    ),
    Contract(
        operation="lightning_attention_1.decay_attend",
        sizes=HEADS,
        queries="tokens",
        keys="tokens",
        arrays=(*QKV, SLOPES, S0),
        outputs=(Output("o"), STATE),
        form=lambda **a: decay_attend_tiled(**a, block=64),
        linear_in=("q", "v S0", "k S0"),
        causal=lambda case: True,
        cancelling=("dslopes",),
        neutral={"S0": lambda case: np.zeros(case.shape("batch heads d dv"))},
        stream=_stream(decay_attend),
        bad_inputs=(*BAD_QKV, *BAD_SLOPES, *BAD_STATE),
    ),
    Contract(
        operation="lightning_attention_1.decay_attend_tiled",
        sizes=HEADS,
        queries="tokens",
        keys="tokens",
        arrays=(*QKV, SLOPES, S0),
        outputs=(Output("o"), STATE),
        parameters=blocks,
        form=in_chunks(decay_attend_tiled),
        linear_in=("q", "v S0", "k S0"),
        causal=lambda case: True,
        cancelling=("dslopes",),
        neutral={"S0": lambda case: np.zeros(case.shape("batch heads d dv"))},
        stream=_stream(decay_attend_tiled),
        bad_inputs=(*BAD_QKV, *BAD_SLOPES, *BAD_STATE, *wrong_integers("block")),
    ),
    Contract(
        operation="lightning_attention_1.decay_attend_backward",
        sizes=HEADS,
        queries="tokens",
        keys="tokens",
        arrays=(*QKV, SLOPES, Array("do", "batch heads tokens dv")),
        outputs=(Output("dq"), Output("dk"), Output("dv")),
        parameters=blocks,
        bad_inputs=(
            *BAD_QKV,
            *BAD_SLOPES,
            ("do of other tokens", "do", lambda a: longer(a["do"])),
            *wrong_integers("block"),
        ),
    ),
    Contract(
        operation="lightning_attention_1.norm_attention",
        sizes=HEADS,
        queries="tokens",
        keys="tokens",
        arrays=QKV,
        outputs=(Output("o"),),
        linear_in=("q", "k", "v"),
        causal=lambda case: True,
        bad_inputs=BAD_QKV,
    ),
)
