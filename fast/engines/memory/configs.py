"""Launch configurations of the memory kernels: a checked-in table, tuned by an explicit command."""

from __future__ import annotations

from dataclasses import dataclass, replace

from attnspec.fast.tuning import Table


@dataclass(frozen=True)
class MemoryConfig:
    """Tiles of the linear memory's kernels, and of those for two layers.

    `piece`: tokens of a product at most, a power of two >= 16. `walk_items` is the most numbers of
    one of the two states a program of the walks keeps in registers, which decides how many value
    channels it owns; `tile` is the key and value channels of the kernels that walk nowhere.
    A memory of two layers has tiles of its own, those that begin with `deep`: tokens of a piece,
    and hidden channels that a program owns, or goes through at once if it `deep_read`s.
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
    MemoryConfig(deep_tile=32, deep_warps=4),
    MemoryConfig(deep_stages=1),
    MemoryConfig(deep_piece=32, deep_tile=32, deep_warps=4),
)
DEEP_WIDE = (
    MemoryConfig(deep_tile=32, deep_read=16),
    MemoryConfig(deep_tile=32, deep_read=16, deep_stages=1),
    MemoryConfig(deep_piece=32, deep_tile=32, deep_read=16),
)
DEEP32 = (
    MemoryConfig(deep_piece=32, deep_tile=32, deep_read=16, deep_stages=1),
    MemoryConfig(deep_piece=32, deep_tile=16, deep_read=16, deep_stages=1),
    MemoryConfig(deep_piece=16, deep_tile=32, deep_read=16, deep_stages=1),
    MemoryConfig(deep_piece=32, deep_tile=32, deep_read=16, deep_warps=4, deep_stages=1),
)
"""As for `FLOAT32`, products run on no matrix unit. Also 16-bit inputs before Hopper."""
DEEP32_WIDE = (
    MemoryConfig(deep_piece=16, deep_tile=16, deep_read=16, deep_stages=1),
    MemoryConfig(deep_piece=16, deep_tile=32, deep_read=16, deep_stages=1),
    MemoryConfig(deep_piece=32, deep_tile=16, deep_read=16, deep_stages=1),
)
"""Keys or values of more than 64 channels."""

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
        ("deep", "16-bit", "wide"): DEEP_WIDE,
        ("deep", "32-bit"): DEEP32,
        ("deep", "32-bit", "wide"): DEEP32_WIDE,
    },
)


def config(itemsize: int, hopper: bool) -> MemoryConfig:
    """The configuration in force for numbers of `itemsize` bytes."""
    key = ("32-bit",) if itemsize >= 4 else ("16-bit",) if hopper else ("16-bit", "other")
    return TABLE.forced() or TABLE.choose(*key)


def deep_config(itemsize: int, hopper: bool, widest: int) -> MemoryConfig:
    """The configuration in force for a memory of two layers, of up to `widest` channels of keys and
    of values.
    """
    kind = "16-bit" if itemsize < 4 and hopper else "32-bit"
    key = ("deep", kind, "wide") if widest > 64 else ("deep", kind)
    return TABLE.forced() or TABLE.choose(*key)


def least_side(itemsize: int) -> int:
    """The least side of a tile, for a memory of two layers.

    Products of 16-bit inputs are in TF32. From such products over 16 numbers, outside a loop, ptxas
    12.8 has made descriptors of shared memory of registers that held something else.
    """
    return 16 if itemsize >= 4 else 32


use_config = TABLE.use
