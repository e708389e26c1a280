"""Launch configurations of the density kernels: a checked-in table, chosen by hand."""

from __future__ import annotations

from dataclasses import dataclass

from attnspec.fast.tuning import Table


@dataclass(frozen=True)
class DensityConfig:
    """A chunk is held in registers if a tile of `wide` slices of it has no more than `held`
    entries. Such tiles have about `tile` entries forward and `once` backward. Along longer chunks
    programs walk with tiles of `tile` entries of `wide` slices forward, and of `step` entries of
    `slim` slices backward.

    There are about `programs` programs at least: tiles get fewer slices, down to `least`, or chunks
    are divided, as are those of more than `longest` entries. `vector`: neighbouring slices that a
    thread reads at once.
    """

    held: int = 8192
    tile: int = 4096
    once: int = 4096
    step: int = 1024
    wide: int = 64
    slim: int = 32
    least: int = 16
    programs: int = 1056
    longest: int = 4096
    vector: int = 4


CANDIDATES = (
    DensityConfig(),
    DensityConfig(vector=2),
    DensityConfig(tile=2048, wide=32),
    DensityConfig(tile=8192),
    DensityConfig(slim=16),
    DensityConfig(step=2048),
    DensityConfig(once=2048),
    DensityConfig(longest=1024),
)

TABLE = Table("density", {("all",): CANDIDATES})


def config() -> DensityConfig:
    """The configuration in force."""
    return TABLE.forced() or TABLE.choose("all")


use_config = TABLE.use
