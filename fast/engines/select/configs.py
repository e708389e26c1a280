"""Launch configurations of the select kernels: a checked-in table, tuned by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class SelectConfig:
    """Tiles of the three kernel families.

    `pool_rows`: tokens a pooling step loads at once; `score_q` x `score_k`: tile of the score
    matrix; `row_items`: the longest row a top-k program holds in registers; `chunk_items`: what it
    loads at once of a longer row.
    """

    pool_rows: int = 64
    pool_warps: int = 4
    score_q: int = 64
    score_k: int = 64
    score_warps: int = 4
    score_stages: int = 2
    row_items: int = 8192
    chunk_items: int = 4096
    chunk_warps: int = 8


CANDIDATES = (
    SelectConfig(),
    SelectConfig(pool_rows=32, pool_warps=2),
    SelectConfig(pool_rows=128, pool_warps=8),
    SelectConfig(score_q=128, score_k=128, score_warps=8),
    SelectConfig(score_q=128, score_k=64, score_stages=3),
    SelectConfig(row_items=2048, chunk_items=2048, chunk_warps=4),
)

_forced: list[SelectConfig] = []


def config() -> SelectConfig:
    """The configuration in force."""
    return _forced[-1] if _forced else CANDIDATES[0]


@contextmanager
def use_config(forced: SelectConfig) -> Iterator[None]:
    """Run every select kernel inside the block with `forced`."""
    _forced.append(forced)
    try:
        yield
    finally:
        _forced.pop()
