"""SnapKV on Numba and Triton: the prompt's cache, compressed once by what its end attends to.

`prefill` takes the log denominators of the window's rows from the prompt's own attention, so that
the scores cost one more read of the keys and no buffer of weights. The steps are exposed too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnspec.fast.backend import (
    DTYPES,
    check_attention_inputs,
    check_choice,
    check_integer,
    check_same,
    check_size,
    check_tensor,
)
from attnspec.fast.cache.snapkv_selection import (
    REDUCTIONS,
    check_padding,
    check_pool,
    check_window,
    pool_and_reduce,
    pool_scores,
    prefix_scores,
    reduce_groups,
    select,
    window_attention,
    window_scores,
)
from attnspec.fast.engines.decode import decode
from attnspec.fast.engines.flash import flash
from attnspec.fast.growing import Room, append, check_continues, checkable

__all__ = [
    "State",
    "compress",
    "init_state",
    "pool_scores",
    "prefill",
    "prefix_scores",
    "reduce_groups",
    "select",
    "step",
    "window_attention",
    "window_scores",
]

CLAIMS: dict[str, dict[str, Any]] = {
    "window_attention": {"compiled": True},
    "window_scores": {"compiled": True},
    **{name: {"launches": None} for name in ("prefix_scores", "compress")},
}
"""What the suite is told beyond the defaults: a sum and a gather are torch's own."""


