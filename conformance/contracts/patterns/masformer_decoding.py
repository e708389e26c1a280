"""Contract of MASFormer's decoder, which keeps what the span of its layer can still read."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.contract import Array, Contract, Output, Stream
from attnspec.conformance.contracts.patterns.masformer import BAD_SPANS, SHARED, SPANS
from attnspec.conformance.values import feed_tokens
from attnspec.reference.patterns.masformer import layer_attend
from attnspec.reference.patterns.masformer_decoding import Cache, cache_after


def _cache(rng: np.random.Generator, case: Case) -> Cache:
    """What `past` tokens leave behind."""
    batch, kv_heads, past, d, dv = case.shape("batch kv_heads past d dv")
    k = rng.standard_normal((batch, kv_heads, past, d))
    v = rng.standard_normal((batch, kv_heads, past, dv))
    return cache_after(k, v, case.parameters["span"])


def _start(whole: Mapping[str, Any]) -> Cache:
    return cache_after(whole["k"][..., :0, :], whole["v"][..., :0, :], whole["span"])


TOKENS = SHARED["arrays"][:3]
CONTRACTS = (
    Contract(
        operation="masformer.decode_step",
        sizes={**SHARED["sizes"], "tokens": (1, 4), "past": (0, 24)},
        arrays=(*TOKENS, Array("cache", make=_cache)),
        outputs=(
            Output("out", cancels=True),
            Output("cache.k", "copy"),
            Output("cache.v", "copy"),
            Output("cache.seen", "exact", plain=True),
        ),
        parameters=lambda sizes: {
            "span": st.sampled_from(SPANS),
            "scale": st.sampled_from([None, 1.0, 0.5]),
        },
        queries="tokens",
        stream=Stream(
            arrays=TOKENS,
            start=_start,
            feed=partial(feed_tokens, state="cache"),
            whole=lambda whole: layer_attend(**whole)[0],
        ),
        bad_inputs=(
            ("k of another head size", "k", lambda a: a["k"].repeat(2, axis=-1)),
            ("more keys than queries", "k", lambda a: a["k"].repeat(2, axis=2)),
            ("a cache of other heads", "cache",
             lambda a: a["cache"]._replace(k=a["cache"].k.repeat(2, axis=1))),
            ("a cache of fewer values", "cache",
             lambda a: a["cache"]._replace(v=np.concatenate([a["cache"].v, a["v"]], axis=2))),
            ("a cache of another time", "cache",
             lambda a: a["cache"]._replace(seen=0 if a["cache"].seen else 5)),
            ("keys and values that are no cache", "cache", lambda a: (a["k"], a["v"])),
            ("scale = -1", "scale", lambda a: -1.0),
            *BAD_SPANS,
        ),
    ),
)  # fmt: skip
