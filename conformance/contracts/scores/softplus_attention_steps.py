"""Contracts of the steps of softplus attention: counts, unit vectors, scores, both stages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.contract import Array, Contract, Output
from attnspec.conformance.contracts.dense.attention import SIZES


def make_pairs(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Three of four pairs visible, (batch, queries, keys); one row in five sees nothing.

    With "left" or "right" among the case's options, padding on that side, one row for all queries.
    """
    shape = case.shape("batch queries keys")
    if {"left", "right"} & set(case.options):
        real = np.arange(shape[2]) >= rng.integers(0, shape[2] + 1, (shape[0], 1, 1))
        return real if "left" in case.options else real[..., ::-1].copy()
    return np.logical_and(rng.random(shape) < 0.75, rng.random((*shape[:-1], 1)) < 0.8)


def make_visible(rng: np.random.Generator, case: Case) -> Any:
    """The causal order, none, or a mask."""
    return make_pairs(rng, case) if rng.random() < 0.6 else bool(rng.random() < 0.7)


def make_counts(rng: np.random.Generator, case: Case) -> np.ndarray:
    """From none to all of the keys, and more of a cache that is not here."""
    batch, queries, keys = case.shape("batch queries keys")
    return rng.integers(0, 2 * keys + 2, (batch, queries))


