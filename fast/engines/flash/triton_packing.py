"""The order in which the tiles of packed sequences are worked on, made in one small launch."""

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
def lay_tiles_kernel(
    offsets, walked, table, sequences, most, tokens, walked_tokens,
    TILE: tl.constexpr, RISING: tl.constexpr, TILES: tl.constexpr, SEQUENCES: tl.constexpr,
):  # fmt: skip
    """Sequence and number inside it of the tiles: those of the sequence that walks farthest first.

    The tiles of a sequence stay together, because they read the same tokens: by rising numbers, or
    by falling ones, so that the long walks of the causal rule come first.
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
    behind = sequence >= sequences
    sequence = tl.minimum(sequence, sequences - 1)
    _, length = sequence_bounds(offsets, sequence, number < most, tokens)
    _, far = sequence_bounds(walked, sequence, number < most, walked_tokens)
    tiles = (length + TILE - 1) // TILE
    index = number - before
    place = index
    for first in range(0, sequences, SEQUENCES):
        other = first + lane
        inside = other < sequences
        _begin, other_length = sequence_bounds(offsets, other, inside, tokens)
        _begin, other_far = sequence_bounds(walked, other, inside, walked_tokens)
        alike = (other_far[None, :] == far[:, None]) & (other[None, :] < sequence[:, None])
        ahead = (other_far[None, :] > far[:, None]) | alike
        count = tl.where(inside, (other_length + TILE - 1) // TILE, 0)
        place += tl.sum(tl.where(ahead, count[None, :], 0), axis=1)
    tile = index if RISING else tiles - 1 - index
    place = tl.where(behind, number, place)
    tl.store(table + 2 * place, sequence, mask=number < most)
    tl.store(table + 2 * place + 1, tl.where(behind, tiles + index, tile), mask=number < most)


class TileTable:
    """The launch that lays out the tiles of `tile` tokens of packed sequences of one kind.

    The number of tokens bounds that of tiles without asking the device.
    """

    def __init__(
        self, offsets: Tensor, walked: Tensor, tokens: int, walked_tokens: int, tile: int,
        rising: bool,
    ) -> None:  # fmt: skip
        sequences = offsets.shape[0] - 1
        self.most = tokens // tile + sequences
        arguments = {
            "offsets": offsets, "walked": walked, "table": offsets, "sequences": sequences,
            "most": self.most, "tokens": tokens, "walked_tokens": walked_tokens, "TILE": tile,
            "RISING": rising, "TILES": TILES, "SEQUENCES": SEQUENCES,
        }  # fmt: skip
        programs = -(-self.most // TILES)
        self.launch = Prepared(
            lay_tiles_kernel, programs, arguments, offsets.device, num_warps=4, num_stages=1
        )

    def __call__(self, offsets: Tensor, walked: Tensor) -> Tensor:
        """int32 (tiles, 2): sequence and number of each tile in it, in the order of work."""
        table = offsets.new_empty(self.most, 2, dtype=torch.int32)
        self.launch(offsets=offsets, walked=walked, table=table)
        return table
