"""MASFormer, token by token or in chunks, from a cache of what the layer's span still holds.

The clauses are those of `masformer`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from attnspec.reference.conventions import check_array, check_attention_inputs, check_size
from attnspec.reference.dense.attention import attend
from attnspec.reference.patterns.masformer_spans import Span, cache_rows_needed, check_span, sees
from attnspec.reference.patterns.masformer_tiles import check_scale


class Cache(NamedTuple):
    """S9: the rows that the next token of a layer may read, and how many tokens have come.

    k (..., Hk, rows, d), v (..., Hk, rows, dv), those of the last tokens seen, in their order.
    """

    k: np.ndarray
    v: np.ndarray
    seen: int


def cache_after(k: np.ndarray, v: np.ndarray, span: Span) -> Cache:
    """S9: what the tokens `k` (..., Hk, T, d) and `v` (..., Hk, T, dv), none or more, leave behind.

    >>> x = np.ones((1, 5, 2))
    >>> cache_after(x, x, ("block", 3, 0)).k.shape
    (1, 2, 2)
    """
    check_array("k", k, ("Hk", "T", "d"))
    check_array("v", v, ("Hk", "T", "dv"))
    check_size("v", v.shape[-2], k.shape[-2], "tokens, as in k")
    check_span(span)
    T = k.shape[-2]
    first = T - (cache_rows_needed(T - 1, span) if T else 0)
    return Cache(k[..., first:, :], v[..., first:, :], T)


def decode_step(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    cache: Cache,
    span: Span,
    *,
    scale: float | None = None,
) -> tuple[np.ndarray, Cache]:
    """S9, S10: output (..., H, tokens, dv) of one or more new tokens, and the cache behind them.

    q (..., H, tokens, d), k (..., Hk, tokens, d), v (..., Hk, tokens, dv).

    >>> x = np.ones((1, 1, 2))
    >>> cache = cache_after(x[:, :0], x[:, :0], ("window", 1))
    >>> for _ in range(3):
    ...     out, cache = decode_step(x, x, x, cache, ("window", 1))
    >>> cache.k.shape, cache.seen
    ((1, 2, 2), 3)
    """
    check_attention_inputs(q, k, v)
    check_span(span)
    check_scale(scale)
    tokens = q.shape[-2]
    check_size("k", k.shape[-2], tokens, "tokens, as in q")
    if not isinstance(cache, Cache):
        raise TypeError(f"cache: got {type(cache).__name__}, expected a Cache")
    rows = cache_rows_needed(cache.seen - 1, span) if cache.seen else 0
    for name, old, new in (("cache.k", cache.k, k), ("cache.v", cache.v, v)):
        expected = (*new.shape[:-2], rows, new.shape[-1])
        if old.shape != expected:
            raise ValueError(
                f"{name}: got shape {old.shape}, expected {expected} after {cache.seen} tokens"
            )
    if not tokens:
        return np.zeros_like(v, shape=(*q.shape[:-1], v.shape[-1])), cache
    keys = np.concatenate([cache.k, k], axis=-2)
    values = np.concatenate([cache.v, v], axis=-2)
    seen = cache.seen + tokens
    t, u = np.arange(cache.seen, seen), np.arange(cache.seen - rows, seen)
    out, _ = attend(q, keys, values, mask=sees(t[:, None], u, span, True), scale=scale)
    kept = len(u) - cache_rows_needed(seen - 1, span)
    return out, Cache(keys[..., kept:, :], values[..., kept:, :], seen)