def make_scores(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Positive numbers, one in four exactly 0."""
    shape = case.shape("batch heads queries keys")
    return rng.exponential(size=shape) * (rng.random(shape) < 0.75)


def make_sums(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Positive numbers, one in ten exactly 0: a row that sees nothing."""
    shape = case.shape("batch heads queries")
    return (rng.exponential(size=shape) + 0.1) * (rng.random(shape) < 0.9)


def make_weights(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Rows that sum to 1, multiples of 1/64 with equal ones and zeros; one in ten is all 0.

    One in five is a power of two of equal weights, which is dead where as many keys are counted.
    """
    shape = case.shape("batch heads queries keys")
    if not shape[-1]:
        return np.zeros(shape)
    rows = rng.multinomial(64, rng.dirichlet(np.full(shape[-1], 0.5)), shape[:-1]) / 64.0
    equal = 1 << int(np.log2(shape[-1]))
    flat = np.where(np.arange(shape[-1]) < equal, 1.0 / equal, 0.0)
    kind = rng.random((*shape[:-1], 1))
    return np.where(kind < 0.1, 0.0, np.where(kind < 0.3, flat, rows))


def poison_behind_mask(arguments: dict[str, Any], case: Case) -> dict[str, Any]:
    """NaN in every logit that the mask hides."""
    if "mask" in arguments:
        arguments["logits"] = np.where(arguments["mask"], arguments["logits"], np.nan)
    return arguments


def poison_unweighed(arguments: dict[str, Any], case: Case) -> dict[str, Any]:
    """NaN in the values that no query weighs."""
    unread = np.all(arguments["weights"] == 0, axis=(1, 2))
    arguments["v"] = np.where(unread[:, None, :, None], np.nan, arguments["v"])
    return arguments


def without(*axes: str) -> dict[str, tuple[int, int]]:
    return {axis: span for axis, span in SIZES.items() if axis not in axes}


def second_stage(sizes: Mapping[str, int]) -> dict[str, st.SearchStrategy[Any]]:
    return {"p": st.sampled_from([15, 1, 2, 2.5]), "warm": st.sampled_from([3, 1, 8])}


BAD_POWERS = (
    ("a power below 1", "p", lambda a: 0.5),
    ("a power that is no number", "p", lambda a: "15"),
    ("a power that is not finite", "p", lambda a: float("inf")),
    ("no warm rows", "warm", lambda a: 0),
    ("half a warm row", "warm", lambda a: 2.5),
)
BAD_EPS = (
    ("a negative eps", "eps", lambda a: -1e-8),
    ("an eps that is not a number", "eps", lambda a: float("nan")),
)
NO_CHOICE = (
    ("a number for normalise_qk", "normalise_qk", lambda a: 1),
    ("a word for normalise_qk", "normalise_qk", lambda a: "yes"),
)
BAD_COUNTS = (
    ("counts of other rows", "n", lambda a: np.ones((1, 99))),
    ("counts in a list", "n", lambda a: [1, 2]),
)
OTHER_KEYS = (
    ("k of another head size", "k", lambda a: a["k"].repeat(2, axis=-1)),
    ("kv heads that do not divide", "k", lambda a: a["k"].repeat(7, axis=-3)),
)
Q = Array("q", "batch heads queries d", role="query")
K = Array("k", "batch kv_heads keys d", role="key")
V = Array("v", "batch kv_heads keys dv", role="value")
WEIGHTS = Array("weights", "batch heads queries keys", make=make_weights)
COUNTS = Array("n", "batch queries", make=make_counts)

CONTRACTS = (
    Contract(
        operation="softplus_attention.visible_counts",
        sizes={"batch": (1, 2), "queries": (1, 24), "keys": (1, 24)},
        arrays=(Array("visible", "batch queries keys", make=make_visible),),
        outputs=(Output("n", kind="exact"),),
        parameters=lambda sizes: {
            "q_tokens": st.just(sizes["queries"]),
            "k_tokens": st.just(sizes["keys"]),
            "offset": st.sampled_from([None, 0, 5]),
        },
        bad_inputs=(
            ("visible as a number", "visible", lambda a: 1),
            ("visible as an array of numbers", "visible", lambda a: np.ones((2, 2))),
        ),
    ),
    Contract(
        operation="softplus_attention.unit",
        sizes={"batch": (1, 2), "heads": (1, 3), "queries": (1, 24), "d": (1, 24)},
        arrays=(Array("x", "batch heads queries d", role="query"),),
        outputs=(Output("out"),),
        cancelling=("dx",),
    ),
    Contract(
        operation="softplus_attention.lssa_logits",
        sizes=without("dv"),
        arrays=(Q, K, COUNTS),
        outputs=(Output("logits"),),
        parameters=lambda sizes: {"normalise_qk": st.booleans()},
        bad_inputs=(*OTHER_KEYS, *BAD_COUNTS, *NO_CHOICE),
    ),
    Contract(
        operation="softplus_attention.lssa_scores",
        sizes=without("d", "dv"),
        arrays=(
            Array("logits", "batch heads queries keys", role="query"),
            Array(
                "mask",
                "batch 1 queries keys",
                make=lambda rng, case: make_pairs(rng, case)[:, None],
                optional=True,
            ),
        ),
        outputs=(Output("scores"),),
        poison=poison_behind_mask,
        neutral={"mask": lambda case: np.ones(case.shape("batch 1 queries keys"), bool)},
        bad_inputs=(
            ("an integer mask", "mask", lambda a: np.ones((1, 1, 1, 1), np.int64)),
            ("a mask of other keys", "mask", lambda a: np.ones((1, 99), bool)),
        ),
    ),
    Contract(
        operation="softplus_attention.row_sum",
        sizes=without("d", "dv"),
        arrays=(Array("scores", "batch heads queries keys", make=make_scores),),
        outputs=(Output("sums", row_axes=0),),
        linear_in=("scores",),
    ),
    Contract(
        operation="softplus_attention.lssa_weights",
        sizes=without("d", "dv"),
        arrays=(
            Array("scores", "batch heads queries keys", make=make_scores),
            Array("row_sum", "batch heads queries", make=make_sums),
        ),
        outputs=(Output("weights"),),
        parameters=lambda sizes: {"eps": st.sampled_from([1e-8, 0.0, 0.5])},
        linear_in=("scores",),
        bad_inputs=(("sums of other rows", "row_sum", lambda a: np.ones((1, 1, 99))), *BAD_EPS),
    ),
    Contract(
        operation="softplus_attention.reweight",
        sizes=without("d", "dv"),
        arrays=(WEIGHTS, COUNTS),
        outputs=(Output("weights"), Output("dead_rows", kind="exact")),
        parameters=lambda sizes: {
            **second_stage(sizes),
            "eps": st.sampled_from([1e-8, 0.0, 0.01]),
        },
        bad_inputs=(*BAD_POWERS, *BAD_EPS, *BAD_COUNTS),
    ),
    Contract(
        operation="softplus_attention.log_weights",
        sizes=without("d", "dv"),
        arrays=(WEIGHTS, COUNTS),
        outputs=(Output("log_weights"), Output("dead_rows", kind="exact")),
        parameters=lambda sizes: {**second_stage(sizes), "dead_tol": st.sampled_from([1e-6, 0.5])},
        bad_inputs=(
            *BAD_POWERS,
            *BAD_COUNTS,
            ("a negative dead_tol", "dead_tol", lambda a: -1.0),
        ),
    ),
    Contract(
        operation="softplus_attention.attend",
        sizes=without("d"),
        arrays=(WEIGHTS, V),
        outputs=(Output("out"),),
        linear_in=("v", "weights"),
        key_arrays=("weights", "v"),
        poison=poison_unweighed,
        bad_inputs=(
            ("v with more tokens", "v", lambda a: np.repeat(a["v"], 7, axis=-2)),
            ("kv heads that do not divide", "v", lambda a: np.repeat(a["v"], 7, axis=-3)),
            ("another batch in v", "v", lambda a: np.repeat(a["v"], 3, axis=0)),
        ),
    ),
)
