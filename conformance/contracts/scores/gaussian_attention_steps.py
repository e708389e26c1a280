"""Contracts of Gaussian attention, step by step: chunks, statistics, densities, weights."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.contract import Array, BadValue, Contract, Output
from attnspec.conformance.contracts.scores.gaussian_attention import (
    AXES,
    BAD_OPTIONS,
    LEAST,
    MASK,
    SIZES,
    make_entries,
    make_gaussians,
)


def make_delta(rng: np.random.Generator, case: Case) -> np.ndarray:
    return make_gaussians(case.generator("Gaussians"), case, 2, heads=1)[0][0]


def make_c(rng: np.random.Generator, case: Case) -> np.ndarray:
    return make_gaussians(case.generator("Gaussians"), case, 2, heads=1)[1][0]


def make_several_delta(rng: np.random.Generator, case: Case) -> np.ndarray:
    return make_gaussians(case.generator("Gaussians"), case, 2, heads=3)[0]


def make_several_c(rng: np.random.Generator, case: Case) -> np.ndarray:
    return make_gaussians(case.generator("Gaussians"), case, 2, heads=3)[1]


def make_variance(rng: np.random.Generator, case: Case) -> np.ndarray:
    return 0.25 + rng.random(case.shape("batch tokens 1"))


def make_raw(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Logs of densities; those of some slices are so low that the clamp acts."""
    shape = case.shape("batch tokens d")
    return rng.standard_normal(shape) * 4 - 30.0 * (rng.random((shape[0], shape[1], 1)) < 0.4)


def poison_padding(name: str) -> Any:
    def poison(arguments: dict[str, Any], case: Case) -> dict[str, Any]:
        """NaN in what the mask says is not read."""
        if "mask" in arguments:
            arguments[name] = np.where(arguments["mask"], arguments[name], np.nan)
        return arguments

    return poison


Z = Array("z", "batch tokens d", role="query")
FAR = Array("z", "batch tokens d", role="query", make=make_entries)
GAUSSIANS = (
    Array("delta", "K", make=make_delta),
    Array("c", "K", make=make_c),
)
NO_GAUSSIANS = (
    ("a list of offsets", "delta", lambda a: a["delta"].tolist()),
    ("integer widths", "c", lambda a: np.ones(a["c"].shape, int)),
    ("widths of another number", "c", lambda a: np.ones(99)),
    BadValue("a width of 0", "c", lambda a: 0 * a["c"]),
)
NO_AXES = (
    ("an axis that is not there", "axis", lambda a: 3),
    ("an axis that is no integer", "axis", lambda a: "last"),
)
NO_MASKS = (
    ("a mask of numbers", "mask", lambda a: np.ones((1, 1, 1))),
    ("a mask of another shape", "mask", lambda a: np.ones((1, 99, 1), bool)),
)
SOME_OPTIONS = {name: bad for bad in BAD_OPTIONS for name in bad[1:2]}

CONTRACTS = (
    Contract(
        operation="gaussian_attention.split_chunks",
        sizes={},
        arrays=(),
        outputs=(Output("chunks", kind="exact", plain=True),),
        parameters=lambda sizes: {"n": st.integers(9, 30), "h": st.integers(1, 9)},
        bad_inputs=(
            ("no entries", "n", lambda a: 0),
            ("a fraction of entries", "n", lambda a: 8.0),
            ("no heads", "h", lambda a: 0),
            ("more heads than entries", "h", lambda a: 99),
        ),
    ),
    Contract(
        operation="gaussian_attention.axis_stats",
        sizes=SIZES,
        least=LEAST,
        arrays=(FAR, MASK),
        outputs=(Output("mu", cancels=True), Output("var", cancels=True)),
        parameters=lambda sizes: {
            "eps": st.sampled_from([1e-8, 0.5]),
            "axis": st.sampled_from(AXES),
            "exact_mask": st.booleans(),
        },
        poison=poison_padding("z"),
        neutral={"mask": lambda case: np.ones(case.shape("batch tokens d"), bool)},
        bad_inputs=(
            ("a list as z", "z", lambda a: a["z"].tolist()),
            ("integers as z", "z", lambda a: np.zeros(a["z"].shape, int)),
            ("a single entry", "z", lambda a: np.ones((1, 1, 1))),
            *NO_AXES,
            *NO_MASKS,
            SOME_OPTIONS["eps"],
            SOME_OPTIONS["exact_mask"],
        ),
    ),
    Contract(
        operation="gaussian_attention.log_density",
        sizes=SIZES,
        least=LEAST,
        arrays=(
            Z,
            Array("mu", "batch tokens 1"),
            Array("var", "batch tokens 1", make=make_variance),
            *GAUSSIANS,
        ),
        outputs=(Output("logw", cancels=True),),
        parameters=lambda sizes: {"combine": st.sampled_from(["product", "sum"])},
        bad_inputs=(
            ("means of other rows", "mu", lambda a: np.ones((1, 99, 1))),
            ("variances of other rows", "var", lambda a: np.ones((1, 99, 1))),
            ("integer variances", "var", lambda a: np.ones((1, 1, 1), int)),
            *NO_GAUSSIANS,
            SOME_OPTIONS["combine"],
        ),
    ),
    Contract(
        operation="gaussian_attention.normalise",
        sizes=SIZES,
        least=LEAST,
        arrays=(Array("logw", "batch tokens d", make=make_raw), MASK),
        outputs=(Output("w", cancels=True),),
        parameters=lambda sizes: {
            "eps": st.sampled_from([1e-8, 1e-3]),
            "axis": st.sampled_from(AXES),
            "clamp": st.sampled_from(["source", "none"]),
        },
        poison=poison_padding("logw"),
        neutral={"mask": lambda case: np.ones(case.shape("batch tokens d"), bool)},
        bad_inputs=(
            ("a list of logs", "logw", lambda a: a["logw"].tolist()),
            *NO_AXES,
            *NO_MASKS,
            SOME_OPTIONS["eps"],
            SOME_OPTIONS["clamp"],
        ),
    ),
    Contract(
        operation="gaussian_attention.apply",
        sizes=SIZES,
        least=LEAST,
        arrays=(Z, Array("w", "batch tokens d"), MASK),
        outputs=(Output("out"),),
        linear_in=("z",),
        poison=poison_padding("w"),
        neutral={"mask": lambda case: np.ones(case.shape("batch tokens d"), bool)},
        bad_inputs=(
            ("weights of another shape", "w", lambda a: np.ones((1, 1, 1, 1))),
            *NO_MASKS,
        ),
    ),
    Contract(
        operation="gaussian_attention.collapse",
        sizes=SIZES,
        arrays=(
            Array("delta", "heads K", make=make_several_delta),
            Array("c", "heads K", make=make_several_c),
        ),
        outputs=(Output("centre", row_axes=0, cancels=True), Output("lam", row_axes=0)),
        linear_in=("delta",),
        bad_inputs=NO_GAUSSIANS,
    ),
)
