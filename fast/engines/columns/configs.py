"""Launch configurations of the columns kernels: a checked-in table, tuned by hand."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attnspec.fast.tuning import Table


@dataclass(frozen=True)
class ColumnsConfig:
    """Largest tile of keys and of query rows, and how a program runs.

    `programs` is how many programs the keys are split among where a few rows stay on chip, at
    least, if there are enough keys.
    """

    block_k: int
    block_q: int
    num_warps: int
    num_stages: int
    programs: int = 1024


ROWS = (
    ColumnsConfig(64, 128, 4, 3),
    ColumnsConfig(64, 128, 4, 4),
    ColumnsConfig(128, 64, 4, 3),
    ColumnsConfig(128, 64, 4, 2),
    ColumnsConfig(64, 64, 4, 3),
    ColumnsConfig(128, 128, 8, 3),
)
"""For a few rows against all keys: their kernels walk over the keys."""

CANDIDATES = (
    ColumnsConfig(128, 64, 4, 2),
    ColumnsConfig(128, 64, 4, 3),
    ColumnsConfig(128, 64, 8, 2),
    ColumnsConfig(256, 64, 8, 2),
    ColumnsConfig(64, 64, 4, 3),
    ColumnsConfig(128, 128, 8, 2),
    ColumnsConfig(128, 32, 4, 3),
)

LARGE = (
    ColumnsConfig(64, 32, 4, 2),
    ColumnsConfig(64, 32, 4, 1),
    ColumnsConfig(64, 64, 4, 2),
    ColumnsConfig(64, 64, 8, 2),
    ColumnsConfig(128, 32, 8, 2),
)
"""For float32 and heads of more than 128, whose tiles take twice the shared memory."""

TABLE = Table("columns", {("rows",): ROWS, ("16-bit",): CANDIDATES, ("large",): LARGE})


def config(d: int, dtype: torch.dtype, few: bool = False) -> ColumnsConfig:
    """The configuration in force for head size `d`, inputs of `dtype`, and a few rows or many."""
    large = dtype == torch.float32 or d > 128
    return TABLE.forced() or TABLE.choose("large" if large else "rows" if few else "16-bit")


use_config = TABLE.use
