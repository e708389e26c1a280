"""StreamingLLM on Numba and Triton: a stream without end from a cache of constant size.

Positions in the cache need no second rotation of the keys. Inside the window the cache's distances
are the text's, so window keys keep their absolute rotation; only the sinks are seen from a position
of their own. A whole stream is therefore two attentions, merged by their lse, whatever the calls it
comes in; without positions it is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnspec.fast.backend import (
    FLOATS,
    INTEGERS,
    check_attention_inputs,
    check_integer,
    check_size,
    check_tensor,
)
from attnspec.fast.cache.streaming_llm_rows import (
    Trace,
    alibi_bias,
    cache_positions,
    calls_of,
    check_rotary,
    check_slopes,
    evict_rows,
    evict_rows_for_space,
    evict_rows_range,
    rope,
    sink_window_distances,
    sink_window_mask,
    unrounded,
)
from attnspec.fast.cache.streaming_llm_sinks import (
    attend_with_sink_logit,
    attend_with_sink_logit_backward,
    softmax1,
    softmax1_backward,
)
from attnspec.fast.dense.attention import MOST_DECODED
from attnspec.fast.engines.decode import decode
from attnspec.fast.engines.flash import SPECIALISED_CONFIGS, flash
from attnspec.fast.engines.merge import merge
from attnspec.fast.engines.rows import turn
from attnspec.fast.growing import check_continues, checkable

__all__ = [
    "State",
    "Trace",
    "alibi_bias",
    "attend_with_sink_logit",
    "attend_with_sink_logit_backward",
    "cache_positions",
    "evict_rows",
    "evict_rows_for_space",
    "evict_rows_range",
    "init_state",
    "keep_rows",
    "rope",
    "sink_window_distances",
    "sink_window_mask",
    "softmax1",
    "softmax1_backward",
    "step",
    "streaming_attend",
]

CLAIMS = {
    **{
        name: {
            "gradient": True,
            "blocks": (16, 64),
            "compiled": True,
            "triton": {"configs": SPECIALISED_CONFIGS},
        }
        for name in ("streaming_attend", "attend_with_sink_logit")
    },
    "softmax1": {"gradient": True, "launches": None, "compiled": True},
    **{
        name: {"launches": None}
        for name in (
            "alibi_bias",
            "cache_positions",
            "evict_rows",
            "evict_rows_for_space",
            "evict_rows_range",
            "sink_window_distances",
            "sink_window_mask",
        )
    },
}
"""Rows, positions and softmax1 are a few torch operations and launch no kernel of ours."""


class State(NamedTuple):
    """The rows kept, and how many tokens have come.

    k (batch, kv_heads, rows, d) before rotation, v (batch, kv_heads, rows, dv), pos int64 (rows)
    the number of each row's token in the stream, seen the number of tokens so far.
    """

    k: Tensor
    v: Tensor
    pos: Tensor
    seen: int


def init_state(k: Tensor, v: Tensor, *, backend: str | None = None) -> State:
    """An empty state for tokens shaped as `k` and `v`."""
    check_attention_inputs(k, k, v, FLOATS)
    pos = torch.empty(0, dtype=torch.int64, device=k.device)
    return State(k[:, :, :0], v[:, :, :0], pos, 0)


def keep_rows(state: State, rows: Tensor, *, backend: str | None = None) -> State:
    """The state with only `rows`, as `evict_rows` and its siblings return them."""
    check_tensor("rows", rows, ("kept",), INTEGERS)
    last = state.k.shape[2] - 1
    if checkable(rows) and rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) <= last:
        raise ValueError(f"rows: got {rows.tolist()}, expected rows in 0..{last}")
    rows = rows.to(state.k.device)
    return State(state.k[:, :, rows], state.v[:, :, rows], state.pos[rows], state.seen)


def step(
    state: State,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    S: int = 4,
    R: int = 512,
    *,
    rope_base: float | None = None,
    alibi_slopes: Tensor | None = None,
    rotary_dims: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, State]:
    """One call with w new tokens: output (batch, heads, w, dv) and the next state, a new value.

    q (batch, heads, w, d), k (batch, kv_heads, w, d), v (batch, kv_heads, w, dv), none of them
    rotated; `rope_base` for a model with rotary positions, of which `rotary_dims` channels turn
    (all d if None), `alibi_slopes` (heads) for one with ALiBi, neither for no positions at all. For
    inference: there is no gradient.
    """
    _check_call(q, k, v, S, R, rope_base, alibi_slopes, rotary_dims)
    check_continues(state, k, v)
    n, w = state.k.shape[2], q.shape[2]
    new_pos = torch.arange(state.seen, state.seen + w, device=q.device)
    keys = torch.cat([state.k, k.detach()], dim=2)
    values = torch.cat([state.v, v.detach()], dim=2)
    pos = torch.cat([state.pos, new_pos])
    queries, rotated, mixed = q.detach(), keys, values
    if rope_base is not None:
        queries, rotated, mixed = unrounded(queries, keys, values)
        queries, rotated = turn(
            queries, rotated, base=rope_base, rotary_dims=rotary_dims, backend=backend
        )
    if alibi_slopes is not None:
        slopes = alibi_slopes.detach()
        out, _ = flash(queries, rotated, mixed, causal=True, slopes=slopes, backend=backend)
    else:
        attention = decode if w <= MOST_DECODED else flash
        out, _ = attention(queries, rotated, mixed, causal=True, backend=backend)
    if n + w > S + R:
        recent = n + w - R
        keys = torch.cat([keys[:, :, :S], keys[:, :, recent:]], dim=2)
        values = torch.cat([values[:, :, :S], values[:, :, recent:]], dim=2)
        pos = torch.cat([pos[:S], pos[recent:]])
    return out.to(q.dtype), State(keys, values, pos, state.seen + w)


def streaming_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    S: int = 4,
    R: int = 512,
    chunk: int | Sequence[int] = 1,
    rope_base: float | None = None,
    alibi_slopes: Tensor | None = None,
    rotary_dims: int | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Trace]:
    """A stream of T tokens in calls of `chunk`: output and what each call left behind.

    q (batch, heads, T, d), k (batch, kv_heads, T, d), v (batch, kv_heads, T, dv), none of them
    rotated; `chunk` tokens a call, or the list of call sizes: ``[w, 1, 1, ...]`` is a dense prompt
    of w tokens, then decoding. Positions as in `step`. Returns out (batch, heads, T, dv),
    differentiable in q, k and v, and the trace.
    """
    _check_call(q, k, v, S, R, rope_base, alibi_slopes, rotary_dims)
    calls, T = calls_of(q.shape[2], chunk), q.shape[2]
    trace = Trace(calls, S, R)
    # Up to the first call that comes after an eviction, every token sees all before it.
    dense_calls = calls.until(S + R)
    dense = T if dense_calls == len(calls.starts) else calls.starts[dense_calls]
    positions = torch.arange(T, device=q.device)
    dtype, slopes = q.dtype, alibi_slopes
    if rope_base is not None:
        q, k, v = unrounded(q, k, v)
        queries, keys = turn(q, k, base=rope_base, rotary_dims=rotary_dims, backend=backend)
    else:
        queries, keys = q, k

    def window(first: int, low: int, sinks: int) -> tuple[Tensor, Tensor]:
        """Tokens from `first` on against those from `low` on, within their calls' windows."""
        ranges = calls.ranges(first, low, S, R, q.device)
        return flash(
            queries[:, :, first:], keys[:, :, low:], v[:, :, low:], causal=True, sinks=sinks,
            slopes=slopes, backend=backend, **ranges,
        )  # fmt: skip

    positioned = rope_base is not None or slopes is not None
    if dense == T or S == 0 or not positioned:
        return window(0, 0, S)[0].to(dtype), trace
    early, _ = flash(
        queries[:, :, :dense], keys[:, :, :dense], v[:, :, :dense], causal=True, slopes=slopes,
        backend=backend,
    )  # fmt: skip
    recent = window(dense, dense - R, 0)
    seen_from = S + R + positions[dense:] - calls.begins(dense, q.device)
    sink_queries = q[:, :, dense:]
    if rope_base is not None:
        sink_queries = rope(sink_queries, seen_from, rope_base, rotary_dims, backend=backend)
    sinks = flash(
        sink_queries, keys[:, :, :S], v[:, :, :S], slopes=slopes,
        slope_positions=None if slopes is None else seen_from, backend=backend,
    )  # fmt: skip
    late, _ = merge(*recent, *sinks)
    return torch.cat([early, late], dim=2).to(dtype), trace


def _check_call(
    q: Any, k: Any, v: Any, S: Any, R: Any, rope_base: Any, alibi_slopes: Any, rotary_dims: Any
) -> None:
    check_attention_inputs(q, k, v, FLOATS)
    check_size("k", k.shape[2], q.shape[2], "tokens, as in q")
    check_integer("S", S, least=0)
    check_integer("R", R, least=0)
    if rope_base is not None:
        check_rotary("q", q, "rope_base", rope_base, rotary_dims)
    elif rotary_dims is not None:
        raise ValueError(f"rotary_dims: got {rotary_dims!r} without a rope_base, expected both")
    if alibi_slopes is not None:
        check_slopes(alibi_slopes)
        check_size("alibi_slopes", alibi_slopes.shape[0], q.shape[1], "heads, as in q")
        if rope_base is not None:
            raise ValueError("alibi_slopes: got slopes and a rope_base, expected one of the two")
