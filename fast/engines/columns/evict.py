"""One step of a cache that keeps what was attended to most: two custom ops, on Triton alone."""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from attnspec.fast.backend import load
from attnspec.fast.engines.columns.op import positive
from attnspec.fast.engines.operation import Operation
from attnspec.fast.engines.select.configs import config


@cache
def _kernels() -> ModuleType:
    """The implementation, imported on first use."""
    return load("attnspec.fast.engines.columns.triton_evict")


def run_received(q: Tensor, k: Tensor, a: Tensor, scale: float) -> Tensor:
    with torch.cuda.device_of(q):
        return _kernels().received(q, k, a, scale)


received_op = Operation("attnspec::received", run_received)


@received_op.register_fake
def _(q: Tensor, k: Tensor, a: Tensor, scale: float) -> Tensor:
    return q.new_empty(k.shape[1:3], dtype=torch.float32)


def received(q: Tensor, k: Tensor, a: Tensor, *, scale: float | None = None) -> Tensor:
    """Scores (kv_heads, n), float32: those before, `a` (kv_heads, n - w), and what every key has
    got from the heads of its group in the last w rows, causally.

    q (1, H, w, d), k (1, kv_heads, n, d), n >= w >= 1. No gradient.
    """
    q, scale = positive(q, scale)
    return received_op(q, k, a, scale)


def run_evict(
    k: Tensor, v: Tensor, a: Tensor, pos: Tensor, seen: int, hh: int, rec: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.cuda.device_of(k):
        return _kernels().evict(k, v, a, pos, seen, hh, rec)


evict_op = Operation("attnspec::evict", run_evict)


@evict_op.register_fake
def _(
    k: Tensor, v: Tensor, a: Tensor, pos: Tensor, seen: int, hh: int, rec: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kept = hh + rec
    rows = (x.new_empty(*x.shape[:2], kept, x.shape[3]) for x in (k, v))
    return *rows, *(x.new_empty(x.shape[0], kept) for x in (a, pos))  # type: ignore[return-value]


def evictable(n: int, rec: int) -> bool:
    """Whether the rows to choose among, all of n but the last `rec`, fit in registers."""
    return n - rec <= config().row_items


def evict(
    k: Tensor, v: Tensor, a: Tensor, pos: Tensor, seen: int, hh: int, rec: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """k, v, a and pos of the `hh` rows with the highest a but the last `rec` rows, and of these.

    k (1, kv_heads, n, d), v (1, kv_heads, n, dv) and a (kv_heads, n) float32, n > hh + rec; `pos`
    int64 (kv_heads, n - w) are those of the old rows, and new rows count on from `seen`. Ties go to
    the lower index; ascending. No gradient.
    """
    return evict_op(k, v, a, pos, seen, hh, rec)
