"""MoA: circular caches of different lengths, one a head, and decoding from them.

The clauses are those of `moa`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from attnspec.reference.conventions import (
    check_array,
    check_attention_inputs,
    check_integer,
    check_size,
    group_size,
)
from attnspec.reference.dense.attention import attend
from attnspec.reference.patterns.moa_masks import Sizes, check_plan


class Cache(NamedTuple):
    """S7: the slots of all kv heads end to end, and how many tokens have come.

    k (..., slots, d) and v (..., slots, dv), seen int (...). Which slots are a head's is what its
    s and c say, which every function takes besides.
    """

    k: np.ndarray
    v: np.ndarray
    seen: np.ndarray


def init_cache(k: np.ndarray, v: np.ndarray, s: Sizes, c: Sizes) -> Cache:
    """S7: an empty cache for tokens shaped as `k` and `v`; `s` and `c` as `cache_sizes` gives them.

    >>> init_cache(np.ones((2, 5, 4)), np.ones((2, 5, 3)), s=[1, 1], c=[2, 4]).v.shape
    (8, 3)
    """
    check_array("k", k, ("kv_heads", "tokens", "d"))
    check_array("v", v, ("kv_heads", "tokens", "dv"))
    s, c = check_plan(s, c, k.shape[-3])
    shape = (*k.shape[:-3], sum(s) + sum(c))
    slots_k = np.zeros_like(k, shape=(*shape, k.shape[-1]))
    slots_v = np.zeros_like(v, shape=(*shape, v.shape[-1]))
    return Cache(slots_k, slots_v, np.zeros(shape[:-1], np.int64))


def circular_slots(count: np.ndarray, s: int, c: int) -> np.ndarray:
    """S7: int (...), the slot inside a head's range of the token that comes after `count` (...).

    >>> circular_slots(np.arange(8), s=2, c=3)
    array([0, 1, 2, 3, 4, 2, 3, 4])
    """
    check_array("count", count, (), dtype="int")
    check_integer("s", s, least=0)
    check_integer("c", c, least=1)
    if np.any(count < 0):
        raise ValueError(f"count: got {count.min()}, expected integers >= 0")
    return np.where(count < s, count, s + (count - s) % c)


def cache_update(
    cache: Cache,
    k: np.ndarray,
    v: np.ndarray,
    s: Sizes,
    c: Sizes,
    valid_mask: np.ndarray | None = None,
) -> Cache:
    """S7, S8: the cache after tokens k (..., kv_heads, w, d) and v (..., kv_heads, w, dv).

    `s` and `c` are those of `init_cache`, `valid_mask` bool (..., w): True = a token, False =
    padding.

    >>> x = np.array([[[1.0], [2.0], [3.0]]])
    >>> cache = cache_update(init_cache(x, x, [1], [1]), x, x, [1], [1])
    >>> cache.k.ravel(), cache.seen
    (array([1., 3.]), array(3))
    """
    s, c = check_cache(cache, s, c)
    _check_tokens(cache, k, v, len(s))
    w = k.shape[-2]
    if valid_mask is None:
        valid_mask = np.ones((*k.shape[:-3], w), bool)
    check_array("valid_mask", valid_mask, ("w",), dtype="bool")
    if valid_mask.shape != (*k.shape[:-3], w):
        raise ValueError(
            f"valid_mask: got shape {valid_mask.shape}, expected {(*k.shape[:-3], w)}, as k"
        )
    new_k, new_v, count = cache.k.copy(), cache.v.copy(), np.array(cache.seen)
    for at in np.ndindex(valid_mask.shape):
        batch, i = at[:-1], at[-1]
        if not valid_mask[at]:
            continue
        for h, start in enumerate(starts(s, c)):
            slot = start + circular_slots(np.array(count[batch]), s[h], c[h])
            new_k[(*batch, slot)] = k[(*batch, h, i)]
            new_v[(*batch, slot)] = v[(*batch, h, i)]
        count[batch] += 1
    return Cache(new_k, new_v, count)


def decode(
    q: np.ndarray, cache: Cache, s: Sizes, c: Sizes, *, scale: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """S9: output (..., heads, 1, dv) and lse (..., heads, 1) of the token written last.

    q (..., heads, 1, d); `s` and `c` are those of `init_cache`.

    >>> x = np.array([[[1.0], [2.0], [3.0]]])
    >>> cache = cache_update(init_cache(x, x, [1], [1]), x, x, [1], [1])
    >>> decode(np.zeros((1, 1, 1)), cache, [1], [1])[0]
    array([[[2.]]])
    """
    s, c = check_cache(cache, s, c)
    check_array("q", q, ("heads", "1", "d"))
    check_size("q", q.shape[-2], 1, "tokens")
    check_size("q", q.shape[-1], cache.k.shape[-1], "d, as in cache")
    if q.dtype != cache.k.dtype:
        raise TypeError(f"q: got dtype {q.dtype}, expected {cache.k.dtype}, as cache")
    if q.shape[:-3] != cache.seen.shape:
        raise ValueError(f"q: got leading axes {q.shape[:-3]}, expected {cache.seen.shape}")
    kv_heads = len(s)
    if kv_heads < 1 or q.shape[-3] % kv_heads:
        raise ValueError(f"q: got {q.shape[-3]} heads, expected a multiple of {kv_heads} (cache)")
    group = group_size(q.shape[-3], kv_heads)
    outs, lses = [], []
    for h, start in enumerate(starts(s, c)):
        own = slice(start, start + s[h] + c[h])
        written = np.arange(own.stop - own.start) < cache.seen[..., None]
        keys, values = (x[..., None, own, :] for x in (cache.k, cache.v))
        queries = q[..., h * group : (h + 1) * group, :, :]
        mask = written[..., None, None, :]
        out, lse = attend(queries, keys, _written(values, written), mask=mask, scale=scale)
        outs.append(out)
        lses.append(lse)
    return np.concatenate(outs, axis=-3), np.concatenate(lses, axis=-2)


def decode_step(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    cache: Cache,
    s: Sizes,
    c: Sizes,
    *,
    scale: float | None = None,
) -> tuple[np.ndarray, np.ndarray, Cache]:
    """S7-S9: output (..., heads, w, dv) and lse (..., heads, w) of new tokens, and the cache.

    q (..., heads, w, d), k (..., kv_heads, w, d), v (..., kv_heads, w, dv); each token is written,
    then attends.

    >>> x = np.array([[[1.0], [2.0], [3.0]]])
    >>> decode_step(0 * x, x, x, init_cache(x, x, [1], [1]), [1], [1])[0].ravel()
    array([1. , 1.5, 2. ])
    """
    check_attention_inputs(q, k, v)
    check_size("k", k.shape[-2], q.shape[-2], "tokens, as in q")
    s, c = check_cache(cache, s, c)
    _check_tokens(cache, k, v, len(s))
    out = np.zeros_like(q, shape=(*q.shape[:-1], v.shape[-1]))
    lse = np.zeros_like(q, shape=q.shape[:-1])
    for i in range(q.shape[-2]):
        new = slice(i, i + 1)
        cache = cache_update(cache, k[..., new, :], v[..., new, :], s, c)
        out[..., new, :], lse[..., new] = decode(q[..., new, :], cache, s, c, scale=scale)
    return out, lse, cache


def starts(s: Sizes, c: Sizes) -> np.ndarray:
    """S7: int (kv_heads), the first slot of each head.

    >>> starts([1, 1], [2, 4])
    array([0, 3])
    """
    sizes = np.add(s, c)
    return np.cumsum(sizes) - sizes


def check_cache(cache: Any, s: Any, c: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """K14: the parts of `cache` fit one another and the plan, which comes back as integers."""
    if not isinstance(cache, Cache):
        raise TypeError(f"cache: got {type(cache).__name__}, expected a Cache")
    check_array("cache.k", cache.k, ("slots", "d"))
    check_array("cache.v", cache.v, ("slots", "dv"))
    s, c = check_plan(s, c)
    for name, x in (("cache.k", cache.k), ("cache.v", cache.v)):
        check_size(name, x.shape[-2], sum(s) + sum(c), "slots, the sum of s and c")
        if np.shape(cache.seen) != x.shape[:-2]:
            raise ValueError(
                f"cache.seen: got shape {np.shape(cache.seen)}, expected {x.shape[:-2]}"
            )
    return s, c


def _check_tokens(cache: Cache, k: Any, v: Any, kv_heads: int) -> None:
    for name, x, slots in (("k", k, cache.k), ("v", v, cache.v)):
        check_array(name, x, ("kv_heads", "w", "d"))
        expected = (*slots.shape[:-2], kv_heads, k.shape[-2], slots.shape[-1])
        if x.shape != expected:
            raise ValueError(f"{name}: got shape {x.shape}, expected {expected}, as the cache")
        if x.dtype != slots.dtype:
            raise TypeError(f"{name}: got dtype {x.dtype}, expected {slots.dtype}, as the cache")


def _written(values: np.ndarray, written: np.ndarray) -> np.ndarray:
    """`values` (..., 1, slots, dv) with zeros in the slots that nothing was written to (K11)."""
    return np.where(written[..., None, :, None], values, np.zeros_like(values))
