"""Contracts of DiffQKV attention's single steps: maps, contraction, weights, selection."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.contract import Array, Contract, Output
from attnspec.conformance.contracts.heads.diffqkv import (
    BAD_C,
    K,
    Q,
    V,
    bad_integers,
    fit_heads,
    without,
)

WITHOUT_CONTRACT = {
    "union_indices": "its answer is a list of lists of arrays; the reference's tests cover it"
}


def make_map(axis: str) -> Any:
    """The contiguous map of query heads to the heads of `axis`."""

    def make(rng: np.random.Generator, case: Case) -> np.ndarray:
        return np.arange(case.heads) // (case.heads // case.sizes[axis])

    return make


def make_any_map(axis: str) -> Any:
    """A map of query heads to any heads of `axis`: what a kernel is given, it must look at."""

    def make(rng: np.random.Generator, case: Case) -> np.ndarray:
        return rng.integers(0, case.sizes[axis], case.heads)

    return make


def make_mask(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Three of four pairs visible; one row in five sees nothing."""
    shape = case.shape("batch 1 queries keys")
    return np.logical_and(rng.random(shape) < 0.75, rng.random((*shape[:-1], 1)) < 0.8)


def make_weights(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Rows that sum to at most 1: multiples of 1/64, so that many are equal and some are 0."""
    shape = case.shape("batch heads queries keys")
    if not shape[-1]:
        return np.zeros(shape)
    counts = rng.multinomial(64, rng.dirichlet(np.full(shape[-1], 0.5)), shape[:-1])
    return np.where(rng.random((*shape[:-1], 1)) < 0.1, 0.0, counts / 64.0)


def make_chosen(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Distinct keys in any order, `c` a row."""
    shape = case.shape("batch heads queries keys")
    order = np.argsort(rng.random(shape), axis=-1, kind="stable")
    return order[..., : case.sizes["c"]]


def poison_unread(arguments: dict[str, Any], case: Case) -> dict[str, Any]:
    """NaN in the values that no row of the query heads which read them weighs, or has chosen."""
    P, v = arguments["P"], arguments["v"].copy()
    used = P != 0
    if "idx" in arguments:
        chosen = np.zeros(P.shape, bool)
        np.put_along_axis(chosen, arguments["idx"], True, axis=-1)
        used &= chosen
    by_head: np.ndarray = np.any(used, axis=2)
    for g in range(v.shape[1]):
        unread: np.ndarray = np.logical_not(np.any(by_head[:, arguments["hv"] == g], axis=1))
        v[:, g][unread] = np.nan
    return {**arguments, "v": v}


def poison_hidden_scores(arguments: dict[str, Any], case: Case) -> dict[str, Any]:
    """NaN in the scores that the mask hides."""
    if "mask" not in arguments:
        return arguments
    return {**arguments, "s": np.where(arguments["mask"], arguments["s"], np.nan)}


def _counts(sizes: Any) -> dict[str, st.SearchStrategy[Any]]:
    """Hq is a multiple of both, which have no need of one another."""
    return {"Hq": st.sampled_from([12, 24]), "Hk": st.sampled_from([1, 3, 4]),
            "Hv": st.sampled_from([2, 6, 12])}  # fmt: skip


def _sizes_of_a_cache(sizes: Any) -> dict[str, st.SearchStrategy[Any]]:
    names = {"Hk": 16, "dk": 256, "Hv": 16, "dv": 256, "itemsize": 8, "S": 2**20}
    return {name: st.integers(1, most) for name, most in names.items()}


P = Array("P", "batch heads queries keys", make=make_weights)
HV = Array("hv", "heads", make=make_map("v_heads"))
BAD_MAP = (
    ("a map of one head too many", "hv", lambda a: np.append(a["hv"], 0)),
    ("a map of floats", "hv", lambda a: a["hv"] * 1.0),
)
CONTRACTS = (
    Contract(
        operation="diffqkv.head_maps",
        sizes={},
        arrays=(),
        outputs=(Output("hk", "exact"), Output("hv", "exact")),
        parameters=_counts,
        bad_inputs=(
            ("key heads that do not divide", "Hk", lambda a: 5),
            ("value heads that do not divide", "Hv", lambda a: 7),
            *bad_integers("Hq"),
            *bad_integers("Hk"),
            *bad_integers("Hv"),
        ),
    ),
    Contract(
        operation="diffqkv.contract_query",
        sizes={**without("keys", "v_heads", "dv"), "wide": (1, 32)},
        arrays=(
            Array("q", "batch heads queries wide", role="query"),
            Array("E", "heads wide d"),
        ),
        outputs=(Output("qe"),),
        linear_in=("q", "E"),
        bad_inputs=(
            ("E of another width", "E", lambda a: a["E"].repeat(2, axis=1)),
            ("E of other heads", "E", lambda a: a["E"].repeat(2, axis=0)),
            ("E with a batch", "E", lambda a: a["E"][None]),
        ),
    ),
    Contract(
        operation="diffqkv.scores",
        sizes=without("v_heads", "dv"),
        arrays=(Q, K, Array("hk", "heads", make=make_any_map("kv_heads"))),
        outputs=(Output("s", dtype="float32"),),
        parameters=lambda sizes: {"scale": st.sampled_from([None, 0.5])},
        linear_in=("q", "k"),
        bad_inputs=(
            ("k of another head size", "k", lambda a: a["k"].repeat(2, axis=-1)),
            ("a map of one head too many", "hk", lambda a: np.append(a["hk"], 0)),
            ("a map of floats", "hk", lambda a: a["hk"] * 1.0),
            ("a map beyond the key heads", "hk", lambda a: a["hk"] + a["k"].shape[1]),
        ),
    ),
    Contract(
        operation="diffqkv.softmax_rows",
        sizes=without("v_heads", "d", "dv"),
        arrays=(
            Array("s", "batch heads queries keys", role="query"),
            Array("mask", "batch 1 queries keys", make=make_mask, optional=True),
        ),
        outputs=(Output("P"), Output("lse", dtype="float32", row_axes=0)),
        poison=poison_hidden_scores,
        neutral={"mask": lambda case: np.ones(case.shape("batch 1 queries keys"), bool)},
        bad_inputs=(
            ("an integer mask", "mask", lambda a: np.ones((1, 1, 1, 1), np.int64)),
            ("a mask of other rows", "mask", lambda a: np.ones((1, 1, 99, 1), bool)),
        ),
    ),
    Contract(
        operation="diffqkv.attend",
        sizes=without("d"),
        fix=fit_heads,
        arrays=(P, V, Array("hv", "heads", make=make_any_map("v_heads"))),
        outputs=(Output("out"),),
        linear_in=("v", "P"),
        key_arrays=("P", "v"),
        poison=poison_unread,
        bad_inputs=(
            *BAD_MAP,
            ("v with fewer tokens", "v", lambda a: a["v"][..., :-1, :]),
            ("a map beyond the value heads", "hv", lambda a: a["hv"] + a["v"].shape[1]),
        ),
    ),
    Contract(
        operation="diffqkv.select_values",
        sizes=without("v_heads", "d", "dv"),
        arrays=(P,),
        outputs=(Output("idx", "exact"), Output("kept", row_axes=0)),
        parameters=lambda sizes: {"c": st.sampled_from([1, 2, 3, 5, 8, 24, 100])},
        bad_inputs=(*BAD_C, ("weights that are no array", "P", lambda a: a["P"].tolist())),
    ),
    Contract(
        operation="diffqkv.attend_selected",
        sizes={**without("d"), "c": (1, 24)},
        fix=lambda sizes: {**fit_heads(sizes), "c": min(sizes["c"], sizes["keys"])},
        arrays=(P, Array("idx", "batch heads queries c", make=make_chosen), V, HV),
        outputs=(Output("out"),),
        parameters=lambda sizes: {"renormalise": st.booleans()},
        linear_in=("v",),
        poison=poison_unread,
        bad_inputs=(
            *BAD_MAP,
            ("idx of floats", "idx", lambda a: a["idx"] * 1.0),
            ("idx of other heads", "idx", lambda a: a["idx"].repeat(2, axis=1)),
            ("v with fewer tokens", "v", lambda a: a["v"][..., :-1, :]),
        ),
    ),
    Contract(
        operation="diffqkv.cache_bytes",
        sizes={},
        arrays=(),
        outputs=(Output("bytes", "exact", plain=True),),
        parameters=_sizes_of_a_cache,
        bad_inputs=(*bad_integers("Hk"), *bad_integers("dv"), ("S = -1", "S", lambda a: -1)),
    ),
)
