"""SinkLoRA at inference: H2O, the cache that keeps recent tokens and those attended to most.

The clauses are those of `sinklora`. What a prompt's masks would be is in `sinklora_prompt`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from attnspec.reference.cache.streaming_llm_rows import cache_positions, check_rotary, rope
from attnspec.reference.conventions import (
    causal_mask,
    check_array,
    check_attention_inputs,
    check_continues,
    check_integer,
    check_size,
)
from attnspec.reference.dense.attention import combine, score
from attnspec.reference.primitives.softmax import softmax_lse
from attnspec.reference.primitives.top_k import top_k, top_k_mask


class State(NamedTuple):
    """S10: the rows kept of one sequence, different ones in every kv head.

    k (..., kv_heads, rows, d), v (..., kv_heads, rows, dv), a (kv_heads, rows) what each row has
    received so far, pos int (kv_heads, rows) the number of its token in the text, ascending; seen
    the number of tokens so far. The leading axes of k and v hold one sequence.
    """

    k: np.ndarray
    v: np.ndarray
    a: np.ndarray
    pos: np.ndarray
    seen: int


def init_state(k: np.ndarray, v: np.ndarray) -> State:
    """S10: an empty state for tokens shaped as `k` and `v`.

    >>> init_state(np.ones((1, 2, 5, 4)), np.ones((1, 2, 5, 3))).v.shape
    (1, 2, 0, 3)
    """
    check_array("k", k, ("kv_heads", "tokens", "d"))
    check_array("v", v, ("kv_heads", "tokens", "dv"))
    a = np.zeros_like(k, shape=(k.shape[-3], 0))
    return State(k[..., :0, :], v[..., :0, :], a, np.zeros(a.shape, np.int64), 0)


def h2o_accumulate(
    a: np.ndarray | None, P: np.ndarray, w: int, kv_heads: int | None = None
) -> np.ndarray:
    """S8: scores (kv_heads, n) after a call of `w` queries with the weights P (1, H, w, n).

    `a` (kv_heads, n - w) holds the scores before the call, None if there are none; the first call
    may say how many `kv_heads` there are, which is H if it does not.

    >>> P = np.array([[[[0.5, 0.5]], [[0.25, 0.75]]]])
    >>> h2o_accumulate(np.array([[1.0], [2.0]]), P, 1)
    array([[1.5 , 0.5 ],
           [2.25, 0.75]])
    >>> h2o_accumulate(None, P, 1, kv_heads=1)
    array([[0.75, 1.25]])
    """
    check_array("P", P, ("H", "w", "n"))
    check_integer("w", w, least=1)
    _check_one_sequence("P", P)
    check_size("P", P.shape[-2], w, "queries of the call")
    n = P.shape[-1]
    if n < w:
        raise ValueError(f"P: got {n} keys for {w} queries, expected at least as many")
    if a is not None:
        check_array("a", a, ("kv_heads", "n - w"))
        check_size("a", a.ndim, 2, "axes")
        check_size("a", a.shape[1], n - w, "rows before the call")
        _check_divides("a", len(a), P.shape[-3])
        if kv_heads not in (None, len(a)):
            raise ValueError(f"kv_heads: got {kv_heads}, expected {len(a)}, as in a")
        kv_heads = len(a)
    elif kv_heads is None:
        kv_heads = P.shape[-3]
    else:
        check_integer("kv_heads", kv_heads, least=1)
        _check_divides("kv_heads", kv_heads, P.shape[-3])
    columns = np.sum(P.reshape(kv_heads, -1, n), axis=1)
    if a is None:
        return columns
    return columns + np.concatenate([a, np.zeros_like(a, shape=(kv_heads, w))], axis=1)


def h2o_keep(a: np.ndarray, n: int, hh: int = 4, rec: int = 512) -> np.ndarray:
    """S9: int64 (..., kv_heads, min(n, hh + rec)), the rows that stay of n, ascending.

    `a` (..., kv_heads, n) are their scores; those of the last `rec` rows are not read.

    >>> h2o_keep(np.array([[3.0, 1.0, 2.0, 0.0, 0.0]]), 5, hh=2, rec=1)
    array([[0, 2, 4]])
    """
    check_array("a", a, ("kv_heads", "n"))
    check_integer("n", n, least=0)
    check_size("a", a.shape[-1], n, "rows")
    check_budgets(hh, rec)
    if n <= hh + rec:
        return np.broadcast_to(np.arange(n), a.shape).copy()
    recent = np.broadcast_to(np.arange(n - rec, n), (*a.shape[:-1], rec))
    return np.concatenate([top_k(a[..., : n - rec], hh), recent], axis=-1)


def h2o_step(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    state: State,
    hh: int = 4,
    rec: int = 512,
    scale: float | None = None,
    *,
    rope_base: float | None = None,
) -> tuple[np.ndarray, State]:
    """S10, S11: one call with w new tokens: output (..., H, w, dv) and the next state.

    q (..., H, w, d), k (..., kv_heads, w, d), v (..., kv_heads, w, dv) of one sequence, rotated to
    their places in the text, or not rotated if a `rope_base` asks for places in the cache.

    >>> x = np.ones((1, 1, 3, 2))
    >>> out, state = h2o_step(x, x, x, init_state(x, x), hh=1, rec=1)
    >>> state.pos, state.a.round(4), state.seen
    (array([[0, 2]]), array([[1.8333, 0.3333]]), 3)
    """
    _check_call(q, k, v, state, hh, rec, rope_base)
    w, kv_heads = q.shape[-2], k.shape[-3]
    keys = np.concatenate([state.k, k], axis=-2)
    values = np.concatenate([state.v, v], axis=-2)
    here = np.broadcast_to(np.arange(state.seen, state.seen + w), (kv_heads, w))
    pos = np.concatenate([state.pos, here], axis=-1)
    n = pos.shape[-1]
    queries, rows = q, keys
    if rope_base is not None:
        p_q, p_k = cache_positions(n - w, w)
        queries, rows = rope(q, p_q, rope_base), rope(keys, p_k, rope_base)
    P, _ = softmax_lse(score(queries, rows, scale=scale), causal_mask(w, n))
    a = h2o_accumulate(state.a, P, w)
    idx = h2o_keep(a, n, hh, rec)
    kept = State(
        _rows(keys, idx),
        _rows(values, idx),
        np.take_along_axis(a, idx, axis=-1),
        np.take_along_axis(pos, idx, axis=-1),
        state.seen + w,
    )
    return combine(P, values), kept


def h2o_mask_step(
    a: np.ndarray | None, P: np.ndarray, kept: np.ndarray | None, hh: int = 4, rec: int = 512
) -> tuple[np.ndarray, np.ndarray]:
    """S12: scores and bool `kept`, both (kv_heads, n), after a call whose weights P (1, H, w, n)
    are 0 where a token was dropped. `a` and `kept` (kv_heads, n - w) are those before, or None.

    >>> P = np.array([[[[0.2, 0.5, 0.3]]]])
    >>> a, kept = h2o_mask_step(np.array([[1.0, 0.5]]), P, np.ones((1, 2), bool), hh=1, rec=1)
    >>> a, kept
    (array([[1.2, 0. , 0.3]]), array([[ True, False,  True]]))
    """
    check_array("P", P, ("H", "w", "n"))
    check_budgets(hh, rec)
    if (a is None) != (kept is None):
        name, got = ("a", a) if a is None else ("kept", kept)
        raise ValueError(f"{name}: got {got}, expected both a and kept or neither")
    w, n = P.shape[-2:]
    total = h2o_accumulate(a, P, w)
    alive = np.ones(total.shape, bool)
    if kept is not None:
        check_array("kept", kept, ("kv_heads", "n - w"), dtype="bool")
        if kept.shape != (len(total), n - w):
            raise ValueError(f"kept: got shape {kept.shape}, expected {(len(total), n - w)}, as a")
        alive[:, : n - w] = kept
    recent = np.arange(n) >= n - rec
    heavy = alive & ~recent
    heavy = heavy & top_k_mask(np.where(heavy, total, -np.inf), hh)
    staying = heavy | (alive & recent)
    return np.where(staying, total, np.zeros_like(total)), staying


def h2o_budgets(T: int, heavy_ratio: float = 0.1, recent_ratio: float = 0.1) -> tuple[int, int]:
    """S15: hh and rec for a prompt of T tokens, each rounded down.

    >>> h2o_budgets(24, 0.2, 0.3)
    (4, 7)
    """
    check_integer("T", T, least=0)
    for name, ratio in (("heavy_ratio", heavy_ratio), ("recent_ratio", recent_ratio)):
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)):
            raise TypeError(f"{name}: got {ratio!r}, expected a number of at least 0")
        if not 0 <= ratio < math.inf:
            raise ValueError(f"{name}: got {ratio}, expected a number of at least 0")
    return int(heavy_ratio * T), int(recent_ratio * T)


def check_budgets(hh: Any, rec: Any) -> None:
    """K14: both budgets are numbers of rows.

    >>> check_budgets(4, -1)
    Traceback (most recent call last):
    ValueError: rec: got -1, expected an integer >= 0
    """
    check_integer("hh", hh, least=0)
    check_integer("rec", rec, least=0)


def _rows(x: np.ndarray, idx: np.ndarray) -> np.ndarray:
    """The rows `idx` (kv_heads, kept) of x (..., kv_heads, n, d)."""
    idx = idx.reshape((1,) * (x.ndim - 3) + (*idx.shape, 1))
    return np.take_along_axis(x, idx, axis=-2)


def _check_divides(name: str, kv_heads: int, H: int) -> None:
    if kv_heads < 1 or H % kv_heads:
        raise ValueError(f"{name}: got {kv_heads} kv heads, expected a divisor of {H}")


def _check_one_sequence(name: str, x: np.ndarray) -> None:
    sequences = math.prod(x.shape[:-3])
    if sequences != 1:
        raise ValueError(f"{name}: got {sequences} sequences, expected 1: scores are its own")


def _check_call(q: Any, k: Any, v: Any, state: Any, hh: Any, rec: Any, rope_base: Any) -> None:
    check_attention_inputs(q, k, v)
    _check_one_sequence("q", q)
    check_size("k", k.shape[-2], q.shape[-2], "tokens, as in q")
    check_integer("q", q.shape[-2], least=1)
    check_budgets(hh, rec)
    if rope_base is not None:
        check_rotary("q", q, "rope_base", rope_base)
    if not isinstance(state, State):
        raise TypeError(f"state: got {type(state).__name__}, expected a State")
    check_continues(state, k, v)
    rows = state.k.shape[-3:-1]
    for name, got in (("v", state.v.shape[-3:-1]), ("a", state.a.shape), ("pos", state.pos.shape)):
        if got != rows:
            raise ValueError(f"state.{name}: got {got}, expected {rows} (kv_heads, rows), as k")
