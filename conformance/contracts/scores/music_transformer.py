"""Contracts of relative attention as a whole, global and local."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.cells import heads_cell
from attnspec.conformance.contract import Array, Contract, Output
from attnspec.conformance.contracts.scores.music_transformer_steps import (
    BAD_SCALES,
    BAD_TABLES,
    BLOCKS,
    NO_BLOCKS,
    NO_ORDER,
    ON_TOKENS,
    OTHER_KEYS,
    SIZES,
    E,
    K,
    Q,
    V,
    make_table,
)


def poison_far_rows(arguments: dict[str, Any], case: Case) -> dict[str, Any]:
    """NaN in the rows of the tables for distances that do not occur."""
    tokens, causal = case.sizes["tokens"], arguments.get("causal", True)
    for name in {"E", "Ev"} & set(arguments):
        table: np.ndarray = arguments[name].copy()
        rows = table.shape[-2]
        zero = rows - 1 if causal else rows // 2
        far = np.abs(np.arange(rows) - zero) >= tokens
        table[..., far, :] = np.nan
        arguments[name] = table
    return arguments


def _order(causal: bool) -> Any:
    return lambda case: case.with_(parameters={"causal": causal})


EV = Array("Ev", "heads rows dv", make=make_table("dv"), optional=True)
BAD_TOKENS = (
    *OTHER_KEYS,
    *BAD_TABLES,
    *BAD_SCALES,
    ("a table of values of another width", "Ev", lambda a: np.ones((99, a["v"].shape[-1] + 1))),
    ("v with fewer tokens", "v", lambda a: a["v"][..., :-1, :]),
    ("another batch in v", "v", lambda a: a["v"].repeat(2, axis=0)),
)
HEADS = {"MHA": heads_cell(2, 1), "GQA": heads_cell(2, 3), "MQA": heads_cell(1, 4)}
SHARED: dict[str, Any] = {
    "sizes": SIZES,
    "arrays": (Q, K, V, E, EV),
    "outputs": (Output("out", cancels=True),),
    "poison": poison_far_rows,
    "cancelling": ("dE",),
    **ON_TOKENS,
}
CONTRACTS = (
    Contract(
        operation="music_transformer.global_attention",
        parameters=lambda sizes: {
            "causal": st.sampled_from([True, True, False]),
            "scale": st.sampled_from([None, 0.5]),
        },
        causal=lambda case: case.parameters["causal"],
        cells={"causal self": _order(True), "noncausal self": _order(False), **HEADS},
        bad_inputs=(*BAD_TOKENS, NO_ORDER),
        **SHARED,
    ),
    Contract(
        operation="music_transformer.local_attention",
        parameters=lambda sizes: {
            "b": st.sampled_from(BLOCKS),
            "scale": st.sampled_from([None, 0.5]),
        },
        causal=lambda case: True,
        cells={"causal self": lambda case: case, **HEADS},
        bad_inputs=(
            *BAD_TOKENS,
            *NO_BLOCKS,
            ("a short table of values", "Ev", lambda a: np.ones((0, a["v"].shape[-1]))),
        ),
        **SHARED,
    ),
)
