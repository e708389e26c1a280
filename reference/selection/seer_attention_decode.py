"""SeerAttention-R, the gate at decode: the clauses S11 to S15 of `seer_attention`.

A new token has no block of queries to pool, so the heads of its group are pooled instead. A block
of keys is compressed once, when its last token arrives, and one mask serves a whole kv group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from attnspec.reference.conventions import (
    check_array,
    check_attention_inputs,
    check_choice,
    check_integer,
    check_size,
    group_size,
    repeat_heads,
)
from attnspec.reference.dense.attention import attend
from attnspec.reference.primitives.rope import rope
from attnspec.reference.primitives.softmax import softmax
from attnspec.reference.primitives.top_k import top_k_mask
from attnspec.reference.selection.seer_attention_gate import check_kinds, pool_blocks
from attnspec.reference.selection.seer_attention_selection import check_number

MODES = ("Qproj", "Qavg", "Qavgproj", "Qorig")


class GateCache(NamedTuple):
    """S12: raw keys `rest` (..., kv_heads, < b, d) of the incomplete block and the compressed keys
    `gk` (..., kv_heads, complete blocks, dg)."""

    rest: np.ndarray
    gk: np.ndarray


def init_cache(k_t: np.ndarray, Wk: np.ndarray) -> GateCache:
    """S12: an empty cache for keys shaped as k_t (..., kv_heads, d).

    >>> [x.shape for x in init_cache(np.ones((2, 4)), np.ones((2, 12, 8)))]
    [(2, 0, 4), (2, 0, 8)]
    """
    check_array("k_t", k_t, ("kv_heads", "d"))
    check_array("Wk", Wk, ("kv_heads", "nk * d", "dg"))
    rest = k_t[..., None, :][..., :0, :]
    return GateCache(rest, np.zeros_like(rest, shape=(*rest.shape[:-1], Wk.shape[-1])))


def compress_step(
    cache: GateCache,
    k_t: np.ndarray,
    Wk: np.ndarray,
    b: int,
    kinds: Sequence[str],
    base: float = 10000.0,
    norm: np.ndarray | None = None,
) -> GateCache:
    """S12: a new cache that includes the key k_t (..., kv_heads, d) before its rotation.

    Wk (kv_heads, len(kinds) d, dg); `norm` (dg,) is the weight of an RMS norm, None for none.

    >>> Wk, k_t = np.eye(2)[None], np.ones((1, 2))
    >>> cache = compress_step(init_cache(k_t, Wk), k_t, Wk, 2, ("avg",))
    >>> compress_step(cache, k_t, Wk, 2, ("avg",))
    GateCache(rest=array([], shape=(1, 0, 2), dtype=float64), gk=array([[[1., 1.]]]))
    """
    check_array("k_t", k_t, ("kv_heads", "d"))
    check_array("Wk", Wk, ("kv_heads", "nk * d", "dg"))
    check_kinds(kinds)
    check_integer("b", b, least=cache.rest.shape[-2] + 1)
    token = k_t[..., None, :]
    if token.shape != (*cache.rest.shape[:-2], 1, cache.rest.shape[-1]):
        expected = (*cache.rest.shape[:-2], cache.rest.shape[-1])
        raise ValueError(f"k_t: got shape {k_t.shape}, expected {expected}")
    projection = (k_t.shape[-2], len(kinds) * k_t.shape[-1], cache.gk.shape[-1])
    if Wk.shape != projection:
        raise ValueError(f"Wk: got shape {Wk.shape}, expected {projection}")
    rest = np.concatenate([cache.rest, token], axis=-2)
    if rest.shape[-2] < b:
        return GateCache(rest, cache.gk)
    block_start = np.array([cache.gk.shape[-2] * b])
    row = rope(_rms_norm(pool_blocks(rest, b, kinds) @ Wk, norm), block_start, base)
    return GateCache(rest[..., :0, :], np.concatenate([cache.gk, row], axis=-2))


def decode_gate(
    q_t: np.ndarray,
    cache: GateCache,
    pos: int,
    Wq: np.ndarray | None,
    mode: str,
    base: float = 10000.0,
    norm: np.ndarray | None = None,
) -> np.ndarray:
    """S11, S13: scores (..., kv_heads, nb) of the query q_t (..., heads, d), before its rotation,
    at position `pos`; the cache holds its own token already.

    Wq (kv_heads, group, d, dg) for "Qproj", (kv_heads, d, dg) for "Qavgproj", None for "Qavg" and
    "Qorig", which need dg = d; `norm` (dg,) as in `compress_step`.

    >>> cache = GateCache(np.ones((1, 1, 4)), np.ones((1, 1, 4)))
    >>> decode_gate(np.ones((2, 4)), cache, 0, None, "Qavg")
    array([[2., 0.]])
    """
    check_array("q_t", q_t, ("heads", "d"))
    check_integer("pos", pos, least=0)
    check_choice("mode", mode, MODES)
    rest, gk = cache
    if q_t.shape[:-2] != gk.shape[:-3]:
        raise ValueError(f"q_t: got leading axes {q_t.shape[:-2]}, expected {gk.shape[:-3]}")
    if rest.shape[-2]:
        gk = np.concatenate([gk, np.zeros_like(gk, shape=(*gk.shape[:-2], 1, gk.shape[-1]))], -2)
    kv_heads, dg, d = gk.shape[-3], gk.shape[-1], q_t.shape[-1]
    group = group_size(q_t.shape[-2], kv_heads)
    _check_projection(Wq, {"Qproj": (kv_heads, group, d, dg), "Qavgproj": (kv_heads, d, dg)}, mode)
    if Wq is None:
        check_size("q_t", d, dg, "dg, as there is no Wq")
    grouped = q_t.reshape(*q_t.shape[:-2], kv_heads, group, d)
    if mode == "Qorig":
        gq = grouped
    elif mode == "Qproj":
        gq = np.sum(grouped[..., None, :] @ Wq, axis=-3)
    else:
        gq = np.mean(grouped, axis=-2, keepdims=True)
        gq = gq if Wq is None else gq @ Wq
    gq = rope(_rms_norm(gq, norm), np.full(gq.shape[-2], pos), base)
    return np.mean(gq @ np.swapaxes(gk, -1, -2), axis=-2) / math.sqrt(dg)


def decode_select(
    scores: np.ndarray, b: int, *, tau: float | None = None, budget: int | None = None
) -> np.ndarray:
    """S14: M bool (..., kv_heads, nb); the last block is always in, on top of the budget.

    Either `tau`, a threshold on softmax(scores), or `budget`, a number of tokens that b divides;
    neither means a budget of 4096.

    >>> decode_select(np.array([[1.0, 3.0, 2.0, 0.0]]), 16, budget=32).astype(int)
    array([[0, 1, 1, 1]])
    """
    check_array("scores", scores, ("kv_heads", "nb"))
    check_integer("b", b, least=1)
    if tau is not None and budget is not None:
        raise ValueError(f"tau: got {tau} beside budget {budget}, expected one of the two")
    if tau is None:
        budget = 4096 if budget is None else budget
        check_integer("budget", budget, least=b)
        if budget % b:
            raise ValueError(f"budget: got {budget}, expected a multiple of {b} (b)")
        chosen = top_k_mask(scores, budget // b)
    else:
        check_number("tau", tau)
        chosen = softmax(scores) > tau
    return chosen | (np.arange(scores.shape[-1]) == scores.shape[-1] - 1)


def decode_attend(
    q_t: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    M: np.ndarray,
    b: int,
    *,
    scale: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """S14: out (..., heads, 1, dv) and lse (..., heads, 1) of one query over the selected blocks.

    q_t (..., heads, 1, d), k (..., kv_heads, n, d), both rotated, v (..., kv_heads, n, dv), M bool
    (..., kv_heads, ceil(n/b)).

    >>> k, v = np.zeros((1, 3, 2)), np.array([[[1.0], [2.0], [9.0]]])
    >>> decode_attend(np.zeros((1, 1, 2)), k, v, np.array([[False, True]]), 2)[0]
    array([[[9.]]])
    """
    check_array("q_t", q_t, ("heads", "1", "d"))
    check_attention_inputs(q_t, k, v)
    check_size("q_t", q_t.shape[-2], 1, "one token")
    check_array("M", M, ("kv_heads", "nb"), dtype="bool")
    check_integer("b", b, least=1)
    n, expected = k.shape[-2], (*k.shape[:-2], -(-k.shape[-2] // b))
    if M.shape != expected:
        raise ValueError(f"M: got shape {M.shape}, expected {expected}")
    keys = np.repeat(M, b, axis=-1)[..., None, :n]
    return attend(q_t, k, v, mask=repeat_heads(keys, q_t.shape[-3]), scale=scale)


class State(NamedTuple):
    """S15: the gate's cache, and the rotated keys and the values seen so far."""

    cache: GateCache
    k: np.ndarray
    v: np.ndarray


