"""Launch configurations of the memory kernels: a checked-in table, tuned by an explicit command."""

from __future__ import annotations

from dataclasses import dataclass, replace

from attnspec.fast.tuning import Table


@dataclass(frozen=True)
class MemoryConfig:
    """Tiles of the memory's kernels, of the linear one but for the last four.

    `piece`: tokens of a product at most, a power of two >= 16. `walk_items` is the most numbers of
    one of the two states a program of the walks keeps in registers, which decides how many value
    channels it owns; `tile` is the key and value channels of the kernels that walk nowhere.
    A memory of two layers has its own: tokens of a piece, hidden channels of a program.
    """

    piece: int = 64
    walk_items: int = 4096
    walk_warps: int = 4
    walk_stages: int = 2
    tile: int = 64
    tile_warps: int = 4
    tile_stages: int = 2
    deep_piece: int = 64
    deep_tile: int = 64
    deep_read: int = 32
    deep_warps: int = 8
    deep_stages: int = 2


CANDIDATES = (
    MemoryConfig(),
    MemoryConfig(walk_items=2048),
    MemoryConfig(walk_warps=8),
    MemoryConfig(piece=32),
    MemoryConfig(piece=128, walk_items=2048, walk_warps=8, tile_warps=8),
    MemoryConfig(tile=32),
    MemoryConfig(tile_warps=8),
)
FLOAT32 = MemoryConfig(
    piece=32, walk_items=2048, walk_warps=8, walk_stages=1, tile=32, tile_stages=1
)
"""IEEE float32 products run on no matrix unit, and larger tiles spill registers."""
OLDER = MemoryConfig(piece=32, walk_items=2048, walk_stages=1, tile=32, tile_stages=1)
"""16-bit inputs on processors before Hopper: less shared memory."""

DEEP = (
    MemoryConfig(),
    MemoryConfig(deep_tile=32),
    MemoryConfig(deep_warps=4),
    MemoryConfig(deep_tile=32, deep_warps=4),
    MemoryConfig(deep_piece=32, deep_tile=32, deep_warps=4),
    MemoryConfig(deep_stages=2),
)
DEEP32 = (
    MemoryConfig(deep_piece=32, deep_tile=32),
    MemoryConfig(deep_piece=16, deep_tile=32),
    MemoryConfig(deep_piece=32, deep_tile=32, deep_warps=4),
    MemoryConfig(deep_piece=32, deep_tile=16),
    MemoryConfig(deep_piece=64, deep_tile=32),
)
"""As `FLOAT32`: a product runs on no matrix unit."""

TABLE = Table(
    "memory",
    {
        ("16-bit",): CANDIDATES,
        ("16-bit", "other"): (
            OLDER,
            replace(OLDER, piece=64),
            replace(OLDER, walk_items=4096),
            replace(OLDER, walk_stages=2),
            replace(OLDER, tile=64),
            *CANDIDATES,
        ),
        ("32-bit",): (
            FLOAT32,
            replace(FLOAT32, piece=16),
            replace(FLOAT32, walk_items=1024),
            replace(FLOAT32, walk_warps=4),
            replace(FLOAT32, tile_warps=8),
        ),
        ("deep", "16-bit"): DEEP,
        ("deep", "32-bit"): DEEP32,
    },
)


def config(itemsize: int, hopper: bool) -> MemoryConfig:
    """The configuration in force for numbers of `itemsize` bytes."""
    key = ("32-bit",) if itemsize >= 4 else ("16-bit",) if hopper else ("16-bit", "other")
    return TABLE.forced() or TABLE.choose(*key)


def deep_config(itemsize: int, hopper: bool) -> MemoryConfig:
    """The configuration in force for a memory of two layers; processors before Hopper have the
    shared memory of float32's tiles.
    """
    kind = "16-bit" if itemsize < 4 and hopper else "32-bit"
    return TABLE.forced() or TABLE.choose("deep", kind)


use_config = TABLE.use
