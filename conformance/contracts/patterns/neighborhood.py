"""Contracts of neighborhood attention: windows on a grid, fused and in two products."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.cells import heads_cell
from attnspec.conformance.contract import Array, Contract, Output
from attnspec.reference.patterns.neighborhood_windows import window_tokens

SIZES = {
    "batch": (1, 2),
    "kv_heads": (1, 2),
    "group": (1, 3),
    "queries": (2, 40),
    "keys": (2, 46),
    "d": (1, 24),
    "dv": (1, 24),
}
MOST_EXTRA = 6
Parameters = dict[str, st.SearchStrategy[Any]]


def fit_extra(sizes: dict[str, int]) -> dict[str, int]:
    """The keys are those of the grid and a few more."""
    queries = min(sizes["queries"], sizes["keys"])
    extra = min(sizes["keys"] - queries, MOST_EXTRA)
    return {**sizes, "queries": queries, "keys": queries + extra}


def without(*axes: str) -> dict[str, tuple[int, int]]:
    return {axis: span for axis, span in SIZES.items() if axis not in axes}


def shapes_of(tokens: int) -> list[tuple[int, ...]]:
    """Every grid of one to three axes of at least two tokens with `tokens` in all."""
    sides = [n for n in range(2, tokens + 1) if tokens % n == 0]
    found: list[tuple[int, ...]] = [(tokens,)]
    found += [(a, tokens // a) for a in sides if a < tokens]
    found += [
        (a, b, tokens // (a * b)) for a in sides for b in sides if tokens % (a * b) == 0
        if tokens // (a * b) > 1
    ]  # fmt: skip
    return found


@st.composite
def axes_of(draw: st.DrawFn, X: int) -> tuple[int, int, int, bool]:
    """Kernel, stride, dilation and order of an axis, the whole range of each likely."""
    dilation = draw(st.sampled_from([n for n in (1, 1, 2, 3) if 2 * n <= X]))
    kernel = draw(st.integers(2, X // dilation))
    stride = draw(st.one_of(st.just(1), st.integers(1, kernel), st.just(kernel)))
    return kernel, stride, dilation, draw(st.booleans())


@st.composite
def grids(draw: st.DrawFn, tokens: int) -> dict[str, Any]:
    """A grid of so many tokens and all that there is to say about it."""
    shape = draw(st.sampled_from(shapes_of(tokens)))
    columns = zip(*(draw(axes_of(X)) for X in shape), strict=True)
    return {"shape": shape, **dict(zip(("kernel", "stride", "dilation", "causal"), columns,
                                       strict=True))}  # fmt: skip


def of_grid(tokens: int, *names: str) -> Parameters:
    """The parameters of one grid, drawn together."""
    grid = st.shared(grids(tokens), key=f"grid of {tokens}")
    return {name: grid.map(itemgetter(name)) for name in names}


GRID = ("shape", "kernel", "stride", "dilation", "causal")


def grid_parameters(sizes: Mapping[str, int]) -> Parameters:
    return of_grid(sizes["queries"], *GRID)


def attend_parameters(sizes: Mapping[str, int]) -> Parameters:
    return {
        **grid_parameters(sizes),
        "extra": st.just(sizes["keys"] - sizes["queries"]),
        "scale": st.sampled_from([None, 0.5]),
    }


def ordered(case: Case) -> bool:
    """One causal axis and nothing that all see: later tokens are of no concern to earlier ones."""
    causal, extra = case.parameters["causal"], case.parameters["extra"]
    return len(case.parameters["shape"]) == 1 and bool(causal[0]) and extra == 0


def make_weights(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Random rows in window order, NaN where nothing is read: behind the end of a causal axis."""
    grid = {name: case.parameters[name] for name in GRID}
    _, inside = window_tokens(**grid)
    weights = rng.random((*case.shape("batch heads queries"), inside.shape[1]))
    return np.where(inside, weights, np.nan)


def _cell(causal: bool) -> Callable[[Case], Case]:
    def move(case: Case) -> Case:
        axes = len(case.parameters["shape"])
        return case.with_(parameters={"causal": (causal,) * axes})

    return move


