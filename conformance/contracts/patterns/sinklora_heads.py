"""Contracts of SinkLoRA's masks: kinds of heads, who sees whom, and the roll of shifted heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

from attnspec.conformance.contract import Array, Contract, Output
from attnspec.conformance.contracts.patterns.sinklora import BAD_PATTERN, RHO
from attnspec.conformance.values import bad_integers

BAD_SHARES = (
    ("rho = -0.5", "rho", lambda a: -0.5),
    ("rho = 2", "rho", lambda a: 2),
    ("rho = True", "rho", lambda a: True),
    ("a share in words", "rho", lambda a: "half"),
)


def _mask_parameters(sizes: Mapping[str, int]) -> dict[str, st.SearchStrategy[Any]]:
    """Even sizes that fit one another where `sizes` says to roll, any sizes elsewhere."""
    rolls = sizes["rolls"] == 1
    return {
        "T": st.sampled_from([8, 16, 0, 24] if rolls else [9, 16, 5, 1, 0, 23]),
        "G": st.sampled_from([4, 8, 2] if rolls else [4, 3, 2, 1, 8, 30]),
        "H": st.sampled_from([4, 2, 3, 8, 1]),
        "s": st.sampled_from([4, 1, 0, 2, 6, 40]),
        "rho": st.sampled_from(RHO),
        "wrap": st.just(rolls),
        "causal": st.sampled_from([True, True, False]),
    }


CONTRACTS = (
    Contract(
        operation="sinklora.sf_head_kind",
        sizes={},
        arrays=(),
        outputs=(Output("kind", "exact"),),
        parameters=lambda sizes: {
            "H": st.sampled_from([8, 1, 2, 3, 5, 20, 32, 200]),
            "rho": st.sampled_from([*RHO, 0.07, 0.1, 0.34, 0]),
        },
        bad_inputs=(*bad_integers("H"), *BAD_SHARES),
    ),
    Contract(
        operation="sinklora.sf_mask",
        sizes={"rolls": (0, 1)},
        arrays=(),
        outputs=(Output("mask", "exact"),),
        parameters=_mask_parameters,
        bad_inputs=(
            *bad_integers("H"),
            *BAD_PATTERN,
            ("T = -1", "T", lambda a: -1),
        ),
    ),
    Contract(
        operation="sinklora.segment_and_reassemble",
        sizes={
            "batch": (1, 2),
            "H": (1, 5),
            "groups": (1, 3),
            "half": (1, 4),
            "d": (1, 8),
        },
        arrays=(Array("x", "batch H 2*half*groups d"),),
        outputs=(Output("x", "copy"),),
        parameters=lambda sizes: {
            "G": st.just(2 * sizes["half"]),
            "rho": st.sampled_from(RHO),
            "sign": st.sampled_from([-1, 1]),
        },
        bad_inputs=(
            *bad_integers("G"),
            *BAD_SHARES,
            ("an odd group", "G", lambda a: 1),
            ("a group that does not divide", "G", lambda a: 64 if a["x"].shape[2] else 0),
            ("sign = 0", "sign", lambda a: 0),
        ),
    ),
)  # fmt: skip
