"""Launch configurations of the scan kernels: a checked-in table, tuned by an explicit command."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from attnspec.fast.tuning import Table


@dataclass(frozen=True)
class ScanConfig:
    """Tiles and splits of the three kernel families.

    `block`: rows of a matrix product, a power of two >= 16, and no more than `most` if a caller
    asks for others. `states` sums the state of a segment,
    `walk` goes through a segment for o, dq, dk or dv, `pairs` are the products inside a block under
    a decay per channel, `logits` the same straight from an additive recurrence's, `steep` where the
    decay is far, `gates` its gradient, `mend` that where it is far; on Hopper the last two want two
    warps, see `triton_gates.py`. `*_registers` is the most a thread may use, `*_items` is the most
    numbers of a state one program keeps in registers, which decides how many value channels it
    owns; `pairs_tile` and the like are how many key channels are weighted at a time. `descriptors`
    loads tiles by the tensor memory accelerator where strides allow it. Where `triton_specialised`
    knows a call, which is for Hopper, it walks with `specialised` tiles of each kind on their way
    (0: it does not) and `specialised_programs` instead of `programs`.

    Sequences are cut in segments of `segment` tokens; None cuts them so that about `programs`
    programs a multiprocessor exist, but not below `least_segment` tokens, nor above `gate_segment`
    where the gradient of a decay is summed over a segment.
    """

    block: int = 64
    most: int = 128
    states_items: int = 16384
    states_warps: int = 8
    states_stages: int = 3
    walk_items: int = 8192
    walk_warps: int = 4
    walk_stages: int = 2
    pairs_tile: int = 32
    pairs_warps: int = 4
    pairs_stages: int = 1
    logits_tile: int = 64
    logits_warps: int = 4
    logits_registers: int = 168
    steep_tile: int = 32
    steep_warps: int = 8
    gates_tile: int = 16
    gates_warps: int = 2
    gates_stages: int = 1
    mend_tile: int = 16
    mend_warps: int = 2
    descriptors: bool = True
    specialised: int = 0
    specialised_programs: float = 1.0
    segment: int | None = None
    programs: float = 2.0
    least_segment: int = 2048
    gate_segment: int = 2048


@dataclass(frozen=True)
class LaneConfig:
    """Tiles and splits of the scans without matrix products, where a thread owns a channel or two.

    `rows` of a tile, a power of two, and at most `channels` of a program, another. Sequences are
    cut in segments so that about `programs` programs a multiprocessor exist, but not below
    `least_segment` tokens.
    """

    rows: int
    channels: int
    least_segment: int
    programs: int


@dataclass(frozen=True)
class MemoryConfig:
    """Tiles and splits of the memory that is read before it is written.

    The tokens of heads that read a state are multiplied by it at once, up to `stack` rows: `block`
    tokens of each head, or more where a single head has fewer than `most` rows. A program keeps at
    most `items` numbers of a state. Kernels of its gradient keep a whole one, if neither side of
    that is wider than `whole`; they take `most` queries of a head at a time for the gradient of the
    state, and for those of keys and values `keys` tokens, with `queries` of those that read them.
    `most` and `queries` divide `keys`. Sequences are cut in segments so that about `programs`
    programs a multiprocessor exist, but not below `least_segment` tokens.
    """

    block: int = 32
    most: int = 64
    keys: int = 128
    queries: int = 32
    stack: int = 128
    items: int = 16384
    warps: int = 8
    stages: int = 2
    whole: int = 128
    programs: float = 1.0
    least_segment: int = 256


ELEMENTWISE = (LaneConfig(32, 64, 256, 8), LaneConfig(16, 32, 128, 16))
GATED = (LaneConfig(16, 64, 256, 16), LaneConfig(32, 64, 256, 8), LaneConfig(16, 64, 128, 32))
GATED_GRADIENT = (LaneConfig(8, 64, 256, 10), LaneConfig(8, 64, 128, 20), LaneConfig(8, 64, 256, 8))
SELECTIVE = (LaneConfig(16, 32, 64, 16), LaneConfig(32, 32, 128, 8))
RUNNING = (LaneConfig(16, 64, 64, 10), LaneConfig(8, 64, 64, 24), LaneConfig(32, 64, 128, 8))
FLOWS = (LaneConfig(64, 64, 128, 5), LaneConfig(32, 64, 128, 10), LaneConfig(64, 64, 128, 10))
ORDERED = (LaneConfig(8, 64, 64, 16), LaneConfig(16, 64, 64, 8), LaneConfig(8, 64, 64, 32))
TRACE = (LaneConfig(16, 64, 64, 10), LaneConfig(8, 64, 64, 10), LaneConfig(16, 64, 64, 20))
FLOWS_GRADIENT = (LaneConfig(8, 64, 64, 0), LaneConfig(16, 64, 64, 0), LaneConfig(4, 64, 64, 0))
"""Candidates, of which the first is in force. A tile of `GATED_GRADIENT` has 8 rows at most, for a
thread's registers. A program of `RUNNING` and those below it has all channels, and as many rows as
keep the size of its tile. The segments of `FLOWS_GRADIENT` are those of the forward it belongs to.
"""

CANDIDATES = (
    ScanConfig(),
    ScanConfig(descriptors=False),
    ScanConfig(walk_stages=3),
    ScanConfig(walk_stages=3, descriptors=False),
    ScanConfig(walk_items=4096, walk_stages=3),
    ScanConfig(programs=4.0),
    ScanConfig(programs=1.0),
    ScanConfig(states_items=8192, states_warps=4),
    ScanConfig(states_items=8192, states_warps=4, states_stages=4),
    ScanConfig(least_segment=1024),
    ScanConfig(gate_segment=4096),
    ScanConfig(block=128, walk_warps=8, logits_warps=8, logits_registers=255),
    ScanConfig(pairs_tile=64),
    ScanConfig(logits_tile=32, logits_registers=128),
    ScanConfig(logits_warps=8, logits_registers=128),
    ScanConfig(logits_tile=128, logits_warps=8, logits_registers=255),
    ScanConfig(logits_tile=128, logits_registers=255),
    ScanConfig(pairs_tile=16, gates_tile=32),
    ScanConfig(pairs_stages=2),
    ScanConfig(steep_tile=64),
    ScanConfig(steep_warps=4),
    ScanConfig(pairs_tile=128, pairs_warps=8, mend_tile=32),
)

CONSTANT = ScanConfig(walk_stages=3, states_items=8192, states_warps=4, specialised=3)
"""Where a decay is the same for every token of a head, a walk has registers to spare."""
TOKEN = ScanConfig(programs=4.0, states_items=8192, states_warps=4, specialised=3)
"""Where it is one number a token."""

FLOAT32 = ScanConfig(
    block=16,
    most=16,
    states_items=2048,
    states_stages=1,
    walk_items=2048,
    walk_warps=8,
    walk_stages=1,
    gates_tile=32,
    gates_warps=4,
    mend_tile=32,
    mend_warps=8,
)
"""IEEE float32 products run on no matrix unit. Of larger tiles the assembler makes code with 32
registers and kilobytes of stack for each thread, which fill a device's memory."""
OLDER = ScanConfig(
    block=32,
    states_items=4096,
    states_warps=4,
    states_stages=1,
    walk_items=4096,
    walk_stages=1,
    descriptors=False,
)
"""16-bit inputs on processors before Hopper: less shared memory."""

