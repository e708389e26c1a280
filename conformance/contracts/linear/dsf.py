"""Contracts of the Dynamical Systems Framework: systems, their scan, and the maps into them.

The mixers are in `dsf_mixers` and `dsf_rnn`, the task in `dsf_recall`, equivalences in `dsf_laws`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.contract import Array, Contract, Output, Stream
from attnspec.conformance.values import longer
from attnspec.reference.linear.dsf import dsf_scan
from attnspec.reference.linear.dsf_recurrence import elementwise_scan

SMALL = {"batch": (1, 2), "tokens": (1, 8), "state": (1, 8), "dv": (1, 5)}
MAPS = {"batch": (1, 2), "tokens": (1, 8), "n": (1, 6)}
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
DV = {"dv": st.integers(1, 4)}
BAD_DV = (("dv = 0", "dv", lambda a: 0), ("dv that is a float", "dv", lambda a: 1.0))
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
    Contract(
        operation="dsf.from_attention",
        sizes=MAPS,
        queries="tokens",
        keys="tokens",
        values=VALUES,
        arrays=(
            Array("phi_q", f"{BATCH} n"),
            Array("psi_k", f"{BATCH} n"),
            Array("eta", make=positive(BATCH, low=0.1, size=2.0)),
        ),
        outputs=MADE,
        parameters=lambda sizes: {**DV, "form": st.sampled_from([1, 2])},
        bad_inputs=(
            *BAD_DV,
            ("a third form", "form", lambda a: 3),
            ("a normaliser of 0", "eta", lambda a: 0 * a["eta"]),
            ("a normaliser a channel", "eta", lambda a: a["phi_q"]),
            ("other features of keys", "psi_k", lambda a: a["psi_k"].repeat(2, axis=-1)),
        ),
    ),
    Contract(
        operation="dsf.from_normalised_attention",
        sizes=MAPS,
        queries="tokens",
        keys="tokens",
        values=VALUES,
        arrays=(Array("q", f"{BATCH} n"), Array("k", f"{BATCH} n"), Array("n", BATCH)),
        outputs=MADE,
        parameters=lambda sizes: DV,
        bad_inputs=(*BAD_DV, ("n a channel", "n", lambda a: a["q"])),
    ),
    Contract(
        operation="dsf.from_s6",
        sizes={**MAPS, "dv": (1, 4)},
        queries="tokens",
        keys="tokens",
        values=VALUES,
        arrays=(
            Array("Delta", make=positive(f"{BATCH} dv")),
            Array("A", make=positive("dv n", size=2.0)),
            Array("b", f"{BATCH} n"),
            Array("c", f"{BATCH} n"),
            Array("D", "dv", optional=True),
        ),
        outputs=MADE,
        bad_inputs=(
            ("a negative step", "Delta", lambda a: -1 - a["Delta"]),
            ("A stored negative", "A", lambda a: -1 - a["A"]),
            ("b of other numbers", "b", lambda a: a["b"].repeat(2, axis=-1)),
            ("D of another width", "D", lambda a: np.ones(99)),
        ),
    ),
    Contract(
        operation="dsf.from_ssd",
        sizes=MAPS,
        queries="tokens",
        keys="tokens",
        values=VALUES,
        arrays=(
            Array("Delta", make=positive(BATCH)),
            Array("a", make=positive("batch", size=1.0)),
            Array("b", f"{BATCH} n"),
            Array("c", f"{BATCH} n"),
        ),
        outputs=MADE,
        parameters=lambda sizes: DV,
        bad_inputs=(
            *BAD_DV,
            ("a negative rate", "a", lambda a: -1 - a["a"]),
            ("a rate a token", "a", lambda a: a["Delta"]),
        ),
    ),
    Contract(
        operation="dsf.from_qlstm",
        sizes=MAPS,
        queries="tokens",
        keys="tokens",
        arrays=tuple(Array(name, f"{BATCH} n") for name in ("f", "i", "o")),
        outputs=MADE,
        parameters=lambda sizes: {
            "alpha": st.sampled_from([1.0, 2.5, 0.0, -1.0]),
            "reversed": st.booleans(),
        },
        bad_inputs=(
            ("alpha as text", "alpha", lambda a: "1"),
            ("reversed = 1", "reversed", lambda a: 1),
            ("o of other tokens", "o", lambda a: longer(a["o"])),
        ),
    ),
    Contract(
        operation="dsf.from_rg_lru",
        sizes=MAPS,
        queries="tokens",
        keys="tokens",
        arrays=(Array("r", f"{BATCH} n"), Array("g", f"{BATCH} n"), Array("lam", "n")),
        outputs=MADE,
        parameters=lambda sizes: {"c": st.sampled_from([8.0, 1.0])},
        bad_inputs=(("c = 0", "c", lambda a: 0.0), ("lam a token", "lam", lambda a: a["r"])),
    ),
    Contract(
        operation="dsf.taylor_features",
        sizes={"batch": (1, 2), "tokens": (1, 6), "n": (1, 4)},
        queries="tokens",
        keys="tokens",
        arrays=(Array("x", f"{BATCH} n"),),
        outputs=(Output("features"),),
        parameters=lambda sizes: {"P": st.integers(0, 4), "packed": st.booleans()},
        bad_inputs=(
            ("a negative order", "P", lambda a: -1),
            ("packed = 1", "packed", lambda a: 1),
        ),
    ),
)  # fmt: skip
