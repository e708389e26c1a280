"""Contract of NTK-Attention over sequences laid end to end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.cells import heads_cell
from attnspec.conformance.contract import Array, BadValue, Contract, Output
from attnspec.conformance.contracts.linear.ntk_attention import (
    BAD_SCALE,
    BAD_STATE,
    BAD_TOKENS,
    POSITIVITY,
    SIZES,
    SMALL_K,
    Z,
)
from attnspec.conformance.packing import PACKED, Packed, packed_sizes


def _cuts(axis: str) -> Any:
    """Cuts anywhere: some sequences have no query, some no key."""

    def make(rng: np.random.Generator, case: Case) -> np.ndarray:
        total, sequences = case.shape(f"{axis} sequences")
        cuts = np.sort(rng.integers(0, total + 1, sequences - 1))
        return np.concatenate([[0], cuts, [total]]).astype(np.int64)

    return make


def poison_unasked(arguments: dict[str, Any], case: Case) -> dict[str, Any]:
    """NaN in the keys and values of sequences without a query."""
    asked = np.diff(arguments["q_offsets"]) > 0
    rows = np.repeat(asked, np.diff(arguments["k_offsets"]))
    for name in ("K", "V"):
        arguments[name] = np.where(rows[:, None], arguments[name], np.nan)
    return arguments


def _parameters(sizes: Mapping[str, int]) -> dict[str, st.SearchStrategy[Any]]:
    scale = st.sampled_from([None, 0.5])
    return {"causal": st.booleans(), "scale": scale, "positivity": POSITIVITY}


CONTRACTS = (
    Contract(
        operation="ntk_attention.ntk_packed",
        sizes=packed_sizes(SIZES),
        arrays=(
            Array("q", "heads queries d", role="query"),
            Array("K", "kv_heads keys d", role="key"),
            Array("V", "kv_heads keys dv", role="value"),
            Z,
            SMALL_K,
            Array("q_offsets", make=_cuts("queries")),
            Array("k_offsets", make=_cuts("keys")),
        ),
        outputs=(Output("out", cancels=True),),
        parameters=_parameters,
        linear_in=("V Z",),
        poison=poison_unasked,
        packed=Packed({"q_offsets": {"q": -2}, "k_offsets": {"K": -2, "V": -2}}),
        cells={
            **PACKED,
            "MHA": heads_cell(2, 1),
            "GQA": heads_cell(2, 3),
            "MQA": heads_cell(1, 4),
        },
        bad_inputs=(
            ("offsets that stop short", "q_offsets", lambda a: a["q_offsets"][:-1]),
            ("offsets of another number", "k_offsets", lambda a: a["k_offsets"].repeat(2)),
            BadValue("offsets that decrease", "q_offsets", lambda a: a["q_offsets"][::-1].copy()),
            ("offsets as floats", "k_offsets", lambda a: a["k_offsets"] + 0.5),
            ("q with a batch", "q", lambda a: a["q"][None]),
            *(bad for bad in BAD_TOKENS if bad[0] != "another batch in V"),
            *BAD_STATE,
            *BAD_SCALE,
        ),
    ),
)
