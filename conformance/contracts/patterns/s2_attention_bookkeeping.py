"""Contracts of S2-Attention's patterns and of their compressed forms: whole numbers, exactly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.contract import Array, Contract, Output
from attnspec.conformance.values import bad_integers

GRID = {"heads_of_it": (1, 3), "rows": (0, 9), "columns": (0, 9)}


def make_grid(rng: np.random.Generator, case: Case) -> np.ndarray:
    """A pattern with many blocks or few, or one in which no block returns."""
    shape = case.shape("heads_of_it rows columns")
    kind = rng.integers(3)
    if kind == 2:
        first = rng.integers(0, shape[1] + 1, (shape[0], 1, shape[2]))
        row = np.arange(shape[1])[:, None]
        return (row >= np.arange(shape[2])) & (row < first)
    return rng.random(shape) < (0.3, 0.8)[kind]


def make_token_grid(rng: np.random.Generator, case: Case) -> np.ndarray:
    """A pattern with as many blocks as the tokens of the case ask for."""
    rows, columns = (-(-case.parameters[name] // case.parameters["b"]) for name in ("Tq", "Tk"))
    return rng.random((case.sizes["heads_of_it"], rows, columns)) < 0.6


def _pattern_parameters(sizes: Mapping[str, int]) -> dict[str, st.SearchStrategy[Any]]:
    return {
        "M": st.sampled_from([9, 12, 5, 1, 0]),
        "N": st.sampled_from([9, 12, 5, 1, 0]),
        "H": st.sampled_from([8, 4, 12]),
        "Hk": st.sampled_from([4, 2, 1]),
        "local": st.sampled_from([1, 2, 3]),
        "v": st.sampled_from([8, 4, 3, 2, 1]),
        "num_dense_heads": st.sampled_from([0, 0, 1]),
        "step": st.sampled_from([None, 1, 2]),
        "offset": st.integers(0, 5),
        "causal": st.sampled_from([True, False, True]),
        "q_block": st.sampled_from([0, 3]),
        "kv_block": st.sampled_from([0, 2]),
        "active_head_range": st.sampled_from([(1, 3), None, (2, 4)]),
    }


PATTERN = Array("pattern", "heads_of_it rows columns", make=make_grid)
BAD_PATTERN = (
    ("a pattern of integers", "pattern", lambda a: a["pattern"].astype(np.int64)),
    ("a pattern of two axes", "pattern", lambda a: a["pattern"][0]),
    ("a pattern that is no array", "pattern", lambda a: None),
)
CONTRACTS = (
    Contract(
        operation="s2_attention.stride_mask",
        sizes={},
        arrays=(),
        outputs=(Output("mask", "exact"),),
        parameters=lambda sizes: {
            "N": st.integers(0, 20),
            "c": st.integers(0, 7),
            "step": st.integers(1, 3),
            "o": st.integers(0, 5),
            "v": st.integers(1, 6),
        },
        bad_inputs=(
            *bad_integers("v"),
            *bad_integers("step"),
            ("N = -1", "N", lambda a: -1),
            ("c = 1.0", "c", lambda a: 1.0),
            ("o = -1", "o", lambda a: -1),
        ),
    ),
    Contract(
        operation="s2_attention.block_pattern",
        sizes={},
        arrays=(),
        outputs=(Output("pattern", "exact"),),
        parameters=_pattern_parameters,
        bad_inputs=(
            *bad_integers("H"),
            *bad_integers("v"),
            *bad_integers("step"),
            ("kv heads that do not divide", "Hk", lambda a: 5),
            ("local = -1", "local", lambda a: -1),
            ("local = 2.5", "local", lambda a: 2.5),
            ("offset = -1", "offset", lambda a: -1),
            ("more dense heads than there are", "num_dense_heads", lambda a: 99),
            ("a negative row", "q_block", lambda a: -1),
            ("causal = 1", "causal", lambda a: 1),
            ("homo_head in words", "homo_head", lambda a: "yes"),
            ("heads that are not there", "active_head_range", lambda a: (2, 99)),
            ("no heads", "active_head_range", lambda a: (1, 1)),
            ("half a head", "active_head_range", lambda a: (0, 1.5)),
            ("heads without an end", "active_head_range", lambda a: (1,)),
        ),
    ),
    Contract(
        operation="s2_attention.token_mask",
        sizes={"heads_of_it": (1, 3)},
        arrays=(Array("pattern", make=make_token_grid),),
        outputs=(Output("mask", "exact"),),
        parameters=lambda sizes: {
            "b": st.sampled_from([1, 2, 3, 4, 6]),
            "Tq": st.integers(0, 20),
            "Tk": st.integers(0, 20),
            "causal": st.booleans(),
            "q_start": st.sampled_from([0, 12]),
            "kv_start": st.sampled_from([0, 12]),
        },
        bad_inputs=(
            *BAD_PATTERN,
            ("a pattern with too many rows", "pattern", lambda a: a["pattern"].repeat(9, axis=1)
             if a["pattern"].size else np.ones((1, 9, 9), bool)),
            *bad_integers("b"),
            ("causal = 1", "causal", lambda a: 1),
            ("q_start = -12", "q_start", lambda a: -12),
            ("a start inside a block", "kv_start", lambda a: 12 * a["b"] + 1 if a["b"] > 1 else -1),
        ),
    ),
    Contract(
        operation="s2_attention.union_coverage",
        sizes=GRID,
        arrays=(PATTERN,),
        outputs=(Output("covered", "exact"),),
        bad_inputs=BAD_PATTERN,
    ),
    Contract(
        operation="s2_attention.is_kv_efficient",
        sizes=GRID,
        arrays=(PATTERN,),
        outputs=(Output("efficient", "exact", plain=True),),
        parameters=lambda sizes: {"bm": st.integers(1, 4), "bn": st.integers(1, 4)},
        bad_inputs=(*BAD_PATTERN, *bad_integers("bm"), *bad_integers("bn")),
    ),
    Contract(
        operation="s2_attention.live_blocks",
        sizes={},
        arrays=(),
        outputs=(Output("blocks", "exact"),),
        parameters=lambda sizes: {
            "t": st.integers(0, 40),
            "c": st.integers(0, 5),
            "b": st.integers(1, 5),
            "local": st.integers(1, 4),
            "v": st.integers(1, 6),
            "step": st.integers(1, 3),
            "offset": st.integers(0, 5),
            "dense": st.sampled_from([False, False, True]),
        },
        bad_inputs=(
            *bad_integers("b"),
            *bad_integers("v"),
            ("t = -1", "t", lambda a: -1),
            ("c = -1", "c", lambda a: -1),
            ("local = -1", "local", lambda a: -1),
            ("dense = 1", "dense", lambda a: 1),
        ),
    ),
    *(
        Contract(
            operation=f"s2_attention.{name}",
            sizes=GRID,
            arrays=(PATTERN,),
            outputs=(Output("ends", "exact"), Output("entries", "exact")),
            bad_inputs=BAD_PATTERN,
        )
        for name in ("to_csr", "to_csc")
    ),
    Contract(
        operation="s2_attention.merge_q",
        sizes=GRID,
        arrays=(PATTERN,),
        outputs=(Output("crow", "exact"), Output("col", "exact"), Output("micro", "exact")),
        parameters=lambda sizes: {
            "b": st.just(4),
            "bm": st.sampled_from([1, 2, 4, 8, 12]),
            "bn": st.sampled_from([1, 2, 4]),
            "causal": st.just(True),
        },
        bad_inputs=(
            *BAD_PATTERN,
            *bad_integers("b"),
            ("a tile that does not fit", "bm", lambda a: 6),
            ("keys that do not divide", "bn", lambda a: 3),
            ("causal = 1", "causal", lambda a: 1),
        ),
    ),
)  # fmt: skip
