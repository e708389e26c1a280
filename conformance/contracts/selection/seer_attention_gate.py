"""Contracts of SeerAttention's gate: pooling, positions of blocks, scores of pairs of blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.contract import Array, Contract, Output
from attnspec.conformance.contracts.selection.seer_attention_selection import (
    KINDS,
    even,
)
from attnspec.reference.selection.seer_attention_gate import gate_rope


def _width(case: Case) -> int:
    """dg: free with a projection of the queries, else the width of the heads."""
    return 2 * case.sizes["half_gate"] if "Wq" in case.options else case.sizes["d"]


def _table(which: int) -> Any:
    """The cosines (0) or sines (1) of blocks of three tokens."""

    def make(rng: np.random.Generator, case: Case) -> np.ndarray:
        return gate_rope(case.sizes["blocks"], 3, _width(case), 100.0)[which]

    return make


def _make_Wk(rng: np.random.Generator, case: Case) -> np.ndarray:  # noqa: N802
    heads = case.sizes["kv_heads"] if "Wq" in case.options else case.heads
    channels = 3 * case.sizes["d"]
    return rng.standard_normal((heads, channels, _width(case))) / channels**0.5


CONTRACTS = (
    Contract(
        operation="seer_attention.pool_blocks",
        sizes={"batch": (1, 2), "kv_heads": (1, 2), "tokens": (1, 24), "d": (1, 24)},
        arrays=(Array("x", "batch kv_heads tokens d", role="key"),),
        outputs=(Output("pooled"),),
        parameters=lambda sizes: {
            "b": st.sampled_from([1, 2, 3, 7, 16, 64]),
            "kinds": st.sampled_from(KINDS),
        },
        bad_inputs=(
            ("blocks of no token", "b", lambda a: 0),
            ("half a token", "b", lambda a: 0.5),
            ("the median", "kinds", lambda a: ("median",)),
            ("the same kind twice", "kinds", lambda a: ("avg", "avg")),
            ("no kind", "kinds", lambda a: ()),
        ),
    ),
    Contract(
        operation="seer_attention.gate_rope",
        sizes={},
        arrays=(),
        outputs=(Output("cos", dtype="float64"), Output("sin", dtype="float64")),
        parameters=lambda sizes: {
            "nb": st.integers(0, 12),
            "b": st.sampled_from([1, 3, 16, 64]),
            "dg": st.integers(1, 16).map(lambda half: 2 * half),
            "base": st.sampled_from([10000.0, 100.0, 5e5]),
        },
        bad_inputs=(
            ("fewer blocks than none", "nb", lambda a: -1),
            ("blocks of no token", "b", lambda a: 0),
            ("an odd width", "dg", lambda a: 3),
            ("a base of 0", "base", lambda a: 0.0),
        ),
    ),
    Contract(
        operation="seer_attention.gate_scores",
        sizes={
            "batch": (1, 2),
            "kv_heads": (1, 2),
            "group": (1, 3),
            "blocks": (1, 12),
            "d": (1, 24),
            "half_gate": (1, 12),
        },
        fix=even,
        queries="blocks",
        keys="blocks",
        arrays=(
            Array("pq", "batch heads blocks d", role="query"),
            Array("pk", "batch kv_heads blocks 3*d", role="key"),
            Array("Wq", "heads d 2*half_gate", optional=True),
            Array("Wk", "heads 3*d 2*half_gate", make=_make_Wk),
            Array("cos", "blocks 2*half_gate", make=_table(0)),
            Array("sin", "blocks 2*half_gate", make=_table(1)),
        ),
        outputs=(Output("G", wide=True),),
        causal=lambda case: True,
        bad_inputs=(
            ("more blocks of keys", "pk", lambda a: a["pk"].repeat(2, axis=-2)),
            ("kv heads that do not divide", "pk", lambda a: a["pk"].repeat(7, axis=-3)),
            ("a projection of other channels", "Wk", lambda a: a["Wk"].repeat(2, axis=-2)),
            ("a projection of more heads", "Wk", lambda a: a["Wk"].repeat(9, axis=0)),
            ("a projection without heads", "Wk", lambda a: a["Wk"][0]),
            ("no projection of the keys", "Wk", lambda a: None),
            ("queries of other channels", "Wq", lambda a: np.ones((1, 1, 2))),
            ("a table of more blocks", "cos", lambda a: a["cos"].repeat(2, axis=0)),
            ("a table of half the width", "sin", lambda a: a["sin"][:, ::2]),
            ("a table as a list", "sin", lambda a: a["sin"].tolist()),
        ),
    ),
)
