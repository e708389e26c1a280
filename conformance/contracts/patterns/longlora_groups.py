"""Contracts of LongLoRA's groups: their size, where they begin, their masks and the roll."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

from attnspec.conformance.contract import Array, Contract, Output
from attnspec.conformance.values import bad_integers


def _mask_parameters(sizes: Mapping[str, int]) -> dict[str, st.SearchStrategy[Any]]:
    """Even sizes that fit one another where `sizes` says to roll, any sizes elsewhere."""
    rolls = sizes["rolls"] == 1
    return {
        "T": st.sampled_from([8, 16, 0, 24] if rolls else [9, 16, 5, 1, 0, 23]),
        "G": st.sampled_from([4, 8, 2] if rolls else [4, 3, 2, 1, 8, 30]),
        "H": st.sampled_from([4, 2, 6] if rolls else [4, 3, 1]),
        "variant": st.sampled_from(["roll"] if rolls else ["segments"]),
        "causal": st.sampled_from([True, True, False]),
    }


CONTRACTS = (
    Contract(
        operation="longlora.choose_group_size",
        sizes={},
        arrays=(),
        outputs=(Output("G", "exact", plain=True),),
        parameters=lambda sizes: {
            "T": st.sampled_from([8192, 16, 4096, 12, 100000, 12288, 4]),
            "ratio": st.sampled_from([0.25, 0.5, 1.0, 0.25]),
            "sft_group_size": st.sampled_from([None, 8192, 2, None]),
        },
        bad_inputs=(
            *bad_integers("T"),
            ("a text that is no number", "T", lambda a: "8"),
            ("ratio = 0", "ratio", lambda a: 0.0),
            ("ratio = 2", "ratio", lambda a: 2.0),
            ("a ratio in words", "ratio", lambda a: "quarter"),
            ("a group size that is odd", "sft_group_size", lambda a: 3),
            ("a group size of half a token", "sft_group_size", lambda a: 0.5),
            ("T ratio no whole number", "ratio",
             lambda a: 0.25 + 0.5 / a["T"] if a["sft_group_size"] is None else 0.0),
        ),
    ),
    Contract(
        operation="longlora.group_starts",
        sizes={},
        arrays=(),
        outputs=(Output("starts", "exact"),),
        parameters=lambda sizes: {
            "T": st.integers(0, 40),
            "G": st.sampled_from([4, 1, 3, 2, 8, 30, 64]),
            "shifted": st.sampled_from([True, False]),
        },
        bad_inputs=(
            *bad_integers("G"),
            ("T = -1", "T", lambda a: -1),
            ("T = 2.5", "T", lambda a: 2.5),
            ("shifted = 1", "shifted", lambda a: 1),
        ),
    ),
    Contract(
        operation="longlora.s2_mask",
        sizes={"rolls": (0, 1)},
        arrays=(),
        outputs=(Output("mask", "exact"),),
        parameters=_mask_parameters,
        bad_inputs=(
            *bad_integers("G"),
            *bad_integers("H"),
            ("T = -1", "T", lambda a: -1),
            ("a third variant", "variant", lambda a: "shift"),
            ("an odd group to roll", "G", lambda a: 1 if a["variant"] == "roll" else 0),
            ("an odd number of heads to roll", "H" , lambda a: 3 if a["variant"] == "roll" else 0),
            ("causal = 1", "causal", lambda a: 1),
        ),
    ),
    Contract(
        operation="longlora.shift_heads",
        sizes={
            "batch": (1, 2),
            "half_heads": (1, 2),
            "groups": (1, 3),
            "half": (1, 4),
            "d": (1, 8),
        },
        arrays=(Array("x", "batch 2*half_heads 2*half*groups d"),),
        outputs=(Output("x", "copy"),),
        parameters=lambda sizes: {
            "G": st.just(2 * sizes["half"]),
            "sign": st.sampled_from([-1, 1]),
        },
        bad_inputs=(
            *bad_integers("G"),
            ("an odd group", "G", lambda a: 1),
            ("a group that does not divide", "G",
             lambda a: 64 if a["x"].shape[2] else 0),
            ("an odd number of heads", "x", lambda a: a["x"][:, :1]),
            ("sign = 0", "sign", lambda a: 0),
        ),
    ),
)  # fmt: skip
