"""Launch configurations of the additive kernels: a checked-in table, tuned by hand."""

from __future__ import annotations

from dataclasses import dataclass

from attnspec.fast.tuning import Table


@dataclass(frozen=True)
class AdditiveConfig:
    """`rows` x `columns`: tile of scores held in registers; `channels`: channels of a gradient
    that a program accumulates; `programs`: how many programs a row's slots are split into, at
    least, if there are enough of them.
    """

    rows: int = 32
    columns: int = 64
    channels: int = 8
    num_warps: int = 4
    programs: int = 512


CANDIDATES = (
    AdditiveConfig(),
    AdditiveConfig(rows=64, columns=64),
    AdditiveConfig(rows=32, columns=128),
    AdditiveConfig(rows=16, columns=128, channels=16),
    AdditiveConfig(rows=64, columns=128, num_warps=8),
)

TABLE = Table("additive", {("all",): CANDIDATES})


def config() -> AdditiveConfig:
    """The configuration in force."""
    return TABLE.forced() or TABLE.choose("all")


use_config = TABLE.use
