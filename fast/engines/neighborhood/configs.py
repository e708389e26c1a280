"""Launch configurations of the neighborhood kernels: a checked-in table.

The first candidate of an entry is the one in force; `use_config` forces any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from attnspec.fast.tuning import Key, Table, place, places

OWN_KINDS = ("forward", "dq", "dkdv")
KINDS = (*OWN_KINDS, "scores", "values", "keys")


@dataclass(frozen=True)
class NeighborhoodConfig:
    """`owned` tokens of a program, `walked` tokens a step; `warps` and `stages` as Triton's.

    A small owned box has a small union of windows, so fewer pairs are visited; a large one reads
    fewer bytes a pair. `registers`, if not 0, is the most a thread may use, so that more programs
    share a multiprocessor.
    """

    owned: int
    walked: int
    warps: int
    stages: int
    registers: int = 0


CANDIDATES: Mapping[Key, tuple[NeighborhoodConfig, ...]] = {
    ("forward", 64): (
        NeighborhoodConfig(64, 64, 4, 3, 168),
        NeighborhoodConfig(64, 64, 4, 3),
        NeighborhoodConfig(64, 128, 4, 3),
        NeighborhoodConfig(128, 64, 4, 3),
        NeighborhoodConfig(128, 128, 8, 3),
        NeighborhoodConfig(128, 64, 8, 3),
        NeighborhoodConfig(64, 64, 4, 4),
        NeighborhoodConfig(64, 64, 4, 2),
    ),
    ("forward", 128): (
        NeighborhoodConfig(64, 64, 4, 3),
        NeighborhoodConfig(128, 64, 8, 3),
        NeighborhoodConfig(128, 128, 8, 2),
        NeighborhoodConfig(64, 128, 4, 2),
    ),
    ("forward", 256): (NeighborhoodConfig(64, 32, 4, 2), NeighborhoodConfig(64, 64, 8, 2)),
    ("dq", 64): (
        NeighborhoodConfig(64, 64, 4, 3, 168),
        NeighborhoodConfig(64, 64, 4, 3),
        NeighborhoodConfig(64, 128, 4, 2),
        NeighborhoodConfig(128, 64, 8, 3),
        NeighborhoodConfig(64, 64, 4, 2),
    ),
    ("dq", 128): (
        NeighborhoodConfig(64, 64, 4, 2),
        NeighborhoodConfig(128, 64, 8, 2),
    ),
    ("dq", 256): (NeighborhoodConfig(64, 32, 4, 2), NeighborhoodConfig(32, 32, 4, 2)),
    ("dkdv", 64): (
        NeighborhoodConfig(64, 64, 4, 3),
        NeighborhoodConfig(128, 64, 8, 3),
        NeighborhoodConfig(64, 64, 4, 2),
        NeighborhoodConfig(64, 32, 4, 3),
    ),
    ("dkdv", 128): (
        NeighborhoodConfig(64, 64, 4, 2),
        NeighborhoodConfig(128, 64, 8, 2),
        NeighborhoodConfig(64, 32, 4, 3),
    ),
    ("dkdv", 256): (NeighborhoodConfig(64, 32, 8, 2), NeighborhoodConfig(32, 32, 4, 2)),
}
"""By kernel and padded head size, for 16-bit inputs on Hopper. The unfused kernels, "scores",
"values" and "keys", use the forward kernel's."""

SMALL_MEMORY = NeighborhoodConfig(32, 32, 4, 2)
"""16-bit inputs on architectures without Hopper's shared memory."""
SINGLE = NeighborhoodConfig(32, 32, 8, 2)
"""float32 inputs, which the matrix units do not serve."""

TABLE = Table(
    "neighborhood",
    places(
        CANDIDATES,
        other={128: SMALL_MEMORY, 256: replace(SMALL_MEMORY, stages=1)},
        single={128: SINGLE, 256: replace(SINGLE, owned=16)},
    ),
    KINDS,
)


def config(kind: str, arch: int, element_size: int, width: int) -> NeighborhoodConfig:
    """The configuration in force for one of `KINDS`, an architecture (90 is Hopper), bytes an
    element and the larger head size padded to a power of two.
    """
    forced = TABLE.forced(kind)
    if forced is not None:
        return forced
    own = kind if kind in OWN_KINDS else "forward"
    return TABLE.choose(own, *place(arch, element_size, width))


use_config = TABLE.use
