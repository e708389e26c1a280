"""The contract of Flowformer over sequences laid end to end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from attnspec.conformance.case import Case
from attnspec.conformance.contract import Array, Contract, Output
from attnspec.conformance.contracts.linear.based import BAD_EPS, BAD_HEADS
from attnspec.conformance.contracts.linear.flowformer import (
    BAD_CLAMP,
    BAD_KIND,
    SELF,
    STATE,
    bounded,
)
from attnspec.conformance.packing import (
    BAD_OFFSETS,
    OFFSETS,
    PACKED,
    Packed,
    cut_rows,
    last_as,
    packed_sizes,
)
from attnspec.conformance.values import longer
from attnspec.reference.linear.flowformer_causal import (
    FlowState,
    empty_state,
    flow_attend_causal,
)


def make_states(rng: np.random.Generator, case: Case) -> FlowState:
    """Those behind some tokens, of none for some sequences."""
    sequences, heads, d, dv = case.shape("sequences heads d dv")
    states = []
    for _ in range(sequences):
        shape = (heads, int(rng.integers(0, 6)))
        q, k = (rng.standard_normal((*shape, d)) for _ in range(2))
        states.append(flow_attend_causal(q, k, rng.standard_normal((*shape, dv)))[1])
    return FlowState(*(np.stack(parts) for parts in zip(*states, strict=True)))


def no_states(a: Mapping[str, Any]) -> FlowState:
    one = empty_state(a["q"], a["v"])
    return FlowState(*(np.stack([x] * (len(a["offsets"]) - 1)) for x in one))


def no_state_of_case(case: Case) -> FlowState:
    q, v = np.zeros(case.shape("heads tokens d")), np.zeros(case.shape("heads tokens dv"))
    return no_states({"q": q, "v": v, "offsets": range(case.sizes["sequences"] + 1)})


CONTRACTS = (
    Contract(
        operation="flowformer.flow_attend_packed",
        sizes=packed_sizes(SELF),
        queries="tokens",
        keys="tokens",
        arrays=(
            Array("q", "heads tokens d", role="query"),
            Array("k", "kv_heads tokens d", role="key"),
            Array("v", "kv_heads tokens dv", role="value"),
            OFFSETS,
            Array("state", make=make_states, optional=True),
        ),
        outputs=(Output("out"), *STATE),
        parameters=bounded,
        cancelling=("dq", "dk"),
        causal=lambda case: True,
        neutral={"state": no_state_of_case},
        packed=Packed(cut_rows("q", "k", "v"), ("state",), handed=last_as("state")),
        cells=PACKED,
        bad_inputs=(
            *BAD_OFFSETS,
            ("more queries than keys", "q", lambda a: longer(a["q"])),
            ("a list as state", "state", lambda a: [1]),
            ("a state for another sequence", "state", lambda a: FlowState(
                *(x.repeat(9, axis=0) for x in no_states(a)))),
            *(bad for bad in BAD_HEADS if bad[0] != "another batch in v"),
            *BAD_EPS,
            *BAD_KIND,
            *BAD_CLAMP,
        ),
    ),
)  # fmt: skip
