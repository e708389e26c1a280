"""Launch configurations of the flash kernels: a checked-in table, tuned by an explicit command.

The first candidate of an entry is the one in force; `use_config` forces any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

from attnspec.fast.tuning import Table, place, places

KINDS = ("forward", "dq", "dkdv", "backward")
WALKS = ("long", "medium", "short", "brief", "specialised")
"""How far a program walks: how many tiles it visits decides what its start and its end cost."""
BRIEF = 2048
"""Packed sequences that have at most so many rows on average are walked briefly."""
MEDIUM = range(2049, 8193)
"""Texts so long are walked at medium length."""
WIDE = 128
"""Blocks of so many tokens fill the tiles of a medium walk."""
SPECIAL_ROWS, SPECIAL_KEYS = 128, 64
"""Tokens of which listed blocks must be multiples, for the specialised kernel."""
MANY_ROWS = 128 * 132
"""So many rows of all heads give every multiprocessor of an H100 a specialised tile."""
LONG_ROWS = 1024
"""Programs that share gradients of so many rows seldom wait for each other."""
MANY_PAIRS = 1 << 28
"""Queries times keys, of which a window hides some, that take a GPU longer than the host takes to
launch what the specialised backward kernel needs."""
L2_BYTES = 24 << 20
"""Share of the L2 cache that the keys and values (or queries) of a section of heads may fill."""


@dataclass(frozen=True)
class FlashConfig:
    """`rows` queries and `keys` keys a tile; `warps` and `stages` as Triton counts them.

    `early` (dkdv only) issues both products of a pair of tiles at once: more overlap, more
    registers. `joined` (forward only) walks over full tiles and edges in one loop: its pipeline
    fills once, which pays for few tiles, and the edges are told by a branch. `specialised` is
    a kernel whose warps have trades of their own; calls that it does not know take what the table
    has for them. Backward it computes all gradients, in tiles of one size; any other configuration
    of kind "backward" leaves them to the kernels for dq and for dk and dv.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    early: bool = False
    joined: bool = False
    specialised: bool = False

    def fitted(self, q_tokens: int) -> FlashConfig:
        """For kernels that own rows: with fewer, and fewer warps, if half of them are enough."""
        if q_tokens > self.rows // 2:
            return self
        rows = 16 if q_tokens <= 16 else 64 if q_tokens <= 64 else self.rows
        return replace(self, rows=min(rows, self.rows), warps=min(self.warps, 4))


SPECIALISED = (
    FlashConfig(128, 128, 8, 2, specialised=True),
    FlashConfig(128, 64, 8, 3, specialised=True),
)
TOGETHER = FlashConfig(64, 128, 8, 2, specialised=True)
APART = FlashConfig(0, 0, 0, 0)
CANDIDATES: Mapping[tuple[str, str, int], tuple[FlashConfig, ...]] = {
    ("forward", "long", 64): (
        FlashConfig(64, 128, 4, 3),
        FlashConfig(128, 64, 4, 3),
        FlashConfig(128, 128, 8, 3),
        FlashConfig(128, 128, 4, 3),
        FlashConfig(128, 64, 8, 4),
    ),
    ("forward", "brief", 64): (
        FlashConfig(128, 64, 4, 3),
        FlashConfig(64, 128, 4, 3),
        FlashConfig(128, 128, 8, 3),
    ),
    ("forward", "specialised", 64): (*SPECIALISED, FlashConfig(64, 128, 4, 3)),
    ("forward", "specialised", 128): (
        *SPECIALISED,
        FlashConfig(128, 64, 4, 2),
        FlashConfig(64, 64, 4, 2, joined=True),
    ),
    ("forward", "long", 128): (
        FlashConfig(128, 64, 4, 2),
        FlashConfig(128, 128, 8, 3),
        FlashConfig(128, 64, 8, 4),
        FlashConfig(128, 128, 8, 2),
        FlashConfig(64, 128, 4, 2),
        FlashConfig(64, 64, 4, 3),
    ),
    ("forward", "long", 256): (
        FlashConfig(128, 64, 8, 2),
        FlashConfig(128, 32, 8, 3),
        FlashConfig(64, 64, 4, 2),
        FlashConfig(64, 32, 4, 2),
    ),
    ("forward", "short", 128): (
        FlashConfig(64, 64, 4, 2, joined=True),
        FlashConfig(128, 128, 8, 3, joined=True),
        FlashConfig(128, 64, 4, 2),
    ),
    ("forward", "medium", 128): (
        FlashConfig(128, 128, 8, 3, joined=True),
        FlashConfig(64, 64, 4, 2, joined=True),
        FlashConfig(128, 64, 4, 2),
        FlashConfig(128, 128, 8, 3),
    ),
    ("dq", "long", 64): (
        FlashConfig(128, 128, 8, 3),
        FlashConfig(128, 64, 8, 3),
        FlashConfig(64, 64, 4, 3),
    ),
    ("dq", "long", 128): (
        FlashConfig(128, 64, 8, 3),
        FlashConfig(128, 128, 8, 2),
        FlashConfig(64, 64, 4, 2),
        FlashConfig(64, 128, 4, 1),
        FlashConfig(128, 64, 8, 2),
    ),
    ("dq", "short", 128): (
        FlashConfig(64, 64, 4, 2),
        FlashConfig(128, 64, 8, 3),
    ),
    ("dq", "long", 256): (
        FlashConfig(128, 32, 8, 2),
        FlashConfig(64, 32, 4, 2),
        FlashConfig(64, 64, 8, 2),
        FlashConfig(64, 64, 4, 1),
    ),
    ("dkdv", "long", 64): (
        FlashConfig(64, 64, 4, 3),
        FlashConfig(64, 128, 8, 3),
        FlashConfig(128, 128, 8, 2),
        FlashConfig(64, 128, 8, 3, early=True),
        FlashConfig(64, 128, 4, 2),
        FlashConfig(128, 64, 4, 2),
    ),
    ("dkdv", "long", 128): (
        FlashConfig(64, 64, 4, 2),
        FlashConfig(64, 128, 8, 2),
        FlashConfig(64, 128, 8, 2, early=True),
        FlashConfig(64, 128, 8, 3),
        FlashConfig(64, 64, 4, 2, early=True),
        FlashConfig(32, 128, 8, 3),
        FlashConfig(32, 64, 4, 3),
    ),
    ("dkdv", "long", 256): (
        FlashConfig(64, 64, 8, 2),
        FlashConfig(32, 64, 8, 2),
        FlashConfig(32, 64, 8, 3),
    ),
}
"""By kernel, walk and padded head size, for 16-bit inputs on Hopper. A walk without an entry takes
that of a long one."""

