"""Launch configurations of the columns kernels: a checked-in table, tuned by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ColumnsConfig:
    """Largest tile of keys and of query rows, and how a program runs.

    `programs` is how many programs a first pass (`row_lse`) splits the keys into, at least, if
    there are enough keys.
    """

    block_k: int
    block_q: int
    num_warps: int
    num_stages: int
    programs: int = 1024


CANDIDATES = (
    ColumnsConfig(128, 64, 4, 2),
    ColumnsConfig(128, 64, 4, 3),
    ColumnsConfig(128, 64, 8, 2),
    ColumnsConfig(256, 64, 8, 2),
    ColumnsConfig(64, 64, 4, 3),
    ColumnsConfig(128, 128, 8, 2),
    ColumnsConfig(128, 32, 4, 3),
)

_forced: list[ColumnsConfig] = []


def config(d: int, dtype: torch.dtype) -> ColumnsConfig:
    """The configuration for head size `d`: a float32 tile takes twice the shared memory."""
    if _forced:
        return _forced[-1]
    if dtype == torch.float32 or d > 128:
        return ColumnsConfig(64, 32, 4, 2)
    return CANDIDATES[0]


@contextmanager
def use_config(forced: ColumnsConfig) -> Iterator[None]:
    """Run every columns kernel inside the block with `forced`."""
    _forced.append(forced)
    try:
        yield
    finally:
        _forced.pop()
