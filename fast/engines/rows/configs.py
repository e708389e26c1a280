"""Launch configurations of the rows kernels: a checked-in table, tuned by an explicit command."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class RowsConfig:
    """Elements of a tile and the warps that hold it, both powers of two."""

    elements: int = 2048
    warps: int = 4


CANDIDATES = (RowsConfig(), RowsConfig(1024), RowsConfig(4096), RowsConfig(4096, 8))

_forced: list[RowsConfig] = []


def config() -> RowsConfig:
    """The configuration in force."""
    return _forced[-1] if _forced else CANDIDATES[0]


@contextmanager
def use_config(forced: RowsConfig) -> Iterator[None]:
    """Run every kernel of the engine inside the block with `forced`."""
    _forced.append(forced)
    try:
        yield
    finally:
        _forced.pop()
