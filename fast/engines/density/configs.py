"""Launch configurations of the density kernels: a checked-in table, chosen by hand."""

from __future__ import annotations

from dataclasses import dataclass

from attnspec.fast.tuning import Table


@dataclass(frozen=True)
class DensityConfig:
    """`tile`: entries a program holds at a time; `fibres`: how many slices it works on at most,
    halved down to `least` as long as there are fewer than `programs` programs.
    """

    tile: int = 2048
    fibres: int = 64
    least: int = 16
    programs: int = 512
    num_warps: int = 4


CANDIDATES = (
    DensityConfig(),
    DensityConfig(tile=4096),
    DensityConfig(tile=4096, num_warps=8),
    DensityConfig(tile=2048, fibres=32),
    DensityConfig(tile=8192, num_warps=8),
    DensityConfig(tile=1024, fibres=16, least=4, num_warps=2),
)

TABLE = Table("density", {("all",): CANDIDATES})


def config() -> DensityConfig:
    """The configuration in force."""
    return TABLE.forced() or TABLE.choose("all")


use_config = TABLE.use
