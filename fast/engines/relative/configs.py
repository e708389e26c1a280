"""Launch configurations of the relative kernels; `use_config` forces any other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from attnspec.fast.tuning import Key, Table, place, places

KINDS = ("forward", "specialised", "dq", "dkdv", "dtable")
KEYS = 64
"""Keys a tile: the length of the ring that `triton_rotate` turns, in every configuration."""


@dataclass(frozen=True)
class RelativeConfig:
    """`rows` queries a tile, a multiple of 16 up to 128 (forward) or 64; 16 of them a warp keep the
    turning of a tile inside each warp. The specialised forward kernel has 128 rows and 8 warps, and
    as many more for the tiles that it brings as it needs.
    """

    rows: int
    warps: int
    stages: int


CANDIDATES: Mapping[Key, tuple[RelativeConfig, ...]] = {
    ("forward", 64): (
        RelativeConfig(128, 8, 3),
        RelativeConfig(64, 4, 3),
        RelativeConfig(64, 4, 2),
        RelativeConfig(128, 8, 2),
    ),
    ("forward", 128): (
        RelativeConfig(128, 8, 3),
        RelativeConfig(128, 8, 2),
        RelativeConfig(64, 4, 3),
        RelativeConfig(64, 4, 1),
    ),
    ("forward", 256): (RelativeConfig(64, 4, 1),),
    ("dq", 64): (RelativeConfig(64, 4, 2), RelativeConfig(64, 4, 3)),
    ("dq", 128): (RelativeConfig(64, 4, 2), RelativeConfig(64, 4, 1)),
    ("dq", 256): (RelativeConfig(64, 4, 1),),
    ("dkdv", 64): (RelativeConfig(64, 4, 2), RelativeConfig(64, 4, 1)),
    ("dkdv", 128): (RelativeConfig(64, 4, 2), RelativeConfig(64, 4, 1)),
    ("dkdv", 256): (RelativeConfig(64, 4, 1),),
    ("dtable", 64): (RelativeConfig(64, 4, 2), RelativeConfig(64, 4, 1)),
    ("dtable", 128): (RelativeConfig(64, 4, 1), RelativeConfig(64, 4, 2)),
    ("dtable", 256): (RelativeConfig(64, 4, 1),),
}
"""By kernel and padded head size, for 16-bit inputs on Hopper; the first is in force."""

SPECIALISED: Mapping[Key, tuple[RelativeConfig, ...]] = {
    ("specialised", 64): (RelativeConfig(128, 8, 4), RelativeConfig(128, 8, 3)),
    ("specialised", 128): (RelativeConfig(128, 8, 3), RelativeConfig(128, 8, 2)),
}
"""The specialised kernel's, which is for 16-bit inputs on Hopper alone."""

SMALL_MEMORY = RelativeConfig(32, 4, 1)
"""16-bit inputs on architectures without Hopper's shared memory."""
SINGLE = RelativeConfig(32, 8, 1)
"""float32 inputs, which the matrix units do not serve."""

TABLE = Table(
    "relative",
    {
        **places(
            CANDIDATES,
            other={128: SMALL_MEMORY, 256: SMALL_MEMORY},
            single={128: SINGLE, 256: SINGLE},
        ),
        **SPECIALISED,
    },
    KINDS,
)


def config(kind: str, arch: int, element_size: int, width: int, q_tokens: int) -> RelativeConfig:
    """The configuration in force for a kernel, an architecture (90 is Hopper), bytes an element,
    the larger head size padded to a power of two, and the number of queries.
    """
    forced = TABLE.forced(kind)
    if forced is not None:
        return forced
    where = place(arch, element_size, width)
    chosen = TABLE.choose(kind, *where)
    if len(where) > 1:
        return chosen
    if q_tokens <= 16:
        return RelativeConfig(16, 4, 1)
    return RelativeConfig(64, 4, chosen.stages) if q_tokens <= 64 else chosen


def specialises(q_tokens: int) -> bool:
    """Whether the specialised forward kernel is to take so many queries, where it can: one with
    rows to spare has no use for half of its warps. A configuration forced on the other one is.
    """
    return q_tokens > 64 and TABLE.forced("forward") is None


use_config = TABLE.use
