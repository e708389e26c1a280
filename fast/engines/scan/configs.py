"""Launch configurations of the scan kernels: a checked-in table, tuned by an explicit command."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class ScanConfig:
    """Tiles and splits of the three kernel families.

    `block`: rows of a matrix product, a power of two >= 16. `states` sums the state of a segment,
    `walk` goes through a segment for o, dq, dk or dv, `pairs` are the products inside a block under
    a decay per channel. `*_items` is the most numbers of a state one program keeps in registers,
    which decides how many value channels it owns; `pairs_tile` is how many key channels are
    weighted at a time. `descriptors` loads tiles by the tensor memory accelerator where strides
    allow it.

    Sequences are cut in segments of `segment` tokens; None cuts them so that about `programs`
    programs a multiprocessor exist, but not below `least_segment` tokens, nor above `gate_segment`
    where the gradient of a decay is summed over a segment.
    """

    block: int = 64
    states_items: int = 16384
    states_warps: int = 8
    states_stages: int = 3
    walk_items: int = 8192
    walk_warps: int = 4
    walk_stages: int = 2
    pairs_tile: int = 64
    pairs_warps: int = 8
    gates_tile: int = 32
    gates_warps: int = 4
    descriptors: bool = True
    segment: int | None = None
    programs: float = 2.0
    least_segment: int = 2048
    gate_segment: int = 2048


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
    ScanConfig(block=128, walk_warps=8),
    ScanConfig(pairs_tile=32, gates_tile=64, gates_warps=8),
    ScanConfig(pairs_tile=32, pairs_warps=4),
)

FLOAT32 = ScanConfig(
    block=16,
    states_items=2048,
    states_stages=1,
    walk_items=2048,
    walk_warps=8,
    walk_stages=1,
    pairs_tile=32,
)
"""IEEE float32 products run on no matrix unit, and larger tiles spill registers."""
OLDER = ScanConfig(
    block=32,
    states_items=4096,
    states_warps=4,
    states_stages=1,
    walk_items=4096,
    walk_stages=1,
    pairs_tile=32,
    descriptors=False,
)
"""16-bit inputs on processors before Hopper: less shared memory."""

_forced: list[ScanConfig] = []


def config(itemsize: int, d: int, hopper: bool) -> ScanConfig:
    """The configuration in force for numbers of `itemsize` bytes and keys of width `d`."""
    if _forced:
        return _forced[-1]
    if itemsize == 4:
        return FLOAT32
    if not hopper:
        return OLDER
    return CANDIDATES[0] if d <= 128 else replace(CANDIDATES[0], states_stages=2)


@contextmanager
def use_config(forced: ScanConfig) -> Iterator[None]:
    """Run every scan kernel inside the block with `forced`."""
    _forced.append(forced)
    try:
        yield
    finally:
        _forced.pop()