MEMORY = (
    MemoryConfig(),
    MemoryConfig(stages=3),
    MemoryConfig(programs=2.0),
    MemoryConfig(items=8192, programs=2.0),
    MemoryConfig(keys=64),
    MemoryConfig(least_segment=512),
)
"""Candidates on Hopper, of which the first is in force."""
OLDER_MEMORY = MemoryConfig(
    most=32, keys=32, stack=32, items=4096, warps=4, stages=1, whole=0, programs=4.0
)
FLOAT32_MEMORY = MemoryConfig(
    block=16, most=16, keys=16, queries=16, stack=16, items=2048, stages=1, whole=0, programs=4.0
)
"""Tiles as small as those of a scan."""

REACH = {torch.bfloat16: 100.0, torch.float16: 10.0}
"""How far the log decay of a channel may fall over a block that is multiplied as one product: the
factors of the two sides reach e^(REACH / 2), which the type must hold with the inputs' own size. A
float32 product would not gain: it runs on no matrix unit."""

TABLE: Table[Any] = Table(
    "scan",
    {
        ("16-bit",): CANDIDATES,
        ("16-bit", "constant"): (
            CONSTANT,
            replace(CONSTANT, specialised=2, specialised_programs=2.0),
            *CANDIDATES,
        ),
        ("16-bit", "token"): (
            TOKEN,
            replace(TOKEN, specialised=2, specialised_programs=2.0),
            *CANDIDATES,
        ),
        ("16-bit", "wide"): [
            replace(each, states_stages=min(each.states_stages, 2)) for each in CANDIDATES
        ],
        ("16-bit", "other"): (
            OLDER,
            replace(OLDER, block=64),
            replace(OLDER, states_items=8192, states_warps=8),
            replace(OLDER, walk_items=8192),
            replace(OLDER, walk_items=2048),
            replace(OLDER, states_stages=2, walk_stages=2),
            replace(OLDER, programs=4.0),
            replace(OLDER, least_segment=1024),
            replace(OLDER, pairs_tile=16, gates_tile=16),
        ),
        ("32-bit",): (
            FLOAT32,
            replace(FLOAT32, states_items=4096, walk_items=4096),
            replace(FLOAT32, walk_warps=4),
            replace(FLOAT32, programs=4.0),
            replace(FLOAT32, least_segment=1024),
            replace(FLOAT32, pairs_tile=16, gates_tile=16),
        ),
        ("elementwise",): ELEMENTWISE,
        ("gated",): GATED,
        ("gated gradient",): GATED_GRADIENT,
        ("selective",): SELECTIVE,
        ("running",): RUNNING,
        ("flows",): FLOWS,
        ("ordered",): ORDERED,
        ("trace",): TRACE,
        ("memory", "16-bit"): MEMORY,
        ("memory", "16-bit", "other"): (OLDER_MEMORY, replace(OLDER_MEMORY, items=8192)),
        ("memory", "32-bit"): (FLOAT32_MEMORY, replace(FLOAT32_MEMORY, programs=8.0)),
        ("flows gradient",): FLOWS_GRADIENT,
    },
)
"""Keys of more than 128 channels are "wide": three tiles of them ahead leave no room."""


