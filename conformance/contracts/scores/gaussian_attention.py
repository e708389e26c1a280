"""Contracts of Gaussian attention: a layer, a block of layers, and what their weights tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.contract import Array, BadValue, Contract, Output
from attnspec.conformance.kernel import Kernel
from attnspec.conformance.laws.base import Law, Strategy, draw_case
from attnspec.conformance.trial import Trial
from attnspec.conformance.violation import Violation
from attnspec.reference.scores.gaussian_attention import multi_head

SIZES = {"batch": (1, 2), "tokens": (2, 14), "d": (2, 12)}
LEAST = {"tokens": 2}
AXES = (1, 2, -1, -2)
WIDTHS = np.array([0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 3.0])
PADDING = 0.0
GAUSSIANS = 3


def make_gaussians(rng: np.random.Generator, case: Case, axis: int, heads: int = 0) -> Any:
    """Offsets and widths, exact in every dtype, of as many heads as the axis allows or fewer."""
    entries = case.shape("batch tokens d")[axis]
    heads = heads or int(rng.integers(1, min(4, entries // 2) + 1))
    shape = heads, int(rng.integers(1, GAUSSIANS + 1))
    delta = rng.integers(-4, 5, shape) / 4.0 * (rng.random() < 0.8)
    return delta, rng.choice(WIDTHS, shape) * rng.choice([-1.0, 1.0], shape)


def make_params(rng: np.random.Generator, case: Case) -> Any:
    return make_gaussians(rng, case, case.parameters["axis"])


def make_layers(rng: np.random.Generator, case: Case) -> Any:
    """Two layers, along one axis or along two."""
    axes = rng.choice(AXES, 2)
    return tuple((int(axis), make_gaussians(rng, case, int(axis))) for axis in axes)


def make_padding(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Scattered padding, or that of whole tokens at the end."""
    shape = case.shape("batch tokens d")
    if rng.random() < 0.5:
        return rng.random(shape) < 0.7
    real = rng.integers(1, shape[1] + 1, (shape[0], 1, 1))
    return np.arange(shape[1])[None, :, None] < real


