"""Contracts of the steps of RCMHA: heads, convolutions, scores, the shift, weights, memory."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.contract import Array, Contract, Output
from attnspec.conformance.contracts.scores.rcmha import (
    SIZES,
    B,
    K,
    Q,
    R,
    U,
    V,
    fit_queries,
    make_normal,
)

TOKENS: dict[str, Any] = {"queries": "tokens", "keys": "tokens"}


def without(*axes: str) -> dict[str, tuple[int, int]]:
    return {axis: span for axis, span in SIZES.items() if axis not in axes}


def make_products(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Products of the queries with keys + queries rows of a table."""
    queries, keys = case.shape("queries keys")
    return rng.standard_normal((*case.shape("batch heads queries"), keys + queries))


def make_before(rng: np.random.Generator, case: Case) -> np.ndarray:
    batch, heads, d, taps = case.shape("batch heads d taps")
    return rng.standard_normal((batch, heads, taps - 1, d))


def make_mask(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Three pairs of four; some rows see nothing."""
    queries, keys = case.shape("queries keys")
    seen = rng.random((queries, keys)) < 0.75
    return np.logical_and(seen, rng.random((queries, 1)) < 0.8)


def poison_behind_mask(arguments: dict[str, Any], case: Case) -> dict[str, Any]:
    """NaN in every score that the mask hides, and in the values that no row sees."""
    mask = arguments.get("mask")
    if mask is not None:
        arguments["scores"] = np.where(mask, arguments["scores"], np.nan)
        unread: np.ndarray = np.logical_not(mask.any(axis=0))
        arguments["v"] = np.where(unread[:, None], np.nan, arguments["v"])
    return arguments


BAD_K = (
    ("k of another head size", "k", lambda a: a["k"].repeat(2, axis=-1)),
    ("other heads in k", "k", lambda a: a["k"].repeat(2, axis=-3)),
)
CONTRACTS = (
    Contract(
        operation="rcmha.project_heads",
        sizes={"batch": (1, 2), "kv_heads": (1, 4), "tokens": (1, 24), "d": (1, 24)},
        arrays=(
            Array("x", "batch tokens kv_heads*d"),
            Array("W", make=make_normal("kv_heads*d kv_heads*d", "kv_heads*d")),
            Array("b", "kv_heads*d", optional=True),
        ),
        outputs=(Output("p"),),
        parameters=lambda sizes: {"heads": st.just(sizes["kv_heads"])},
        linear_in=("x b", "W b"),
        bad_inputs=(
            ("a matrix that is not square", "W", lambda a: a["W"].repeat(2, axis=1)),
            ("a bias of another width", "b", lambda a: np.ones(999)),
            ("heads that do not divide", "heads", lambda a: 999),
            ("no heads", "heads", lambda a: 0),
        ),
        **TOKENS,
    ),
    Contract(
        operation="rcmha.depthwise_causal_conv",
        sizes={
            "batch": (1, 2), "kv_heads": (1, 3), "tokens": (1, 24), "d": (1, 24), "taps": (1, 5),
        },
        arrays=(
            Array("p", "batch heads tokens d"),
            Array("w", "d taps"),
            Array("b", "d"),
            Array("state", "batch heads before d", make=make_before, optional=True),
        ),
        outputs=(Output("y"), Output("new_state", kind="copy")),
        linear_in=("p b state", "w b"),
        causal=lambda case: True,
        bad_inputs=(
            ("filters of another width", "w", lambda a: a["w"].repeat(2, axis=0)),
            ("no taps", "w", lambda a: a["w"][:, :0]),
            ("biases of another width", "b", lambda a: a["b"].repeat(2)),
            ("a state of other rows", "state", lambda a: np.ones((*a["p"].shape[:2], 9, 1))),
        ),
        **TOKENS,
    ),
    Contract(
        operation="rcmha.content_scores",
        sizes=without("dv"),
        fix=fit_queries,
        arrays=(Q, U, K),
        outputs=(Output("s"),),
        linear_in=("k", "q u"),
        bad_inputs=(*BAD_K, ("a bias of other heads", "u", lambda a: a["u"].repeat(2, axis=0))),
    ),
    Contract(
        operation="rcmha.relative_shift",
        sizes=without("d", "dv"),
        fix=fit_queries,
        arrays=(Array("Bmat", make=make_products),),
        outputs=(Output("s", kind="exact"),),
        bad_inputs=(("too few columns", "Bmat", lambda a: a["Bmat"].repeat(9, axis=-2)),),
    ),
    Contract(
        operation="rcmha.relative_scores",
        sizes=without("dv"),
        fix=fit_queries,
        arrays=(Q, R, B),
        outputs=(Output("s"),),
        parameters=lambda sizes: {"M": st.just(sizes["keys"] - sizes["queries"])},
        linear_in=("R b", "q b"),
        bad_inputs=(
            ("an odd number of rows", "R", lambda a: a["R"][1:]),
            ("a table of other heads", "R", lambda a: a["R"].repeat(2, axis=1)),
            ("numbers for fewer distances", "b", lambda a: a["b"][1:]),
            ("a memory beyond the table", "R", lambda a: a["R"][:0]),
            ("a memory of -1 tokens", "M", lambda a: -1),
            ("half a token", "M", lambda a: 0.5),
        ),
    ),
    Contract(
        operation="rcmha.memory_mask",
        sizes={"queries": (1, 24), "keys": (0, 24)},
        arrays=(),
        outputs=(Output("mask", kind="exact"),),
        parameters=lambda sizes: {"T": st.just(sizes["queries"]), "M": st.just(sizes["keys"])},
        bad_inputs=(("T = -1", "T", lambda a: -1), ("M = True", "M", lambda a: True)),
    ),
    Contract(
        operation="rcmha.attend",
        sizes=without("d"),
        arrays=(
            Array("scores", "batch heads queries keys"),
            Array("mask", "queries keys", make=make_mask, optional=True),
            V,
        ),
        outputs=(Output("o", cancels=True), Output("P")),
        linear_in=("v",),
        poison=poison_behind_mask,
        neutral={"mask": lambda case: np.ones(case.shape("queries keys"), bool)},
        bad_inputs=(
            ("a mask of more rows", "mask", lambda a: np.ones((99, 1), bool)),
            ("a mask of numbers", "mask", lambda a: np.ones(a["scores"].shape[-2:])),
            ("v with fewer tokens", "v", lambda a: a["v"][..., :-1, :]),
            ("other heads in v", "v", lambda a: a["v"].repeat(2, axis=-3)),
        ),
    ),
    Contract(
        operation="rcmha.update_memory",
        sizes={"batch": (1, 2), "memory": (0, 8), "tokens": (1, 8), "d": (1, 24)},
        arrays=(
            Array("old", "batch memory d", optional=True),
            Array("new", "batch tokens d"),
        ),
        outputs=(Output("memory", kind="copy"),),
        parameters=lambda sizes: {"mem_len": st.sampled_from([0, 1, 2, 5, 9, 99])},
        bad_inputs=(
            ("mem_len = -1", "mem_len", lambda a: -1),
            ("mem_len = None", "mem_len", lambda a: None),
            ("old tokens of another batch", "old", lambda a: a["new"].repeat(2, axis=0)),
        ),
        **TOKENS,
    ),
)  # fmt: skip
