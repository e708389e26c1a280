"""Contracts of lean attention's schedule: tiles, workers and shares, all of them exact integers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.contract import Array, Contract, Output
from attnspec.conformance.contracts.parallel.lean_attention import wrong_integers
from attnspec.reference.parallel.lean_attention_schedule import lean_schedule

Drawn = dict[str, st.SearchStrategy[Any]]


def make_tiles(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Tiles of each output: few or many, one in five has none, sometimes none has any."""
    rng = case.generator("tiles")
    n = rng.integers(0, rng.choice([2, 5, 40, 400, 400]), case.sizes["outputs"])
    return np.where(rng.random(n.shape) < 0.2, 0, n).astype(np.int64)


def make_edges(which: int) -> Any:
    """Where the workers of a schedule start (0) or end (1)."""

    def make(rng: np.random.Generator, case: Case) -> np.ndarray:
        n = make_tiles(rng, case)
        # Numbers of workers that divide the tiles, and that leave all but one with one tile.
        workers = [1, 2, 3, 5, 16, max(1, int(n.sum()) - 1), max(1, int(n.sum()) // 2)]
        return lean_schedule(n, int(case.generator("workers").choice(workers)))[which]

    return make


def make_lengths(rng: np.random.Generator, case: Case) -> np.ndarray:
    lengths = rng.integers(0, 70, case.sizes["sequences"])
    return np.where(rng.random(lengths.shape) < 0.2, 0, lengths).astype(np.int64)


def _tiles_parameters(sizes: Mapping[str, int]) -> Drawn:
    return {
        "N": st.sampled_from([1, 2, 3, 8, 16, 64]),
        "Hkv": st.integers(1, 3),
        "Tq": st.integers(0, 24),
        "M": st.sampled_from([None, 1, 2, 5, 16]),
        "causal": st.booleans(),
        "order": st.sampled_from(["natural", "paired"]),
    }


TILES = Array("n", make=make_tiles)
SCHEDULE = (TILES, Array("start", make=make_edges(0)), Array("end", make=make_edges(1)))
WORKERS = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 16, 33, 132])
WIDTHS = st.sampled_from([1, 16, 63, 64, 65, 80, 127, 128, 129, 192, 256, 320])
SLOTS = st.sampled_from([33, 66, 132, 1, 5, 16])
RULES = st.sampled_from(["authors", "port"])
BAD_TILES = (
    ("tiles as floats", "n", lambda a: a["n"] + 0.5),
    ("tiles as a list", "n", lambda a: a["n"].tolist()),
    ("fewer tiles than none", "n", lambda a: a["n"] - 1000),
)
BAD_EDGES = (
    ("a start too many", "end", lambda a: a["end"][:-1] if len(a["end"]) else np.arange(3)),
    ("starts as floats", "start", lambda a: a["start"] + 0.5),
    ("ends as a list", "end", lambda a: a["end"].tolist()),
    ("tiles that no worker owns", "n", lambda a: a["n"] + 1),
)

CONTRACTS = (
    Contract(
        operation="lean_attention.tile_size",
        sizes={},
        arrays=(),
        outputs=(Output("N", kind="exact", plain=True),),
        parameters=lambda sizes: {"d": WIDTHS, "rule": RULES},
        bad_inputs=(("another rule", "rule", lambda a: "paper"), *wrong_integers("d")),
    ),
    Contract(
        operation="lean_attention.line_order",
        sizes={},
        arrays=(),
        outputs=(Output("line", kind="exact", plain=True),),
        parameters=lambda sizes: {
            "Hkv": st.integers(1, 3),
            "batch": st.integers(0, 3),
            "blocks": st.integers(0, 9),
            "order": st.sampled_from(["natural", "paired"]),
        },
        bad_inputs=(
            ("another order", "order", lambda a: "reversed"),
            ("fewer blocks than none", "blocks", lambda a: -1),
            ("a fractional batch", "batch", lambda a: 1.5),
            *wrong_integers("Hkv"),
        ),
    ),
    Contract(
        operation="lean_attention.tiles_per_output",
        sizes={"sequences": (1, 4)},
        arrays=(Array("lengths", "sequences", make=make_lengths),),
        outputs=(Output("n", kind="exact"),),
        parameters=_tiles_parameters,
        bad_inputs=(
            ("a negative length", "lengths", lambda a: a["lengths"] - 1000),
            ("lengths as floats", "lengths", lambda a: a["lengths"] + 0.5),
            ("another order", "order", lambda a: "reversed"),
            ("fewer queries than none", "Tq", lambda a: -1),
            *wrong_integers("N", "Hkv", "M"),
        ),
    ),
    Contract(
        operation="lean_attention.grid_size",
        sizes={"outputs": (1, 6)},
        arrays=(TILES,),
        outputs=(Output("G", kind="exact", plain=True),),
        parameters=lambda sizes: {"slots": SLOTS, "rule": RULES},
        bad_inputs=(
            ("another rule", "rule", lambda a: "paper"),
            *BAD_TILES,
            *wrong_integers("slots"),
        ),
    ),
    Contract(
        operation="lean_attention.lean_schedule",
        sizes={"outputs": (1, 6)},
        arrays=(TILES,),
        outputs=(Output("start", kind="exact"), Output("end", kind="exact")),
        parameters=lambda sizes: {"G": WORKERS},
        bad_inputs=(*BAD_TILES, *wrong_integers("G")),
    ),
    Contract(
        operation="lean_attention.split_bound",
        sizes={"outputs": (1, 6)},
        arrays=(TILES,),
        outputs=(Output("bound", kind="exact", plain=True),),
        parameters=lambda sizes: {"G": WORKERS},
        bad_inputs=(*BAD_TILES, *wrong_integers("G")),
    ),
    Contract(
        operation="lean_attention.segments",
        sizes={"outputs": (1, 6)},
        arrays=SCHEDULE,
        outputs=(Output("segments", kind="exact", plain=True),),
        bad_inputs=(*BAD_TILES, *BAD_EDGES),
    ),
    Contract(
        operation="lean_attention.helpers",
        sizes={"outputs": (1, 6)},
        arrays=SCHEDULE,
        outputs=(Output("helpers", kind="exact", plain=True),),
        parameters=lambda sizes: {"u": st.integers(0, sizes["outputs"] - 1)},
        bad_inputs=(
            ("an output that is not there", "u", lambda a: len(a["n"])),
            ("a negative output", "u", lambda a: -1),
            ("a fractional output", "u", lambda a: 0.5),
            *BAD_TILES,
            *BAD_EDGES,
        ),
    ),
)
