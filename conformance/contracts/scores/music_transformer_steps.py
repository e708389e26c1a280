"""Contracts of the steps of relative attention: tables, skewing, logits, weights, gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.contract import Array, Contract, Output
from attnspec.reference.conventions import causal_mask

SIZES = {
    "batch": (1, 2),
    "kv_heads": (1, 2),
    "group": (1, 3),
    "tokens": (1, 24),
    "rows": (1, 30),
    "d": (1, 24),
    "dv": (1, 24),
}
BLOCKS = (1, 2, 3, 3, 4, 5, 8, 30)
ON_TOKENS: dict[str, Any] = {"queries": "tokens", "keys": "tokens"}


def without(*axes: str) -> dict[str, tuple[int, int]]:
    return {axis: span for axis, span in SIZES.items() if axis not in axes}


def odd_rows(rows: int, causal: bool) -> int:
    """A number of rows that a table may have: an odd one without a causal order."""
    return rows if causal else max(rows - 1 + rows % 2, 1)


def make_table(width: str) -> Any:
    """A table for each head, or in one case of three for all of them."""

    def make(rng: np.random.Generator, case: Case) -> np.ndarray:
        shared = rng.random() < 1 / 3
        rows = odd_rows(case.sizes["rows"], case.parameters.get("causal", True))
        if "b" in case.parameters:
            tokens = case.sizes["tokens"]
            rows += min(2 * case.parameters["b"], tokens)
        shape = (rows, case.sizes[width]) if shared else (case.heads, rows, case.sizes[width])
        return rng.standard_normal(shape)

    return make


def make_used(rng: np.random.Generator, case: Case) -> np.ndarray:
    """A table as long as it is, for each head or for all."""
    rows, d = case.sizes["rows"], case.sizes["d"]
    return rng.standard_normal((rows, d) if rng.random() < 1 / 3 else (case.heads, rows, d))


def make_mask(rng: np.random.Generator, case: Case) -> np.ndarray:
    """The causal order and three pairs of four; some rows see nothing."""
    tokens = case.sizes["tokens"]
    return causal_mask(tokens, tokens) & (rng.random((tokens, tokens)) < 0.75)


def make_weights(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Causal rows that sum to 1."""
    shape = case.shape("batch heads tokens tokens")
    weights = rng.exponential(size=shape) * causal_mask(*shape[-2:])
    total = weights.sum(axis=-1, keepdims=True)
    return weights / np.where(total == 0, 1.0, total)


def make_wide(rng: np.random.Generator, case: Case) -> np.ndarray:
    batch, heads, tokens = case.shape("batch heads tokens")
    return rng.standard_normal((batch, heads, tokens, max(2 * tokens - 1, 0)))


