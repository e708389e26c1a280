"""Contracts of TempScale, the diagnostics of attention as a filter and of collapsed embeddings."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.case import Case
from attnspec.conformance.contract import Array, BadValue, Contract, Output

TOKENS = {"batch": (1, 3), "tokens": (1, 20)}
TEXTS = {"batch": (1, 3), "texts": (2, 12), "c": (1, 16)}


def _filters(rng: np.random.Generator, case: Case, axes: str) -> np.ndarray:
    sharpness = rng.choice([0.5, 2.0, 6.0])
    weights = np.exp(sharpness * rng.standard_normal(case.shape(axes)))
    if rng.random() < 0.5:
        weights = np.tril(weights)
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights


def make_filter(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Rows that sum to 1, causal half of the time."""
    return _filters(rng, case, "batch tokens tokens")


def make_filter_with_gaps(rng: np.random.Generator, case: Case) -> np.ndarray:
    """As `make_filter`, but one row in eight saw nothing and is 0, never the first."""
    A = _filters(rng, case, "batch tokens tokens")
    A[:, 1:] *= rng.random((*A[:, 1:].shape[:2], 1)) < 0.875
    return A


def make_weights(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Rows that sum to 1 with some weights exactly 0; one row in eight is 0."""
    shape = case.shape("batch heads queries keys")
    P = rng.exponential(size=shape) * (rng.random(shape) < 0.7)
    total = P.sum(axis=-1, keepdims=True)
    P /= np.where(total == 0, 1.0, total)
    return P * (rng.random((*shape[:-1], 1)) < 0.875)


A = Array("A", "batch tokens tokens", make=make_filter)
A_WITH_GAPS = Array("A", "batch tokens tokens", make=make_filter_with_gaps)
X = Array("X", "batch tokens c", role="value")
E = Array("E", "batch texts c", role="value")
NO_FILTERS: tuple[tuple[str, str, Any], ...] = (
    ("a list as A", "A", lambda a: a["A"].tolist()),
    ("integers as A", "A", lambda a: np.ones(a["A"].shape, np.int64)),
    ("no tokens", "A", lambda a: a["A"][..., :0, :0]),
    ("more rows than columns", "A", lambda a: np.repeat(a["A"], 2, axis=-2)),
)
NO_TOKENS = (("no tokens", "X", lambda a: a["X"][..., :0, :]),)

CONTRACTS = (
    Contract(
        operation="tempscale.dc",
        sizes={**TOKENS, "c": (1, 16)},
        least={"tokens": 1},
        arrays=(X,),
        outputs=(Output("DC", cancels=True),),
        linear_in=("X",),
        bad_inputs=NO_TOKENS,
    ),
    Contract(
        operation="tempscale.hc",
        sizes={**TOKENS, "c": (1, 16)},
        least={"tokens": 1},
        arrays=(X,),
        outputs=(Output("HC", cancels=True),),
        linear_in=("X",),
        bad_inputs=NO_TOKENS,
    ),
    Contract(
        operation="tempscale.filter_gain",
        sizes=TOKENS,
        least={"tokens": 1},
        arrays=(A,),
        outputs=(Output("gain", row_axes=0, cancels=True),),
        bad_inputs=NO_FILTERS,
    ),
    Contract(
        operation="tempscale.retention",
        sizes={**TOKENS, "c": (1, 16)},
        least={"tokens": 1},
        arrays=(A_WITH_GAPS, X),
        outputs=(Output("rho", row_axes=0, cancels=True),),
        bad_inputs=(
            *NO_FILTERS,
            ("tokens that A does not have", "X", lambda a: np.repeat(a["X"], 2, axis=-2)),
            ("another batch in X", "X", lambda a: np.repeat(a["X"], 4, axis=0)),
        ),
    ),
    Contract(
        operation="tempscale.token_spectrum",
        sizes=TOKENS,
        least={"tokens": 1},
        arrays=(A_WITH_GAPS,),
        outputs=(Output("spectrum", row_axes=0, cancels=True),),
        bad_inputs=NO_FILTERS,
    ),
    Contract(
        operation="tempscale.attention_entropy",
        sizes={
            "batch": (1, 2),
            "kv_heads": (1, 2),
            "group": (1, 3),
            "queries": (1, 12),
            "keys": (1, 24),
        },
        arrays=(Array("P", "batch heads queries keys", make=make_weights),),
        outputs=(Output("entropy", row_axes=0, cancels=True),),
        key_arrays=("P",),
        bad_inputs=(
            ("a list as P", "P", lambda a: a["P"].tolist()),
            ("integers as P", "P", lambda a: np.ones((1, 1), np.int64)),
            BadValue("a weight below 0", "P", lambda a: -np.ones_like(a["P"])),
        ),
    ),
    Contract(
        operation="tempscale.pairwise_cosine",
        sizes=TEXTS,
        arrays=(E,),
        outputs=(Output("cosine", row_axes=0, cancels=True),),
        bad_inputs=(("a single text", "E", lambda a: a["E"][..., :1, :]),),
    ),
    Contract(
        operation="tempscale.centre_distance",
        sizes=TEXTS,
        arrays=(E,),
        outputs=(Output("distance", row_axes=0, cancels=True),),
        linear_in=("E",),
        bad_inputs=(("no texts", "E", lambda a: a["E"][..., :0, :]),),
    ),
)
