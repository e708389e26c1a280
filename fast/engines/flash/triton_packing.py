"""The order in which the tiles of packed sequences are worked on, made in two small launches."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnspec.fast.engines.flash.triton_tiles import sequence_bounds
from attnspec.fast.engines.prepared import Prepared

TILES, SEQUENCES = 64, 256
"""How many a program looks at together."""


@triton.jit(do_not_specialize=["sequences", "most", "tokens", "walked_tokens"])
def place_tiles_kernel(
    offsets, walked, unsorted, work, sequences, most, tokens, walked_tokens,
    TILE: tl.constexpr, FALLING: tl.constexpr, TILES: tl.constexpr, SEQUENCES: tl.constexpr,
):  # fmt: skip
    """Sequence, number inside it and work of the tiles, sequence by sequence.

    The work of a tile is the keys up to its end, or if FALLING the rows from its beginning.
    """
    number = tl.program_id(0) * TILES + tl.arange(0, TILES)
    lane = tl.arange(0, SEQUENCES)
    sequence, before, base = number * 0, number * 0, 0
    for first in range(0, sequences, SEQUENCES):
        inside = first + lane < sequences
        _, length = sequence_bounds(offsets, first + lane, inside, tokens)
        count = (length + TILE - 1) // TILE
        passed = (base + tl.cumsum(count, 0))[None, :] <= number[:, None]
        passed &= inside[None, :]
        sequence += tl.sum(passed.to(tl.int32), axis=1)
        before += tl.sum(tl.where(passed, count[None, :], 0), axis=1)
        base += tl.sum(count, axis=0)
    # Tiles behind the last one lie beyond the end of the last sequence: they are empty.
    last = sequence >= sequences
    sequence = tl.minimum(sequence, sequences - 1)
    _, length = sequence_bounds(offsets, sequence, number < most, tokens)
    _, walked_length = sequence_bounds(walked, sequence, number < most, walked_tokens)
    tile = number - before + tl.where(last, (length + TILE - 1) // TILE, 0)
    shift = walked_length - length
    if FALLING:
        amount = walked_length - tile * TILE - shift
    else:
        amount = tile * TILE + shift
    tl.store(unsorted + 2 * number, sequence, mask=number < most)
    tl.store(unsorted + 2 * number + 1, tile, mask=number < most)
    tl.store(work + number, amount, mask=number < most)


@triton.jit(do_not_specialize=["most"])
def sort_tiles_kernel(unsorted, work, table, most, TILES: tl.constexpr, OTHERS: tl.constexpr):
    """The tiles by falling work, those of equal work in their order."""
    number = tl.program_id(0) * TILES + tl.arange(0, TILES)
    own = tl.load(work + number, mask=number < most, other=0)
    place = number * 0
    for first in range(0, most, OTHERS):
        other = first + tl.arange(0, OTHERS)
        theirs = tl.load(work + other, mask=other < most, other=0)
        ahead = (theirs[None, :] > own[:, None]) | (
            (theirs[None, :] == own[:, None]) & (other[None, :] < number[:, None])
        )
        place += tl.sum((ahead & (other < most)[None, :]).to(tl.int32), axis=1)
    for part in tl.static_range(2):
        value = tl.load(unsorted + 2 * number + part, mask=number < most, other=0)
        tl.store(table + 2 * place + part, value, mask=number < most)


class TileTable:
    """The launches that lay out the tiles of `tile` tokens of packed sequences of one kind.

    The number of tokens bounds that of tiles without asking the device.
    """

    def __init__(
        self, offsets: Tensor, walked: Tensor, tokens: int, walked_tokens: int, tile: int,
        falling: bool,
    ) -> None:  # fmt: skip
        sequences = offsets.shape[0] - 1
        self.most = most = tokens // tile + sequences
        programs = -(-most // TILES)
        device, warps = offsets.device, {"num_warps": 4, "num_stages": 1}
        arguments = {
            "offsets": offsets, "walked": walked, "unsorted": offsets, "work": offsets,
            "sequences": sequences, "most": most, "tokens": tokens, "walked_tokens": walked_tokens,
            "TILE": tile, "FALLING": falling, "TILES": TILES, "SEQUENCES": SEQUENCES,
        }  # fmt: skip
        self.place = Prepared(place_tiles_kernel, programs, arguments, device, **warps)
        arguments = {
            "unsorted": offsets, "work": offsets, "table": offsets, "most": most, "TILES": TILES,
            "OTHERS": SEQUENCES,
        }  # fmt: skip
        self.sort = Prepared(sort_tiles_kernel, programs, arguments, device, **warps)

    def __call__(self, offsets: Tensor, walked: Tensor) -> Tensor:
        """int32 (tiles, 2): sequence and number of each tile in it, the longest first."""
        unsorted, table = offsets.new_empty((2, self.most, 2), dtype=torch.int32)
        work = offsets.new_empty(self.most, dtype=torch.int32)
        self.place(offsets=offsets, walked=walked, unsorted=unsorted, work=work)
        self.sort(unsorted=unsorted, work=work, table=table)
        return table
