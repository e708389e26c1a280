"""Contract of SeerAttention's decode step, alone and over a whole stream of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.contract import Array, Contract, Output, Ranking, Stream
from attnspec.conformance.contracts.selection.seer_attention_decode import (
    BAD_RULES,
    BASE,
    MODE,
    SCALE,
    SIZES,
    make_cache,
    make_norm,
    make_Wk,
    make_Wq,
    rank,
    rules,
)
from attnspec.conformance.contracts.selection.seer_attention_selection import KINDS, even
from attnspec.reference.primitives.rope import rope
from attnspec.reference.selection.seer_attention_decode import (
    GateCache,
    State,
    compress_step,
    decode_attend,
    decode_gate,
    decode_select,
    init_state,
)
from attnspec.reference.selection.seer_attention_gate import pool_blocks


def make_state(rng: np.random.Generator, case: Case) -> State:
    """What `past` tokens may leave behind."""
    batch, kv_heads, past, d, dv = case.shape("batch kv_heads past d dv")
    blocks, rest = divmod(past, case.parameters["b"])
    cache = make_cache(rng, case.with_(sizes={"blocks": blocks, "rest": rest}))
    k = rng.standard_normal((batch, kv_heads, past, d))
    return State(cache, k, rng.standard_normal((batch, kv_heads, past, dv)))


def _rank_step(a: Mapping[str, Any]) -> Ranking:
    """The choice inside one step, a row for each query head."""
    cache = compress_step(
        a["state"].cache, a["k_t"], a["Wk"], a["b"], a["kinds"], a["base"], a.get("k_norm")
    )
    pos = a["state"].k.shape[-2]
    scores = decode_gate(a["q_t"], cache, pos, a["Wq"], a["mode"], a["base"], a.get("q_norm"))
    group = a["q_t"].shape[-2] // a["k_t"].shape[-2]
    return rank(np.repeat(scores, group, axis=-2), a["b"], a["tau"], a["budget"])


def _normed(x: np.ndarray, weight: np.ndarray | None) -> np.ndarray:
    if weight is None:
        return x
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6) * weight


def _gate(a: Mapping[str, Any], t: int) -> np.ndarray:
    """Scores (batch, kv_heads, nb) of token t, its keys pooled all at once."""
    b, tokens = a["b"], t + 1
    whole = tokens // b * b
    pooled = pool_blocks(a["k"][..., :whole, :], b, a["kinds"]) @ a["Wk"]
    gk = rope(_normed(pooled, a.get("k_norm")), np.arange(0, whole, b), a["base"])
    cache = GateCache(a["k"][..., whole:tokens, :], gk)
    query = a["q"][..., t, :]
    return decode_gate(query, cache, t, a["Wq"], a["mode"], a["base"], a.get("q_norm"))


def _whole(a: Mapping[str, Any]) -> np.ndarray:
    """Outputs (batch, tokens * heads, dv), each token from all keys up to it."""
    outs = []
    positions = np.arange(a["q"].shape[-2])
    q, k = rope(a["q"], positions, a["base"]), rope(a["k"], positions, a["base"])
    for t in positions:
        M = decode_select(_gate(a, t), a["b"], tau=a["tau"], budget=a["budget"])
        seen, now = slice(t + 1), slice(t, t + 1)
        keys, values = k[..., seen, :], a["v"][..., seen, :]
        out, _ = decode_attend(q[..., now, :], keys, values, M, a["b"], scale=a["scale"])
        outs.append(out[..., 0, :])
    return np.concatenate(outs, axis=-2)


def _rank_whole(a: Mapping[str, Any]) -> Ranking:
    """The choices of all tokens, a row for each token and query head."""
    T, group = a["q"].shape[-2], a["q"].shape[-3] // a["k"].shape[-3]
    most = -(-T // a["b"])
    scores, allowed, extra = [], [], []
    for t in range(T):
        one = rank(np.repeat(_gate(a, t), group, axis=-2), a["b"], a["tau"], a["budget"])
        missing = [(0, 0), (0, 0), (0, most - one.scores.shape[-1])]
        scores.append(np.pad(one.scores, missing, constant_values=-np.inf))
        allowed.append(np.pad(np.ones(one.scores.shape, bool), missing))
        extra.append(np.pad(np.asarray(one.extra), missing))
    rows = [np.concatenate(part, axis=-2) for part in (scores, allowed, extra)]
    return replace(one, scores=rows[0], allowed=rows[1], extra=rows[2])


def _start(a: Mapping[str, Any]) -> State:
    return init_state(a["k"][..., 0, :], a["v"][..., 0, :], a["Wk"])


def _feed(a: Mapping[str, Any], state: Any, first: int, last: int) -> dict[str, Any]:
    token = {f"{name}_t": a[name][..., first, :] for name in ("q", "k", "v")}
    return {**a, **token, "state": state}


WEIGHTS = (Array("Wq", make=make_Wq), Array("Wk", make=make_Wk))
NORMS = tuple(Array(name, make=make_norm, optional=True) for name in ("q_norm", "k_norm"))

CONTRACTS = (
    Contract(
        operation="seer_attention.step",
        sizes={**SIZES, "dv": (1, 24), "past": (0, 12), "tokens": (1, 12)},
        least={"tokens": 1},
        fix=even,
        arrays=(
            Array("state", make=make_state),
            Array("q_t", "batch heads d", role="query"),
            Array("k_t", "batch kv_heads d", role="key"),
            Array("v_t", "batch kv_heads dv", role="value"),
            *WEIGHTS,
            *NORMS,
        ),
        outputs=(
            Output("out"),
            Output("state.cache.rest", kind="copy"),
            Output("state.cache.gk"),
            Output("state.k"),
            Output("state.v", kind="copy"),
        ),
        parameters=lambda sizes: {
            **rules(1, 2, 4),
            "kinds": st.sampled_from(KINDS),
            "mode": MODE,
            "base": BASE,
            "scale": SCALE,
        },
        hidden=_rank_step,
        stream=Stream(
            arrays=(
                Array("q", "batch heads tokens d", role="query"),
                Array("k", "batch kv_heads tokens d", role="key"),
                Array("v", "batch kv_heads tokens dv", role="value"),
                *WEIGHTS,
            ),
            start=_start,
            feed=_feed,
            whole=lambda whole: _whole(whole),
            chunked=False,
            hidden=_rank_whole,
        ),
        bad_inputs=(
            ("a query of another width", "q_t", lambda a: a["q_t"].repeat(2, axis=-1)),
            ("a key of another width", "k_t", lambda a: a["k_t"].repeat(2, axis=-1)),
            ("a value of another batch", "v_t", lambda a: a["v_t"].repeat(3, axis=0)),
            ("no projection of the keys", "Wk", lambda a: None),
            ("another mode", "mode", lambda a: "Qmax"),
            ("the median", "kinds", lambda a: ("median",)),
            *BAD_RULES,
        ),
    ),
)