def make_dlogits(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Gradients of logits, 0 behind the causal order if there is one."""
    shape = case.shape("batch heads tokens tokens")
    seen = causal_mask(*shape[-2:]) if case.parameters.get("causal", True) else True
    return np.where(seen, rng.standard_normal(shape), 0.0)


def poison_behind_mask(arguments: dict[str, Any], case: Case) -> dict[str, Any]:
    """NaN in every logit that the mask hides."""
    if arguments.get("mask") is not None:
        arguments["logits"] = np.where(arguments["mask"], arguments["logits"], np.nan)
    return arguments


Q = Array("q", "batch heads tokens d", role="query")
K = Array("k", "batch kv_heads tokens d", role="key")
V = Array("v", "batch kv_heads tokens dv", role="value")
QS = Array("qs", "batch heads tokens d", role="query")
E = Array("E", "heads rows d", make=make_table("d"))
SQUARE = Array("R", "batch heads tokens tokens", role="query")
BAD_TABLES = (
    ("a table of other heads", "E", lambda a: np.ones((99, 3, a["E"].shape[-1]))),
    ("a table of another width", "E", lambda a: a["E"].repeat(2, axis=-1)),
    ("a table without rows", "E", lambda a: a["E"][..., :0, :]),
)
BAD_SCALES = (
    ("a word for the scale", "scale", lambda a: "one"),
    ("an infinite scale", "scale", lambda a: float("inf")),
)
NO_ORDER = ("a number for causal", "causal", lambda a: 1)
OTHER_KEYS = (
    ("k of another head size", "k", lambda a: a["k"].repeat(2, axis=-1)),
    ("kv heads that do not divide", "k", lambda a: a["k"].repeat(7, axis=-3)),
    ("k with more tokens than q", "k", lambda a: a["k"].repeat(2, axis=-2)),
)
NO_BLOCKS = tuple((f"b = {value}", "b", lambda a, value=value: value) for value in (0, 2.5, True))
NOT_SQUARE = "expected as many columns as rows"


def wider(name: str) -> Any:
    return (NOT_SQUARE, name, lambda a: a[name].repeat(2, axis=-1))


CONTRACTS = (
    Contract(
        operation="music_transformer.relative_table_slice",
        sizes=without("batch", "dv"),
        arrays=(E,),
        outputs=(Output("used", kind="exact"),),
        parameters=lambda sizes: {
            "L": st.just(max(sizes["tokens"], 1)),
            "causal": st.booleans(),
            "clip": st.sampled_from([False, False, True]),
        },
        bad_inputs=(
            ("no tokens", "L", lambda a: 0),
            ("a table without rows", "E", lambda a: a["E"][..., :0, :]),
            ("a number for clip", "clip", lambda a: 1),
            NO_ORDER,
        ),
        **ON_TOKENS,
    ),
    Contract(
        operation="music_transformer.relative_logits",
        sizes=without("dv"),
        arrays=(QS, Array("Eused", "heads rows d", make=make_used)),
        outputs=(Output("R"),),
        linear_in=("qs", "Eused"),
        bad_inputs=(("another width", "Eused", lambda a: a["Eused"].repeat(2, axis=-1)),),
        **ON_TOKENS,
    ),
    Contract(
        operation="music_transformer.relative_logits_gather",
        sizes=without("dv"),
        arrays=(QS, E),
        outputs=(Output("rel"),),
        parameters=lambda sizes: {"L": st.just(sizes["tokens"]), "causal": st.booleans()},
        linear_in=("qs", "E"),
        bad_inputs=(
            *BAD_TABLES,
            ("other tokens", "qs", lambda a: a["qs"].repeat(2, axis=-2)),
            NO_ORDER,
        ),
        **ON_TOKENS,
    ),
    Contract(
        operation="music_transformer.skew",
        sizes=without("rows", "d", "dv"),
        arrays=(SQUARE,),
        outputs=(Output("S", kind="exact"),),
        bad_inputs=(wider("R"),),
        **ON_TOKENS,
    ),
    Contract(
        operation="music_transformer.unskew",
        sizes=without("rows", "d", "dv"),
        arrays=(Array("S", "batch heads tokens tokens", role="query"),),
        outputs=(Output("R", kind="exact"),),
        bad_inputs=(wider("S"),),
        **ON_TOKENS,
    ),
    Contract(
        operation="music_transformer.skew_full",
        sizes=without("rows", "d", "dv"),
        arrays=(Array("R", "batch heads tokens wide", make=make_wide),),
        outputs=(Output("S", kind="exact"),),
        bad_inputs=(("other columns", "R", lambda a: a["R"].repeat(2, axis=-1)),),
        **ON_TOKENS,
    ),
    Contract(
        operation="music_transformer.global_logits",
        sizes=without("dv"),
        arrays=(Q, K, E),
        outputs=(Output("logits"),),
        parameters=lambda sizes: {
            "scale": st.sampled_from([None, 0.5]),
            "causal": st.just(False),
        },
        bad_inputs=(*OTHER_KEYS, *BAD_TABLES, *BAD_SCALES, NO_ORDER),
        **ON_TOKENS,
    ),
    Contract(
        operation="music_transformer.local_visibility",
        sizes=without("batch", "kv_heads", "group", "rows", "d", "dv"),
        arrays=(),
        outputs=(Output("seen", kind="exact"),),
        parameters=lambda sizes: {
            "L": st.just(sizes["tokens"]),
            "b": st.sampled_from(BLOCKS),
        },
        bad_inputs=NO_BLOCKS,
        **ON_TOKENS,
    ),
    Contract(
        operation="music_transformer.local_logits",
        sizes=without("dv"),
        arrays=(Q, K, E),
        outputs=(Output("logits"),),
        parameters=lambda sizes: {
            "b": st.sampled_from(BLOCKS),
            "scale": st.sampled_from([None, 0.5]),
        },
        bad_inputs=(*OTHER_KEYS, *BAD_TABLES, *BAD_SCALES, *NO_BLOCKS),
        **ON_TOKENS,
    ),
    Contract(
        operation="music_transformer.attend",
        sizes=without("rows", "d"),
        arrays=(
            Array("logits", "batch heads tokens tokens", role="query"),
            Array("mask", "tokens tokens", make=make_mask, optional=True),
            V,
        ),
        outputs=(Output("out"), Output("P")),
        linear_in=("v",),
        poison=poison_behind_mask,
        bad_inputs=(
            ("an integer mask", "mask", lambda a: np.ones((1, 1), np.int64)),
            ("a mask of other keys", "mask", lambda a: np.ones((1, 99), bool)),
            ("v with more tokens", "v", lambda a: a["v"].repeat(7, axis=-2)),
            ("kv heads that do not divide", "v", lambda a: a["v"].repeat(7, axis=-3)),
        ),
        **ON_TOKENS,
    ),
    Contract(
        operation="music_transformer.decode_relative",
        sizes=without("dv"),
        arrays=(Array("q_row", "batch heads d", role="query"), E),
        outputs=(Output("rel"),),
        parameters=lambda sizes: {
            "n_keys": st.just(max(sizes["tokens"], 1)),
            "scale": st.sampled_from([None, 0.5]),
        },
        linear_in=("q_row", "E"),
        bad_inputs=(*BAD_TABLES, *BAD_SCALES, ("no keys", "n_keys", lambda a: 0)),
        **ON_TOKENS,
    ),
    Contract(
        operation="music_transformer.relative_values",
        sizes=without("d"),
        arrays=(
            Array("P", "batch heads tokens tokens", make=make_weights),
            Array("Ev", "heads rows dv", make=make_table("dv")),
        ),
        outputs=(Output("out"),),
        parameters=lambda sizes: {"causal": st.booleans()},
        linear_in=("P", "Ev"),
        bad_inputs=(
            ("a table of other heads", "Ev", lambda a: np.ones((99, 3, 2))),
            ("a table without rows", "Ev", lambda a: a["Ev"][..., :0, :]),
            wider("P"),
            NO_ORDER,
        ),
        **ON_TOKENS,
    ),
    Contract(
        operation="music_transformer.table_gradient",
        sizes=without("dv", "rows"),
        arrays=(Array("dlogits", "batch heads tokens tokens", make=make_dlogits), QS),
        outputs=(Output("dE", by_query=False, cancels=True),),
        parameters=lambda sizes: {
            "M": st.sampled_from([1, 2, 5, 13, 30]),
            "causal": st.booleans(),
        },
        linear_in=("dlogits", "qs"),
        bad_inputs=(
            ("no rows", "M", lambda a: 0),
            ("half a row", "M", lambda a: 2.5),
            ("other tokens", "dlogits", lambda a: a["dlogits"].repeat(2, axis=-1)),
            NO_ORDER,
        ),
        **ON_TOKENS,
    ),
)
