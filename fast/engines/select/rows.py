"""Rows by their numbers: in another order, and where the last of a kind are."""

from __future__ import annotations

import torch
from torch import Tensor

from attnspec.fast.backend import choose_backend, load, unobserved
from attnspec.fast.kept import kept


def take_rows(x: Tensor, order: Tensor, *, backend: str | None = None) -> Tensor:
    """Row order[i] of `x` (rows, channels) as row i; `order` (n,) of int32 or int64.

    For callers that know their numbers to be right. Where a gradient or a tracer looks on, it is
    torch's own selection.
    """
    if choose_backend(backend, x) == "triton" and unobserved(x) and x.element_size() < 8:
        return load("attnspec.fast.engines.select.triton_rows").take_rows(x, order)
    return x.index_select(0, order)


def last_unflagged(flags: Tensor, count: int, *, backend: str | None = None) -> Tensor:
    """int32 (count,), ascending: where the last `count` entries of `flags` bool (n,) are that are
    False. Where there are fewer of them, the first numbers are -1.
    """
    if choose_backend(backend, flags) == "triton" and unobserved(flags):
        return load("attnspec.fast.engines.select.triton_rows").last_unflagged(flags, count)
    (places,) = kept(_places, flags.device, flags.shape[0])
    return torch.where(flags, -1, places).sort().values[flags.shape[0] - count :]


def _places(device: torch.device, count: int) -> tuple[Tensor]:
    return (torch.arange(count, dtype=torch.int32, device=device),)
