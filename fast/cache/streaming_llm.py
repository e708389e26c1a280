"""StreamingLLM on Numba and Triton: a stream without end from a cache of constant size.

Positions in the cache need no second rotation of the keys. Inside the window the cache's distances
are the text's, so window keys keep their absolute rotation; only the sinks are seen from a position
of their own. A whole stream is therefore two attentions, merged by their lse, whatever the calls it
comes in; without positions it is one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnspec.fast.backend import check_attention_inputs, check_integer, check_same, check_size
from attnspec.fast.cache.streaming_llm_rows import (
    alibi_bias,
    cache_positions,
    call_sizes,
    check_rotary,
    check_slopes,
    evict_rows,
    evict_rows_for_space,
    evict_rows_range,
    rope,
    sink_window_distances,
    sink_window_mask,
)
from attnspec.fast.cache.streaming_llm_sinks import (
    attend_with_sink_logit,
    attend_with_sink_logit_backward,
    softmax1,
    softmax1_backward,
)
from attnspec.fast.dense.attention import MOST_DECODED
from attnspec.fast.engines.decode import decode
from attnspec.fast.engines.flash import flash
from attnspec.fast.engines.flash.checks import FLOATS
from attnspec.fast.engines.merge import merge

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


class State(NamedTuple):
    """The rows kept, and how many tokens have come.

    k (batch, kv_heads, rows, d) before rotation, v (batch, kv_heads, rows, dv), pos int64 (rows)
    the number of each row's token in the stream, seen the number of tokens so far.
    """

    k: Tensor
    v: Tensor
    pos: Tensor
    seen: int


class Trace(list[Tensor]):
    """For each call the numbers of the tokens kept after it, int64 (kept), made when asked for."""

    def __init__(self, sizes: Sequence[int], S: int, R: int) -> None:
        super().__init__()
        self.ends, self.S, self.R = list(accumulate(sizes)), S, R

    def __len__(self) -> int:
        return len(self.ends)

    def __iter__(self) -> Iterator[Tensor]:
        return (evict_rows(end, self.S, self.R) for end in self.ends)

    def __getitem__(self, call: Any) -> Any:
        if isinstance(call, slice):
            return [evict_rows(end, self.S, self.R) for end in self.ends[call]]
        return evict_rows(self.ends[call], self.S, self.R)


def init_state(k: Tensor, v: Tensor, *, backend: str | None = None) -> State:
    """An empty state for tokens shaped as `k` and `v`."""
    check_attention_inputs(k, k, v, FLOATS)
    pos = torch.empty(0, dtype=torch.int64, device=k.device)
    return State(k[:, :, :0], v[:, :, :0], pos, 0)


def keep_rows(state: State, rows: Tensor, *, backend: str | None = None) -> State:
    """The state with only `rows`, as `evict_rows` and its siblings return them."""
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
    backend: str | None = None,
) -> tuple[Tensor, State]:
    """One call with w new tokens: output (batch, heads, w, dv) and the next state, a new value.

    q (batch, heads, w, d), k (batch, kv_heads, w, d), v (batch, kv_heads, w, dv), none of them
    rotated; `rope_base` for a model with rotary positions, `alibi_slopes` (heads) for one with
    ALiBi, neither for no positions at all. For inference: there is no gradient.
    """
    _check_call(q, k, v, S, R, rope_base, alibi_slopes)
    for name, cached, new in (("k", state.k, k), ("v", state.v, v)):
        check_same(name, new, f"state.{name}", cached)
        if cached.shape[:2] != new.shape[:2] or cached.shape[3] != new.shape[3]:
            raise ValueError(
                f"{name}: got shape {tuple(new.shape)}, "
                f"expected the state's {tuple(cached.shape)} but for tokens"
            )
    n, w = state.k.shape[2], q.shape[2]
    new_pos = torch.arange(state.seen, state.seen + w, device=q.device)
    keys = torch.cat([state.k, k.detach()], dim=2)
    values = torch.cat([state.v, v.detach()], dim=2)
    pos = torch.cat([state.pos, new_pos])
    queries, rotated = q.detach(), keys
    if rope_base is not None:
        p_k = torch.arange(n + w, device=q.device)
        queries, rotated = rope(queries, p_k[n:], rope_base), rope(keys, p_k, rope_base)
    if alibi_slopes is not None:
        slopes = alibi_slopes.detach()
        out, _ = flash(queries, rotated, values, causal=True, slopes=slopes, backend=backend)
    else:
        attention = decode if w <= MOST_DECODED else flash
        out, _ = attention(queries, rotated, values, causal=True, backend=backend)
    if n + w > S + R:
        recent = n + w - R
        keys = torch.cat([keys[:, :, :S], keys[:, :, recent:]], dim=2)
        values = torch.cat([values[:, :, :S], values[:, :, recent:]], dim=2)
        pos = torch.cat([pos[:S], pos[recent:]])
    return out, State(keys, values, pos, state.seen + w)


def streaming_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    S: int = 4,
    R: int = 512,
    chunk: int | Sequence[int] = 1,
    rope_base: float | None = None,
    alibi_slopes: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Trace]:
    """A stream of T tokens in calls of `chunk`: output and what each call left behind.

    q (batch, heads, T, d), k (batch, kv_heads, T, d), v (batch, kv_heads, T, dv), none of them
    rotated; `chunk` tokens a call, or the list of call sizes: ``[w, 1, 1, ...]`` is a dense prompt
    of w tokens, then decoding. Returns out (batch, heads, T, dv), differentiable, and the trace.
    """
    _check_call(q, k, v, S, R, rope_base, alibi_slopes)
    sizes = call_sizes(q.shape[2], chunk)
    trace = Trace(sizes, S, R)
    starts = [end - size for end, size in zip(trace.ends, sizes, strict=True)]
    T = q.shape[2]
    # Up to the first call that comes after an eviction, every token sees all before it.
    dense_calls = sum(start <= S + R for start in starts)
    dense = T if dense_calls == len(starts) else starts[dense_calls]
    positions = torch.arange(T, device=q.device)
    queries, keys = q, k
    if rope_base is not None:
        queries, keys = rope(q, positions, rope_base), rope(k, positions, rope_base)
    slopes = alibi_slopes

    def window(first: int, low: int, sinks: int) -> tuple[Tensor, Tensor]:
        """Tokens from `first` on against those from `low` on, within their calls' windows."""
        ranges = _ranges(starts, sizes, first, low, S, R, q.device)
        return flash(
            queries[:, :, first:], keys[:, :, low:], v[:, :, low:], causal=True, sinks=sinks,
            slopes=slopes, backend=backend, **ranges,
        )  # fmt: skip

    positioned = rope_base is not None or slopes is not None
    if dense == T or S == 0 or not positioned:
        return window(0, 0, S)[0], trace
    early, _ = flash(
        queries[:, :, :dense], keys[:, :, :dense], v[:, :, :dense], causal=True, slopes=slopes,
        backend=backend,
    )  # fmt: skip
    recent = window(dense, dense - R, 0)
    seen_from = S + R + positions[dense:] - _call_starts(starts, sizes, dense, q.device)
    sink_queries = q[:, :, dense:]
    if rope_base is not None:
        sink_queries = rope(sink_queries, seen_from, rope_base)
    sinks = flash(
        sink_queries, keys[:, :, :S], v[:, :, :S], slopes=slopes,
        slope_positions=None if slopes is None else seen_from, backend=backend,
    )  # fmt: skip
    late, _ = merge(*recent, *sinks)
    return torch.cat([early, late], dim=2), trace


