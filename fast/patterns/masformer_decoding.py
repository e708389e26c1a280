"""MASFormer's decoding on the decode engine, from a cache of what the layer's span still holds."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnspec.fast.backend import (
    FLOATS,
    check_attention_inputs,
    check_positive,
    check_same,
    check_size,
    check_tensor,
)
from attnspec.fast.dense.attention import MOST_DECODED
from attnspec.fast.engines.decode import decode
from attnspec.fast.engines.flash import flash
from attnspec.fast.growing import Room, append
from attnspec.fast.patterns.masformer_spans import (
    Span,
    block_starts,
    cache_rows_needed,
    check_span,
    rows_read,
)


class Cache(NamedTuple):
    """The rows that the next token of a layer may read, and how many tokens have come.

    k (batch, Hk, rows, d), v (batch, Hk, rows, dv), those of the last tokens seen, in their order.
    A step writes its tokens **in place** into the spare `room` behind them, of which they begin at
    place `first`, and returns a new cache; the old one still sees its own tokens.
    """

    k: Tensor
    v: Tensor
    seen: int
    room: Room | None = None
    first: int = 0


def cache_after(k: Tensor, v: Tensor, span: Span, *, backend: str | None = None) -> Cache:
    """What the tokens k (batch, Hk, T, d) and v (batch, Hk, T, dv), none or more, leave behind."""
    check_tensor("k", k, ("batch", "Hk", "T", "d"), FLOATS)
    check_tensor("v", v, ("batch", "Hk", "T", "dv"), FLOATS)
    check_size("v", v.shape[2], k.shape[2], "tokens, as in k")
    check_span(span)
    T = k.shape[2]
    first = T - (cache_rows_needed(T - 1, span) if T else 0)
    return Cache(k.detach()[:, :, first:], v.detach()[:, :, first:], T)


def decode_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: Cache,
    span: Span,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Cache]:
    """Output (batch, H, tokens, dv) of one or more new tokens, and the cache behind them.

    q (batch, H, tokens, d), k (batch, Hk, tokens, d), v (batch, Hk, tokens, dv). One launch, and
    rows are moved only when the room is used up, once in 64 steps or less often. For inference:
    there is no gradient.
    """
    check_attention_inputs(q, k, v, FLOATS)
    check_span(span)
    if scale is not None:
        check_positive("scale", scale)
    tokens = q.shape[2]
    check_size("k", k.shape[2], tokens, "tokens, as in q")
    if not {"k", "v", "seen"} <= set(getattr(cache, "_fields", ())):
        raise TypeError(f"cache: got {type(cache).__name__}, expected a Cache")
    seen = cache.seen
    rows = cache_rows_needed(seen - 1, span) if seen else 0
    for name, old, new in (("cache.k", cache.k, k), ("cache.v", cache.v, v)):
        check_tensor(name, old, ("batch", "Hk", "rows", "d"), FLOATS)
        check_same(name, old, "q", q)
        expected = (*new.shape[:2], rows, new.shape[3])
        if tuple(old.shape) != expected:
            raise ValueError(
                f"{name}: got shape {tuple(old.shape)}, expected {expected} after {seen} tokens"
            )
    if not tokens:
        return q.new_zeros(*q.shape[:3], v.shape[3]), cache
    # A cache of another making has no room yet.
    room, first = getattr(cache, "room", None), getattr(cache, "first", 0)
    added = k.detach(), v.detach()
    (keys, values), room = append(room, (cache.k, cache.v), added, first)
    reads = rows_read(seen, span) - 1
    unread = rows - reads
    out = _attend(q.detach(), keys[:, :, unread:], values[:, :, unread:], seen, span,
                  {"scale": scale, "backend": backend})  # fmt: skip
    kept = rows_read(seen + tokens - 1, span)
    gone = rows + tokens - kept
    first = room.used - kept
    return out, Cache(keys[:, :, gone:], values[:, :, gone:], seen + tokens, room, first)


def _attend(
    q: Tensor, keys: Tensor, values: Tensor, seen: int, span: Span, options: dict[str, Any]
) -> Tensor:
    """Tokens from position `seen` on against the rows that the first of them reads, and their own.

    Where all of them begin at the same row, as in a block or a full layer, this is dense attention.
    """
    tokens = q.shape[2]
    last = seen + tokens - 1
    begin, last_begin = (t + 1 - rows_read(t, span) for t in (seen, last))
    if begin == last_begin:
        attention = decode if tokens <= MOST_DECODED else flash
        return attention(q, keys, values, causal=True, **options)[0]
    if span[0] == "window":
        return flash(q, keys, values, causal=True, window=span[1] + 1, **options)[0]
    t = torch.arange(seen, seen + tokens, device=q.device)
    starts = block_starts(t, span[1], span[2]).clamp(min=begin) - begin
    return flash(q, keys, values, causal=True, row_start=starts, **options)[0]
