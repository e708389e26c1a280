"""Contracts of StreamingLLM, the rows of the cache: which stay, and where attention sees them."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.contract import Array, BadValue, Contract, Output


def positions(axis: str, name: str) -> Array:
    """Integers that are neither sorted nor dense: a position is not a place in the array."""
    return Array(name, axis, make=lambda rng, case: rng.integers(0, 48, case.shape(axis)))


def integers(**ranges: tuple[int, int]) -> Any:
    return lambda sizes: {name: st.integers(*ends) for name, ends in ranges.items()}


def wrong_integers(*names: str) -> tuple[tuple[str, str, Any], ...]:
    """A negative, fractional and missing value for each integer argument."""
    return tuple(
        (f"{name} = {value}", name, lambda a, value=value: value)
        for name in names
        for value in (-1, 2.5, None, True)
    )


CONTRACTS = (
    Contract(
        operation="streaming_llm.evict_rows",
        sizes={},
        arrays=(),
        outputs=(Output("rows", "exact"),),
        parameters=integers(T=(0, 40), S=(0, 6), R=(0, 12)),
        bad_inputs=wrong_integers("T", "S", "R"),
    ),
    Contract(
        operation="streaming_llm.evict_rows_for_space",
        sizes={},
        arrays=(),
        outputs=(Output("rows", "exact"),),
        parameters=integers(T=(0, 40), m=(0, 16), S=(0, 6), R=(0, 12)),
        bad_inputs=wrong_integers("T", "m", "S", "R"),
    ),
    Contract(
        operation="streaming_llm.evict_rows_range",
        sizes={"before": (0, 9), "gap": (0, 9), "after": (0, 9)},
        arrays=(),
        outputs=(Output("rows", "exact"),),
        parameters=lambda sizes: {
            "T": st.just(sum(sizes.values())),
            "a": st.just(sizes["before"]),
            "b": st.just(sizes["before"] + sizes["gap"]),
        },
        bad_inputs=(
            ("a range beyond the rows", "b", lambda a: a["T"] + 1),
            ("a range that starts behind its end", "a", lambda a: a["b"] + 1),
            *wrong_integers("T", "a", "b"),
        ),
    ),
    Contract(
        operation="streaming_llm.cache_positions",
        sizes={},
        arrays=(),
        outputs=(Output("p_q", "exact"), Output("p_k", "exact")),
        parameters=integers(n=(0, 40), w=(0, 12)),
        bad_inputs=wrong_integers("n", "w"),
    ),
    Contract(
        operation="streaming_llm.rope",
        sizes={"batch": (1, 2), "kv_heads": (1, 3), "tokens": (1, 24), "pairs": (1, 12)},
        arrays=(
            Array("x", "batch kv_heads tokens 2*pairs", role="query"),
            positions("tokens", "pos"),
        ),
        outputs=(Output("out"),),
        parameters=lambda sizes: {
            "base": st.sampled_from([10000.0, 500000.0, 30.0]),
            "rotary_dims": st.sampled_from([None, *range(2, 2 * sizes["pairs"] + 1, 2)]),
        },
        linear_in=("x",),
        neutral={"rotary_dims": lambda case: 2 * case.sizes["pairs"]},
        bad_inputs=(
            ("an odd head size", "x", lambda a: a["x"][..., : (a["rotary_dims"] or 2) - 1]),
            ("an odd number of turned channels", "rotary_dims", lambda a: 3),
            ("more turned channels than there are", "rotary_dims", lambda a: a["x"].shape[-1] + 2),
            ("no turned channels", "rotary_dims", lambda a: 0),
            ("half a channel", "rotary_dims", lambda a: 2.5),
            ("positions of another number", "pos", lambda a: np.append(a["pos"], 0)),
            ("fractional positions", "pos", lambda a: a["pos"] + 0.5),
            ("a base of 0", "base", lambda a: 0.0),
            ("a negative base", "base", lambda a: -2.0),
        ),
    ),
    Contract(
        operation="streaming_llm.alibi_bias",
        sizes={"kv_heads": (1, 2), "group": (1, 3), "queries": (1, 24), "keys": (1, 24)},
        arrays=(
            Array("alibi_slopes", "heads", make=lambda rng, case: rng.uniform(0.01, 1, case.heads)),
            positions("queries", "p_q"),
            positions("keys", "p_k"),
        ),
        outputs=(Output("out"),),
        linear_in=("alibi_slopes",),
        bad_inputs=(
            BadValue("a slope of 0", "alibi_slopes", lambda a: 0 * a["alibi_slopes"]),
            ("integer slopes", "alibi_slopes", lambda a: np.ones(1, np.int64)),
            ("fractional positions", "p_q", lambda a: a["p_q"] + 0.5),
            ("fractional positions", "p_k", lambda a: a["p_k"] + 0.5),
        ),
    ),
    Contract(
        operation="streaming_llm.sink_window_mask",
        sizes={},
        arrays=(),
        outputs=(Output("mask", "exact"),),
        parameters=integers(T=(0, 24), S=(0, 6), R=(0, 12)),
        bad_inputs=wrong_integers("T", "S", "R"),
    ),
    Contract(
        operation="streaming_llm.sink_window_distances",
        sizes={},
        arrays=(),
        outputs=(Output("distances", "exact"),),
        parameters=integers(T=(0, 24), S=(0, 6), R=(0, 12)),
        bad_inputs=wrong_integers("T", "S", "R"),
    ),
)
