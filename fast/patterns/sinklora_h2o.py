"""H2O's cache: recent tokens and those attended to most.

A step is one attention over the cache, and two more reads of the keys for what each row receives:
the attention's own lse is rounded, so that a weight of 1 at large logits would not come out as 1.
On Triton a step of few tokens is five launches. Scores are float32 (float64 for float64): a sum
over ten thousand steps would lose every further weight in 16 bits.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnspec.fast.backend import (
    FLOATS,
    check_attention_inputs,
    check_integer,
    check_size,
    check_tensor,
    choose_backend,
    wide,
)
from attnspec.fast.cache.streaming_llm_rows import check_rotary, unrounded
from attnspec.fast.dense.attention import MOST_DECODED
from attnspec.fast.engines.columns import column_sums, evict, evictable, received
from attnspec.fast.engines.decode import decode
from attnspec.fast.engines.flash import flash
from attnspec.fast.engines.rows import turn
from attnspec.fast.engines.select import top_k, top_k_mask
from attnspec.fast.growing import check_continues


class State(NamedTuple):
    """The rows kept of one sequence, different ones in every kv head.

    k (1, kv_heads, rows, d), v (1, kv_heads, rows, dv), a (kv_heads, rows) what each row has
    received so far, pos int64 (kv_heads, rows) the number of its token in the text, ascending; seen
    the number of tokens so far.
    """

    k: Tensor
    v: Tensor
    a: Tensor
    pos: Tensor
    seen: int


def init_state(k: Tensor, v: Tensor, *, backend: str | None = None) -> State:
    """An empty state for tokens shaped as `k` and `v`."""
    check_attention_inputs(k, k, v, FLOATS)
    pos = torch.empty(k.shape[1], 0, dtype=torch.int64, device=k.device)
    return State(k[:, :, :0], v[:, :, :0], wide(k.new_empty(pos.shape)), pos, 0)


def h2o_accumulate(
    a: Tensor | None,
    P: Tensor,
    w: int,
    kv_heads: int | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Scores (kv_heads, n) after a call of `w` queries with the weights P (1, H, w, n).

    `a` (kv_heads, n - w) holds the scores before the call, None if there are none; the first call
    may say how many `kv_heads` there are, which is H if it does not. At least float32.
    """
    check_tensor("P", P, ("batch", "H", "w", "n"), FLOATS)
    check_integer("w", w, least=1)
    _check_one_sequence("P", P)
    check_size("P", P.shape[2], w, "queries of the call")
    H, n = P.shape[1], P.shape[3]
    if n < w:
        raise ValueError(f"P: got {n} keys for {w} queries, expected at least as many")
    if a is not None:
        check_tensor("a", a, ("kv_heads", "n - w"), FLOATS)
        check_size("a", a.shape[1], n - w, "rows before the call")
        _check_divides("a", a.shape[0], H)
        if kv_heads not in (None, a.shape[0]):
            raise ValueError(f"kv_heads: got {kv_heads}, expected {a.shape[0]}, as in a")
        kv_heads = a.shape[0]
    elif kv_heads is None:
        kv_heads = H
    else:
        check_integer("kv_heads", kv_heads, least=1)
        _check_divides("kv_heads", kv_heads, H)
    return _added(a, wide(P.detach())[0].sum(1), kv_heads)


def h2o_keep(
    a: Tensor, n: int, hh: int = 4, rec: int = 512, *, backend: str | None = None
) -> Tensor:
    """int64 (..., kv_heads, min(n, hh + rec)), the rows that stay of n, ascending.

    `a` (..., kv_heads, n) are their scores; those of the last `rec` rows are not read.
    """
    if not isinstance(a, Tensor) or a.dim() < 2:
        check_tensor("a", a, ("kv_heads", "n"), FLOATS)
    check_tensor("a", a, ("...",) * (a.dim() - 2) + ("kv_heads", "n"), FLOATS)
    check_integer("n", n, least=0)
    check_size("a", a.shape[-1], n, "rows")
    check_budgets(hh, rec)
    rows = torch.arange(n, device=a.device)
    if n <= hh + rec:
        return rows.expand(a.shape).clone()
    recent = rows[n - rec :].expand(*a.shape[:-1], rec)
    return torch.cat([top_k(a[..., : n - rec], hh, backend=backend), recent], dim=-1)


