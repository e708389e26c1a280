"""SeerAttention-R on Numba and Triton: selection at decode, and attention to its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attnspec.fast.backend import (
    DTYPES,
    FLOATS,
    check_attention_inputs,
    check_integer,
    check_same,
    check_size,
    check_tensor,
)
from attnspec.fast.engines.decode import decode
from attnspec.fast.engines.select import mask_lists, top_k_mask
from attnspec.fast.growing import Room, append
from attnspec.fast.selection.seer_attention_decode_gate import (
    GateCache,
    compress_step,
    decode_gate,
    init_cache,
)
from attnspec.fast.selection.seer_attention_gate import rope
from attnspec.fast.selection.seer_attention_selection import check_number


def decode_select(
    scores: Tensor,
    b: int,
    *,
    tau: float | None = None,
    budget: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """M bool (batch, kv_heads, nb); the last block is always in, on top of the budget.

    Either `tau`, a threshold on softmax(scores), or `budget`, a number of tokens that b divides;
    neither means a budget of 4096.
    """
    check_tensor("scores", scores, ("batch", "kv_heads", "nb"), FLOATS)
    check_integer("b", b, least=1)
    if tau is not None and budget is not None:
        raise ValueError(f"tau: got {tau} beside budget {budget}, expected one of the two")
    if tau is None:
        budget = 4096 if budget is None else budget
        check_integer("budget", budget, least=b)
        if budget % b:
            raise ValueError(f"budget: got {budget}, expected a multiple of {b} (b)")
        chosen = top_k_mask(scores, budget // b, backend=backend)
    else:
        check_number("tau", tau)
        chosen = torch.softmax(scores, -1) > tau
    return chosen | (torch.arange(scores.shape[2], device=scores.device) == scores.shape[2] - 1)


def decode_attend(
    q_t: Tensor,
    k: Tensor,
    v: Tensor,
    M: Tensor,
    b: int,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """out (batch, heads, 1, dv) and lse (batch, heads, 1) of one query over the selected blocks.

    q_t (batch, heads, 1, d), k (batch, kv_heads, n, d), both rotated, v (batch, kv_heads, n, dv), M
    bool (batch, kv_heads, ceil(n/b)). Only the selected blocks are read.
    """
    check_tensor("q_t", q_t, ("batch", "heads", "q_tokens", "d"))
    check_attention_inputs(q_t, k, v)
    check_size("q_t", q_t.shape[2], 1, "one token")
    check_tensor("M", M, ("batch", "kv_heads", "nb"), (torch.bool,))
    check_integer("b", b, least=1)
    expected = (*k.shape[:2], -(-k.shape[2] // b))
    if tuple(M.shape) != expected:
        raise ValueError(f"M: got shape {tuple(M.shape)}, expected {expected}")
    return _attend_listed(q_t, k, v, M, b, M.shape[2], scale, backend)


class State(NamedTuple):
    """The gate's cache, and the rotated keys and the values seen so far.

    `room` is where later tokens go: `step` writes them there IN PLACE, behind the tokens of the
    state it was given, which stay as they are.
    """

    cache: GateCache
    k: Tensor
    v: Tensor
    room: Room | None = None


def init_state(k_t: Tensor, v_t: Tensor, Wk: Tensor, *, backend: str | None = None) -> State:
    """An empty state for tokens shaped as k_t (batch, kv_heads, d), v_t (batch, kv_heads, dv)."""
    cache = init_cache(k_t, Wk)
    check_tensor("v_t", v_t, ("batch", "kv_heads", "dv"), DTYPES)
    return State(cache, cache.rest, v_t[:, :, None][:, :, :0])


def step(
    state: State,
    q_t: Tensor,
    k_t: Tensor,
    v_t: Tensor,
    Wq: Tensor | None,
    Wk: Tensor,
    *,
    b: int = 64,
    kinds: Sequence[str] = ("max", "min", "avg"),
    mode: str = "Qproj",
    base: float = 10000.0,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    tau: float | None = None,
    budget: int | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, State]:
    """out (batch, heads, dv) of one new token, and the state with it.

    q_t (batch, heads, d), k_t (batch, kv_heads, d) before their rotation, v_t (batch, kv_heads,
    dv). See `State` for what is updated in place.
    """
    check_tensor("q_t", q_t, ("batch", "heads", "d"))
    check_tensor("k_t", k_t, ("batch", "kv_heads", "d"))
    check_tensor("v_t", v_t, ("batch", "kv_heads", "dv"))
    check_size("q_t", q_t.shape[2], k_t.shape[2], "d, as in k_t")
    check_same("q_t", q_t, "k_t", k_t)
    check_same("v_t", v_t, "k_t", k_t)
    expected = (*k_t.shape[:2], state.v.shape[3])
    if tuple(v_t.shape) != expected:
        raise ValueError(f"v_t: got shape {tuple(v_t.shape)}, expected {expected}")
    pos = state.k.shape[2]
    cache = compress_step(state.cache, k_t, Wk, b, kinds, base, k_norm, backend=backend)
    at = torch.full((1,), pos, device=q_t.device)
    query, key = rope(q_t[:, :, None], k_t[:, :, None], at, base, backend)
    new = (key.detach(), v_t[:, :, None].detach())
    (k, v), room = append(getattr(state, "room", None), (state.k, state.v), new)
    scores = decode_gate(q_t, cache, pos, Wq, mode, base, q_norm, backend=backend)
    M = decode_select(scores, b, tau=tau, budget=budget, backend=backend)
    most = M.shape[2]
    if tau is None:
        most = min(most, (4096 if budget is None else budget) // b + 1)
    out, _ = _attend_listed(query, k, v, M, b, most, scale, backend)
    return out[:, :, 0], State(cache, k, v, room)


def _attend_listed(
    q: Tensor, k: Tensor, v: Tensor, M: Tensor, b: int, most: int, scale: float | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention to the blocks of M, of which no row has more than `most`."""
    lists = mask_lists(M[:, :, None], 1, b, backend=backend)
    index, counts = lists.index[:, :, 0, :most], lists.count[:, :, 0]
    return decode(q, k, v, scale=scale, index=index, counts=counts, page=b, backend=backend)