def config(itemsize: int, d: int, hopper: bool, decay: str = "channel") -> ScanConfig:
    """The configuration in force for numbers of `itemsize` bytes and keys of width `d`, under a
    decay that is "constant", one number a "token", or one a token and "channel".
    """
    if itemsize == 4:
        key: tuple[str, ...] = ("32-bit",)
    elif not hopper:
        key = ("16-bit", "other")
    else:
        kind = "wide" if d > 128 else decay
        key = ("16-bit",) if kind == "channel" else ("16-bit", kind)
    forced = TABLE.forced()
    return forced if isinstance(forced, ScanConfig) else TABLE.choose(*key)


def lanes(kernel: str) -> LaneConfig:
    """The configuration in force for a scan without matrix products: elementwise, gated or its
    gradient, selective, running, flows, ordered flows, the gradient of these, or the trace.
    """
    forced = TABLE.forced()
    return forced if isinstance(forced, LaneConfig) else TABLE.choose(kernel)


def memory_config(itemsize: int, hopper: bool) -> MemoryConfig:
    """The configuration in force for the memory on numbers of `itemsize` bytes."""
    key = ("32-bit",) if itemsize == 4 else ("16-bit",) if hopper else ("16-bit", "other")
    forced = TABLE.forced()
    return forced if isinstance(forced, MemoryConfig) else TABLE.choose("memory", *key)


use_config = TABLE.use
