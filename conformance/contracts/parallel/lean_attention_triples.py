"""Contracts of lean attention's triples: made of some keys, merged, and turned into a result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.arrays import round_arguments
from attnspec.conformance.case import Case
from attnspec.conformance.contract import Array, Contract, Output
from attnspec.conformance.contracts.parallel.lean_attention import RESULT
from attnspec.conformance.laws.base import Law, draw_anywhere
from attnspec.conformance.trial import Trial
from attnspec.conformance.violation import Violation
from attnspec.reference.parallel.lean_attention import Triple

Drawn = dict[str, st.SearchStrategy[Any]]


def make_triple(rng: np.random.Generator, case: Case) -> Triple:
    """Triples of few keys and of many; a maximum may be far off, and one row in four is empty."""
    batch, rows, dv = case.shape("batch rows dv")
    empty = rng.random((batch, rows)) < 0.25
    m = rng.standard_normal((batch, rows)) * rng.choice([1.0, 30.0, 1e4])
    # A triple may refer to a maximum above its own keys': l below 1 is a sum like any other.
    total = rng.exponential(2.0, (batch, rows)) + 0.01
    o = rng.standard_normal((batch, rows, dv)) * total[..., None]
    return Triple(
        np.where(empty, -np.inf, m),
        np.where(empty, 0.0, total),
        np.where(empty[..., None], 0.0, o),
    )


def _field(name: str) -> Any:
    return lambda rng, case: getattr(make_triple(case.generator("triple"), case), name)


def _mask(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Three of four pairs; one row in five and one key in five are not seen at all."""
    shape = case.shape("batch rows keys")
    seen = rng.random((shape[0], 1, shape[2])) < 0.8
    return (rng.random(shape) < 0.75) & (rng.random((*shape[:-1], 1)) < 0.8) & seen


def _hide(arguments: dict[str, Any], case: Case) -> dict[str, Any]:
    """NaN in keys and values outside lo .. hi, or that no row sees."""
    keys = case.sizes["keys"]
    read = (np.arange(keys) >= arguments["lo"]) & (np.arange(keys) < arguments["hi"])
    read = np.broadcast_to(read, (case.sizes["batch"], keys))
    if "mask" in arguments:
        read = read & arguments["mask"].any(axis=-2)
    for name in ("k", "v"):
        arguments[name] = np.where(read[..., None], arguments[name], np.nan)
    return arguments


