"""Contracts of Lightning Attention-2: its slopes, its quadratic and recurrent forms, its blocks.

What happens inside a block is in `lightning_attention_2_chunks`, unequal sequences are in
`lightning_attention_2_batches`, and the mechanism's own laws in `lightning_attention_2_laws`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.cells import heads_cell
from attnspec.conformance.contract import Array, Contract, Output, Stream
from attnspec.conformance.values import longer
from attnspec.reference.linear.lightning_attention_2 import attend, attend_recurrent

HEADS = {"batch": (1, 2), "kv_heads": (1, 2), "group": (1, 3), "d": (1, 24), "dv": (1, 24)}
SELF = {**HEADS, "tokens": (1, 24)}
CROSS = {**HEADS, "queries": (1, 24), "keys": (1, 24)}
Drawn = dict[str, st.SearchStrategy[Any]]


def make_slopes(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Slopes as models have them; one head in four has none, next to none, or forgets at once."""
    usual = 2.0 ** -rng.uniform(0, 9, case.heads)
    extreme = rng.choice([0.0, 1e-8, 50.0], case.heads)
    return np.where(rng.random(case.heads) < 0.25, extreme, usual)


def blocks(sizes: Mapping[str, int]) -> Drawn:
    return {"block": st.sampled_from([64, 1, 2, 7, 16, 32, 128])}


def wrong_integers(name: str) -> tuple[tuple[str, str, Any], ...]:
    """Values that are no integer of at least 1."""
    return tuple(
        (f"{name} = {value}", name, lambda a, value=value: value) for value in (0, 2.5, None, True)
    )


def state_shape(a: Mapping[str, Any]) -> tuple[int, ...]:
    return (*a["q"].shape[:-2], a["q"].shape[-1], a["v"].shape[-1])


def _more_keys(extra: int) -> Any:
    return lambda case: case.with_(sizes={"keys": case.sizes["queries"] + extra})


def _tokens(whole: Mapping[str, Any], first: int, last: int) -> dict[str, Any]:
    return {name: whole[name][..., first:last, :] for name in ("q", "k", "v")}


def _token_by_token(whole: Mapping[str, Any]) -> np.ndarray:
    return attend_recurrent(**{name: whole[name] for name in ("q", "k", "v", "s")})[0]