def h2o_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: State,
    hh: int = 4,
    rec: int = 512,
    scale: float | None = None,
    *,
    rope_base: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, State]:
    """One call with w new tokens: output (1, H, w, dv) and the next state, a new value.

    q (1, H, w, d), k (1, kv_heads, w, d), v (1, kv_heads, w, dv), rotated to their places in the
    text, or not rotated if a `rope_base` asks for places in the cache. For inference: there is no
    gradient.
    """
    _check_call(q, k, v, state, hh, rec, rope_base)
    w, kv_heads, n = q.shape[2], k.shape[1], state.k.shape[2] + q.shape[2]
    keys = torch.cat([state.k, k.detach()], dim=2)
    values = torch.cat([state.v, v.detach()], dim=2)
    queries, rows, mixed = q.detach(), keys, values
    if rope_base is not None:
        queries, rows, mixed = unrounded(queries, keys, values)
        queries, rows = turn(queries, rows, base=rope_base, backend=backend)
    attention = decode if w <= MOST_DECODED else flash
    out, _ = attention(queries, rows, mixed, causal=True, scale=scale, backend=backend)
    out, seen = out.to(q.dtype), state.seen + w
    if w <= MOST_DECODED and choose_backend(backend, q) == "triton":
        a = received(queries, rows, state.a.detach(), scale=scale)
        if n > hh + rec and evictable(n, rec):
            return out, State(*evict(keys, values, a, state.pos, state.seen, hh, rec), seen)
    else:
        sums = column_sums(queries, rows, causal=True, scale=scale, backend=backend)
        a = _added(state.a, sums[0], kv_heads)
    new = torch.arange(state.seen, seen, device=q.device)
    pos = torch.cat([state.pos, new.expand(kv_heads, w)], dim=1)
    if n <= hh + rec:
        return out, State(keys, values, a, pos, seen)
    idx = h2o_keep(a, n, hh, rec, backend=backend)
    chosen = idx[None, :, :, None]
    return out, State(
        keys.gather(2, chosen.expand(1, *idx.shape, keys.shape[3])),
        values.gather(2, chosen.expand(1, *idx.shape, values.shape[3])),
        a.gather(1, idx),
        pos.gather(1, idx),
        seen,
    )


def h2o_mask_step(
    a: Tensor | None,
    P: Tensor,
    kept: Tensor | None,
    hh: int = 4,
    rec: int = 512,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Scores and bool `kept`, both (kv_heads, n), after a call whose weights P (1, H, w, n)
    are 0 where a token was dropped. `a` and `kept` (kv_heads, n - w) are those before, or None.
    """
    check_tensor("P", P, ("batch", "H", "w", "n"), FLOATS)
    check_budgets(hh, rec)
    if (a is None) != (kept is None):
        name, got = ("a", a) if a is None else ("kept", kept)
        raise ValueError(f"{name}: got {got}, expected both a and kept or neither")
    w, n = P.shape[2:]
    total = h2o_accumulate(a, P, w)
    alive = torch.ones(total.shape, dtype=torch.bool, device=P.device)
    if kept is not None:
        check_tensor("kept", kept, ("kv_heads", "n - w"), (torch.bool,))
        expected = (total.shape[0], n - w)
        if tuple(kept.shape) != expected:
            raise ValueError(f"kept: got shape {tuple(kept.shape)}, expected {expected}, as a")
        alive[:, : n - w] = kept
    recent = torch.arange(n, device=P.device) >= n - rec
    heavy = alive & ~recent
    heavy &= top_k_mask(total.masked_fill(~heavy, -torch.inf), hh, backend=backend)
    staying = heavy | (alive & recent)
    return total.where(staying, 0.0), staying


def h2o_budgets(
    T: int, heavy_ratio: float = 0.1, recent_ratio: float = 0.1, *, backend: str | None = None
) -> tuple[int, int]:
    """hh and rec for a prompt of T tokens, each rounded down."""
    check_integer("T", T, least=0)
    for name, ratio in (("heavy_ratio", heavy_ratio), ("recent_ratio", recent_ratio)):
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)):
            raise TypeError(f"{name}: got {ratio!r}, expected a number of at least 0")
        if not 0 <= ratio < math.inf:
            raise ValueError(f"{name}: got {ratio}, expected a number of at least 0")
    return int(heavy_ratio * T), int(recent_ratio * T)


def check_budgets(hh: Any, rec: Any) -> None:
    """Both budgets are numbers of rows."""
    check_integer("hh", hh, least=0)
    check_integer("rec", rec, least=0)


def _added(a: Tensor | None, received: Tensor, kv_heads: int) -> Tensor:
    """Scores (kv_heads, n): what rows had, `a`, and what they have `received` (H, n)."""
    total = received.unflatten(0, (kv_heads, -1)).sum(1)
    if a is not None:
        total[:, : a.shape[1]] += a.detach()
    return total


def _check_divides(name: str, kv_heads: int, H: int) -> None:
    if kv_heads < 1 or H % kv_heads:
        raise ValueError(f"{name}: got {kv_heads} kv heads, expected a divisor of {H}")


def _check_one_sequence(name: str, x: Tensor) -> None:
    if x.shape[0] != 1:
        raise ValueError(f"{name}: got {x.shape[0]} sequences, expected 1: scores are its own")


def _check_call(q: Any, k: Any, v: Any, state: Any, hh: Any, rec: Any, rope_base: Any) -> None:
    check_attention_inputs(q, k, v, FLOATS)
    _check_one_sequence("q", q)
    check_size("k", k.shape[2], q.shape[2], "tokens, as in q")
    check_integer("q", q.shape[2], least=1)
    check_budgets(hh, rec)
    if rope_base is not None:
        check_rotary("q", q, "rope_base", rope_base)
    if not {"k", "v", "a", "pos", "seen"} <= set(getattr(state, "_fields", ())):
        raise TypeError(f"state: got {type(state).__name__}, expected a State")
    check_continues(state, k, v)
    rows = tuple(state.k.shape[1:3])
    for name, got in (("v", state.v.shape[1:3]), ("a", state.a.shape), ("pos", state.pos.shape)):
        if tuple(got) != rows:
            raise ValueError(
                f"state.{name}: got {tuple(got)}, expected {rows} (kv_heads, rows), as k"
            )