def _range(sizes: Mapping[str, int]) -> Drawn:
    keys = sizes["keys"]
    return {
        "lo": st.integers(0, keys // 2),
        "hi": st.integers(keys // 2, keys),
        "scale": st.sampled_from([None, 0.5]),
    }


TRIPLE = (
    Output("m", dtype="float32", row_axes=0),
    Output("l", dtype="float32", row_axes=0),
    Output("o", dtype="float32"),
)

CONTRACTS = (
    Contract(
        operation="lean_attention.partial",
        sizes={"batch": (1, 2), "rows": (1, 12), "keys": (1, 24), "d": (1, 24), "dv": (1, 24)},
        arrays=(
            Array("q", "batch rows d", role="query"),
            Array("k", "batch keys d", role="key"),
            Array("v", "batch keys dv", role="value"),
            Array("mask", "batch rows keys", make=_mask, optional=True),
        ),
        outputs=TRIPLE,
        parameters=_range,
        poison=_hide,
        neutral={"mask": lambda case: np.ones(case.shape("batch rows keys"), bool)},
        bad_inputs=(
            ("k of another head size", "k", lambda a: a["k"].repeat(2, axis=-1)),
            ("k with more tokens than v", "v", lambda a: a["v"][..., :-1, :]),
            ("a start below 0", "lo", lambda a: -1),
            ("an end before the start", "hi", lambda a: a["lo"] - 1),
            ("an end behind the keys", "hi", lambda a: a["k"].shape[-2] + 1),
            ("a fractional start", "lo", lambda a: 0.5),
            ("an integer mask", "mask", lambda a: np.ones((1, a["k"].shape[-2]), np.int64)),
            ("a mask of other keys", "mask", lambda a: np.ones((1, 99), bool)),
            (
                "a mask of other rows",
                "mask",
                lambda a: np.ones((a["q"].shape[-2] + 2, a["k"].shape[-2]), bool),
            ),
        ),
    ),
    Contract(
        operation="lean_attention.merge",
        sizes={"batch": (1, 2), "rows": (1, 12), "dv": (1, 24)},
        arrays=(Array("a", make=make_triple), Array("b", make=make_triple)),
        outputs=tuple(Output(o.name, row_axes=o.row_axes) for o in TRIPLE),
        bad_inputs=(
            ("a maximum as a list", "a", lambda a: a["a"]._replace(m=a["a"].m.tolist())),
            ("integers as outputs", "b", lambda a: a["b"]._replace(o=a["b"].o.astype(np.int64))),
            ("a maximum of other rows", "b", lambda a: a["b"]._replace(m=a["b"].m[..., :-1])),
            ("sums of other rows", "a", lambda a: a["a"]._replace(l=a["a"].l[..., :-1])),
            ("outputs of another width", "b", lambda a: a["b"]._replace(o=a["b"].o[..., :-1])),
        ),
    ),
    Contract(
        operation="lean_attention.finalize",
        sizes={"batch": (1, 2), "rows": (1, 12), "dv": (1, 24)},
        arrays=(
            Array("m", "batch rows", make=_field("m")),
            Array("l", "batch rows", make=_field("l")),
            Array("o", "batch rows dv", make=_field("o")),
        ),
        outputs=RESULT,
        linear_in=("o",),
        bad_inputs=(
            ("a maximum as a list", "m", lambda a: a["m"].tolist()),
            ("integers as sums", "l", lambda a: np.ones(a["l"].shape, np.int64)),
            ("no output", "o", lambda a: None),
            ("sums of other rows", "l", lambda a: a["l"][..., :-1]),
            ("outputs of other rows", "o", lambda a: a["o"][..., :-1, :]),
        ),
    ),
)


def check_monoid(trial: Trial) -> None:
    """The order of two triples does not matter, and an empty one changes no bit of the other."""
    arguments = trial.arguments()
    a, b = arguments["a"], arguments["b"]
    trial.judge(trial.run({"a": b, "b": a}), arguments)
    nothing = Triple(np.full_like(a.m, -np.inf), np.zeros_like(a.l), np.zeros_like(a.o))
    for pair in ({"a": a, "b": nothing}, {"a": nothing, "b": a}):
        merged = trial.run(pair)
        for name, value in a._asdict().items():
            if not np.array_equal(merged[name], value):
                raise Violation(name, "merging with an empty triple changes it")


def check_cancelling(trial: Trial) -> None:
    """Outputs of nearly opposite size: what is left of them is not the rounding of a product."""
    arguments = trial.arguments()
    a, b = arguments["a"], arguments["b"]
    lower = np.where(np.isneginf(a.m), 0.0, a.m) - 0.7
    b = b._replace(m=lower, l=np.where(b.l == 0, 1.0, b.l), o=-a.o * np.exp(a.m - lower)[..., None])
    arguments = round_arguments({"a": a, "b": b}, trial.case.dtype)
    trial.judge(trial.run(arguments), arguments)


LAWS = (
    Law(
        "monoid",
        "Triples merge in any order, and the empty triple is the unit.",
        ("K4", "K5"),
        draw_anywhere,
        check_monoid,
        applies=lambda contract, kernel: contract.operation == "lean_attention.merge",
        examples=0.5,
    ),
    Law(
        "cancelling",
        "Triples whose outputs nearly cancel merge in float32 at least, and are rounded once.",
        ("K10",),
        draw_anywhere,
        check_cancelling,
        applies=lambda contract, kernel: contract.operation == "lean_attention.merge",
        examples=0.5,
    ),
)