def all_axes(name: str, value: Any) -> Callable[[Mapping[str, Any]], Any]:
    """The same wrong `value` for every axis of the grid."""
    return lambda arguments: (value,) * len(arguments["shape"])


def one_more(name: str) -> Callable[[Mapping[str, Any]], Any]:
    """A value too many."""
    return lambda arguments: (*arguments[name], 1)


Q = Array("q", "batch heads queries d", role="query")
K = Array("k", "batch kv_heads keys d", role="key")
V = Array("v", "batch kv_heads keys dv", role="value")
SAME_K = Array("k", "batch kv_heads queries d", role="key")
SAME_V = Array("v", "batch kv_heads queries dv", role="value")
P = Array("p", "batch heads queries window", make=make_weights)
BAD_GRID = (
    ("a shape of other tokens", "shape", lambda a: (*a["shape"][:-1], a["shape"][-1] + 1)),
    ("a shape of four axes", "shape", lambda a: (1, 1, 1, math.prod(a["shape"]))),
    ("a shape that is a number", "shape", lambda a: math.prod(a["shape"])),
    ("kernel = 1", "kernel", all_axes("kernel", 1)),
    ("a kernel beyond the grid", "kernel", all_axes("kernel", 41)),
    ("a fractional kernel", "kernel", all_axes("kernel", 2.5)),
    ("a kernel for another axis", "kernel", one_more("kernel")),
    ("stride = 0", "stride", all_axes("stride", 0)),
    ("a stride beyond the kernel", "stride", all_axes("stride", 41)),
    ("dilation = 0", "dilation", all_axes("dilation", 0)),
    ("a dilation beyond the grid", "dilation", all_axes("dilation", 41)),
    ("causal = 1", "causal", all_axes("causal", 1)),
)
OTHER_HEADS = ("kv heads that do not divide", "k", lambda a: a["k"].repeat(7, axis=-3))
CONTRACTS = (
    Contract(
        operation="neighborhood.na_attend",
        sizes=SIZES,
        least={"queries": 2, "keys": 2},
        fix=fit_extra,
        arrays=(Q, K, V),
        outputs=(Output("out", cancels=True), Output("lse", dtype="float32", row_axes=0)),
        parameters=attend_parameters,
        linear_in=("v",),
        causal=ordered,
        cells={
            "noncausal self": _cell(False),
            "causal self": _cell(True),
            "MHA": heads_cell(2, 1),
            "GQA": heads_cell(2, 3),
            "MQA": heads_cell(1, 4),
        },
        bad_inputs=(
            *BAD_GRID,
            ("extra = -1", "extra", lambda a: -1),
            ("an extra key that is not there", "k", lambda a: a["k"][..., :-1, :]),
            ("k of another head size", "k", lambda a: a["k"].repeat(2, axis=-1)),
            ("another batch in v", "v", lambda a: a["v"].repeat(2, axis=0)),
            OTHER_HEADS,
        ),
    ),
    Contract(
        operation="neighborhood.na_qk",
        sizes=without("keys", "dv"),
        least={"queries": 2},
        arrays=(Q, SAME_K),
        outputs=(Output("scores", wide=True),),
        parameters=lambda sizes: {**grid_parameters(sizes), "scale": st.sampled_from([None, 0.5])},
        linear_in=("q", "k"),
        bad_inputs=(
            *BAD_GRID,
            ("k of another head size", "k", lambda a: a["k"].repeat(2, axis=-1)),
            ("k with fewer tokens", "k", lambda a: a["k"][..., :-1, :]),
            OTHER_HEADS,
        ),
    ),
    Contract(
        operation="neighborhood.na_av",
        sizes=without("keys", "d"),
        least={"queries": 2},
        arrays=(P, SAME_V),
        outputs=(Output("out"),),
        parameters=grid_parameters,
        linear_in=("p", "v"),
        bad_inputs=(
            *BAD_GRID,
            ("weights of another window", "p", lambda a: a["p"].repeat(2, axis=-1)),
            ("weights in a list", "p", lambda a: a["p"].tolist()),
            ("v with fewer tokens", "v", lambda a: a["v"][..., :-1, :]),
            ("kv heads that do not divide", "v", lambda a: a["v"].repeat(7, axis=-3)),
        ),
    ),
)