def in_chunks(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` on blocks of 64 tokens, whichever it is asked for: the answer does not depend."""
    return lambda **a: function(**{**a, "block": 64})


def _no_state(whole: Mapping[str, Any]) -> np.ndarray:
    return np.zeros(state_shape(whole))


SLOPES = Array("s", "heads", make=make_slopes)
Q = Array("q", "batch heads tokens d", role="query")
K = Array("k", "batch kv_heads tokens d", role="key")
V = Array("v", "batch kv_heads tokens dv", role="value")
CROSS_ARRAYS = (
    Array("q", "batch heads queries d", role="query"),
    Array("k", "batch kv_heads keys d", role="key"),
    Array("v", "batch kv_heads keys dv", role="value"),
    SLOPES,
)
S0 = Array("S0", "batch heads d dv", optional=True)
STATE = Output("S", dtype="float32", by_query=False)

BAD_HEADS = (
    ("k of another head size", "k", lambda a: a["k"].repeat(2, axis=-1)),
    ("k with more tokens than v", "v", lambda a: a["v"][..., :-1, :]),
    ("kv heads that do not divide", "k", lambda a: a["k"].repeat(7, axis=-3)),
    ("other kv heads in v", "v", lambda a: a["v"].repeat(2, axis=-3)),
    ("another batch in v", "v", lambda a: a["v"].repeat(2, axis=0)),
)
BAD_SLOPES = (
    ("a negative slope", "s", lambda a: -1.0 - a["s"]),
    ("a slope that is NaN", "s", lambda a: a["s"] + np.nan),
    ("an infinite slope", "s", lambda a: a["s"] + np.inf),
    ("a slope too many", "s", lambda a: np.append(a["s"], 0.5)),
    ("slopes of two axes", "s", lambda a: a["s"][None]),
    ("one number for all heads", "s", lambda a: 0.5),
    ("no slopes", "s", lambda a: None),
)
BAD_STATE = (
    ("a state of another width", "S0", lambda a: np.zeros((*state_shape(a)[:-1], 99))),
    ("a state without a batch", "S0", lambda a: np.zeros(state_shape(a)[1:])),
    ("an integer state", "S0", lambda a: np.zeros(state_shape(a), np.int64)),
)

CONTRACTS = (
    Contract(
        operation="lightning_attention_2.slopes",
        sizes={},
        arrays=(),
        outputs=(Output("s", dtype="float64"),),
        parameters=lambda sizes: {"n_heads": st.integers(1, 80)},
        bad_inputs=wrong_integers("n_heads"),
    ),
    Contract(
        operation="lightning_attention_2.layer_slopes",
        sizes={"n_layers": (1, 40)},
        arrays=(),
        outputs=(Output("s", dtype="float64"),),
        parameters=lambda sizes: {
            "n_heads": st.integers(1, 24),
            "layer": st.integers(0, sizes["n_layers"] - 1),
            "n_layers": st.just(sizes["n_layers"]),
        },
        bad_inputs=(
            ("a layer beyond the last", "layer", lambda a: a["n_layers"]),
            ("a negative layer", "layer", lambda a: -1),
            *wrong_integers("n_heads"),
            *wrong_integers("n_layers"),
        ),
    ),
    Contract(
        operation="lightning_attention_2.decay_mask",
        sizes={"kv_heads": (1, 2), "group": (1, 3)},
        arrays=(SLOPES,),
        outputs=(Output("M"),),
        parameters=lambda sizes: {"T": st.integers(0, 40)},
        bad_inputs=(
            ("a negative length", "T", lambda a: -1),
            ("a fractional length", "T", lambda a: 2.5),
            *(bad for bad in BAD_SLOPES if bad[0] != "a slope too many"),
        ),
    ),
    Contract(
        operation="lightning_attention_2.attend_left",
        sizes=SELF,
        queries="tokens",
        keys="tokens",
        arrays=(Q, K, V, SLOPES),
        outputs=(Output("o"),),
        linear_in=("q", "k", "v"),
        causal=lambda case: True,
        bad_inputs=(
            ("more queries than keys", "q", lambda a: longer(a["q"])),
            *BAD_HEADS,
            *BAD_SLOPES,
        ),
    ),
    Contract(
        operation="lightning_attention_2.attend_recurrent",
        sizes=SELF,
        queries="tokens",
        keys="tokens",
        arrays=(Q, K, V, SLOPES, S0),
        outputs=(Output("o"), STATE),
        linear_in=("q", "v S0", "k S0"),
        form=in_chunks(attend),
        causal=lambda case: True,
        neutral={"S0": lambda case: np.zeros(case.shape("batch heads d dv"))},
        bad_inputs=(
            ("more queries than keys", "q", lambda a: longer(a["q"])),
            *BAD_HEADS,
            *BAD_SLOPES,
            *BAD_STATE,
        ),
    ),
    Contract(
        operation="lightning_attention_2.attend",
        sizes=CROSS,
        arrays=(*CROSS_ARRAYS, S0),
        outputs=(Output("o"), STATE),
        parameters=blocks,
        linear_in=("q", "v S0", "k S0"),
        form=in_chunks(attend),
        causal=lambda case: True,
        cancelling=("ds",),
        neutral={"S0": lambda case: np.zeros(case.shape("batch heads d dv"))},
        stream=Stream(
            arrays=CROSS_ARRAYS,
            start=_no_state,
            feed=lambda whole, state, first, last: {
                **whole,
                **_tokens(whole, first, last),
                "S0": state,
            },
            whole=_token_by_token,
            tokens="queries",
        ),
        cells={
            "causal self": _more_keys(0),
            "causal cross": _more_keys(5),
            "MHA": heads_cell(2, 1),
            "GQA": heads_cell(2, 3),
            "MQA": heads_cell(1, 4),
        },
        bad_inputs=(*BAD_HEADS, *BAD_SLOPES, *BAD_STATE, *wrong_integers("block")),
    ),
    Contract(
        operation="lightning_attention_2.decode_step",
        sizes={**HEADS, "tokens": (1, 6)},
        least={"tokens": 1},
        arrays=(
            Array("S", "batch heads d dv"),
            Array("q", "batch heads 1 d", role="query"),
            Array("k", "batch kv_heads 1 d", role="key"),
            Array("v", "batch kv_heads 1 dv", role="value"),
            SLOPES,
        ),
        outputs=(Output("o"), STATE),
        linear_in=("q", "v S", "k S"),
        stream=Stream(
            arrays=(Q, K, V, SLOPES),
            start=_no_state,
            feed=lambda whole, state, first, last: {
                **_tokens(whole, first, last),
                "s": whole["s"],
                "S": state,
            },
            whole=_token_by_token,
            chunked=False,
        ),
        bad_inputs=(
            ("two tokens in q", "q", lambda a: longer(a["q"])),
            ("a state of another width", "S", lambda a: np.zeros((*state_shape(a)[:-1], 99))),
            *BAD_HEADS,
            *BAD_SLOPES,
        ),
    ),
)
