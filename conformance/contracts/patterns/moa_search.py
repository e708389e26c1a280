"""Contracts of MoA's search: any solver must find the plans that trying all of them finds."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.contract import Array, Contract, Output
from attnspec.conformance.values import bad_integers

SIZES = {"profiles": (1, 3), "layers": (1, 2), "heads_of_one": (2, 3), "rules": (2, 3)}
LONGER = 1
"""Lengths with a bound that are not profiled."""


def _values(rng: np.random.Generator, case: Case, lengths: int) -> np.ndarray:
    """No two plans have the same sum."""
    heads = case.sizes["layers"] * case.sizes["heads_of_one"]
    return rng.uniform(1.0, 9.0, (lengths, heads, case.sizes["rules"]))


def make_loss(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Rules that are good at one profile may be bad at another."""
    return _values(rng, case, case.sizes["profiles"])


def make_cost(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Ascending with the rule, at all lengths much the same."""
    one = np.sort(_values(rng, case, 1), axis=-1)
    return one * rng.uniform(0.9, 1.1, (case.sizes["profiles"] + LONGER, *one.shape[1:]))


def totals_of_a_plan(case: Case, values: np.ndarray) -> np.ndarray:
    """Sums of values (lengths, heads, R) over the heads of one plan, the same for all values."""
    rng = case.generator("plan")
    layers, heads, R = case.shape("layers heads_of_one rules")
    plan = rng.integers(0, R, layers * heads)
    if rng.integers(2):
        plan = np.repeat(plan[::heads], heads)
    return np.asarray(values[:, np.arange(layers * heads), plan].sum(axis=1))


def make_bounds(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Just above what a plan costs; or, one time in four, between the cheapest and the dearest
    plans and a bit beyond, where there may be no feasible one.
    """
    cost = make_cost(case.generator("cost"), case)
    if rng.integers(4):
        return totals_of_a_plan(case, cost) * rng.uniform(1.0, 1.1)
    low, high = (x.sum(axis=1) for x in (cost.min(axis=2), cost.max(axis=2)))
    return np.asarray(low + (high - low) * rng.uniform(-0.1, 1.2, 1) + 0.01)


def make_end(sign: float) -> Any:
    """Ends of the intervals of the losses, around those of a plan; a third of them are free."""

    def make(rng: np.random.Generator, case: Case) -> np.ndarray:
        middle = totals_of_a_plan(case, make_loss(case.generator("loss"), case))
        free = rng.random(len(middle)) < 1 / 3
        return np.where(free, sign * np.inf, middle + sign * rng.uniform(0.0, 3.0, len(middle)))

    return make


ARRAYS = (
    Array("loss", make=make_loss),
    Array("cost", make=make_cost),
    Array("bounds", make=make_bounds),
)
BAD = (
    ("a loss of two axes", "loss", lambda a: a["loss"][0]),
    ("costs of fewer heads", "cost", lambda a: a["cost"][:, :-1]),
    ("more bounds than costs", "bounds", lambda a: np.ones(9)),
    ("a lower bound above the upper", "lower", lambda a: 1.5),
    *bad_integers("max_rules_per_layer"),
    ("layers of unequal heads", "heads_per_layer", lambda a: 7),
)


def parameters(sizes: Any) -> dict[str, st.SearchStrategy[Any]]:
    return {
        "lower": st.sampled_from([0.5, 0.9, 0.0]),
        "max_rules_per_layer": st.sampled_from([1, None, 2]),
        "heads_per_layer": st.just(sizes["heads_of_one"]),
    }


CONTRACTS = (
    Contract(
        operation="moa.solve",
        sizes=SIZES,
        arrays=(*ARRAYS, Array("low", make=make_end(-1.0)), Array("high", make=make_end(1.0))),
        outputs=(Output("plan", "exact"),),
        parameters=lambda sizes: {
            **parameters(sizes),
            "primary": st.integers(0, max(0, sizes["profiles"] - 1)),
        },
        bad_inputs=(
            *BAD,
            ("a profile that is not there", "primary", lambda a: len(a["loss"])),
            ("more ends than profiles", "low", lambda a: np.ones(9)),
        ),
    ),
    Contract(
        operation="moa.search",
        sizes=SIZES,
        arrays=ARRAYS,
        outputs=(Output("plans", "exact"),),
        parameters=lambda sizes: {
            **parameters(sizes),
            "points": st.sampled_from([5, 4, 2] if sizes["profiles"] < 3 else [3, 2]),
        },
        bad_inputs=(*BAD, ("one point", "points", lambda a: 1)),
    ),
    Contract(
        operation="moa.pareto",
        sizes={"plans": (0, 9), "losses": (1, 3)},
        arrays=(
            Array(
                "points",
                make=lambda rng, case: rng.integers(0, 4, case.shape("plans losses")).astype(float),
            ),
        ),
        outputs=(Output("kept", "exact"),),
        bad_inputs=(("points of one axis", "points", lambda a: a["points"][:, 0]),),
    ),
)
