"""Launch configurations of the filter kernels; `use_config` forces any other."""

from __future__ import annotations

from dataclasses import dataclass

from attnspec.fast.tuning import Table


@dataclass(frozen=True)
class FilterConfig:
    """A program takes `tiles` tiles of about `numbers` numbers each, as many whole rows as fit."""

    numbers: int
    tiles: int
    warps: int

    def rows(self, width: int) -> int:
        """Rows of a tile whose channels are padded to `width`, a power of two."""
        return max(self.numbers // width, 1)


CANDIDATES = (
    FilterConfig(4096, 2, 4),
    FilterConfig(2048, 4, 4),
    FilterConfig(4096, 4, 4),
    FilterConfig(8192, 2, 8),
    FilterConfig(8192, 1, 8),
    FilterConfig(2048, 1, 4),
)
"""The first is in force."""

TABLE = Table("filters", {("all",): CANDIDATES})


def config() -> FilterConfig:
    """The configuration in force."""
    return TABLE.forced() or TABLE.choose("all")


use_config = TABLE.use
