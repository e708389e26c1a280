"""Rows by their numbers: in another order and back, and where the last of a kind are."""

from __future__ import annotations

import torch
from torch import Tensor

from attnspec.fast.backend import choose_backend, load, unobserved
from attnspec.fast.kept import counting


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
    places = torch.where(flags, -1, counting(flags.device, flags.shape[0]))
    return places.sort().values[flags.shape[0] - count :].to(torch.int32)


def inverse(order: Tensor) -> Tensor:
    """Where each entry of a permutation (n,) of int64 stands."""
    return torch.empty_like(order).scatter_(0, order, counting(order.device, order.shape[0]))
