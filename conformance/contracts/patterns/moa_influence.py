"""Contracts of MoA's influence: what hiding an entry of the attention changes."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.cells import heads_cell
from attnspec.conformance.contract import Array, Contract, Output
from attnspec.conformance.contracts.patterns.moa import SIZES
from attnspec.conformance.values import bad_integers, longer
from attnspec.reference.conventions import causal_mask
from attnspec.reference.primitives.softmax import softmax_lse

BLOCKS = (1, 2, 4, 3)
EPSILONS = (2.0**-7, 2.0**-10, 0.5)
"""Far above the rounding of 1 - P in the narrowest dtype, whose quotient would be noise."""


def whole_blocks(sizes: dict[str, int]) -> dict[str, int]:
    """A multiple of twelve, which all of `BLOCKS` divide."""
    return {**sizes, "tokens": sizes["tokens"] // 12 * 12}


def make_weights(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Causal softmax weights."""
    scores = 2.0 * rng.standard_normal(case.shape("batch heads tokens tokens"))
    return softmax_lse(scores, causal_mask(*scores.shape[-2:]))[0]


def poison_above(name: str) -> Any:
    """NaN above the diagonal of the last two axes."""

    def poison(arguments: dict[str, Any], case: Case) -> dict[str, Any]:
        x = arguments[name]
        return {**arguments, name: np.where(causal_mask(*x.shape[-2:]), x, np.nan)}

    return poison


BAD_EPSILONS = (
    ("a negative eps", "eps", lambda a: -1e-3),
    ("an eps that is no number", "eps", lambda a: True),
)
CONTRACTS = (
    Contract(
        operation="moa.influence",
        sizes={**{axis: SIZES[axis] for axis in ("batch", "kv_heads", "group", "dv")},
               "tokens": (1, 12)},
        queries="tokens",
        keys="tokens",
        least={"tokens": 1},
        arrays=(
            Array("P", make=make_weights),
            Array("V", "batch kv_heads tokens dv", role="value"),
            Array("g", "batch heads tokens dv"),
        ),
        outputs=(Output("E", cancels=True),),
        parameters=lambda sizes: {"eps": st.sampled_from(EPSILONS)},
        linear_in=("g", "V"),
        bad_inputs=(
            ("fewer keys than queries", "P", lambda a: a["P"][..., :-1]),
            ("values of more tokens", "V", lambda a: longer(a["V"])),
            ("a gradient of more tokens", "g", lambda a: longer(a["g"])),
            *BAD_EPSILONS,
        ),
    ),
    Contract(
        operation="moa.block_sum",
        sizes={"batch": (1, 2), "heads_of_it": (1, 3), "tokens": (12, 24)},
        fix=whole_blocks,
        arrays=(Array("E", "batch heads_of_it tokens tokens"),),
        outputs=(Output("blocks"),),
        parameters=lambda sizes: {"b": st.sampled_from(BLOCKS)},
        linear_in=("E",),
        poison=poison_above("E"),
        bad_inputs=(
            ("fewer rows than columns", "E",
             lambda a: a["E"][..., :-1, :]),
            ("blocks that do not fit", "b", lambda a: 1.5),
            *bad_integers("b"),
        ),
    ),
    Contract(
        operation="moa.block_influence",
        sizes={**SIZES, "tokens": (12, 36)},
        queries="tokens",
        keys="tokens",
        fix=whole_blocks,
        values=("normal", "flat", "structured", "real"),
        arrays=(
            Array("q", "batch heads tokens d", role="query"),
            Array("k", "batch kv_heads tokens d", role="key"),
            Array("v", "batch kv_heads tokens dv", role="value"),
            Array("g", "batch heads tokens dv"),
        ),
        outputs=(Output("influence", wide=True, cancels=True),),
        parameters=lambda sizes: {
            "b": st.sampled_from(BLOCKS),
            "eps": st.sampled_from(EPSILONS),
            "scale": st.sampled_from([None, 0.5, -0.25, 0.0]),
        },
        cells={
            "causal self": lambda case: case,
            "MHA": heads_cell(2, 1),
            "GQA": heads_cell(2, 3),
            "MQA": heads_cell(1, 4),
        },
        bad_inputs=(
            ("more keys than queries", "k", lambda a: longer(a["k"])),
            ("k of another head size", "k", lambda a: a["k"].repeat(2, axis=-1)),
            ("a gradient of more tokens", "g", lambda a: longer(a["g"])),
            ("a gradient of more channels", "g", lambda a: a["g"].repeat(2, axis=-1)),
            *bad_integers("b"),
            *BAD_EPSILONS,
        ),
    ),
    Contract(
        operation="moa.group_influence",
        sizes={"batch": (1, 2), "kv_heads": (1, 3), "group": (1, 3), "nb": (1, 6)},
        arrays=(Array("I", "batch heads nb nb"),),
        outputs=(Output("influence"),),
        parameters=lambda sizes: {
            "kv_heads": st.just(sizes["kv_heads"]),
            "interleaved": st.booleans(),
        },
        bad_inputs=(
            ("heads that do not divide", "kv_heads", lambda a: 11),
            *bad_integers("kv_heads"),
        ),
    ),
)  # fmt: skip
