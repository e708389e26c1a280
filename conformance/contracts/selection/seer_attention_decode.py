"""Contracts of SeerAttention at decode: the gate's cache, its scores, its choice, and a step."""

from __future__ import annotations

from collections.abc import Mapping
from operator import itemgetter
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.contract import Array, Contract, Output, Ranking
from attnspec.conformance.contracts.selection.seer_attention_selection import KINDS, even
from attnspec.reference.selection.seer_attention_decode import (
    GateCache,
)

SIZES = {
    "batch": (1, 2),
    "kv_heads": (1, 2),
    "group": (1, 3),
    "d": (1, 24),
    "half_gate": (1, 12),
}
MODES = ("Qproj", "Qavg", "Qavgproj", "Qorig")
MODE = st.sampled_from(MODES)
BASE = st.sampled_from([10000.0, 100.0])
SCALE = st.sampled_from([None, 0.5])
Drawn = dict[str, st.SearchStrategy[Any]]


def width(case: Case) -> int:
    """dg: free where the queries are projected, else the width of the heads."""
    projected = case.parameters.get("mode", "Qproj") in ("Qproj", "Qavgproj")
    return 2 * case.sizes["half_gate"] if projected else case.sizes["d"]


def make_Wq(rng: np.random.Generator, case: Case) -> np.ndarray | None:  # noqa: N802
    kv_heads, group, d = case.shape("kv_heads group d")
    shapes = {"Qproj": (kv_heads, group, d, width(case)), "Qavgproj": (kv_heads, d, width(case))}
    shape = shapes.get(case.parameters["mode"])
    return None if shape is None else rng.standard_normal(shape) / d**0.5


def make_Wk(rng: np.random.Generator, case: Case) -> np.ndarray:  # noqa: N802
    channels = len(case.parameters["kinds"]) * case.sizes["d"]
    shape = (case.sizes["kv_heads"], channels, width(case))
    return rng.standard_normal(shape) / channels**0.5


def make_norm(rng: np.random.Generator, case: Case) -> np.ndarray:
    return 1.0 + 0.3 * rng.standard_normal(width(case))


def make_cache(rng: np.random.Generator, case: Case) -> GateCache:
    """`rest` raw keys of the incomplete block behind `blocks` complete ones."""
    batch, kv_heads, rest, d = case.shape("batch kv_heads rest d")
    gk = rng.standard_normal((batch, kv_heads, case.sizes["blocks"], width(case)))
    return GateCache(rng.standard_normal((batch, kv_heads, rest, d)), gk)


