"""Decoding with sparsely-sharded attention, and the merge of attentions over parts of the keys.

The clauses are those of `s2_attention`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from attnspec.reference.conventions import (
    check_array,
    check_attention_inputs,
    check_integer,
    check_size,
)
from attnspec.reference.dense.attention import attend
from attnspec.reference.patterns.s2_attention_patterns import check_stride, live_blocks


class State(NamedTuple):
    """S9: the rows that are kept, and how many tokens have come.

    k (..., kv_heads, rows, d), v (..., kv_heads, rows, dv); pos int64 (kv_heads, rows) are the
    positions of a head's rows, ascending, and -1 behind them where another head keeps more. seen
    is the number of tokens so far.
    """

    k: np.ndarray
    v: np.ndarray
    pos: np.ndarray
    seen: int


def init_state(k: np.ndarray, v: np.ndarray) -> State:
    """S9: an empty state for tokens shaped as `k` and `v`.

    >>> init_state(np.ones((2, 5, 4)), np.ones((2, 5, 3))).pos.shape
    (2, 0)
    """
    check_array("k", k, ("kv_heads", "tokens", "d"))
    check_array("v", v, ("kv_heads", "tokens", "dv"))
    return State(k[..., :0, :], v[..., :0, :], np.zeros((k.shape[-3], 0), np.int64), 0)


def decode_step(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    state: State,
    b: int,
    local: int,
    v_stride: int,
    step: int | None = None,
    offset: int = 0,
    num_dense_heads: int = 0,
    *,
    scale: float | None = None,
) -> tuple[np.ndarray, np.ndarray, State]:
    """S9: output (..., heads, tokens, dv) and lse (..., heads, tokens) of new tokens, and the
    state.

    q (..., heads, tokens, d), k (..., kv_heads, tokens, d), v (..., kv_heads, tokens, dv). The
    state that comes back holds what the next token can read, and no more.

    >>> x = np.ones((1, 5, 2))
    >>> _, _, state = decode_step(x, x, x, init_state(x, x), b=1, local=2, v_stride=3)
    >>> state.pos, state.seen
    (array([[0, 3, 4]]), 5)
    """
    check_attention_inputs(q, k, v)
    check_integer("b", b, least=1)
    check_integer("v_stride", v_stride, least=1)
    heads, kv_heads = q.shape[-3], k.shape[-3]
    _, _, step = check_stride(
        heads, kv_heads, local, v_stride, num_dense_heads, step, offset, False
    )
    check_size("k", k.shape[-2], q.shape[-2], "tokens, as in q")
    for name, old, new in (("state.k", state.k, k), ("state.v", state.v, v)):
        if (*old.shape[:-2], old.shape[-1]) != (*new.shape[:-2], new.shape[-1]):
            raise ValueError(f"{name}: got shape {old.shape}, expected that of {new.shape}")
    if state.pos.shape != (kv_heads, state.k.shape[-2]):
        raise ValueError(
            f"state.pos: got shape {state.pos.shape}, expected {(kv_heads, state.k.shape[-2])}"
        )
    outs = np.zeros_like(q, shape=(*q.shape[:-1], v.shape[-1]))
    lses = np.zeros_like(q, shape=q.shape[:-1])
    for i in range(q.shape[-2]):
        token = slice(i, i + 1)
        rows = State(
            np.concatenate([state.k, k[..., token, :]], axis=-2),
            np.concatenate([state.v, v[..., token, :]], axis=-2),
            np.pad(state.pos, ((0, 0), (0, 1)), constant_values=state.seen),
            state.seen + 1,
        )
        live, kept = (
            [
                live_blocks(t, c, b, local, v_stride, step, offset, c >= kv_heads - num_dense_heads)
                for c in range(kv_heads)
            ]
            for t in (state.seen, state.seen + 1)
        )
        visible = np.repeat(_rows_of_blocks(rows.pos, live, b), heads // kv_heads, axis=0)
        outs[..., token, :], lses[..., token] = attend(
            q[..., token, :], rows.k, rows.v, mask=visible[:, None], scale=scale
        )
        state = _keep(rows, _rows_of_blocks(rows.pos, kept, b))
    return outs, lses, state


def merge_partitions(outs: np.ndarray, lses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """S13: out (..., dv) and lse (...) over all keys, from those over each part of them.

    `outs` (parts, ..., dv) and `lses` (parts, ...). A part with lse -inf is skipped, whatever its
    output holds; if all are, the output is 0.

    >>> merge_partitions(np.array([[2.0], [4.0], [np.nan]]), np.array([0.0, 0.0, -np.inf]))[0]
    array([3.])
    """
    check_array("outs", outs, ("parts", "dv"))
    check_array("lses", lses, ("parts",))
    if lses.shape != outs.shape[:-1]:
        raise ValueError(f"lses: got shape {lses.shape}, expected {outs.shape[:-1]}, as outs")
    if not len(outs):
        raise ValueError("outs: got 0 parts, expected at least 1")
    top = np.max(lses, axis=0)
    mass = np.exp(lses - np.where(np.isneginf(top), np.zeros_like(top), top))
    total = np.sum(mass, axis=0)
    empty = total == 0
    filled = np.where(empty, np.ones_like(total), total)
    weights = (mass / filled)[..., None]
    read = np.where(weights == 0, np.zeros_like(outs), outs)
    out = np.sum(weights * read, axis=0).astype(outs.dtype)
    return out, np.where(empty, np.full_like(top, -np.inf), top + np.log(filled))


def _rows_of_blocks(pos: np.ndarray, blocks: list[np.ndarray], b: int) -> np.ndarray:
    """bool (kv_heads, rows): the rows that lie in the `blocks` of their head."""
    return np.stack([(p >= 0) & np.isin(p // b, live) for p, live in zip(pos, blocks, strict=True)])


def _keep(state: State, kept: np.ndarray) -> State:
    """The state with only the rows that are `kept` (kv_heads, rows), moved up in each head."""
    most = int(kept.sum(axis=1).max(initial=0))
    order = np.argsort(~kept, axis=1, kind="stable")[:, :most]
    real = np.take_along_axis(kept, order, axis=1)
    k, v = (
        np.where(real[..., None], np.take_along_axis(x, _fitted(order, x), axis=-2), 0).astype(
            x.dtype
        )
        for x in (state.k, state.v)
    )
    return State(k, v, np.where(real, np.take_along_axis(state.pos, order, axis=1), -1), state.seen)


def _fitted(order: np.ndarray, x: np.ndarray) -> np.ndarray:
    """`order` (kv_heads, rows) with the axes of x (..., kv_heads, rows, d)."""
    return order.reshape((1,) * (x.ndim - 3) + (*order.shape, 1))
