"""Launch configurations of the additive kernels: a checked-in table, tuned by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


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

_forced: list[AdditiveConfig] = []


def config() -> AdditiveConfig:
    """The configuration in force."""
    return _forced[-1] if _forced else CANDIDATES[0]


@contextmanager
def use_config(forced: AdditiveConfig) -> Iterator[None]:
    """Run every additive kernel inside the block with `forced`."""
    _forced.append(forced)
    try:
        yield
    finally:
        _forced.pop()