def make_blocks(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Half of the blocks; one kv head in five has none."""
    shape = (*case.shape("batch kv_heads"), -(-case.sizes["keys"] // case.parameters["b"]))
    return (rng.random(shape) < 0.5) & (rng.random((*shape[:-1], 1)) < 0.8)


def rules(*sizes: int) -> Drawn:
    """Blocks of so many tokens with a threshold, a budget, or neither."""
    triples: list[tuple[int, float | None, int | None]]
    triples = [(b, tau, None) for b in sizes for tau in (0.05, 0.2, 0.4, -1.0)]
    triples += [(b, None, b * n) for b in sizes for n in (1, 2, 3, 20)]
    triples += [(b, None, None) for b in sizes]
    drawn = st.shared(st.sampled_from(triples), key="rule")
    names = ("b", "tau", "budget")
    return {name: drawn.map(itemgetter(i)) for i, name in enumerate(names)}


def rank(scores: np.ndarray, b: int, tau: float | None, budget: int | None) -> Ranking:
    """S14: a threshold on the weights, or the best blocks; the last one besides."""
    nb = scores.shape[-1]
    last = np.broadcast_to(np.arange(nb) == nb - 1, scores.shape)
    if tau is not None:
        return Ranking(scores, threshold=tau, softmax=True, extra=last)
    return Ranking(scores, (4096 if budget is None else budget) // b, "always", extra=last)


def poison_unselected(arguments: dict[str, Any], case: Case) -> dict[str, Any]:
    keys = case.sizes["keys"]
    read = arguments["M"].repeat(arguments["b"], axis=-1)[..., :keys, None]
    for name in ("k", "v"):
        arguments[name] = np.where(read, arguments[name], np.nan)
    return arguments


def two_masks(arguments: Mapping[str, Any], case: Case) -> list[dict[str, Any]]:
    M = arguments["M"]
    first = case.generator("deal").random(M.shape) < 0.5
    return [{**arguments, "M": M & first}, {**arguments, "M": M & ~first}]


def _cache_parameters(sizes: Mapping[str, int]) -> Drawn:
    rest = sizes["rest"]
    # The block is complete with this token, or not yet.
    return {
        "b": st.sampled_from([rest + 1, rest + 2, 64]),
        "kinds": st.sampled_from(KINDS),
        "base": BASE,
    }


BAD_RULES = (
    ("blocks of no token", "b", lambda a: 0),
    ("a threshold in words", "tau", lambda a: "high"),
    ("a threshold that is NaN", "tau", lambda a: np.nan),
    ("a budget below a block", "budget", lambda a: a["b"] - 1),
    ("a budget of half a block", "budget", lambda a: a["b"] + 0.5),
)

CONTRACTS = (
    Contract(
        operation="seer_attention.compress_step",
        sizes={**SIZES, "rest": (0, 5), "blocks": (0, 4)},
        fix=even,
        arrays=(
            Array("cache", make=make_cache),
            Array("k_t", "batch kv_heads d", role="key"),
            Array("Wk", make=make_Wk),
            Array("norm", make=make_norm, optional=True),
        ),
        outputs=(Output("rest", kind="copy"), Output("gk")),
        parameters=_cache_parameters,
        bad_inputs=(
            ("a key of another width", "k_t", lambda a: a["k_t"].repeat(2, axis=-1)),
            ("a key of another batch", "k_t", lambda a: a["k_t"].repeat(3, axis=0)),
            ("a projection of other channels", "Wk", lambda a: a["Wk"].repeat(2, axis=-2)),
            ("a projection of another width", "Wk", lambda a: a["Wk"].repeat(2, axis=-1)),
            ("no projection", "Wk", lambda a: None),
            ("a block that is complete", "b", lambda a: a["cache"].rest.shape[-2]),
            ("the median", "kinds", lambda a: ("median",)),
        ),
    ),
    Contract(
        operation="seer_attention.decode_gate",
        sizes={**SIZES, "rest": (0, 3), "blocks": (0, 6)},
        fix=even,
        arrays=(
            Array("q_t", "batch heads d", role="query"),
            Array("cache", make=make_cache),
            Array("Wq", make=make_Wq),
            Array("norm", make=make_norm, optional=True),
        ),
        outputs=(Output("scores", wide=True),),
        parameters=lambda sizes: {"pos": st.integers(0, 200), "mode": MODE, "base": BASE},
        bad_inputs=(
            ("a query of another batch", "q_t", lambda a: a["q_t"].repeat(3, axis=0)),
            ("a position before the first", "pos", lambda a: -1),
            ("another mode", "mode", lambda a: "Qmax"),
            ("another projection", "Wq", lambda a: np.ones((1, 1, 1, 1, 2))),
        ),
    ),
    Contract(
        operation="seer_attention.decode_select",
        sizes={"batch": (1, 2), "kv_heads": (1, 3), "blocks": (1, 16)},
        queries="blocks",
        keys="blocks",
        arrays=(Array("scores", "batch kv_heads blocks"),),
        outputs=(Output("M", kind="selection"),),
        parameters=lambda sizes: rules(1, 4, 16),
        ranking=lambda arguments: rank(**arguments),
        bad_inputs=(
            ("both rules", "tau", lambda a: 0.1 if a["budget"] is not None else "high"),
            *BAD_RULES,
        ),
    ),
    Contract(
        operation="seer_attention.decode_attend",
        sizes={
            **{a: n for a, n in SIZES.items() if a != "half_gate"},
            "keys": (1, 32),
            "dv": (1, 24),
        },
        arrays=(
            Array("q_t", "batch heads 1 d", role="query"),
            Array("k", "batch kv_heads keys d", role="key"),
            Array("v", "batch kv_heads keys dv", role="value"),
            Array("M", make=make_blocks),
        ),
        outputs=(Output("out"), Output("lse", dtype="float32", row_axes=0)),
        parameters=lambda sizes: {"b": st.sampled_from([1, 2, 3, 8, 16, 64]), "scale": SCALE},
        linear_in=("v",),
        poison=poison_unselected,
        split=two_masks,
        bad_inputs=(
            ("two queries", "q_t", lambda a: a["q_t"].repeat(2, axis=-2)),
            ("k of another head size", "k", lambda a: a["k"].repeat(2, axis=-1)),
            ("v with fewer tokens than k", "v", lambda a: a["v"][..., :-1, :]),
            ("a mask of numbers", "M", lambda a: a["M"].astype(np.int64)),
            ("a mask of more blocks", "M", lambda a: a["M"].repeat(2, axis=-1)),
            ("a mask of more heads", "M", lambda a: a["M"].repeat(7, axis=-2)),
            ("no mask", "M", lambda a: None),
            ("blocks of no token", "b", lambda a: 0),
        ),
    ),
)
