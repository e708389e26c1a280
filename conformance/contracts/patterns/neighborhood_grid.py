"""Contracts of neighborhood attention's bookkeeping: windows, masks, permutation, merge."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.contract import Array, Contract, Output
from attnspec.conformance.contracts.patterns.neighborhood import (
    BAD_GRID,
    GRID,
    Parameters,
    all_axes,
    axes_of,
    grids,
    of_grid,
    one_more,
)


def make_coordinates(rng: np.random.Generator, case: Case) -> np.ndarray:
    return rng.integers(0, case.parameters["X"], case.shape("queries"))


def make_parts(shape: str) -> Callable[[np.random.Generator, Case], tuple[np.ndarray, ...]]:
    """One array for each part; a part of keys that a row does not see has lse -inf."""

    def make(rng: np.random.Generator, case: Case) -> tuple[np.ndarray, ...]:
        sizes = (case.sizes["parts"], *case.shape(shape))
        x = rng.standard_normal(sizes) * 3.0
        return tuple(x)

    return make


def axis_parameters(sizes: Mapping[str, int]) -> Parameters:
    """One axis; `fix` and the queries do not matter to it."""

    @st.composite
    def axes(draw: st.DrawFn) -> dict[str, Any]:
        X = draw(st.integers(2, 24))
        return dict(zip(("X", "k", "s", "dil", "causal"), (X, *draw(axes_of(X))), strict=True))

    axis = st.shared(axes(), key="axis")
    names = ("X", "k", "s", "dil", "causal")
    return {name: axis.map(itemgetter(name)) for name in names}


def mask_parameters(sizes: Mapping[str, int]) -> Parameters:
    tokens = st.shared(st.integers(2, 36), key="tokens of the mask")
    grid = st.shared(tokens.flatmap(grids), key="grid of the mask")
    return {name: grid.map(itemgetter(name)) for name in GRID}


def permutation_parameters(sizes: Mapping[str, int]) -> Parameters:
    tokens = sizes["queries"]
    grid = of_grid(tokens, "shape", "dilation")
    return {"shape": grid["shape"], "dil": grid["dilation"]}


X = Array("x", "batch queries d")
BAD_AXIS = (
    ("X = 0", "X", lambda a: 0),
    ("k = 1", "k", lambda a: 1),
    ("k beyond X", "k", lambda a: a["X"] + 1),
    ("s = 0", "s", lambda a: 0),
    ("s beyond k", "s", lambda a: a["k"] + 1),
    ("dil = 0", "dil", lambda a: 0),
    ("dil beyond X", "dil", lambda a: a["X"]),
    ("causal = 1", "causal", lambda a: 1),
)
CONTRACTS = (
    Contract(
        operation="neighborhood.axis_window",
        sizes={"queries": (1, 24)},
        arrays=(Array("x", "queries", make=make_coordinates),),
        outputs=(Output("start", "exact"), Output("end", "exact"), Output("group", "exact")),
        parameters=axis_parameters,
        bad_inputs=(
            *(bad for bad in BAD_AXIS if bad[1] != "X"),
            ("coordinates that are floats", "x", lambda a: a["x"] * 1.0),
            ("a coordinate behind the axis", "x", lambda a: a["x"] + a["X"]),
            ("a list of coordinates", "x", lambda a: a["x"].tolist()),
        ),
    ),
    Contract(
        operation="neighborhood.axis_mask",
        sizes={},
        arrays=(),
        outputs=(Output("mask", "exact"),),
        parameters=axis_parameters,
        bad_inputs=BAD_AXIS,
    ),
    Contract(
        operation="neighborhood.na_mask",
        sizes={},
        arrays=(),
        outputs=(Output("mask", "exact"),),
        parameters=mask_parameters,
        bad_inputs=tuple(bad for bad in BAD_GRID[1:] if bad[0] != "a shape that is a number"),
    ),
    *(
        Contract(
            operation=f"neighborhood.{name}",
            sizes={"batch": (1, 3), "queries": (2, 40), "d": (1, 24)},
            least={"queries": 2},
            arrays=(X,),
            outputs=outputs,
            parameters=permutation_parameters,
            linear_in=("x",),
            bad_inputs=(
                BAD_GRID[0],
                BAD_GRID[2],
                ("dil = 0", "dil", all_axes("dil", 0)),
                ("dil beyond the grid", "dil", all_axes("dil", 41)),
                ("dil for another axis", "dil", one_more("dil")),
            ),
        )
        for name, outputs in (
            ("token_permute", (Output("tokens", "copy"), Output("shapes", "exact"))),
            ("token_unpermute", (Output("tokens", "copy"),)),
        )
    ),
    Contract(
        operation="neighborhood.merge_attentions",
        sizes={"batch": (1, 2), "queries": (1, 12), "dv": (1, 12), "parts": (1, 4)},
        arrays=(
            Array("outs", make=make_parts("batch queries dv")),
            Array("lses", make=make_parts("batch queries")),
        ),
        outputs=(Output("out", cancels=True), Output("lse", row_axes=0)),
        bad_inputs=(
            ("no parts", "outs", lambda a: ()),
            ("a part too many", "lses", lambda a: (*a["lses"], a["lses"][0])),
            ("one array", "outs", lambda a: a["outs"][0]),
            ("lse of other rows", "lses", lambda a: tuple(x[..., None] for x in a["lses"])),
        ),
    ),
)