SMALL_MEMORY = {
    "forward": FlashConfig(64, 32, 4, 2),
    "dq": FlashConfig(32, 32, 4, 2),
    "dkdv": FlashConfig(32, 32, 4, 2),
}
"""16-bit inputs on architectures without Hopper's shared memory."""
SINGLE = FlashConfig(32, 32, 8, 2)
"""float32 inputs, which the matrix units do not serve."""

TABLE = Table(
    "flash",
    {
        ("backward", 64): (TOGETHER, replace(TOGETHER, stages=3), APART),
        ("backward", 128): (TOGETHER, APART),
    }
    | {
        key: candidates
        for kind, other in SMALL_MEMORY.items()
        for walk in WALKS
        for key, candidates in places(
            {
                (kind, walk, width): CANDIDATES.get(
                    (kind, walk, width), CANDIDATES[kind, "long", width]
                )
                for width in (64, 128, 256)
            },
            other={128: other, 256: replace(other, stages=1)},
            single={128: SINGLE, 256: replace(SINGLE, rows=16)},
        ).items()
    },
    KINDS,
)


def config(
    kind: str, walk: str, arch: int, element_size: int, width: int, q_tokens: int
) -> FlashConfig:
    """The configuration in force for a kernel of `KINDS`, a walk of `WALKS`, an architecture (90
    is Hopper), bytes an element, the larger head size padded to a power of two, and the number of
    queries. Only a specialised walk is that, whatever is forced.
    """
    forced = TABLE.forced(kind)
    if forced is not None and (walk == "specialised" or not forced.specialised):
        return forced
    chosen = TABLE.choose(kind, walk, *place(arch, element_size, width))
    return chosen if kind == "dkdv" else chosen.fitted(q_tokens)


def specialises(kind: str, rows: int, all_rows: int) -> bool:
    """Whether the specialised kernel is to walk over so many queries of a sequence, on average, and
    of all heads.
    """
    forced = TABLE.forced(kind)
    many = rows > 64 and all_rows >= MANY_ROWS
    return kind == "forward" and (many or (forced is not None and forced.specialised))


def backward_config(rows: int, pairs: int, width: int) -> FlashConfig:
    """How the gradients of a call that the specialised kernel knows are computed: so many queries
    of a sequence, pairs of queries and keys of all heads, and the larger head size padded to a
    power of two.
    """
    forced = TABLE.forced("backward")
    if forced is not None:
        return forced
    many = rows >= LONG_ROWS and pairs >= MANY_PAIRS
    return TABLE.choose("backward", max(width, 64)) if many else APART


use_config = TABLE.use
SPECIALISED_CONFIGS = {
    str(c): partial(use_config, forward=c, backward=TOGETHER) for c in SPECIALISED
}
"""What forces the specialised kernels on calls of any length."""
