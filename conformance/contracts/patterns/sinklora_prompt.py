"""Contracts of H2O's choices simulated on a prompt: of each query in turn, and of all at once.

A choice that rounding decides would change all that follow, so that the scores here leave none:
two that compete are equal, or far apart.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.contract import Array, Contract, Output
from attnspec.conformance.contracts.cache.streaming_llm_rows import wrong_integers
from attnspec.conformance.contracts.patterns.sinklora_h2o import eighths
from attnspec.reference.conventions import causal_mask
from attnspec.reference.primitives.softmax import softmax
from attnspec.reference.primitives.top_k import top_k_mask

SIZES = {"batch": (1, 2), "H": (1, 3), "tokens": (6, 20)}
CLEAR = 1e-4
"""Far apart: hundreds of times the rounding of sums in float32."""


def clear_scores(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Sixteenths, exact in every dtype, some columns equal throughout: the first draw that is
    clear for each head.
    """
    batch, H, T = case.shape("batch H tokens")
    return np.stack([[_clear(rng, T, case.parameters["hh"]) for _ in range(H)]
                     for _ in range(batch)])  # fmt: skip


def _clear(rng: np.random.Generator, T: int, hh: int) -> np.ndarray:
    while True:
        scores = rng.integers(-80, 81, (T, T)) / 16.0
        scores[:, 1 : T // 2 : 2] = scores[:, : max(0, T // 2 - 1) : 2]
        if _margin(scores, hh) > CLEAR:
            return scores


def _margin(scores: np.ndarray, hh: int) -> float:
    """The smallest difference, but 0, between a score that is kept and one that is not."""
    T = len(scores)
    P = softmax(scores, causal_mask(T, T))
    kept, a, margin = np.arange(T) < hh, np.sum(P[:hh], axis=0), np.inf
    for t in range(hh, T if hh else 0):
        best = top_k_mask(np.where(kept, a, -np.inf), hh - 1)
        gap = np.subtract.outer(a[best], a[kept & ~best])
        margin = min(margin, np.min(gap, where=gap > 1e-12, initial=np.inf))
        kept = best | (np.arange(T) == t)
        a = np.where(kept, a + P[t], 0.0)
    return float(margin)


def hide_later(name: str) -> Any:
    """NaN above the diagonal."""

    def poison(arguments: dict[str, Any], case: Case) -> dict[str, Any]:
        T = case.sizes["tokens"]
        return {**arguments, name: np.where(causal_mask(T, T), arguments[name], np.nan)}

    return poison


def exact_weights(rng: np.random.Generator, case: Case) -> np.ndarray:
    T = case.sizes["tokens"]
    return eighths(rng, (*case.shape("batch H"), T, T), 9) * np.tri(T)


CONTRACTS = (
    Contract(
        operation="sinklora.h2o_local_mask",
        sizes=SIZES,
        arrays=(Array("scores", make=clear_scores),),
        outputs=(Output("mask", "exact"),),
        parameters=lambda sizes: {"hh": st.sampled_from([3, 1, 2, 0, 5, 8, 20])},
        queries="tokens",
        keys="tokens",
        poison=hide_later("scores"),
        bad_inputs=(
            ("fewer keys than queries", "scores", lambda a: a["scores"].repeat(2, axis=-2)),
            *wrong_integers("hh"),
        ),
    ),
    Contract(
        operation="sinklora.h2o_global_mask",
        sizes=SIZES,
        arrays=(Array("P", make=exact_weights),),
        outputs=(Output("mask", "exact"),),
        parameters=lambda sizes: {
            "hh": st.sampled_from([3, 1, 2, 0, 5, 20]),
            "rec": st.sampled_from([2, 0, 1, 4, 20]),
        },
        queries="tokens",
        keys="tokens",
        poison=hide_later("P"),
        bad_inputs=(
            ("fewer keys than queries", "P", lambda a: a["P"].repeat(2, axis=-2)),
            *wrong_integers("hh", "rec"),
        ),
    ),
)
