"""Circular caches of different lengths in one buffer, and decoding from all of them at once.

Every head of every sequence is a sequence of its own to the decode engine, whose block table finds
the head's slots in the buffer: the engine shares the work of all heads, long and short, evenly.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnspec.fast.backend import (
    FLOATS,
    INTEGERS,
    check_attention_inputs,
    check_integer,
    check_same,
    check_size,
    check_tensor,
    wide_dtype,
)
from attnspec.fast.engines import decode as engine
from attnspec.fast.growing import checkable
from attnspec.fast.patterns.moa_masks import Sizes, check_plan


class Cache(NamedTuple):
    """The slots of all kv heads end to end, and how many tokens have come.

    k (batch, slots, d) and v (batch, slots, dv), seen int64 (batch). Which slots are a head's is
    what its s and c say, which every function takes besides.
    """

    k: Tensor
    v: Tensor
    seen: Tensor


class Places(NamedTuple):
    """Where slots lie, on the device. Of each head its first slot, s, c and their sum, int64
    (kv_heads); of each slot its head, its place in the head's range, s and c, int64 (slots).
    """

    start: Tensor
    s: Tensor
    c: Tensor
    size: Tensor
    head: Tensor
    place: Tensor
    slot_s: Tensor
    slot_c: Tensor


def init_cache(k: Tensor, v: Tensor, s: Sizes, c: Sizes, *, backend: str | None = None) -> Cache:
    """An empty cache for tokens shaped as `k` and `v`; `s` and `c` as `cache_sizes` gives them."""
    check_tensor("k", k, ("batch", "kv_heads", "tokens", "d"), FLOATS)
    check_tensor("v", v, ("batch", "kv_heads", "tokens", "dv"), FLOATS)
    s, c = check_plan(s, c, k.shape[1])
    slots = sum(s) + sum(c)
    count = torch.zeros(k.shape[0], dtype=torch.int64, device=k.device)
    keys, values = (x.new_zeros(x.shape[0], slots, x.shape[3]) for x in (k, v))
    return Cache(keys, values, count)


def circular_slots(count: Tensor, s: int, c: int, *, backend: str | None = None) -> Tensor:
    """int64 (...), the slot inside a head's range of the token that comes after `count` (...)."""
    if not isinstance(count, Tensor):
        raise TypeError(f"count: got {type(count).__name__}, expected torch.Tensor")
    if count.dtype not in INTEGERS:
        raise TypeError(f"count: got dtype {count.dtype}, expected int32 or int64")
    check_integer("s", s, least=0)
    check_integer("c", c, least=1)
    if checkable(count) and bool((count < 0).any()):
        raise ValueError(f"count: got {int(count.min())}, expected integers >= 0")
    return _slots(count, s, c).long()


def _slots(count: Tensor, s: int | Tensor, c: int | Tensor) -> Tensor:
    return torch.where(count < s, count, s + (count - s) % c)


