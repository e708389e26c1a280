"""Contracts of S2-Attention's decoder, and of the merge of parts of the keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.contract import Array, Contract, Output, Stream
from attnspec.conformance.contracts.patterns.s2_attention import SIZES
from attnspec.conformance.values import bad_integers, feed_tokens
from attnspec.reference.patterns.s2_attention import s2_attend
from attnspec.reference.patterns.s2_attention_decoding import State, decode_step, init_state

NAMES = ("b", "local", "v_stride", "step", "offset", "num_dense_heads", "scale")


def _state(rng: np.random.Generator, case: Case) -> State:
    """What `past` tokens leave behind."""
    batch, kv_heads, past, d, dv = case.shape("batch kv_heads past d dv")
    q = np.zeros((batch, case.heads, past, d))
    k, v = (
        rng.standard_normal((batch, kv_heads, past, d)),
        rng.standard_normal((batch, kv_heads, past, dv)),
    )
    options = {name: case.parameters[name] for name in NAMES}
    return decode_step(q, k, v, init_state(k, v), **options)[2]


def _parameters(sizes: Mapping[str, int]) -> dict[str, st.SearchStrategy[Any]]:
    return {
        "b": st.sampled_from([1, 2, 4]),
        "local": st.sampled_from([1, 2, 3]),
        "v_stride": st.sampled_from([3, 2, 4, 1]),
        "step": st.sampled_from([None, 1, 2]),
        "offset": st.sampled_from([0, 1, 5]),
        "num_dense_heads": st.integers(0, min(sizes["kv_heads"], 2)),
        "scale": st.sampled_from([None, 0.5]),
    }


def _lses(rng: np.random.Generator, case: Case) -> np.ndarray:
    """One part in four has seen nothing."""
    shape = case.shape("parts batch heads_of_it queries")
    return np.where(rng.random(shape) < 0.25, -np.inf, 4.0 * rng.standard_normal(shape))


def _poison_empty(arguments: dict[str, Any], case: Case) -> dict[str, Any]:
    """NaN in the outputs of parts that have seen nothing."""
    outs = arguments["outs"].copy()
    outs[np.isneginf(arguments["lses"])] = np.nan
    return {**arguments, "outs": outs}


TOKENS = (
    Array("q", "batch heads tokens d", role="query"),
    Array("k", "batch kv_heads tokens d", role="key"),
    Array("v", "batch kv_heads tokens dv", role="value"),
)
CONTRACTS = (
    Contract(
        operation="s2_attention.decode_step",
        sizes={
            **{axis: span for axis, span in SIZES.items() if axis not in ("queries", "keys")},
            "past": (0, 24),
            "tokens": (1, 4),
        },
        least={"tokens": 1},
        arrays=(*TOKENS, Array("state", make=_state)),
        outputs=(
            Output("out", cancels=True),
            Output("lse", dtype="float32", row_axes=0),
            Output("state.k", "copy"),
            Output("state.v", "copy"),
            Output("state.pos", "exact"),
            Output("state.seen", "exact", plain=True),
        ),
        parameters=_parameters,
        stream=Stream(
            arrays=TOKENS,
            start=lambda whole: init_state(whole["k"], whole["v"]),
            feed=feed_tokens,
            whole=lambda whole: s2_attend(**whole)[0],
            carried=lambda rest: rest[-1],
        ),
        bad_inputs=(
            ("k of another head size", "k", lambda a: a["k"].repeat(2, axis=-1)),
            ("more keys than queries", "k", lambda a: a["k"].repeat(2, axis=2)),
            ("a state of other heads", "state",
             lambda a: a["state"]._replace(k=a["state"].k.repeat(2, axis=1))),
            ("positions of other rows", "state",
             lambda a: a["state"]._replace(pos=np.zeros((1, 99), np.int64))),
            *bad_integers("b"),
            *bad_integers("v_stride"),
            *bad_integers("step"),
            ("local = -1", "local", lambda a: -1),
            ("more dense heads than there are", "num_dense_heads", lambda a: 99),
        ),
    ),
    Contract(
        operation="s2_attention.merge_partitions",
        sizes={"parts": (1, 4), "batch": (1, 2), "heads_of_it": (1, 3), "queries": (1, 24),
               "dv": (1, 24)},
        keys="parts",
        least={"parts": 1},
        arrays=(
            Array("outs", "parts batch heads_of_it queries dv"),
            Array("lses", "parts batch heads_of_it queries", make=_lses),
        ),
        outputs=(Output("out"), Output("lse", row_axes=0)),
        linear_in=("outs",),
        key_arrays=("outs", "lses"),
        poison=_poison_empty,
        bad_inputs=(
            ("no parts", "outs", lambda a: a["outs"][:0]),
            ("lses of fewer parts", "lses", lambda a: a["lses"].repeat(2, axis=0)),
            ("outs that are no array", "outs", lambda a: None),
        ),
    ),
)  # fmt: skip
