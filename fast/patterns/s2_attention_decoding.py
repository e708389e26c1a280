"""Decoding on the decode engine, from a cache that frees the blocks no later query reads."""

from __future__ import annotations

from typing import NamedTuple

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
from attnspec.fast.engines.decode import decode
from attnspec.fast.growing import Room
from attnspec.fast.patterns.s2_attention_patterns import check_stride


class State(NamedTuple):
    """The rows that are kept, and how many tokens have come.

    k (batch, kv_heads, rows, d), v (batch, kv_heads, rows, dv); pos int64 (kv_heads, rows), on the
    CPU, are the positions of a head's rows, ascending, and -1 behind them where another head keeps
    more. seen is the number of tokens so far. A step writes its rows **in place** into the spare
    `room` behind those of each head.
    """

    k: Tensor
    v: Tensor
    pos: Tensor
    seen: int
    room: Room | None = None


def init_state(k: Tensor, v: Tensor, *, backend: str | None = None) -> State:
    """An empty state for tokens shaped as `k` and `v`."""
    check_tensor("k", k, ("batch", "kv_heads", "tokens", "d"), FLOATS)
    check_tensor("v", v, ("batch", "kv_heads", "tokens", "dv"), FLOATS)
    pos = torch.empty(k.shape[1], 0, dtype=torch.int64)
    return State(k[:, :, :0], v[:, :, :0], pos, 0)


