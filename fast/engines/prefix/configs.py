"""Launch configurations of the prefix kernels: a checked-in table, tuned by an explicit command."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from attnspec.fast.tuning import LARGE_MEMORY, Table

KINDS = ("forward", "rows", "sums")
FEW = 16
"""So many rows are one small tile, as those of a decoded token."""


@dataclass(frozen=True)
class PrefixConfig:
    """`rows` of queries a tile; `warps` and `stages` as Triton counts them; `registers` is the most
    that a thread may have, unless 0.

    `chunk`: channels summed over at a time; if that is all of them, a program reads Z once. Of the
    sums: features a program holds, beside `columns` of Z. There are `programs` programs if they
    take no more than `tiles` tiles of rows each, or, of the sums, no less: theirs are written.
    """

    rows: int
    chunk: int
    warps: int
    stages: int
    tiles: int = 16
    programs: int = 1056
    columns: int = 128
    registers: int = 0

    def fitted(self, rows: int) -> PrefixConfig:
        """With tiles for so many rows, if they are few; the kernel that sums over them has as many
        features whatever their number.
        """
        return self if rows > FEW else replace(self, rows=FEW, stages=1, registers=0)


PAIRED = PrefixConfig(32, 128, 8, 2, registers=128)
"""Two programs of it fit into a multiprocessor, next to nothing being spilled: one computes while
the other waits for memory."""
SUMMED = replace(PAIRED, tiles=16, programs=528)

CANDIDATES: Mapping[tuple[str, int], tuple[PrefixConfig, ...]] = {
    ("forward", 128): (
        PAIRED,
        replace(PAIRED, stages=1),
        replace(PAIRED, stages=3),
        replace(PAIRED, tiles=64, programs=528),
        replace(PAIRED, chunk=64),
        PrefixConfig(32, 128, 4, 2),
        PrefixConfig(64, 128, 8, 2),
        PrefixConfig(128, 128, 8, 1),
    ),
    ("forward", 256): (
        PrefixConfig(32, 32, 8, 1),
        PrefixConfig(16, 64, 8, 1),
        PrefixConfig(32, 32, 8, 2),
    ),
    ("rows", 128): (
        PAIRED,
        replace(PAIRED, stages=1),
        replace(PAIRED, stages=3),
        replace(PAIRED, tiles=64, programs=528),
        PrefixConfig(32, 128, 4, 2),
        PrefixConfig(64, 128, 8, 2),
    ),
    ("rows", 256): (
        PrefixConfig(32, 32, 8, 1),
        PrefixConfig(16, 64, 8, 1),
    ),
    ("sums", 128): (
        SUMMED,
        replace(SUMMED, stages=3),
        replace(SUMMED, rows=64, registers=0),
        replace(SUMMED, tiles=32, programs=264),
    ),
    ("sums", 256): (
        SUMMED,
        replace(SUMMED, stages=3),
    ),
}
"""By kernel and padded head size, for 16-bit inputs on Hopper."""

OTHER = {
    "forward": PrefixConfig(16, 32, 4, 1),
    "rows": PrefixConfig(16, 32, 4, 1),
    "sums": PrefixConfig(32, 64, 4, 1, programs=528, columns=64),
}
"""16-bit inputs on architectures without Hopper's shared memory."""
SINGLE = {
    ("forward", 128): PrefixConfig(32, 16, 8, 1),
    ("forward", 256): PrefixConfig(16, 32, 8, 1),
    ("rows", 128): PrefixConfig(32, 16, 8, 1),
    ("rows", 256): PrefixConfig(16, 16, 8, 1),
    ("sums", 128): PrefixConfig(32, 64, 8, 1, programs=528, columns=64),
    ("sums", 256): PrefixConfig(32, 64, 8, 1, programs=528, columns=64),
}
"""float32 inputs, which the matrix units do not serve."""

TABLE = Table(
    "prefix",
    {
        **{(kind, "16-bit", width): each for (kind, width), each in CANDIDATES.items()},
        **{
            (kind, "other", width): (each, replace(each, warps=8), replace(each, rows=32))
            for kind, each in OTHER.items()
            for width in (128, 256)
        },
        **{
            (kind, "32-bit", width): (each, replace(each, warps=4), replace(each, stages=2))
            for (kind, width), each in SINGLE.items()
        },
    },
    KINDS,
)


def config(kind: str, arch: int, element_size: int, width: int, rows: int) -> PrefixConfig:
    """The configuration in force for a kernel ("forward", "rows", "sums"), an architecture (90 is
    Hopper), bytes an element, the larger head size padded to a power of two, and the rows a head.
    """
    forced = TABLE.forced(kind)
    if forced is not None:
        return forced
    numbers = "32-bit" if element_size == 4 else "16-bit" if arch in LARGE_MEMORY else "other"
    chosen = TABLE.choose(kind, numbers, max(width, 128))
    return chosen if kind == "sums" else chosen.fitted(rows)


use_config = TABLE.use
