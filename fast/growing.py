"""Caches that grow by a token a step without being copied each time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import check_same

TOKENS = 2
"""The axis of (batch, heads, tokens, ...) that grows."""


@dataclass
class Room:
    """Buffers with spare room behind the first `used` tokens. Updated in place by `append`."""

    buffers: tuple[Tensor, ...]
    used: int


def append(
    room: Room | None, old: tuple[Tensor, ...], new: tuple[Tensor, ...], first: int = 0
) -> tuple[tuple[Tensor, ...], Room]:
    """The tensors `old` with the tokens of `new` behind them, and the room they live in.

    Each is (batch, heads, tokens, ...); `old` begins at place `first` of its room, before which
    lie tokens that are read no more. If `old` ends where `room` is used up to, the new tokens
    are written IN PLACE behind it; `old` itself, a view of what is before, keeps its values. Else
    (no room, too little of it, or another continuation of `old` has taken it) everything moves to
    new buffers, an eighth larger than needed, so that a copy is paid for by many steps.
    """
    tokens, added = old[0].shape[TOKENS], new[0].shape[TOKENS]
    total = first + tokens + added
    if room is None or room.used != first + tokens or room.buffers[0].shape[TOKENS] < total:
        first, total = 0, tokens + added
        capacity = total + max(64, total // 8)
        buffers = []
        for x in old:
            buffer = x.new_empty(*x.shape[:TOKENS], capacity, *x.shape[TOKENS + 1 :])
            buffer[:, :, :tokens] = x
            buffers.append(buffer)
        room = Room(tuple(buffers), tokens)
    for buffer, x in zip(room.buffers, new, strict=True):
        buffer[:, :, total - added : total] = x
    room.used = total
    return tuple(buffer[:, :, first:total] for buffer in room.buffers), room


def check_continues(state: Any, k: Tensor, v: Tensor) -> None:
    """New keys and values are shaped as those of `state` but for tokens, and of their dtype."""
    for name, cached, new in (("k", state.k, k), ("v", state.v, v)):
        check_same(name, new, f"state.{name}", cached)
        if cached.shape[:2] != new.shape[:2] or cached.shape[3] != new.shape[3]:
            raise ValueError(
                f"{name}: got shape {tuple(new.shape)}, "
                f"expected the state's {tuple(cached.shape)} but for tokens"
            )


def checkable(x: Tensor) -> bool:
    """True if reading `x` costs nothing: a CPU tensor outside of torch.compile.

    Checks of what a tensor holds run only then; on a GPU they would stall it.
    """
    return not x.is_cuda and not torch.compiler.is_compiling()
