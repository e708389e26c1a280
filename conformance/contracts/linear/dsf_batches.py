"""Contracts of `dsf` over sequences laid end to end."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.arrays import flatten
from attnspec.conformance.case import Case
from attnspec.conformance.contract import Array, Contract, Output
from attnspec.conformance.contracts.linear.dsf import VALUES, positive
from attnspec.conformance.contracts.linear.dsf_forms import linear_in_chunks, ssd_in_chunks
from attnspec.conformance.contracts.linear.dsf_mixers import HEADS
from attnspec.conformance.contracts.linear.dsf_rnn import ALPHA, BAD_ALPHA
from attnspec.conformance.packing import (
    BAD_OFFSETS,
    NO_SEQUENCES,
    OFFSETS,
    PACKED,
    Packed,
    cut_rows,
    last_as,
    packed_sizes,
)
from attnspec.conformance.values import longer
from attnspec.reference.conventions import check_offsets
from attnspec.reference.linear.dsf_batches import gathered, stacked

SEVERAL = {"sequences": (1, 4), "tokens": (1, 24)}
ROWS = "kv_heads tokens"
STATE = "sequences kv_heads dv d"
LAST = Output("h", dtype="float32", by_query=False)
LONG_STEPS = {"Delta": 1e4}
"""Those of other sequences: NaN would be refused."""
RNN = {"N": (1, 24), **SEVERAL}


def bad_state(name: str, *shape: str) -> tuple[tuple[str, str, Any], ...]:
    """A state for other sequences, and one without an axis of them."""
    return (
        ("a state for other sequences", name, lambda a: np.zeros((9,) + (1,) * len(shape))),
        ("a state without sequences", name, lambda a: np.zeros((1,) * len(shape))),
    )


def make_pairs(rng: np.random.Generator, case: Case) -> tuple[np.ndarray, np.ndarray]:
    """What a prefix of each sequence leaves: a sum of features, and values under it."""
    z = 1 + rng.exponential(3.0, case.shape("sequences kv_heads d"))
    return rng.standard_normal(case.shape(STATE)) * z[..., None, :], z


def each(form: Any, tokens: tuple[str, ...], state: str, axis: int) -> Any:
    """`form`, the way chunks compute one sequence, of one sequence after the other."""

    def packed(**given: Any) -> Any:
        offsets, first = given.pop("offsets"), given.pop(state, None)
        total = given[tokens[0]].shape[axis]
        parts = []
        for n, rows in enumerate(check_offsets("offsets", offsets, total)):
            cut = (slice(None),) * axis + (rows,)
            own = {name: given[name][cut] for name in tokens}
            begun = tuple(x[n] for x in first) if isinstance(first, tuple) else first
            begun = begun if isinstance(begun, tuple) or begun is None else begun[n]
            y, *last = flatten(form(**{**given, **own, state: begun}))
            parts.append((y, *(stacked(h, h.ndim) for h in last)))
        return gathered(parts, (-2, *(-part.ndim for part in parts[0][1:])))

    return packed


CONTRACTS = (
    Contract(
        operation="dsf.linear_attention_packed",
        sizes={**packed_sizes(HEADS), **SEVERAL},
        queries="tokens",
        keys="tokens",
        arrays=(
            Array("q", f"{ROWS} d", role="query"),
            Array("k", f"{ROWS} d", role="key"),
            Array("v", f"{ROWS} dv", role="value"),
            OFFSETS,
            Array("state", make=make_pairs, optional=True),
        ),
        outputs=(Output("y"), LAST, Output("z", dtype="float32", by_query=False)),
        causal=lambda case: True,
        form=each(linear_in_chunks, ("q", "k", "v"), "state", 1),
        cancelling=("dq", "dk", "dstate"),
        packed=Packed(cut_rows("q", "k", "v"), ("state",), handed=last_as("state")),
        cells=PACKED,
        bad_inputs=(
            ("k of another head size", "k", lambda a: a["k"].repeat(2, axis=-1)),
            ("more values than keys", "v", lambda a: longer(a["v"])),
            ("a state without its normaliser", "state", lambda a: np.zeros((1, 1, 1, 1))),
            ("a state of another width", "state",
             lambda a: (np.zeros((1, 1, 99, 98)), np.zeros((1, 1, 98)))),
            *BAD_OFFSETS,
            *NO_SEQUENCES,
        ),
    ),
    Contract(
        operation="dsf.s6_packed",
        sizes={"dv": (1, 24), "n": (1, 16), **SEVERAL},
        queries="tokens",
        keys="tokens",
        values=VALUES,
        arrays=(
            Array("Delta", make=positive("tokens dv")),
            Array("A", make=positive("dv n", size=2.0)),
            Array("b", "tokens n"),
            Array("c", "tokens n"),
            Array("u", "tokens dv", role="value"),
            OFFSETS,
            Array("D", "dv", optional=True),
            Array("h0", "sequences dv n", optional=True),
        ),
        outputs=(Output("y", cancels=True), LAST),
        linear_in=("u h0", "c D"),
        causal=lambda case: True,
        cancelling=("dDelta", "dA", "db", "dc", "du", "dh0"),
        neutral={
            "D": lambda case: np.zeros(case.shape("dv")),
            "h0": lambda case: np.zeros(case.shape("sequences dv n")),
        },
        packed=Packed(cut_rows("Delta", "b", "c", "u"), ("h0",), LONG_STEPS, last_as("h0")),
        cells=PACKED,
        bad_inputs=(
            ("a negative step", "Delta", lambda a: -1 - a["Delta"]),
            ("A stored negative", "A", lambda a: -1 - a["A"]),
            ("u of other tokens", "u", lambda a: longer(a["u"])),
            *bad_state("h0", "dv", "n"),
            *BAD_OFFSETS,
            *NO_SEQUENCES,
        ),
    ),
    Contract(
        operation="dsf.ssd_packed",
        sizes={**packed_sizes(HEADS), **SEVERAL},
        queries="tokens",
        keys="tokens",
        arrays=(
            Array("Delta", make=positive(ROWS)),
            Array("a", make=positive("kv_heads", size=1.0)),
            Array("b", f"{ROWS} d", role="key"),
            Array("c", f"{ROWS} d", role="query"),
            Array("u", f"{ROWS} dv", role="value"),
            OFFSETS,
            Array("h0", STATE, optional=True),
        ),
        outputs=(Output("y", cancels=True), LAST),
        linear_in=("u h0", "b h0", "c"),
        causal=lambda case: True,
        form=each(ssd_in_chunks, ("Delta", "b", "c", "u"), "h0", 1),
        cancelling=("dDelta", "da", "db", "dc", "du", "dh0"),
        neutral={"h0": lambda case: np.zeros(case.shape(STATE))},
        packed=Packed(
            {"offsets": {"Delta": -1, "b": -2, "c": -2, "u": -2}}, ("h0",), LONG_STEPS,
            last_as("h0"),
        ),
        cells=PACKED,
        bad_inputs=(
            ("a rate a token", "a", lambda a: a["Delta"]),
            ("a negative step", "Delta", lambda a: -1 - a["Delta"]),
            ("u of other tokens", "u", lambda a: longer(a["u"])),
            *bad_state("h0", "kv_heads", "dv", "d"),
            *BAD_OFFSETS,
            *NO_SEQUENCES,
        ),
    ),
    Contract(
        operation="dsf.qlstm_packed",
        sizes=RNN,
        queries="tokens",
        keys="tokens",
        arrays=(
            *(Array(name, "tokens N") for name in ("f", "i", "o", "z")),
            OFFSETS,
            Array("h0", "sequences N", optional=True),
        ),
        outputs=(Output("y", cancels=True), LAST),
        parameters=lambda sizes: ALPHA,
        linear_in=("z h0",),
        causal=lambda case: True,
        cancelling=("df", "di", "do", "dz", "dalpha", "dh0"),
        neutral={"h0": lambda case: np.zeros(case.shape("sequences N"))},
        packed=Packed(cut_rows("f", "i", "o", "z"), ("h0",), handed=last_as("h0")),
        cells=PACKED,
        bad_inputs=(
            *BAD_ALPHA,
            ("z of other tokens", "z", lambda a: longer(a["z"])),
            *bad_state("h0", "N"),
            *BAD_OFFSETS,
            *NO_SEQUENCES,
        ),
    ),
    Contract(
        operation="dsf.rg_lru_packed",
        sizes=RNN,
        queries="tokens",
        keys="tokens",
        values=VALUES,
        arrays=(
            *(Array(name, "tokens N") for name in ("u", "r", "g")),
            Array("lam", "N"),
            OFFSETS,
            Array("h0", "sequences N", optional=True),
        ),
        outputs=(Output("y", cancels=True), LAST),
        parameters=lambda sizes: {"c": st.sampled_from([8.0, 1.0])},
        linear_in=("u h0",),
        causal=lambda case: True,
        cancelling=("du", "dr", "dg", "dlam", "dh0"),
        neutral={"h0": lambda case: np.zeros(case.shape("sequences N"))},
        packed=Packed(cut_rows("u", "r", "g"), ("h0",), handed=last_as("h0")),
        cells=PACKED,
        bad_inputs=(
            ("c = 0", "c", lambda a: 0.0),
            ("lam a token", "lam", lambda a: a["r"]),
            *bad_state("h0", "N"),
            *BAD_OFFSETS,
            *NO_SEQUENCES,
        ),
    ),
)  # fmt: skip