def cache_update(
    cache: Cache,
    k: Tensor,
    v: Tensor,
    s: Sizes,
    c: Sizes,
    valid_mask: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Cache:
    """The cache after tokens k (batch, kv_heads, w, d) and v (batch, kv_heads, w, dv), a new value.

    `s` and `c` are those of `init_cache`, `valid_mask` bool (batch, w): True = a token, False =
    padding. `update_in_place` does not copy.
    """
    s, c = check_cache(cache, s, c)
    _check_tokens(cache, k, v, len(s), valid_mask)
    k, v = k.detach(), v.detach()
    if k.shape[2] != 1:
        return _write_many(cache, k, v, s, c, valid_mask)
    return _write_one(_copy(cache), k, v, s, c, valid_mask)


def update_in_place(
    cache: Cache, k: Tensor, v: Tensor, s: Sizes, c: Sizes, valid_mask: Tensor | None = None
) -> Cache:
    """As `cache_update`, but the slots are written IN PLACE: `cache` holds the new tokens too, and
    its count alone is the old one. Go on with the cache that is returned.

    What a decoder calls for every token, before `decode`.
    """
    s, c = check_cache(cache, s, c)
    _check_tokens(cache, k, v, len(s), valid_mask)
    k, v = k.detach(), v.detach()
    if k.shape[2] == 1:
        return _write_one(cache, k, v, s, c, valid_mask)
    new = _write_many(cache, k, v, s, c, valid_mask)
    cache.k.copy_(new.k)
    cache.v.copy_(new.v)
    return new._replace(k=cache.k, v=cache.v)


def decode(
    q: Tensor,
    cache: Cache,
    s: Sizes,
    c: Sizes,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Output (batch, heads, 1, dv) and lse (batch, heads, 1) of the token written last.

    q (batch, heads, 1, d); `s` and `c` are those of `init_cache`. One launch, and no word from the
    device to the host. For inference: there is no gradient.
    """
    check_tensor("q", q, ("batch", "heads", "1", "d"), FLOATS)
    check_size("q", q.shape[2], 1, "tokens")
    s, c = check_cache(cache, s, c)
    check_same("q", q, "cache", cache.k)
    batch, heads, _, d = q.shape
    kv_heads, slots = len(s), cache.k.shape[1]
    check_size("q", d, cache.k.shape[2], "d, as in cache")
    check_size("q", batch, cache.k.shape[0], "batch, as in cache")
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"q: got {heads} heads, expected a multiple of {kv_heads} (cache)")
    page, table = _table(s, c, batch, q.device)
    size = _places(s, c, q.device).size
    lengths = torch.minimum(cache.seen[:, None], size).reshape(-1)
    pages = (
        x.detach().reshape(batch * slots // page, 1, page, x.shape[2]) for x in (cache.k, cache.v)
    )
    queries = q.detach().reshape(batch * kv_heads, heads // kv_heads, 1, d)
    out, lse = engine.decode(
        queries, *pages, lengths=lengths, block_table=table, scale=scale, backend=backend
    )
    return out.reshape(batch, heads, 1, -1), lse.reshape(batch, heads, 1)


def decode_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: Cache,
    s: Sizes,
    c: Sizes,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Cache]:
    """Output (batch, heads, w, dv) and lse (batch, heads, w) of new tokens, and the new cache.

    q (batch, heads, w, d), k (batch, kv_heads, w, d), v (batch, kv_heads, w, dv); each token is
    written, then attends. `cache` keeps its values: it is copied once. For inference.
    """
    check_attention_inputs(q, k, v, FLOATS)
    check_size("k", k.shape[2], q.shape[2], "tokens, as in q")
    s, c = check_cache(cache, s, c)
    _check_tokens(cache, k, v, len(s), None)
    cache = _copy(cache)
    outs, lses = [], []
    for i in range(q.shape[2]):
        new = slice(i, i + 1)
        cache = _write_one(cache, k[:, :, new].detach(), v[:, :, new].detach(), s, c, None)
        out, lse = decode(q[:, :, new], cache, s, c, scale=scale, backend=backend)
        outs.append(out)
        lses.append(lse)
    if not outs:
        wide = wide_dtype(q)
        return q.new_zeros(*q.shape[:3], v.shape[3]), q.new_zeros(q.shape[:3], dtype=wide), cache
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2), cache


@lru_cache(maxsize=256)
def _places(s: tuple[int, ...], c: tuple[int, ...], device: torch.device) -> Places:
    static, circular = torch.tensor(s, dtype=torch.int64), torch.tensor(c, dtype=torch.int64)
    size = static + circular
    start = size.cumsum(0) - size
    head = torch.arange(len(s)).repeat_interleave(size)
    place = torch.arange(len(head)) - start[head]
    places = Places(start, static, circular, size, head, place, static[head], circular[head])
    return Places(*(x.to(device) for x in places))


@lru_cache(maxsize=256)
def _table(
    s: tuple[int, ...], c: tuple[int, ...], batch: int, device: torch.device
) -> tuple[int, Tensor]:
    """Tokens of a page, and the pages of every head, int32 (batch * kv_heads, most).

    A page is as long as the slots of all heads allow: 64 where they are rounded to that.
    """
    sizes = [a + b for a, b in zip(s, c, strict=True)]
    page = math.gcd(*sizes)
    pages = torch.tensor(sizes) // page
    first = pages.cumsum(0) - pages + torch.arange(batch)[:, None] * pages.sum()
    table = first.reshape(-1, 1) + torch.arange(int(pages.max()))
    # Entries behind a head's own pages are not read; they name a page that exists.
    return page, table.clamp(max=batch * int(pages.sum()) - 1).to(device, torch.int32)


def _copy(cache: Cache) -> Cache:
    return cache._replace(k=cache.k.clone(), v=cache.v.clone())


def _write_one(
    cache: Cache, k: Tensor, v: Tensor, s: tuple[int, ...], c: tuple[int, ...],
    valid_mask: Tensor | None,
) -> Cache:  # fmt: skip
    """One token (batch, kv_heads, 1, d), in place."""
    start, static, circular = _places(s, c, k.device)[:3]
    slot = (start + _slots(cache.seen[:, None], static, circular))[..., None]
    for slots, x in ((cache.k, k[:, :, 0]), (cache.v, v[:, :, 0])):
        at = slot.expand(-1, -1, x.shape[2])
        if valid_mask is not None:
            x = torch.where(valid_mask[:, :, None], x, slots.gather(1, at))
        slots.scatter_(1, at, x)
    more = 1 if valid_mask is None else valid_mask[:, 0]
    return cache._replace(seen=cache.seen + more)


def _write_many(
    cache: Cache, k: Tensor, v: Tensor, s: tuple[int, ...], c: tuple[int, ...],
    valid_mask: Tensor | None,
) -> Cache:  # fmt: skip
    """Tokens (batch, kv_heads, w, d): every slot asks for the last token that belongs into it."""
    batch, _, w, _ = k.shape
    where = _places(s, c, k.device)
    count = cache.seen[:, None]
    if not w:
        return cache
    total = count + (w if valid_mask is None else valid_mask.sum(dim=1, keepdim=True))
    laps = torch.div(total - 1 - where.place, where.slot_c, rounding_mode="floor")
    circular = where.place + laps * where.slot_c
    token = torch.where(where.place < where.slot_s, where.place, circular)
    fresh = ((token >= count) & (where.place < total))[..., None]
    source = (token - count).clamp(0, w - 1)
    if valid_mask is not None:
        order = torch.argsort(valid_mask.logical_not().to(torch.uint8), dim=1, stable=True)
        source = order.gather(1, source)
    row = torch.arange(batch, device=k.device)[:, None]
    new_k, new_v = (
        torch.where(fresh, x[row, where.head, source], slots)
        for slots, x in ((cache.k, k), (cache.v, v))
    )
    return cache._replace(k=new_k, v=new_v, seen=total[:, 0])


def check_cache(cache: Any, s: Any, c: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The parts of `cache` fit one another and the plan, which comes back as integers."""
    if not set(Cache._fields) <= set(getattr(cache, "_fields", ())):
        raise TypeError(f"cache: got {type(cache).__name__}, expected a Cache")
    check_tensor("cache.k", cache.k, ("batch", "slots", "d"), FLOATS)
    check_tensor("cache.v", cache.v, ("batch", "slots", "dv"), FLOATS)
    check_same("cache.v", cache.v, "cache.k", cache.k)
    s, c = check_plan(s, c)
    for name, x in (("cache.k", cache.k), ("cache.v", cache.v)):
        check_size(name, x.shape[1], sum(s) + sum(c), "slots, the sum of s and c")
    check_tensor("cache.seen", cache.seen, ("batch",), INTEGERS)
    check_size("cache.seen", cache.seen.shape[0], cache.k.shape[0], "batch, as in cache.k")
    return s, c


def _check_tokens(cache: Cache, k: Any, v: Any, kv_heads: int, valid_mask: Any) -> None:
    for name, x, slots in (("k", k, cache.k), ("v", v, cache.v)):
        check_tensor(name, x, ("batch", "kv_heads", "w", "d"), FLOATS)
        expected = (slots.shape[0], kv_heads, k.shape[2], slots.shape[2])
        if tuple(x.shape) != expected:
            raise ValueError(
                f"{name}: got shape {tuple(x.shape)}, expected {expected}, as the cache"
            )
        check_same(name, x, "cache", slots)
    if valid_mask is not None:
        check_tensor("valid_mask", valid_mask, ("batch", "w"), (torch.bool,))
        if valid_mask.shape != (k.shape[0], k.shape[2]):
            raise ValueError(
                f"valid_mask: got shape {tuple(valid_mask.shape)}, "
                f"expected {(k.shape[0], k.shape[2])}, as k"
            )
