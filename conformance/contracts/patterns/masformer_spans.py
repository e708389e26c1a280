"""Contracts of MASFormer's bookkeeping: schedules, masks, rows of the cache, reach and cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.contract import Array, BadValue, Contract, Output
from attnspec.conformance.contracts.patterns.masformer import BAD_SPANS, SPANS
from attnspec.conformance.values import bad_integers

T = st.sampled_from([9, 16, 5, 12, 1, 0, 23])
CAUSAL = st.sampled_from([True, True, False])


def _at_most_all(sizes: dict[str, int]) -> dict[str, int]:
    return {**sizes, "full": min(sizes["full"], sizes["layers"])}


def _schedule(sizes: Mapping[str, int]) -> dict[str, st.SearchStrategy[Any]]:
    """Layers by a rule, or by their numbers: those in the middle, from the top down."""
    L, full = sizes["layers"], sizes["full"]
    numbers = [(L - full) // 2 + i for i in reversed(range(full))]
    return {
        "L": st.just(L),
        "l": st.just(full),
        "placement": st.sampled_from(["every", "bottom", "top", numbers]),
    }


def _cost(sizes: Mapping[str, int]) -> dict[str, st.SearchStrategy[Any]]:
    """Blocks or windows, as `sizes` says; some reach over the whole text."""
    reach = st.sampled_from([3, 1, 4, 8, 7, 50])
    blocks = sizes["blocks"] == 1
    return {
        "T": st.sampled_from([24, 10, 1, 37, 8192]),
        "L": st.just(sizes["layers"]),
        "l": st.just(sizes["full"]),
        "kind": st.just("block" if blocks else "window"),
        "b": reach if blocks else st.none(),
        "w": st.none() if blocks else reach,
    }


def _lengths(rng: np.random.Generator, case: Case) -> np.ndarray:
    return rng.integers(0, case.parameters["T"] + 1, case.sizes["batch"])


def _masks(rng: np.random.Generator, case: Case) -> np.ndarray:
    """One pair in four, so that the order of the layers matters."""
    return rng.random(case.shape("layers tokens tokens")) < 0.25


BAD_T = (("T = -1", "T", lambda a: -1), ("T = 2.5", "T", lambda a: 2.5))
CONTRACTS = (
    Contract(
        operation="masformer.layer_spans",
        sizes={"layers": (1, 12), "full": (0, 12)},
        fix=_at_most_all,
        arrays=(),
        outputs=(Output("full", "exact"),),
        parameters=_schedule,
        bad_inputs=(
            *bad_integers("L"),
            *bad_integers("l", 0),
            ("more full layers than there are", "l", lambda a: a["L"] + 1),
            ("a fourth placement", "placement", lambda a: "middle"),
            ("a layer too few", "placement", lambda a: list(range(a["l"] + 1))[1:][:-1]
             if a["l"] else [0]),
            ("a layer too high", "placement", lambda a: [a["L"]] * a["l"] or [0]),
        ),
    ),
    Contract(
        operation="masformer.span_mask",
        sizes={},
        arrays=(),
        outputs=(Output("mask", "exact"),),
        parameters=lambda sizes: {"T": T, "span": st.sampled_from(SPANS), "causal": CAUSAL},
        bad_inputs=(*BAD_T, *BAD_SPANS, ("causal = 1", "causal", lambda a: 1)),
    ),
    Contract(
        operation="masformer.block_mask",
        sizes={"batch": (1, 3)},
        arrays=(Array("lengths", "batch", make=_lengths, optional=True),),
        outputs=(Output("mask", "exact"),),
        parameters=lambda sizes: {
            "T": T,
            "b": st.sampled_from([4, 3, 1, 5, 30]),
            "n": st.sampled_from([0, 1, 2]),
            "causal": CAUSAL,
        },
        bad_inputs=(
            *BAD_T,
            *bad_integers("b"),
            *bad_integers("n", 0),
            ("causal = 1", "causal", lambda a: 1),
            ("one length for all", "lengths", lambda a: 1),
            ("lengths as floats", "lengths", lambda a: np.zeros(2)),
            BadValue("a negative length", "lengths", lambda a: np.array([-1])),
            BadValue("a length beyond the text", "lengths", lambda a: np.array([a["T"] + 1])),
        ),
    ),
    Contract(
        operation="masformer.window_mask",
        sizes={},
        arrays=(),
        outputs=(Output("mask", "exact"),),
        parameters=lambda sizes: {
            "T": T, "w": st.sampled_from([2, 1, 0, 5, 40]), "causal": CAUSAL,
        },
        bad_inputs=(*BAD_T, *bad_integers("w", 0), ("causal = 1", "causal", lambda a: 1)),
    ),
    Contract(
        operation="masformer.cache_rows_needed",
        sizes={},
        arrays=(),
        outputs=(Output("rows", "exact", plain=True),),
        parameters=lambda sizes: {"t": st.integers(0, 40), "span": st.sampled_from(SPANS)},
        bad_inputs=(*bad_integers("t", 0), *BAD_SPANS),
    ),
    Contract(
        operation="masformer.reachability",
        sizes={"layers": (0, 4), "tokens": (1, 12)},
        arrays=(Array("schedule", "layers tokens tokens", make=_masks),),
        outputs=(Output("reached", "exact"),),
        parameters=lambda sizes: {"T": st.just(sizes["tokens"])},
        queries="tokens",
        keys="tokens",
        bad_inputs=(
            *BAD_T,
            ("masks of another text", "schedule", lambda a: np.ones((1, 29, 29), bool)),
            ("masks of weights", "schedule", lambda a: np.ones((1, a["T"], a["T"]))),
            ("a row of masks", "schedule", lambda a: np.ones((1, a["T"]), bool)),
        ),
    ),
    Contract(
        operation="masformer.relative_cost",
        sizes={"layers": (1, 24), "full": (0, 24), "blocks": (0, 1)},
        fix=_at_most_all,
        arrays=(),
        outputs=(Output("cost", "exact", plain=True),),
        parameters=_cost,
        bad_inputs=(
            *bad_integers("T"),
            *bad_integers("L"),
            ("more full layers than there are", "l", lambda a: a["L"] + 1),
            ("a third kind", "kind", lambda a: "full"),
            ("blocks of nothing", "b", lambda a: 0),
            ("a window of half a token", "w", lambda a: 0.5),
        ),
    ),
)  # fmt: skip
