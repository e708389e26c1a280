"""Contracts of Flowformer's steps: features, flows, competition and allocation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.contract import Array, Contract, Output
from attnspec.conformance.contracts.linear.based import BAD_EPS, make_key_mask, wrong_numbers
from attnspec.conformance.contracts.linear.flowformer import (
    BAD_CLAMP,
    BAD_KIND,
    CLAMP,
    EPS,
    KIND,
    Drawn,
)
from attnspec.conformance.values import longer
from attnspec.reference.linear.flowformer_flows import flows, flows_causal
from attnspec.reference.primitives.sigmoid import sigmoid

PAIR = {"batch": (1, 2), "kv_heads": (1, 3), "queries": (1, 24), "keys": (1, 24), "d": (1, 24)}
ALONE = {"batch": (1, 2), "kv_heads": (1, 3), "tokens": (1, 24), "d": (1, 24)}


def features(name: str) -> Any:
    """Positive features of one side of a case, as sigmoids."""

    def make(rng: np.random.Generator, case: Case) -> np.ndarray:
        axes = "batch kv_heads tokens d"
        if "queries" in case.sizes:
            axes = f"batch kv_heads {'queries' if name == 'a' else 'keys'} d"
        return sigmoid(2 * rng.standard_normal(case.shape(axes)))

    return make


def flow(place: int) -> Any:
    """The flow I or O of the case's own features."""

    def make(rng: np.random.Generator, case: Case) -> np.ndarray:
        a, b = (features(name)(case.generator(name), case) for name in ("a", "b"))
        causal = "tokens" in case.sizes
        return np.array((flows_causal if causal else flows)(a, b)[place])

    return make


def _only_eps(sizes: Mapping[str, int]) -> Drawn:
    return {"eps": EPS}


def _two(kind: str, causal: bool) -> tuple[Output, Output]:
    names = {"flows": ("I", "O"), "conserved": ("Ih", "Oh")}[kind]
    return Output(names[0], row_axes=0), Output(names[1], row_axes=0)


A, B = Array("a", make=features("a")), Array("b", make=features("b"))
FLOWS = (Array("I", make=flow(0)), Array("O", make=flow(1)))
BAD_PAIR = (
    ("b of another width", "b", lambda a: a["b"].repeat(2, axis=-1)),
    ("b of another batch", "b", lambda a: a["b"].repeat(2, axis=0)),
    ("b of other heads", "b", lambda a: a["b"].repeat(2, axis=1)),
    ("an integer b", "b", lambda a: np.zeros(a["b"].shape, np.int64)),
    *BAD_EPS,
)
BAD_FLOWS = (
    ("I of other tokens", "I", lambda a: a["I"].repeat(2, axis=-1)),
    ("O with a width", "O", lambda a: a["O"][..., None]),
    *BAD_PAIR,
)

CONTRACTS = (
    Contract(
        operation="flowformer.flow_features",
        sizes={"batch": (1, 2), "queries": (1, 24), "d": (1, 24)},
        arrays=(Array("x", "batch queries d", role="query"),),
        outputs=(Output("features", row_axes=0),),
        parameters=lambda sizes: {"kind": KIND},
        bad_inputs=BAD_KIND,
    ),
    Contract(
        operation="flowformer.flows",
        sizes=PAIR,
        arrays=(A, B),
        outputs=_two("flows", False),
        parameters=_only_eps,
        bad_inputs=BAD_PAIR,
    ),
    Contract(
        operation="flowformer.conserved_flows",
        sizes=PAIR,
        arrays=(A, B, *FLOWS),
        outputs=_two("conserved", False),
        parameters=_only_eps,
        bad_inputs=BAD_FLOWS,
    ),
    Contract(
        operation="flowformer.flows_causal",
        sizes=ALONE,
        queries="tokens",
        keys="tokens",
        arrays=(A, B),
        outputs=_two("flows", True),
        parameters=_only_eps,
        bad_inputs=(("more sources", "b", lambda a: longer(a["b"])), *BAD_PAIR),
    ),
    Contract(
        operation="flowformer.conserved_flows_causal",
        sizes=ALONE,
        queries="tokens",
        keys="tokens",
        arrays=(A, B, *FLOWS),
        outputs=_two("conserved", True),
        parameters=_only_eps,
        bad_inputs=BAD_FLOWS,
    ),
    Contract(
        operation="flowformer.competition",
        sizes={"batch": (1, 2), "kv_heads": (1, 3), "keys": (1, 24)},
        arrays=(
            Array("Oh", "batch kv_heads keys"),
            Array("mask", "batch keys", make=make_key_mask, optional=True),
        ),
        outputs=(Output("c", row_axes=0),),
        parameters=lambda sizes: {"clamp": CLAMP},
        neutral={"mask": lambda case: np.ones(case.shape("batch keys"), bool)},
        bad_inputs=(
            ("a mask of more sources", "mask", lambda a: np.ones((1, 99), bool)),
            ("an integer mask", "mask", lambda a: np.ones(a["Oh"].shape[::2], np.int64)),
            *BAD_CLAMP,
        ),
    ),
    Contract(
        operation="flowformer.competition_causal",
        sizes={"batch": (1, 2), "kv_heads": (1, 3), "tokens": (1, 24)},
        queries="tokens",
        keys="tokens",
        arrays=(Array("Oh", "batch kv_heads tokens"),),
        outputs=(Output("c", row_axes=0),),
        parameters=lambda sizes: {"clamp": CLAMP},
        causal=lambda case: True,
        bad_inputs=BAD_CLAMP,
    ),
    Contract(
        operation="flowformer.allocation",
        sizes={"batch": (1, 2), "kv_heads": (1, 3), "queries": (1, 24)},
        arrays=(Array("Ih", "batch kv_heads queries"),),
        outputs=(Output("g", row_axes=0),),
        parameters=lambda sizes: {"n": st.integers(0, 9), "m": st.integers(0, 9)},
        bad_inputs=(*wrong_numbers("n", -1, 1.5, None), *wrong_numbers("m", -1, "2")),
    ),
)