def compress(
    k: Tensor, v: Tensor, idx: Tensor, w: int = 32, *, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The slots kept: k_c (batch, slot_heads, n + w, d), v_c likewise, pos int64 without d.

    k (batch, kv_heads, T, d), v (batch, kv_heads, T, dv), `idx` int64 (batch, slot_heads, n) below
    T - w; slot_heads is kv_heads, or a multiple of it. The range of `idx` is checked on the CPU
    only.
    """
    _check_keys_values(k, v)
    check_tensor("idx", idx, ("batch", "slot_heads", "n"), (torch.int64,))
    batch, kv_heads, T = k.shape[:3]
    check_window(w, T, T)
    check_size("idx", idx.shape[0], batch, "batch, as in k")
    if idx.shape[1] % kv_heads:
        raise ValueError(
            f"idx: got {idx.shape[1]} heads, expected a multiple of the {kv_heads} kv heads"
        )
    if checkable(idx) and idx.numel() and not 0 <= int(idx.min()) <= int(idx.max()) < T - w:
        raise ValueError(f"idx: got positions outside [0, {T - w}), expected the prefix only")
    window = torch.arange(T - w, T, device=k.device).expand(*idx.shape[:2], w)
    pos = torch.cat([idx, window], dim=2)
    row = torch.arange(batch, device=k.device)[:, None, None]
    head = torch.arange(idx.shape[1], device=k.device)[:, None] // (idx.shape[1] // kv_heads)
    return k[row, head, pos], v[row, head, pos], pos


class State(NamedTuple):
    """The slots of each head, and the position of the next token.

    k (batch, slot_heads, slots, d), v (batch, slot_heads, slots, dv), pos int64 (batch, slot_heads,
    slots) the absolute position of a slot, -1 where it holds padding; seen counts padding too.
    `padded` is False if no slot holds padding. `room` is where later slots go: `step` writes them
    there IN PLACE, behind the slots of the state it was given, which stay as they are.
    """

    k: Tensor
    v: Tensor
    pos: Tensor
    seen: int
    padded: bool = True
    room: Room | None = None


def init_state(k: Tensor, v: Tensor, *, backend: str | None = None) -> State:
    """An empty state for tokens shaped as `k` and `v`."""
    _check_keys_values(k, v)
    pos = torch.empty(*k.shape[:2], 0, dtype=torch.int64, device=k.device)
    return State(k[:, :, :0], v[:, :, :0], pos, 0, padded=False)


def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    w: int = 32,
    C: int = 2048,
    p: int = 5,
    pool: str = "avg",
    gqa: str = "group_mean",
    mask: Tensor | None = None,
    state: State | None = None,
    backend: str | None = None,
) -> tuple[Tensor, State]:
    """The prompt's output (batch, heads, q_tokens, dv) and the compressed state.

    q (batch, heads, q_tokens, d), k (batch, kv_heads, T, d), v (batch, kv_heads, T, dv), rotated to
    their absolute positions; `mask` bool (batch, T), True = real key, for prompts padded on the
    left. ValueError unless `state` is empty or left out. The output is differentiable.
    """
    check_attention_inputs(q, k, v)
    check_integer("C", C, least=2)
    check_integer("w", w, least=1)
    if w >= C:
        raise ValueError(f"w: got {w}, expected less than C = {C}, which includes the window")
    check_pool(p, "pool", pool)
    check_choice("gqa", gqa, REDUCTIONS)
    if state is not None and state.seen:
        raise ValueError(f"state: got one with {state.seen} tokens, expected an empty one")
    check_padding(mask, k)
    T = k.shape[2]
    if T >= C:
        check_window(w, q.shape[2], T)
    out, lse = flash(q, k, v, causal=True, key_mask=mask, backend=backend)
    keys, values = k.detach(), v.detach()
    if T < C:
        pos = torch.arange(T, device=k.device).expand(k.shape[:3])
        pos = pos if mask is None else pos.masked_fill(~mask[:, None], -1)
        return out, State(keys, values, pos, T, padded=mask is not None)
    first = q.shape[2] - w
    s = window_scores(q, k, w, mask, lse[:, :, first:], backend=backend)
    m = pool_and_reduce(s, p, pool, k.shape[1], gqa, backend)
    idx = select(m, C - w, None if mask is None else mask[:, None, : T - w], backend=backend)
    k_c, v_c, pos = compress(keys, values, idx, w)
    if mask is not None:
        real = mask[:, None].expand(*pos.shape[:2], T).gather(2, pos)
        pos = pos.masked_fill(~real, -1)
    return out, State(k_c, v_c, pos, T, padded=mask is not None)


def step(
    state: State, q: Tensor, k: Tensor, v: Tensor, *, backend: str | None = None
) -> tuple[Tensor, State]:
    """The output (batch, heads, 1, dv) of one new token, and the state that includes it.

    q (batch, heads, 1, d), k (batch, kv_heads, 1, d), v (batch, kv_heads, 1, dv), q and k rotated
    to position ``state.seen``. Reads each slot once; see `State` for what is updated in place.
    """
    check_attention_inputs(q, k, v)
    for name, x in (("q", q), ("k", k)):
        check_size(name, x.shape[2], 1, "one token a step")
    slot_heads, heads = state.k.shape[1], q.shape[1]
    if slot_heads not in (k.shape[1], heads):
        raise ValueError(
            f"k: got {k.shape[1]} kv heads, expected {slot_heads}, the heads of the state's slots"
        )
    k, v = (x.repeat_interleave(slot_heads // x.shape[1], 1) for x in (k, v))
    check_continues(state, k, v)
    here = state.pos.new_full((*state.pos.shape[:2], 1), state.seen)
    old = (state.k, state.v, state.pos)
    (keys, values, pos), room = append(
        getattr(state, "room", None), old, (k.detach(), v.detach(), here)
    )
    bias = None
    padded = getattr(state, "padded", True)
    if padded:
        bias = torch.zeros(pos.shape, device=q.device).masked_fill_(pos < 0, float("-inf"))
    out, _ = decode(q, keys, values, bias=bias, backend=backend)
    return out, State(keys, values, pos, state.seen + 1, padded, room)


def _check_keys_values(k: Any, v: Any) -> None:
    check_tensor("k", k, ("batch", "kv_heads", "tokens", "d"), DTYPES)
    check_tensor("v", v, ("batch", "kv_heads", "tokens", "dv"), DTYPES)
    check_same("v", v, "k", k)
    if v.shape[:3] != k.shape[:3]:
        expected = ", ".join(map(str, k.shape[:3]))
        raise ValueError(f"v: got shape {tuple(v.shape)}, expected ({expected}, dv), as k")
