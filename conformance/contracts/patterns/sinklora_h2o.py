"""Contracts of H2O's cache: what rows receive, which of them stay, and how many."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.contract import Array, Contract, Output, Ranking
from attnspec.conformance.contracts.cache.streaming_llm_rows import wrong_integers
from attnspec.conformance.values import longer

Drawn = dict[str, st.SearchStrategy[Any]]


def budgets(sizes: Mapping[str, int]) -> Drawn:
    """Few rows, so that a short text already evicts; either budget may be 0."""
    return {"hh": st.integers(0, 4), "rec": st.integers(0, 6)}


def eighths(rng: np.random.Generator, shape: tuple[int, ...], most: int = 16) -> np.ndarray:
    """Numbers whose sums are exact in every dtype, many of them equal."""
    return rng.integers(0, most, shape) / 8.0


def scores_before(rng: np.random.Generator, case: Case) -> np.ndarray:
    return eighths(rng, case.shape("kv_heads past"))


def first_or_later(rng: np.random.Generator, case: Case) -> np.ndarray | None:
    """Scores before the call, or None in a text's first one."""
    return None if case.sizes["past"] == 0 else scores_before(rng, case)


def kept_before(rng: np.random.Generator, case: Case) -> np.ndarray:
    """The last rows, and others here and there."""
    kv_heads, past = case.shape("kv_heads past")
    recent = np.arange(past) >= past - case.parameters["rec"]
    return recent | (rng.random((kv_heads, past)) < 0.3)


def weights(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Weights of the call's queries: causal, not normalised, exact."""
    H, w, past = case.shape("heads w past")
    P = eighths(rng, (1, H, w, past + w), 9)
    return P * np.tri(w, past + w, past)


def staying(arguments: Mapping[str, Any]) -> np.ndarray:
    """bool (n), the rows that stay whatever their scores are."""
    n, hh, rec = arguments["n"], arguments["hh"], arguments["rec"]
    return (np.arange(n) >= n - rec) | (n <= hh + rec)


def scores_given(arguments: Mapping[str, Any]) -> Ranking:
    """The scores are an argument, so that equal ones are ties."""
    a, room = arguments["a"], arguments["hh"] + arguments["rec"]
    forced = np.broadcast_to(staying(arguments), a.shape)
    scores = np.where(forced, np.zeros_like(a), a)
    return Ranking(scores, min(a.shape[-1], room), exact="always", forced=forced)


P = Array("P", make=weights)
ROWS = {"kv_heads": (1, 3), "group": (1, 3), "past": (0, 16), "w": (1, 4)}
LEAST = {"w": 1}
WRONG_WEIGHTS = (
    ("weights of two sequences", "P", lambda a: a["P"].repeat(2, axis=0)),
    ("scores of other rows", "a", lambda a: np.ones((1, 40))),
    ("scores of another number of heads", "a",
     lambda a: np.ones((29, a["P"].shape[3] - a["P"].shape[2]))),
)  # fmt: skip

CONTRACTS = (
    Contract(
        operation="sinklora.h2o_accumulate",
        sizes=ROWS,
        least=LEAST,
        arrays=(Array("a", make=first_or_later), P),
        outputs=(Output("a", wide=True),),
        parameters=lambda sizes: {
            "w": st.just(sizes["w"]),
            "kv_heads": st.sampled_from([sizes["kv_heads"], None] if sizes["past"] else [
                sizes["kv_heads"]]),
        },
        bad_inputs=(
            *WRONG_WEIGHTS,
            ("weights of more queries", "P", lambda a: a["P"].repeat(2, axis=2)),
            ("no query", "w", lambda a: 0),
            ("half a query", "w", lambda a: 0.5),
            ("kv heads that do not divide", "kv_heads", lambda a: 29),
        ),
    ),
    Contract(
        operation="sinklora.h2o_keep",
        sizes={"kv_heads": (1, 3), "rows": (1, 20)},
        arrays=(Array("a", "kv_heads rows"),),
        outputs=(Output("idx", "selection"),),
        parameters=lambda sizes: {"n": st.just(sizes["rows"]), **budgets(sizes)},
        ranking=scores_given,
        poison=lambda arguments, case: {
            **arguments, "a": np.where(staying(arguments), np.nan, arguments["a"])
        },
        bad_inputs=(
            ("scores of other rows", "n", lambda a: -1),
            ("more scores than rows", "a", lambda a: longer(a["a"].T).T),
            *wrong_integers("hh", "rec"),
        ),
    ),
    Contract(
        operation="sinklora.h2o_mask_step",
        sizes=ROWS,
        least=LEAST,
        arrays=(Array("a", make=scores_before), P, Array("kept", make=kept_before)),
        outputs=(Output("a", wide=True), Output("kept", "exact")),
        parameters=budgets,
        bad_inputs=(
            *WRONG_WEIGHTS,
            ("kept rows of other scores", "kept", lambda a: np.ones((29, 3), bool)),
            ("kept rows as numbers", "kept", lambda a: a["a"]),
            ("scores alone", "kept", lambda a: None),
            ("kept rows alone", "a", lambda a: None),
            *wrong_integers("hh", "rec"),
        ),
    ),
    Contract(
        operation="sinklora.h2o_budgets",
        sizes={},
        arrays=(),
        outputs=(Output("hh", "exact", plain=True), Output("rec", "exact", plain=True)),
        parameters=lambda sizes: {
            "T": st.sampled_from([24, 0, 1, 19, 100, 4096]),
            "heavy_ratio": st.sampled_from([0.1, 0.2, 0.0, 0.29, 1.0, 0.35]),
            "recent_ratio": st.sampled_from([0.1, 0.25, 0.0, 0.58, 1]),
        },
        bad_inputs=(
            ("T = -1", "T", lambda a: -1),
            ("T = 2.5", "T", lambda a: 2.5),
            ("a ratio in words", "heavy_ratio", lambda a: "tenth"),
            ("a ratio below 0", "heavy_ratio", lambda a: -0.1),
            ("a ratio of True", "recent_ratio", lambda a: True),
            ("no end of recent tokens", "recent_ratio", lambda a: float("inf")),
        ),
    ),
)  # fmt: skip
