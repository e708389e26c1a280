"""Contract of Synaptic Resonance over sequences laid end to end."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from attnspec.conformance.case import Case
from attnspec.conformance.cells import heads_cell
from attnspec.conformance.contract import Array, Contract, Output
from attnspec.conformance.contracts.linear.synaptic_resonance import (
    BAD_MIX,
    BAD_TOKENS,
    LAST_C,
    LAST_S,
    SIZES,
    beyond,
    everything,
)
from attnspec.conformance.contracts.linear.synaptic_resonance_forms import whole_by_token
from attnspec.conformance.packing import (
    BAD_OFFSETS,
    NO_SEQUENCES,
    OFFSETS,
    PACKED,
    Packed,
    cut_rows,
    packed_sizes,
)


def make_traces(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Some heads of some sequences have seen nothing: their trace is exactly 0."""
    c = rng.standard_normal(case.shape("sequences kv_heads d"))
    return np.where(rng.random(c.shape[:2])[..., None] < 0.25, 0.0, c)


def packed_by_token(
    q: Any, k: Any, v: Any, offsets: Any, S0: Any = None, c0: Any = None, **numbers: Any
) -> Any:
    outs, states = [], []
    for n, (first, last) in enumerate(pairwise(offsets)):
        tokens = (x[..., first:last, :] for x in (q, k, v))
        before = (None if x is None else x[n] for x in (S0, c0))
        y, state = whole_by_token(*tokens, *before, **numbers)
        outs.append(y)
        states.append(state)
    S, c = (np.stack(parts) for parts in zip(*states, strict=True))
    return np.concatenate(outs, axis=-2), (S, c)


CONTRACTS = (
    Contract(
        operation="synaptic_resonance.synaptic_resonance_packed",
        sizes=packed_sizes(SIZES),
        queries="tokens",
        keys="tokens",
        arrays=(
            Array("q", "heads tokens d", role="query"),
            Array("k", "kv_heads tokens d", role="key"),
            Array("v", "kv_heads tokens dv", role="value"),
            OFFSETS,
            Array("S0", "sequences kv_heads d dv", optional=True),
            Array("c0", "sequences kv_heads d", make=make_traces, optional=True),
        ),
        outputs=(Output("y"), LAST_S, LAST_C),
        parameters=everything,
        form=packed_by_token,
        linear_in=("v S0",),
        causal=lambda case: True,
        neutral={
            "S0": lambda case: np.zeros(case.shape("sequences kv_heads d dv")),
            "c0": lambda case: np.zeros(case.shape("sequences kv_heads d")),
        },
        # Attention goes back to tokens of before, so that states alone do not continue it.
        packed=Packed(cut_rows("q", "k", "v"), ("S0", "c0")),
        cells={
            **PACKED,
            "MHA": heads_cell(2, 1),
            "GQA": heads_cell(2, 3),
            "MQA": heads_cell(1, 4),
        },
        bad_inputs=(
            *BAD_OFFSETS,
            *NO_SEQUENCES,
            ("a state for other sequences", "S0", lambda a: np.zeros((9, *a["k"].shape[::2], 1))),
            ("a trace for another sequence", "c0", lambda a: np.zeros((9, *a["k"].shape[::2]))),
            ("a trace of another width", "c0", lambda a: np.zeros((len(a["offsets"]) - 1, 1, 99))),
            ("q with a batch", "q", lambda a: a["q"][None]),
            *beyond("mu", 1.0, 1.5, -0.1, None),
            *(bad for bad in BAD_TOKENS if bad[0] != "another batch in v"),
            *BAD_MIX,
        ),
    ),
)
