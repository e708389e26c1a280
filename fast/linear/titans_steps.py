"""Titans layer by layer of a decoder: one row into a layout of `TitansBlock` and out of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from attnspec.fast.backend import wide
from attnspec.fast.dense.attention import attend
from attnspec.fast.linear.titans_checks import Layers
from attnspec.fast.linear.titans_decode import MemoryState, decode_step
from attnspec.fast.linear.titans_layouts import directed, gate, projected
from attnspec.fast.linear.titans_memory import mlp_memory

if TYPE_CHECKING:
    from attnspec.fast.linear.titans_module import TitansBlock


class TitansState(NamedTuple):
    """The memory; keys and values (batch, 1, rows, width) that the attention still sees, those of
    the persistent tokens first; rows before that the convolutions see (batch, filters - 1, width);
    the weights a segment of MAC began with, and how many tokens it has.
    """

    memory: MemoryState
    k: Tensor
    v: Tensor
    before: Tensor
    asked: Layers = ()
    pos: int = 0


Step = Callable[["TitansBlock", Tensor, TitansState], tuple[Tensor, TitansState]]


def first_state(block: TitansBlock, batch: int) -> TitansState:
    """The state of `block` after its persistent tokens."""
    if block.layout == "mac" and not block.tokenwise:
        raise ValueError("tokenwise: got False, expected True: without it MAC has no token order")
    W = tuple(wide(w).expand(batch, 1, *w.shape) for w in block.first)
    memory = MemoryState(W, W, tuple(torch.zeros_like(w) for w in W))
    prefix = block.prefix.expand(batch, *block.prefix.shape)
    empty = prefix[:, None, :0]
    past = len(block.filters[0]) - 1 if block.layout == "memory" else 0
    before = prefix.new_zeros(batch, past, prefix.shape[2])
    state = TitansState(memory, empty, empty, before)
    if block.layout in ("mac", "mag"):
        state = state._replace(k=_rows(prefix, block.attn[1]), v=_rows(prefix, block.attn[2]))
    if block.layout in BEFORE:
        for token in range(prefix.shape[1]):
            _, state = BEFORE[block.layout](block, prefix[:, token : token + 1], state)
    return state


def mac_step(block: TitansBlock, x: Tensor, state: TitansState) -> tuple[Tensor, TitansState]:
    """A row attends to its segment and to what the memory said before it; then it is stored."""
    if state.pos in (0, block.segment):
        kept = block.prefix.shape[0]
        memory = state.memory._replace(pos=0)
        state = TitansState(
            memory, state.k[:, :, :kept], state.v[:, :, :kept], state.before, memory.W
        )
    said = mlp_memory(state.asked, directed(_rows(x, block.mem[0]), True))[:, 0]
    state = _appended(block, torch.cat([said, x], 1), state)
    y, _ = attend(_rows(x, block.attn[0]), state.k, state.v)
    read, memory = _store(block, y[:, 0], state.memory, x)
    after = state._replace(memory=memory, pos=state.pos + 1)
    return gate(y[:, 0], read, tuple(block.gains)), after


def mag_step(block: TitansBlock, x: Tensor, state: TitansState) -> tuple[Tensor, TitansState]:
    """A row attends to the persistent tokens and its window, and is stored."""
    state = _appended(block, x, state, sinks=block.prefix.shape[0])
    y, _ = attend(_rows(x, block.attn[0]), state.k, state.v)
    read, memory = _store(block, x, state.memory, x)
    return gate(y[:, 0], read, tuple(block.gains)), state._replace(memory=memory)


def mal_step(block: TitansBlock, x: Tensor, state: TitansState) -> tuple[Tensor, TitansState]:
    """A row is stored, and what the memory reads attends to its window."""
    read, memory = _store(block, x, state.memory, x)
    state = _appended(block, read, state._replace(memory=memory), sinks=0)
    y, _ = attend(_rows(read, block.attn[0]), state.k, state.v)
    return y[:, 0], state


def memory_step(block: TitansBlock, x: Tensor, state: TitansState) -> tuple[Tensor, TitansState]:
    """A row is stored behind the activation, convolution and norm, and read."""
    rows = torch.cat([state.before, x], 1)
    q, k, v = (part[:, :, -1:] for part in block.inputs(rows))
    theta, eta, alpha = (rate[:, None] for rate in block.step_sizes(x))
    y, memory = decode_step(state.memory, q, k, v, (theta, eta, alpha), block.chunk)
    return y[:, 0], state._replace(memory=memory, before=rows[:, 1:])


def _mag_prefix(block: TitansBlock, x: Tensor, state: TitansState) -> tuple[Tensor, TitansState]:
    """A persistent token is stored; the attention has it already."""
    read, memory = _store(block, x, state.memory, x)
    return read, state._replace(memory=memory)


STEPS: dict[str, Step] = {
    "mac": mac_step, "mag": mag_step, "mal": mal_step, "memory": memory_step,
}  # fmt: skip
BEFORE: dict[str, Step] = {"mag": _mag_prefix, "mal": mal_step, "memory": memory_step}
"""What a persistent token does, where it is stored at all."""


def _rows(x: Tensor, matrix: Tensor) -> Tensor:
    """x (batch, rows, width) through a matrix, with an axis of one head."""
    return projected(x, matrix)[:, None]


def _appended(
    block: TitansBlock, x: Tensor, state: TitansState, sinks: int | None = None
) -> TitansState:
    """The keys and values of rows x behind the others; all stay, or `sinks` and a window."""
    k = torch.cat([state.k, _rows(x, block.attn[1])], 2)
    v = torch.cat([state.v, _rows(x, block.attn[2])], 2)
    if sinks is not None and k.shape[2] > sinks + block.window:
        k, v = (torch.cat([y[:, :, :sinks], y[:, :, -block.window :]], 2) for y in (k, v))
    return state._replace(k=k, v=v)


def _store(
    block: TitansBlock, x: Tensor, memory: MemoryState, rates_of: Tensor
) -> tuple[Tensor, MemoryState]:
    """What the memory says (batch, 1, width) of a row x once it has stored it."""
    q, k = (directed(_rows(x, matrix), True) for matrix in list(block.mem)[:2])
    v = _rows(x, block.mem[2])
    theta, eta, alpha = (rate[:, None] for rate in block.step_sizes(rates_of))
    y, memory = decode_step(memory, q, k, v, (theta, eta, alpha), block.chunk)
    return y[:, 0], memory
