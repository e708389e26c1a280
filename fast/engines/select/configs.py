"""Launch configurations of the select kernels: a checked-in table, tuned by hand."""

from __future__ import annotations

from dataclasses import dataclass

from attnspec.fast.tuning import Table


@dataclass(frozen=True)
class SelectConfig:
    """Tiles of the three kernel families.

    `pool_rows`: tokens a pooling step loads at once; `score_q` x `score_k`: tile of the score
    matrix; `row_items`: the longest row a top-k program holds in registers; `chunk_items`: what it
    loads at once of a longer row.
    """

    pool_rows: int = 32
    pool_warps: int = 2
    score_q: int = 64
    score_k: int = 64
    score_warps: int = 4
    score_stages: int = 2
    row_items: int = 8192
    chunk_items: int = 4096
    chunk_warps: int = 8


CANDIDATES = (
    SelectConfig(),
    SelectConfig(pool_rows=64, pool_warps=4),
    SelectConfig(pool_rows=16, pool_warps=1),
    SelectConfig(score_q=128, score_k=128, score_warps=8),
    SelectConfig(score_q=128, score_k=64, score_stages=3),
    SelectConfig(row_items=2048, chunk_items=2048, chunk_warps=4),
)

TABLE = Table("select", {("all",): CANDIDATES})


def config() -> SelectConfig:
    """The configuration in force."""
    return TABLE.forced() or TABLE.choose("all")


use_config = TABLE.use