def make_entries(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Entries that may lie far from 0: their variance is no difference of squares."""
    x = Array("x", "batch tokens d", role="query").data(case)
    return x + rng.choice([0.0, 0.0, 64.0])


def make_padded(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Entries of which a few, or none, have the padding's value."""
    x = make_entries(rng, case)
    padded = rng.random(x.shape) < rng.choice([0.0, 0.3])
    return np.where(padded, PADDING, x)


def make_weights(rng: np.random.Generator, case: Case) -> np.ndarray:
    w = rng.exponential(size=case.shape("batch tokens d"))
    return w / w.sum(axis=-1, keepdims=True)


def options(sizes: Mapping[str, int]) -> dict[str, st.SearchStrategy[Any]]:
    return {
        "eps": st.sampled_from([1e-8, 1e-3]),
        "clamp": st.sampled_from(["source", "none"]),
        "combine": st.sampled_from(["product", "product", "sum"]),
        "exact_mask": st.booleans(),
    }


def _left(case: Case) -> Case:
    return case.with_(options=("mask",))


def _plain(case: Case) -> Case:
    return case.with_(options=())


def _no_width(a: Mapping[str, Any]) -> Any:
    delta, c = a["params"]
    return delta, np.where(np.arange(c.size).reshape(c.shape) == 0, 0.0, c)


def _no_end(a: Mapping[str, Any]) -> Any:
    delta, c = a["params"]
    return delta + np.inf, c


X = Array("x", "batch tokens d", role="query", make=make_entries)
MASK = Array("mask", "batch tokens d", make=make_padding, optional=True)
NO_ENTRIES = (
    ("a list as x", "x", lambda a: a["x"].tolist()),
    ("nothing as x", "x", lambda a: None),
    ("integers as x", "x", lambda a: np.zeros(a["x"].shape, int)),
    ("complex numbers as x", "x", lambda a: a["x"].astype(complex)),
)
BAD_OPTIONS = (
    ("no eps", "eps", lambda a: 0.0),
    ("an eps that is no number", "eps", lambda a: "1e-8"),
    ("an unknown clamp", "clamp", lambda a: "soft"),
    ("an unknown combination", "combine", lambda a: "max"),
    ("an exact mask that is a number", "exact_mask", lambda a: 1),
)

CONTRACTS = (
    Contract(
        operation="gaussian_attention.multi_head",
        sizes=SIZES,
        least=LEAST,
        arrays=(X, Array("params", "h K", make=make_params), MASK),
        outputs=(Output("out", cancels=True), Output("w", cancels=True)),
        parameters=lambda sizes: {"axis": st.sampled_from(AXES), **options(sizes)},
        neutral={"mask": lambda case: np.ones(case.shape("batch tokens d"), bool)},
        cells={"noncausal self": _plain, "none": _plain, "left": _left, "right": _left},
        bad_inputs=(
            *NO_ENTRIES,
            ("a vector as x", "x", lambda a: np.ones(4)),
            ("an axis that x lacks", "axis", lambda a: 3),
            ("an axis far in front", "axis", lambda a: -4),
            ("an axis that is no integer", "axis", lambda a: 1.0),
            ("offsets alone", "params", lambda a: a["params"][0]),
            ("widths of other heads", "params", lambda a: (a["params"][0], np.ones((99, 1)))),
            ("too many heads", "params", lambda a: (np.zeros((99, 1)), np.ones((99, 1)))),
            ("no heads", "params", lambda a: (np.zeros((0, 1)), np.ones((0, 1)))),
            ("no Gaussians", "params", lambda a: (np.zeros((1, 0)), np.ones((1, 0)))),
            ("params without heads", "params", lambda a: (np.zeros(1), np.ones(1))),
            ("integer offsets", "params", lambda a: (np.zeros((1, 1), int), np.ones((1, 1)))),
            BadValue("a width of 0", "params", _no_width),
            BadValue("an infinite offset", "params", _no_end),
            ("a mask of numbers", "mask", lambda a: np.ones((1, 1, 1))),
            ("a mask of another shape", "mask", lambda a: np.ones((1, 99, 1), bool)),
            *BAD_OPTIONS,
        ),
        cancelling=("dx", "dparams"),
    ),
    Contract(
        operation="gaussian_attention.block",
        sizes=SIZES,
        least=LEAST,
        arrays=(
            Array("x", "batch tokens d", make=make_padded),
            Array("layers", "layers", make=make_layers),
        ),
        outputs=(
            Output("out", cancels=True),
            Output("w_first", cancels=True),
            Output("w_second", cancels=True),
        ),
        parameters=lambda sizes: {
            **options(sizes),
            "padding_value": st.sampled_from([None, PADDING]),
        },
        cancelling=("dx",),
        bad_inputs=(
            *NO_ENTRIES,
            ("no layers", "layers", lambda a: ()),
            ("a layer that is no pair", "layers", lambda a: ((1,),)),
            ("layers that are none", "layers", lambda a: None),
            ("a layer along no axis", "layers", lambda a: ((5, a["layers"][0][1]),)),
            ("a layer of too many heads", "layers", lambda a: ((1, (np.ones((99, 1)),) * 2),)),
            ("padding that is no number", "padding_value", lambda a: "0"),
            ("padding that is a truth", "padding_value", lambda a: True),
            ("padding that equals nothing", "padding_value", lambda a: float("nan")),
            *BAD_OPTIONS,
        ),
    ),
    Contract(
        operation="gaussian_attention.importance_factor",
        sizes={"batch": (1, 3), "tokens": (1, 12), "d": (1, 12)},
        least={"tokens": 1},
        arrays=(Array("w", "batch tokens d", make=make_weights),),
        outputs=(Output("factor", cancels=True),),
        parameters=lambda sizes: {"axes": st.sampled_from([(0, 1), (1, 0), (0, -1), (2, 1)])},
        bad_inputs=(
            ("a list as w", "w", lambda a: a["w"].tolist()),
            ("no entries", "w", lambda a: a["w"][:0]),
            ("one axis too few", "axes", lambda a: 0),
            ("an axis too many", "axes", lambda a: (0, 1, 2)),
            ("an axis twice", "axes", lambda a: (0, 0)),
            ("an axis that w lacks", "axes", lambda a: (0, 3)),
        ),
    ),
)


def _masked(contract: Contract, kernel: Kernel, dtype: str) -> Strategy:
    cases = draw_case(contract, kernel, dtype, parameters={"exact_mask": True})
    return cases.map(lambda case: case.with_(options=("mask",)))


def check_deleted(trial: Trial) -> None:
    """NaN in padding is given back where it was and changes no bit of anything else."""
    arguments = trial.arguments()
    real = np.broadcast_to(arguments["mask"], arguments["x"].shape)
    before = trial.run(arguments)
    after = trial.run({**arguments, "x": np.where(real, arguments["x"], np.nan)})
    before["out"] = np.where(real, before["out"], np.nan)
    for name in ("out", "w"):
        if not np.array_equal(before[name], after[name], equal_nan=True):
            raise Violation(name, "padding that is left out was read")


LAWS = (
    Law(
        "exact-padding",
        "Padding that is left out of a layer is not read by it.",
        ("K11",),
        _masked,
        check_deleted,
        applies=lambda contract, kernel: contract.spec.function is multi_head,
        examples=0.3,
    ),
)
