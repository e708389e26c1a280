"""Contracts of MASFormer: layers of blocks, of windows, and of any span that a schedule names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.cells import heads_cell
from attnspec.conformance.contract import Array, BadValue, Contract, Output
from attnspec.conformance.contracts.patterns.longlora import poison_padding
from attnspec.conformance.kernel import Kernel
from attnspec.conformance.laws.base import Law, Strategy, draw_case
from attnspec.conformance.trial import Trial
from attnspec.conformance.values import bad_integers
from attnspec.conformance.violation import Violation
from attnspec.reference.patterns.masformer import layer_attend
from attnspec.reference.patterns.masformer_spans import span_mask

SPANS = [
    ("block", 4, 0), ("window", 2), ("full",), ("block", 3, 1), ("window", 5), ("block", 16, 0),
    ("window", 1), ("block", 2, 2),
]  # fmt: skip
BAD_SPANS: tuple[tuple[str, str, Any], ...] = (
    ("a span by name only", "span", lambda a: "full"),
    ("a span of no kind", "span", lambda a: ()),
    ("a span of a third kind", "span", lambda a: ("sliding", 4)),
    ("blocks without neighbours", "span", lambda a: ("block", 4)),
    ("blocks of nothing", "span", lambda a: ("block", 0, 0)),
    ("a window of half a token", "span", lambda a: ("window", 0.5)),
)


def shared_parameters(sizes: Mapping[str, int]) -> dict[str, st.SearchStrategy[Any]]:
    return {
        "causal": st.sampled_from([True, False]),
        "scale": st.sampled_from([None, 1.0, 0.5]),
    }


def block_parameters(sizes: Mapping[str, int]) -> dict[str, st.SearchStrategy[Any]]:
    return {
        "b": st.sampled_from([4, 3, 2, 16, 5, 1]),
        "n": st.sampled_from([1, 0, 2]),
        **shared_parameters(sizes),
    }


def window_parameters(sizes: Mapping[str, int]) -> dict[str, st.SearchStrategy[Any]]:
    return {"w": st.sampled_from([3, 1, 2, 7, 16, 0]), **shared_parameters(sizes)}


def span_parameters(sizes: Mapping[str, int]) -> dict[str, st.SearchStrategy[Any]]:
    return {"span": st.sampled_from(SPANS), **shared_parameters(sizes)}


def make_lengths(rng: np.random.Generator, case: Case) -> np.ndarray:
    """From no token to all."""
    return rng.integers(0, case.sizes["tokens"] + 1, case.sizes["batch"])


def span_of(parameters: Mapping[str, Any]) -> tuple[Any, ...]:
    """The span of any of the three operations."""
    if "span" in parameters:
        return tuple(parameters["span"])
    if "b" in parameters:
        return ("block", parameters["b"], parameters["n"])
    return ("window", parameters["w"])


SHARED: dict[str, Any] = {
    "sizes": {
        "batch": (1, 2),
        "kv_heads": (1, 3),
        "group": (1, 3),
        "tokens": (1, 24),
        "d": (1, 24),
        "dv": (1, 24),
    },
    "arrays": (
        Array("q", "batch heads tokens d", role="query"),
        Array("k", "batch kv_heads tokens d", role="key"),
        Array("v", "batch kv_heads tokens dv", role="value"),
        Array("lengths", "batch", make=make_lengths, optional=True),
    ),
    "outputs": (Output("out", cancels=True), Output("lse", dtype="float32", row_axes=0)),
    "queries": "tokens",
    "keys": "tokens",
    "linear_in": ("v",),
    "cancelling": ("dq", "dk"),
    "causal": lambda case: case.parameters["causal"],
    "poison": poison_padding,
    "neutral": {"lengths": lambda case: np.full(case.sizes["batch"], case.sizes["tokens"])},
    "cells": {
        "noncausal self": lambda case: case.with_(parameters={"causal": False}),
        "causal self": lambda case: case.with_(parameters={"causal": True}),
        "right": lambda case: case.with_(options=("lengths",)),
        "MHA": heads_cell(2, 1),
        "GQA": heads_cell(2, 3),
        "MQA": heads_cell(1, 4),
    },
}
BAD: tuple[tuple[str, str, Any], ...] = (
    ("k of another head size", "k", lambda a: a["k"].repeat(2, axis=-1)),
    ("a cache of earlier keys", "k", lambda a: a["k"].repeat(2, axis=-2)),
    ("v with fewer tokens", "v", lambda a: a["v"][..., :-1, :]),
    ("kv heads that do not divide", "k", lambda a: a["k"].repeat(7, axis=1)),
    ("causal = 1", "causal", lambda a: 1),
    ("scale = 0", "scale", lambda a: 0.0),
    ("a scale in words", "scale", lambda a: "1"),
    ("lengths of other sequences", "lengths", lambda a: np.zeros(29, np.int64)),
    ("lengths as floats", "lengths", lambda a: np.zeros(len(a["q"]))),
    ("one length for all", "lengths", lambda a: 1),
    BadValue("lengths beyond the text", "lengths",
             lambda a: np.full(len(a["q"]), a["q"].shape[2] + 1)),
    BadValue("a negative length", "lengths", lambda a: np.full(len(a["q"]), -1)),
)  # fmt: skip


CONTRACTS = (
    Contract(
        operation="masformer.block_attend",
        parameters=block_parameters,
        bad_inputs=(*BAD, *bad_integers("b"), *bad_integers("n", 0)),
        **SHARED,
    ),
    Contract(
        operation="masformer.window_attend",
        parameters=window_parameters,
        bad_inputs=(*BAD, *bad_integers("w", 0)),
        **SHARED,
    ),
    Contract(
        operation="masformer.layer_attend",
        parameters=span_parameters,
        bad_inputs=(*BAD, *BAD_SPANS),
        **SHARED,
    ),
)


def without_padding(contract: Contract, kernel: Kernel, dtype: str) -> Strategy:
    axes = {"tokens": st.integers(4, 24)}
    return draw_case(contract, kernel, dtype, axes=axes, options=())


def check_hidden(trial: Trial) -> None:
    """Tokens that a token does not see are changed: its row stays as it is."""
    arguments, case = trial.arguments(), trial.case
    T, parameters = case.sizes["tokens"], case.parameters
    t = int(case.generator("row").integers(0, T))
    hidden = ~span_mask(T, span_of(parameters), parameters["causal"])[t]
    changed = dict(arguments)
    for name in ("k", "v"):
        changed[name] = np.where(hidden[:, None], -3.0 * arguments[name], arguments[name])
    before, after = trial.run(arguments), trial.run(changed)
    for name, row in (("out", np.s_[..., t, :]), ("lse", np.s_[..., t])):
        if not np.array_equal(before[name][row], after[name][row]):
            raise Violation(name, f"row {t} depends on tokens outside its span")


def check_layers(trial: Trial) -> None:
    """The layers of a stack, one after the other: each has its own span."""
    arguments = trial.arguments()
    for span in (("full",), trial.case.parameters["span"], ("block", 2, 0), ("full",)):
        given = {**arguments, "span": span}
        trial.judge(trial.run(given), given)


ATTENDING = tuple(contract.operation for contract in CONTRACTS)
LAWS = (
    Law(
        "hidden",
        "A row does not feel tokens outside its span.",
        (),
        without_padding,
        check_hidden,
        applies=lambda contract, kernel: contract.operation in ATTENDING,
        examples=0.3,
    ),
    Law(
        "layers",
        "A layer does not feel the span of another.",
        (),
        without_padding,
        check_layers,
        applies=lambda contract, kernel: contract.spec.function is layer_attend,
        examples=0.2,
    ),
)
