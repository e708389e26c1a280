"""Contracts of MoA's caches: where tokens are written, and what a decoded one reads."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.cells import heads_cell
from attnspec.conformance.contract import Array, Contract, Output, Stream
from attnspec.conformance.contracts.patterns.moa import (
    SIZES,
    bad_plans,
    one_a_head,
)
from attnspec.conformance.values import bad_integers, feed_tokens, longer
from attnspec.reference.patterns.moa import moa_attend
from attnspec.reference.patterns.moa_cache import Cache, cache_update, init_cache

PAST = {**SIZES, "past": (0, 24)}
S, C = Array("s", make=one_a_head(0, 3)), Array("c", make=one_a_head(1, 7))


def make_cache(rng: np.random.Generator, case: Case) -> Cache:
    """What `past` tokens leave behind, a fifth of them padding."""
    batch, kv_heads, past, d, dv = case.shape("batch kv_heads past d dv")
    k = rng.standard_normal((batch, kv_heads, past, d))
    v = rng.standard_normal((batch, kv_heads, past, dv))
    real = rng.random((batch, past)) < 0.8
    plan = S.data(case), C.data(case)
    return cache_update(init_cache(k, v, *plan), k, v, *plan, real)


def make_real(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Padding on the left, or anywhere."""
    batch, tokens = case.shape("batch tokens")
    if rng.integers(2):
        return np.arange(tokens) >= rng.integers(0, tokens + 1, (batch, 1))
    return rng.random((batch, tokens)) < 0.7


def poison_slots(arguments: dict[str, Any], case: Case) -> dict[str, Any]:
    """NaN in the slots that nothing was written to."""
    cache = arguments["cache"]
    sizes = np.add(arguments["s"], arguments["c"])
    place = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    empty = place >= cache.seen[:, None]
    k, v = (np.where(empty[..., None], np.nan, x) for x in (cache.k, cache.v))
    return {**arguments, "cache": cache._replace(k=k, v=v)}


def poison_padding(arguments: dict[str, Any], case: Case) -> dict[str, Any]:
    """NaN in the tokens that are padding."""
    real = arguments.get("valid_mask")
    if real is not None:
        for name in ("k", "v"):
            arguments[name] = np.where(real[:, None, :, None], arguments[name], np.nan)
    return arguments


Q = Array("q", "batch heads tokens d", role="query")
K = Array("k", "batch kv_heads tokens d", role="key")
V = Array("v", "batch kv_heads tokens dv", role="value")
CACHE = Array("cache", make=make_cache)
SLOTS = (("k", "copy"), ("v", "copy"), ("seen", "exact"))
CELLS = {"MHA": heads_cell(2, 1), "GQA": heads_cell(2, 3), "MQA": heads_cell(1, 4)}
BAD_CACHES = (
    ("a cache of fewer slots", "cache", lambda a: a["cache"]._replace(k=a["cache"].k[:, :-1])),
    ("a count of another batch", "cache",
     lambda a: a["cache"]._replace(seen=np.zeros(9, np.int64))),
    ("a cache that is none", "cache", lambda a: (a["cache"].k, a["cache"].v)),
    *bad_plans(),
)  # fmt: skip
BAD_TOKENS = (
    ("k of another head size", "k", lambda a: a["k"].repeat(2, axis=-1)),
    ("more values than keys", "v", lambda a: longer(a["v"])),
    ("another batch in v", "v", lambda a: a["v"].repeat(2, axis=0)),
)
SCALE = {"scale": st.sampled_from([None, 0.5])}
CONTRACTS = (
    Contract(
        operation="moa.circular_slots",
        sizes={"batch": (1, 9)},
        arrays=(Array("count", make=lambda rng, case: rng.integers(0, 40, case.sizes["batch"])),),
        outputs=(Output("slots", "exact"),),
        parameters=lambda sizes: {"s": st.integers(0, 5), "c": st.integers(1, 9)},
        bad_inputs=(
            ("counts that are no integers", "count", lambda a: a["count"].astype(float)),
            ("no array", "count", lambda a: 3),
            *bad_integers("s", 0),
            *bad_integers("c"),
        ),
    ),
    Contract(
        operation="moa.cache_update",
        sizes={**PAST, "tokens": (1, 24)},
        queries="tokens",
        keys="tokens",
        arrays=(CACHE, K, V, S, C, Array("valid_mask", make=make_real, optional=True)),
        outputs=tuple(Output(name, kind) for name, kind in SLOTS),
        poison=poison_padding,
        neutral={"valid_mask": lambda case: np.ones(case.shape("batch tokens"), bool)},
        cells=CELLS,
        bad_inputs=(
            *BAD_CACHES,
            *BAD_TOKENS,
            ("a mask of floats", "valid_mask", lambda a: np.ones(a["k"].shape[::2])),
            ("a mask of more tokens", "valid_mask",
             lambda a: np.ones((len(a["k"]), a["k"].shape[2] + 1), bool)),
        ),
    ),
    Contract(
        operation="moa.decode",
        sizes=PAST,
        arrays=(Array("q", "batch heads 1 d", role="query"), CACHE, S, C),
        outputs=(Output("out"), Output("lse", dtype="float32", row_axes=0)),
        parameters=lambda sizes: SCALE,
        poison=poison_slots,
        cells=CELLS,
        bad_inputs=(
            *BAD_CACHES,
            ("two tokens", "q", lambda a: a["q"].repeat(2, axis=2)),
            ("another head size", "q", lambda a: a["q"].repeat(2, axis=3)),
            ("another batch", "q", lambda a: a["q"].repeat(3, axis=0)),
        ),
    ),
    Contract(
        operation="moa.decode_step",
        sizes={**PAST, "tokens": (1, 4)},
        least={"tokens": 1},
        arrays=(Q, K, V, CACHE, S, C),
        outputs=(
            Output("out"),
            Output("lse", dtype="float32", row_axes=0),
            *(Output(f"cache.{name}", kind) for name, kind in SLOTS),
        ),
        parameters=lambda sizes: SCALE,
        poison=poison_slots,
        stream=Stream(
            arrays=(Q, K, V, S, C),
            start=lambda whole: init_cache(whole["k"], whole["v"], whole["s"], whole["c"]),
            feed=partial(feed_tokens, state="cache"),
            whole=lambda whole: moa_attend(**whole)[0],
            carried=lambda rest: rest[-1],
        ),
        cells={"causal self": lambda case: case, **CELLS},
        bad_inputs=(
            *BAD_CACHES,
            *BAD_TOKENS,
            ("more queries than keys", "q", lambda a: longer(a["q"])),
        ),
    ),
)  # fmt: skip
