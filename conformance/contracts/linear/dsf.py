"""Contracts of the Dynamical Systems Framework: systems, their scan, their matrix and gauge.

The maps into them are in `dsf_maps`, the mixers in `dsf_mixers` and `dsf_rnn`, the task in
`dsf_recall`, equivalences in `dsf_laws`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from attnspec.conformance.case import Case
from attnspec.conformance.contract import Array, Contract, Output, Stream
from attnspec.conformance.values import longer
from attnspec.reference.linear.dsf import dsf_scan
from attnspec.reference.linear.dsf_recurrence import elementwise_scan

SMALL = {"batch": (1, 2), "tokens": (1, 8), "state": (1, 8), "dv": (1, 5)}
VALUES = ("normal", "flat", "structured", "one-hot")
Make = Callable[[np.random.Generator, Case], np.ndarray]


def factors(axes: str) -> Make:
    """Decays of any kind: within [0, 1], resets, no decay, a few negative or above 1."""

    def make(rng: np.random.Generator, case: Case) -> np.ndarray:
        a = rng.random(case.shape(axes))
        kind = rng.random(a.shape)
        wild = np.where(kind < 0.85, a, np.where(kind < 0.95, -a, 1 + 0.2 * a))
        return np.where(kind < 0.15, 0.0, np.where(kind < 0.3, 1.0, wild))

    return make


def positive(axes: str, low: float = 0.0, size: float = 0.5, zeros: float = 0.1) -> Make:
    """Numbers above `low`, exponential of mean `size`; exactly `low` with a chance of `zeros`."""

    def make(rng: np.random.Generator, case: Case) -> np.ndarray:
        x = low + rng.exponential(size, case.shape(axes))
        return np.where(rng.random(x.shape) < zeros, low, x)

    return make


def away_from_0(axes: str) -> Make:
    """Gauges of either sign."""

    def make(rng: np.random.Generator, case: Case) -> np.ndarray:
        sign = np.where(rng.random(case.shape(axes)) < 0.3, -1.0, 1.0)
        return sign * (0.5 + rng.random(sign.shape))

    return make


def feed(*names: str, state: str = "h0", axis: int = 1) -> Any:
    """A stream's step: tokens [first, last) of `names`, after `state`."""

    def step(whole: Mapping[str, Any], held: Any, first: int, last: int) -> dict[str, Any]:
        rows = (slice(None),) * axis + (slice(first, last),)
        own = {name: whole[name][rows] for name in names if whole.get(name) is not None}
        return {**whole, **own, state: held}

    return step


def outputs_without(function: Any, state: str) -> Any:
    """The first output for the whole sequence from an empty state."""
    return lambda whole: function(**{k: x for k, x in whole.items() if k != state})[0]


BATCH = "batch tokens"
SYSTEM = (
    Array("Lam", make=factors(f"{BATCH} state")),
    Array("B", f"{BATCH} state dv"),
    Array("C", f"{BATCH} dv state"),
    Array("D", f"{BATCH} dv dv", optional=True),
)
MADE = (Output("Lam"), Output("B"), Output("C"), Output("D"))
LAST = Output("h", dtype="float32", by_query=False)
BAD_SYSTEM = (
    ("B of another state", "B", lambda a: a["B"].repeat(2, axis=-2)),
    ("B of other tokens", "B", lambda a: a["B"].repeat(2, axis=1)),
    ("C of another state", "C", lambda a: a["C"].repeat(2, axis=-1)),
)
SELF = {"causal self": lambda case: case, "MHA": lambda case: case}


CONTRACTS = (
    Contract(
        operation="dsf.dsf_scan",
        sizes=SMALL,
        queries="tokens",
        keys="tokens",
        values=VALUES,
        arrays=(
            *SYSTEM,
            Array("u", f"{BATCH} dv", role="value"),
            Array("h0", "batch state", optional=True),
        ),
        outputs=(Output("y", cancels=True), Output("h", dtype="float32", by_query=False)),
        linear_in=("u h0", "C D"),
        causal=lambda case: True,
        cancelling=("dLam", "dB", "du", "dh0"),
        neutral={
            "h0": lambda case: np.zeros(case.shape("batch state")),
            "D": lambda case: np.zeros(case.shape(f"{BATCH} dv dv")),
        },
        stream=Stream(
            arrays=(*SYSTEM, Array("u", f"{BATCH} dv")),
            start=lambda whole: np.zeros_like(whole["Lam"][:, 0]),
            feed=feed("Lam", "B", "C", "D", "u"),
            whole=outputs_without(dsf_scan, "h0"),
        ),
        cells=SELF,
        bad_inputs=(
            *BAD_SYSTEM,
            ("a D that is a vector", "D", lambda a: a["u"]),
            ("more inputs than matrices", "u", lambda a: longer(a["u"])),
            ("a state of another width", "h0", lambda a: a["Lam"][:, 0].repeat(2, axis=-1)),
        ),
    ),
    Contract(
        operation="dsf.dsf_matrix",
        sizes=SMALL,
        queries="tokens",
        keys="tokens",
        values=VALUES,
        arrays=SYSTEM,
        outputs=(Output("Phi", cancels=True),),
        linear_in=("B D", "C D"),
        bad_inputs=BAD_SYSTEM,
    ),
    Contract(
        operation="dsf.gauge",
        sizes=SMALL,
        queries="tokens",
        keys="tokens",
        values=VALUES,
        arrays=(*SYSTEM[:3], Array("T", make=away_from_0(f"{BATCH} state"))),
        outputs=MADE[:3],
        bad_inputs=(
            *BAD_SYSTEM,
            ("a gauge of 0", "T", lambda a: 0 * a["T"]),
            ("a gauge of other tokens", "T", lambda a: longer(a["T"])),
        ),
    ),
    Contract(
        operation="dsf.elementwise_scan",
        sizes={"batch": (1, 2), "tokens": (1, 24), "N": (1, 24)},
        queries="tokens",
        keys="tokens",
        values=VALUES,
        arrays=(
            Array("a", make=factors(f"{BATCH} N")),
            Array("x", f"{BATCH} N", role="value"),
            Array("h0", "batch N", optional=True),
        ),
        outputs=(Output("h", cancels=True), Output("last", dtype="float32", by_query=False,
                                                   cancels=True)),
        linear_in=("x h0",),
        causal=lambda case: True,
        cancelling=("da", "dx", "dh0"),
        neutral={"h0": lambda case: np.zeros(case.shape("batch N"))},
        stream=Stream(
            arrays=(Array("a", make=factors(f"{BATCH} N")), Array("x", f"{BATCH} N")),
            start=lambda whole: np.zeros_like(whole["x"][:, 0]),
            feed=feed("a", "x"),
            whole=outputs_without(elementwise_scan, "h0"),
        ),
        bad_inputs=(
            ("x of other tokens", "x", lambda a: longer(a["x"])),
            ("a state with tokens", "h0", lambda a: a["x"]),
        ),
    ),
)  # fmt: skip