def decode_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: State,
    b: int,
    local: int,
    v_stride: int,
    step: int | None = None,
    offset: int = 0,
    num_dense_heads: int = 0,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, State]:
    """Output (batch, heads, tokens, dv) and lse (batch, heads, tokens) of new tokens, and state.

    q (batch, heads, tokens, d), k (batch, kv_heads, tokens, d), v (batch, kv_heads, tokens, dv).
    The state that comes back holds what the next token can read, and no more; it is cut once in b
    tokens, else it grows in place. One launch of the engine a token. For inference: there is no
    gradient.
    """
    check_attention_inputs(q, k, v, FLOATS)
    check_integer("b", b, least=1)
    check_integer("v_stride", v_stride, least=1)
    heads, kv_heads, tokens = q.shape[1], k.shape[1], q.shape[2]
    _, _, step = check_stride(
        heads, kv_heads, local, v_stride, num_dense_heads, step, offset, False
    )
    check_size("k", k.shape[2], tokens, "tokens, as in q")
    for name, cached, new in (("state.k", state.k, k), ("state.v", state.v, v)):
        check_same(name, cached, "q", q)
        if cached.shape[:2] != new.shape[:2] or cached.shape[3] != new.shape[3]:
            raise ValueError(
                f"{name}: got shape {tuple(cached.shape)}, expected that of {tuple(new.shape)}"
            )
    check_tensor("state.pos", state.pos, ("kv_heads", "rows"), INTEGERS)
    if tuple(state.pos.shape) != (kv_heads, state.k.shape[2]):
        raise ValueError(
            f"state.pos: got shape {tuple(state.pos.shape)}, "
            f"expected {(kv_heads, state.k.shape[2])}"
        )
    c = torch.arange(kv_heads)[:, None]
    dense = c >= kv_heads - num_dense_heads

    def read(pos: Tensor, t: int) -> Tensor:
        """Which rows the query at position t reads."""
        block = pos // b
        strided = (block + c * step + offset) % v_stride == 0
        return (pos >= 0) & (strided | (t // b - block < local) | dense)

    q, k, v = q.detach(), k.detach(), v.detach()
    state = State(state.k, state.v, state.pos.cpu(), state.seen, getattr(state, "room", None))
    outs, lses = [], []
    for i in range(tokens):
        state = _cut(state, read(state.pos, state.seen))
        state, counts = _append(state, k[:, :, i], v[:, :, i])
        lengths = counts.to(q.device, non_blocking=True).expand(q.shape[0], -1)
        out, lse = decode(
            q[:, :, i : i + 1], state.k, state.v, lengths=lengths, scale=scale, backend=backend
        )
        outs.append(out)
        lses.append(lse)
        state = _cut(state, read(state.pos, state.seen))
    if not outs:
        wide = wide_dtype(q)
        return q.new_zeros(*q.shape[:3], v.shape[3]), q.new_zeros(q.shape[:3], dtype=wide), state
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2), state


def merge_partitions(
    outs: Tensor, lses: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """out (..., dv) and lse (...) over all keys, from those over each part of them.

    `outs` (parts, ..., dv) and `lses` (parts, ...), each in its own dtype, in which it comes back;
    sums are float32 at least. A part with lse -inf is skipped, whatever its output holds; if all
    are, the output is 0.
    """
    for name, x, axes in (("outs", outs, 2), ("lses", lses, 1)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: got {type(x).__name__}, expected torch.Tensor")
        if x.dim() < axes or x.dtype not in FLOATS:
            raise TypeError(
                f"{name}: got {x.dtype} of {x.dim()} axes, expected (parts, ...) floats"
            )
    if lses.shape != outs.shape[:-1]:
        raise ValueError(
            f"lses: got shape {tuple(lses.shape)}, expected {tuple(outs.shape[:-1])}, as outs"
        )
    if not len(outs):
        raise ValueError("outs: got 0 parts, expected at least 1")
    wide = torch.float64 if torch.float64 in (outs.dtype, lses.dtype) else torch.float32
    logs = lses.to(wide)
    top = logs.amax(dim=0).detach()
    mass = torch.exp(logs - torch.where(top == -torch.inf, 0.0, top))
    total = mass.sum(dim=0)
    empty = total == 0
    filled = torch.where(empty, 1.0, total)
    weights = (mass / filled)[..., None]
    out = (weights * torch.where(weights == 0, 0.0, outs.to(wide))).sum(dim=0)
    lse = torch.where(empty, -torch.inf, top + torch.log(filled))
    return out.to(outs.dtype), lse.to(lses.dtype)


def _append(state: State, k: Tensor, v: Tensor) -> tuple[State, Tensor]:
    """The state with one more row (batch, kv_heads, d) in each head, and the rows of each head."""
    counts = (state.pos >= 0).sum(dim=1)
    rows = max(state.pos.shape[1], int(counts.max()) + 1)
    room = state.room
    if room is None or room.used != state.seen or room.buffers[0].shape[2] < rows:
        buffers = []
        for x in (state.k, state.v):
            buffer = x.new_zeros(*x.shape[:2], rows + max(64, rows // 8), x.shape[3])
            buffer[:, :, : x.shape[2]] = x
            buffers.append(buffer)
        room = Room(tuple(buffers), state.seen)
    at = counts.to(k.device, non_blocking=True)
    head = torch.arange(len(counts), device=k.device)
    for buffer, x in zip(room.buffers, (k, v), strict=True):
        buffer[:, head, at] = x
    room.used = state.seen + 1
    pos = torch.nn.functional.pad(state.pos, (0, rows - state.pos.shape[1]), value=-1)
    pos = pos.scatter(1, counts[:, None], state.seen)
    keys, values = (buffer[:, :, :rows] for buffer in room.buffers)
    return State(keys, values, pos, state.seen + 1, room), counts + 1


def _cut(state: State, kept: Tensor) -> State:
    """The state with only the rows that are `kept` (kv_heads, rows), moved up in each head."""
    if bool((kept == (state.pos >= 0)).all()):
        return state
    most = int(kept.sum(dim=1).max())
    order = torch.argsort(kept.logical_not().to(torch.uint8), dim=1, stable=True)[:, :most]
    real = kept.gather(1, order)
    rows, there = (x.to(state.k.device, non_blocking=True)[None, ..., None] for x in (order, real))
    k, v = (
        torch.where(there, x.gather(2, rows.expand(x.shape[0], -1, -1, x.shape[3])), 0.0)
        for x in (state.k, state.v)
    )
    return State(k, v, torch.where(real, state.pos.gather(1, order), -1), state.seen)
