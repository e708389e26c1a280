"""Contract of pointer networks at decode: the slots that a constraint leaves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

from attnspec.conformance.contract import Contract, Output


def _visits(n: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Some of the slots of n points, or all, each once and none of them the end."""
    order = st.permutations(range(1, n + 1))
    return st.tuples(order, st.integers(0, n)).map(lambda drawn: tuple(drawn[0][: drawn[1]]))


def _parameters(sizes: Mapping[str, int]) -> dict[str, st.SearchStrategy[Any]]:
    n = st.shared(st.integers(1, 6), key="points")
    return {
        "slots": n.flatmap(_visits),
        "n": n,
        "constraint": st.sampled_from(["tsp", "hull", None]),
    }


CONTRACTS = (
    Contract(
        operation="pointer_networks.constraint_mask",
        sizes={},
        arrays=(),
        outputs=(Output("allowed", "exact"),),
        parameters=_parameters,
        bad_inputs=(
            ("a constraint of no task", "constraint", lambda a: "knapsack"),
            ("no point", "n", lambda a: 0),
            ("half a point", "n", lambda a: 1.5),
            ("a slot beyond the points", "slots", lambda a: (a["n"] + 1,)),
            ("a slot before the end", "slots", lambda a: (-1,)),
        ),
    ),
)
