"""Launch configurations of the softplus kernels; `use_config` forces any other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from attnspec.fast.engines.flash.configs import FlashConfig
from attnspec.fast.tuning import Key, Table, place, places

KINDS = ("forward", "sharp", "rows", "dq", "dkdv")
CANDIDATES: Mapping[Key, tuple[FlashConfig, ...]] = {
    ("forward", 64): (
        FlashConfig(128, 64, 4, 3),
        FlashConfig(128, 128, 8, 3),
        FlashConfig(64, 64, 4, 3),
        FlashConfig(64, 128, 4, 3),
    ),
    ("forward", 128): (
        FlashConfig(128, 64, 4, 2),
        FlashConfig(128, 128, 8, 3),
        FlashConfig(128, 64, 8, 3),
        FlashConfig(128, 64, 4, 3),
        FlashConfig(64, 64, 4, 3),
    ),
    ("forward", 256): (FlashConfig(128, 64, 8, 2), FlashConfig(64, 32, 4, 2)),
    ("sharp", 64): (
        FlashConfig(128, 64, 4, 3),
        FlashConfig(128, 128, 8, 3),
        FlashConfig(64, 64, 4, 3),
    ),
    ("sharp", 128): (
        FlashConfig(128, 64, 8, 3),
        FlashConfig(128, 64, 4, 2),
        FlashConfig(128, 128, 8, 3),
        FlashConfig(64, 64, 4, 3),
    ),
    ("sharp", 256): (FlashConfig(128, 64, 8, 2), FlashConfig(64, 32, 4, 2)),
    ("rows", 64): (FlashConfig(128, 64, 8, 3), FlashConfig(64, 64, 4, 3)),
    ("rows", 128): (
        FlashConfig(128, 64, 8, 3),
        FlashConfig(128, 64, 8, 2),
        FlashConfig(64, 64, 4, 3),
    ),
    ("rows", 256): (FlashConfig(64, 32, 4, 2),),
    ("dq", 64): (FlashConfig(128, 64, 8, 3), FlashConfig(64, 64, 4, 3)),
    ("dq", 128): (
        FlashConfig(64, 64, 4, 2),
        FlashConfig(128, 64, 8, 3),
        FlashConfig(128, 64, 8, 2),
    ),
    ("dq", 256): (FlashConfig(64, 32, 4, 2),),
    ("dkdv", 64): (
        FlashConfig(64, 64, 4, 3),
        FlashConfig(32, 64, 4, 4),
        FlashConfig(64, 128, 8, 2),
    ),
    ("dkdv", 128): (
        FlashConfig(32, 64, 4, 4),
        FlashConfig(64, 64, 4, 2),
        FlashConfig(32, 128, 8, 3),
    ),
    ("dkdv", 256): (FlashConfig(32, 64, 8, 2),),
}
"""By kernel ("forward" plain, "sharp" with two sweeps) and padded head size, for 16-bit inputs on
Hopper; the first is in force."""

SMALL_MEMORY = FlashConfig(32, 32, 4, 2)
"""16-bit inputs on architectures without Hopper's shared memory."""
SINGLE = FlashConfig(32, 32, 8, 2)
"""float32 inputs, which the matrix units do not serve."""

TABLE = Table(
    "softplus",
    places(
        CANDIDATES,
        other={128: SMALL_MEMORY, 256: replace(SMALL_MEMORY, stages=1)},
        single={128: SINGLE, 256: replace(SINGLE, rows=16)},
    ),
    KINDS,
)


def config(kind: str, arch: int, element_size: int, width: int, q_tokens: int) -> FlashConfig:
    """The configuration in force for a kernel, an architecture (90 is Hopper), bytes an element,
    the larger head size padded to a power of two, and the number of queries.
    """
    forced = TABLE.forced(kind)
    if forced is not None:
        return forced
    chosen = TABLE.choose(kind, *place(arch, element_size, width))
    return chosen if kind == "dkdv" else chosen.fitted(q_tokens)


use_config = TABLE.use