def _call_starts(
    starts: Sequence[int], sizes: Sequence[int], first: int, device: torch.device
) -> Tensor:
    """int64: the first token of the call of each token from `first`, itself the start of one."""
    begin = starts.index(first)
    repeats = torch.tensor(sizes[begin:])
    return torch.tensor(starts[begin:]).repeat_interleave(repeats).to(device)


def _ranges(
    starts: Sequence[int],
    sizes: Sequence[int],
    first: int,
    low: int,
    S: int,
    R: int,
    device: torch.device,
) -> dict[str, Any]:
    """The flash engine's ranges of the tokens from `first` on over those from `low` on."""
    if all(size == 1 for size in sizes):
        return {"window": R + 1}
    begin = _call_starts(starts, sizes, first, device) if starts else torch.zeros(0).long()
    return {"row_start": torch.where(begin > S + R, begin - (R + low), 0)}


def _check_call(q: Any, k: Any, v: Any, S: Any, R: Any, rope_base: Any, alibi_slopes: Any) -> None:
    check_attention_inputs(q, k, v, FLOATS)
    check_size("k", k.shape[2], q.shape[2], "tokens, as in q")
    check_integer("S", S, least=0)
    check_integer("R", R, least=0)
    if rope_base is not None:
        check_rotary("q", q, "rope_base", rope_base)
    if alibi_slopes is not None:
        check_slopes(alibi_slopes)
        check_size("alibi_slopes", alibi_slopes.shape[0], q.shape[1], "heads, as in q")
        if rope_base is not None:
            raise ValueError("alibi_slopes: got slopes and a rope_base, expected one of the two")
