"""Launch configurations of the rows kernels: a checked-in table, tuned by an explicit command."""

from __future__ import annotations

from dataclasses import dataclass

from attnspec.fast.tuning import Table


@dataclass(frozen=True)
class RowsConfig:
    """Elements of a tile and the warps that hold it, both powers of two."""

    elements: int = 2048
    warps: int = 4


CANDIDATES = (RowsConfig(), RowsConfig(1024), RowsConfig(4096), RowsConfig(4096, 8))

TABLE = Table("rows", {("all",): CANDIDATES})


def config() -> RowsConfig:
    """The configuration in force."""
    return TABLE.forced() or TABLE.choose("all")


use_config = TABLE.use
