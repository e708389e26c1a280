"""Contracts of Titans over packed sequences."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from attnspec.conformance.case import Case
from attnspec.conformance.cells import heads_cell
from attnspec.conformance.contract import Array, Contract, Output
from attnspec.conformance.contracts.linear.titans import (
    BAD_LAYERS,
    BAD_RATES,
    BAD_SCALES,
    DEEP,
    SIZES,
    STATES,
    chunks,
    layers_of,
    rates_of,
    wrong_integers,
)
from attnspec.conformance.packing import (
    BAD_OFFSETS,
    NO_SEQUENCES,
    OFFSETS,
    PACKED,
    Packed,
    packed_sizes,
)


def _rates(rng: np.random.Generator, case: Case) -> tuple[np.ndarray, ...]:
    return rates_of(rng, case.shape("kv_heads tokens"), case)


def _layers(rng: np.random.Generator, case: Case) -> tuple[np.ndarray, ...]:
    return layers_of(rng, case.shape("sequences kv_heads"), case.shape("d hidden dv"))


def _no_momentum(case: Case) -> Any:
    leading, widths = case.shape("sequences kv_heads"), case.shape("d hidden dv")
    return tuple(np.zeros((*leading, a, b)) for a, b in itertools.pairwise(widths))


TOKENS = (
    Array("k", "kv_heads tokens d"),
    Array("v", "kv_heads tokens dv", role="value"),
    Array("q", "heads tokens d", role="query"),
    Array("rates", make=_rates),
    OFFSETS,
)
LAID_OUT = Packed(
    {"offsets": {"k": -2, "v": -2, "q": -2, "rates": -1}},
    ("W0", "S0"),
    {"rates": None},
    lambda results, arguments: {"W0": results[1], "S0": results[2]},
    lambda arguments: arguments["b"],
)
CELLS = {
    **PACKED,
    "MHA": heads_cell(2, 1),
    "GQA": heads_cell(2, 3),
    "MQA": heads_cell(1, 4),
}
BAD = (
    *BAD_OFFSETS,
    *NO_SEQUENCES,
    ("k of another width", "k", lambda a: np.repeat(a["k"], 2, axis=-1)),
    ("more queries than keys", "q", lambda a: np.repeat(a["q"], 2, axis=-2)),
    ("more values than keys", "v", lambda a: np.repeat(a["v"], 2, axis=-2)),
    ("heads that do not divide", "k", lambda a: np.repeat(a["k"], 7, axis=-3)),
    ("values wider than the memory", "v", lambda a: np.repeat(a["v"], 2, axis=-1)),
    ("a batch of keys", "k", lambda a: a["k"][None]),
    ("an unknown read", "read", lambda a: "before"),
    *wrong_integers("b"),
    *BAD_SCALES,
    *BAD_RATES,
)

CONTRACTS = (
    Contract(
        operation="titans.titans_packed_linear",
        sizes=packed_sizes(SIZES),
        queries="tokens",
        keys="tokens",
        arrays=(
            Array("W0", "sequences kv_heads d dv"),
            Array("S0", "sequences kv_heads d dv", optional=True),
            *TOKENS,
        ),
        outputs=(
            Output("y"),
            Output("W", dtype="float32", by_query=False),
            Output("S", dtype="float32", by_query=False),
        ),
        parameters=chunks,
        linear_in=("q", "v W0 S0"),
        causal=lambda case: True,
        neutral={"S0": lambda case: np.zeros(case.shape("sequences kv_heads d dv"))},
        cancelling=("drates",),
        packed=LAID_OUT,
        cells=CELLS,
        bad_inputs=(
            ("memories of another width", "W0", lambda a: np.repeat(a["W0"], 2, axis=-2)),
            ("memories for other heads", "W0", lambda a: np.repeat(a["W0"], 7, axis=1)),
            ("memories for other sequences", "W0", lambda a: np.repeat(a["W0"], 7, axis=0)),
            ("a tuple as memory", "W0", lambda a: (a["W0"],)),
            ("momentum of another width", "S0", lambda a: np.repeat(a["W0"], 2, axis=-1)),
            ("momentum for other sequences", "S0", lambda a: np.repeat(a["W0"], 7, axis=0)),
            *BAD,
        ),
    ),
    Contract(
        operation="titans.titans_packed_mlp",
        sizes=packed_sizes(DEEP),
        queries="tokens",
        keys="tokens",
        arrays=(Array("W0", make=_layers), Array("S0", make=_layers, optional=True), *TOKENS),
        outputs=(Output("y"), *STATES),
        parameters=chunks,
        causal=lambda case: True,
        neutral={"S0": _no_momentum},
        cancelling=("drates",),
        packed=LAID_OUT,
        cells=CELLS,
        bad_inputs=(*BAD_LAYERS, *BAD),
    ),
)
