"""Launch configurations of the decode kernel: a checked-in table, tuned by an explicit command."""

from __future__ import annotations

from dataclasses import dataclass, replace

from attnspec.fast.tuning import Table


@dataclass(frozen=True)
class DecodeConfig:
    """`tile`: keys a tile; `rows`: packed query rows a block; `workers`: workers a multiprocessor;
    `warps` and `stages` as Triton counts them."""

    tile: int
    rows: int
    workers: int
    warps: int
    stages: int


CANDIDATES = (
    DecodeConfig(tile=64, rows=64, workers=2, warps=4, stages=3),
    DecodeConfig(tile=64, rows=64, workers=2, warps=4, stages=4),
    DecodeConfig(tile=64, rows=64, workers=2, warps=4, stages=2),
    DecodeConfig(tile=64, rows=64, workers=1, warps=4, stages=6),
    DecodeConfig(tile=64, rows=64, workers=2, warps=8, stages=4),
    DecodeConfig(tile=32, rows=64, workers=3, warps=4, stages=3),
    DecodeConfig(tile=32, rows=64, workers=3, warps=4, stages=5),
    DecodeConfig(tile=32, rows=64, workers=4, warps=2, stages=4),
    DecodeConfig(tile=128, rows=64, workers=1, warps=8, stages=3),
    DecodeConfig(tile=128, rows=64, workers=1, warps=4, stages=3),
    DecodeConfig(tile=64, rows=64, workers=1, warps=8, stages=3),
    DecodeConfig(tile=64, rows=128, workers=1, warps=8, stages=3),
)
"""Worth trying for 16-bit heads of 128 on Hopper; an index or a table wants more stages."""

SHARED_BYTES = {80: 160000, 90: 220000, 100: 220000, 103: 220000}
"""Shared memory of a multiprocessor by architecture, less a margin."""
TILE_BYTES = 32768
"""The most a tile of keys or of queries takes."""
LARGEST_BLOCK = 128

SHARED = (
    DecodeConfig(tile=32, rows=32, workers=1, warps=4, stages=3),
    DecodeConfig(tile=16, rows=32, workers=1, warps=4, stages=4),
    DecodeConfig(tile=64, rows=32, workers=1, warps=4, stages=2),
    DecodeConfig(tile=32, rows=32, workers=2, warps=4, stages=2),
    DecodeConfig(tile=32, rows=32, workers=1, warps=8, stages=3),
)
"""Worth trying where a key head has several value heads, whose tiles are loaded together."""

SINGLE = (
    DecodeConfig(tile=32, rows=16, workers=2, warps=4, stages=2),
    DecodeConfig(tile=32, rows=16, workers=2, warps=4, stages=3),
    DecodeConfig(tile=64, rows=16, workers=2, warps=4, stages=2),
    DecodeConfig(tile=32, rows=16, workers=4, warps=4, stages=2),
    DecodeConfig(tile=64, rows=32, workers=1, warps=8, stages=2),
)
"""Worth trying for float32, which the matrix units do not serve."""


QUICK = ("few", "direct", 128, "quick")
"""The key of memory that brings a multiprocessor's tiles faster than one worker takes them in."""
QUICK_MEMORY = 30e9
"""Bytes a second for each multiprocessor: an H100 has 25e9, an H200 37e9."""


def _default(packed: str, found: str, d: int) -> DecodeConfig:
    stages, tile = 5 if found == "indirect" else 3, {256: 32, 128: 64}.get(d, 128)
    if packed == "many" or (found == "direct" and d == 128):
        return DecodeConfig(min(tile, 64), rows=64, workers=1, warps=8, stages=stages)
    return DecodeConfig(tile, rows=32, workers=2, warps=4, stages=stages)


TABLE = Table(
    "decode",
    {
        ("32-bit",): SINGLE,
        ("shared",): SHARED,
        **{
            (packed, found, d): (_default(packed, found, d), *CANDIDATES)
            for packed in ("few", "many")
            for found in ("direct", "indirect")
            for d in (64, 128, 256)
        },
        QUICK: (DecodeConfig(tile=64, rows=32, workers=2, warps=4, stages=3), *CANDIDATES),
    },
)
"""By query rows of a kv head (more than 32 are many), how keys are found, and head size. Each is
cut to what fits on chip."""


def config(
    arch: int, element_size: int, d: int, packed: int, indirect: bool, rows: int = 0, tile: int = 0,
    share: int = 1, bandwidth: float = 0.0,
) -> DecodeConfig:  # fmt: skip
    """The configuration in force, cut to what fits on chip.

    `arch` is 90 for Hopper, `d` the larger head size as a power of two, `packed` the query rows of
    a kv head; `indirect`: keys are found through an index or a block table, whose loads take stages
    too; `rows` and `tile`, unless 0, are the caller's own; `share`: value heads of a key head, all
    of whose tiles are loaded together; `bandwidth`: bytes a second that memory has for each
    multiprocessor, 0 if unknown.
    """
    chosen = TABLE.forced()
    if chosen is None and element_size >= 4:
        chosen = TABLE.choose("32-bit")
    elif chosen is None and share > 1:
        chosen = TABLE.choose("shared")
    elif chosen is None:
        found, width = "indirect" if indirect else "direct", d if d in (128, 256) else 64
        key = ("many" if packed > 32 else "few", found, width)
        quick = bandwidth > QUICK_MEMORY and key == QUICK[:3]
        chosen = TABLE.choose(*(QUICK if quick else key))
    largest = max(16, TILE_BYTES // (d * element_size))
    tile = min(tile or chosen.tile, largest)
    rows = min(rows or chosen.rows, largest, LARGEST_BLOCK)
    room = SHARED_BYTES.get(arch, 98304) - rows * d * element_size
    if share > 1:
        room //= chosen.workers
    buffers = max(1, room // ((1 + share) * tile * d * element_size))
    stages = min(chosen.stages, (2 * buffers if indirect else buffers) + 1)
    return replace(chosen, tile=tile, rows=rows, stages=max(stages, 2))


use_config = TABLE.use