def init_state(k_t: np.ndarray, v_t: np.ndarray, Wk: np.ndarray) -> State:
    """S15: an empty state for tokens shaped as k_t (..., kv_heads, d) and v_t (..., kv_heads, dv).

    >>> init_state(np.ones((1, 4)), np.ones((1, 2)), np.ones((1, 4, 4))).v.shape
    (1, 0, 2)
    """
    cache = init_cache(k_t, Wk)
    check_array("v_t", v_t, ("kv_heads", "dv"))
    return State(cache, cache.rest, v_t[..., None, :][..., :0, :])


def step(
    state: State,
    q_t: np.ndarray,
    k_t: np.ndarray,
    v_t: np.ndarray,
    Wq: np.ndarray | None,
    Wk: np.ndarray,
    *,
    b: int = 64,
    kinds: Sequence[str] = ("max", "min", "avg"),
    mode: str = "Qproj",
    base: float = 10000.0,
    q_norm: np.ndarray | None = None,
    k_norm: np.ndarray | None = None,
    tau: float | None = None,
    budget: int | None = None,
    scale: float | None = None,
) -> tuple[np.ndarray, State]:
    """S15: out (..., heads, dv) of one new token, and the state with it.

    q_t (..., heads, d), k_t (..., kv_heads, d) before their rotation, v_t (..., kv_heads, dv).

    >>> x, eye = np.ones((1, 2)), np.eye(2)[None]
    >>> step(init_state(x, x, eye), x, x, x, None, eye, mode="Qavg", kinds=("avg",))[0]
    array([[1., 1.]])
    """
    check_array("q_t", q_t, ("heads", "d"))
    check_array("v_t", v_t, ("kv_heads", "dv"))
    pos, token = state.k.shape[-2], v_t[..., None, :]
    if token.shape != (*state.v.shape[:-2], 1, state.v.shape[-1]):
        expected = (*state.v.shape[:-2], state.v.shape[-1])
        raise ValueError(f"v_t: got shape {v_t.shape}, expected {expected}, as in the state")
    check_size("q_t", q_t.shape[-1], state.k.shape[-1], "d, as in the state")
    cache = compress_step(state.cache, k_t, Wk, b, kinds, base, k_norm)
    at = np.array([pos])
    k = np.concatenate([state.k, rope(k_t[..., None, :], at, base)], axis=-2)
    v = np.concatenate([state.v, token], axis=-2)
    scores = decode_gate(q_t, cache, pos, Wq, mode, base, q_norm)
    M = decode_select(scores, b, tau=tau, budget=budget)
    out, _ = decode_attend(rope(q_t[..., None, :], at, base), k, v, M, b, scale=scale)
    return out[..., 0, :], State(cache, k, v)


def _rms_norm(x: np.ndarray, weight: np.ndarray | None) -> np.ndarray:
    """S11, S12: x (..., dg) divided by its root mean square (eps 1e-6), times weight (dg,)."""
    if weight is None:
        return x
    check_array("norm", weight, ("dg",))
    check_size("norm", weight.shape[-1], x.shape[-1], "dg")
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6) * weight


def _check_projection(Wq: np.ndarray | None, shapes: dict[str, tuple[int, ...]], mode: str) -> None:
    if mode not in shapes:
        if Wq is not None:
            raise ValueError(f"Wq: got an array, expected None for mode {mode!r}")
        return
    check_array("Wq", Wq, ())
    if Wq is not None and Wq.shape != shapes[mode]:
        raise ValueError(f"Wq: got shape {Wq.shape}, expected {shapes[mode]} for mode {mode!r}")
