"""Packed sequences: where their pieces lie, in tables that the host never reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NOBODY = -1
"""In place of a sequence where none begins or ends."""


def most_pieces(tokens: int, sequences: int, b: int, size: int) -> int:
    """As many pieces as sequences of so many tokens together can have.

    All are full but the last of a sequence, and the last of a chunk that pieces do not divide.
    """
    chunks = (tokens + sequences * (b - 1)) // b
    short = chunks if b % size else sequences
    return min(tokens, (tokens + short * (size - 1)) // size, chunks * -(-b // size))


@dataclass(frozen=True)
class Packed:
    """Pieces of packed sequences, one sequence behind the other, all int64.

    `offsets` and `bounds` (sequences + 1): the first token and the first piece of every sequence;
    `table` (count + 1, 5): a piece's first token, its tokens, which piece of its chunk it is, the
    sequence that begins with it and the one that ends with it, or `NOBODY`. Pieces in excess
    have no tokens and begin behind the last one, and so does the last row, which is none.
    """

    count: int
    offsets: Tensor
    bounds: Tensor
    table: Tensor

    @classmethod
    def of(cls, offsets: Tensor, tokens: int, b: int, size: int) -> Packed:
        """The pieces of up to `size` tokens of gradient chunks of `b`, which begin anew in every
        sequence.
        """
        offsets = offsets.to(torch.int64).contiguous()
        sequences, per = offsets.shape[0] - 1, -(-b // size)
        count = most_pieces(tokens, sequences, b, size)
        lengths = offsets.diff()
        short = (lengths % b + (size - 1)).div(size, rounding_mode="floor")
        pieces = lengths.div(b, rounding_mode="floor") * per + short
        bounds = torch.nn.functional.pad(pieces.cumsum(0), (1, 0))
        piece = torch.arange(count + 1, device=offsets.device)
        sequence = torch.searchsorted(bounds[1:], piece, right=True).clamp(max=sequences - 1)
        own = piece - bounds[sequence]
        turn = own % per
        start = own.div(per, rounding_mode="floor") * b + turn * size
        length = (lengths[sequence] - start).clamp(0, size).minimum(b - turn * size)
        real = piece < bounds[-1]
        begins = torch.where(real & (own == 0), sequence, NOBODY)
        ends = torch.where(real & (piece + 1 == bounds[sequence + 1]), sequence, NOBODY)
        start = torch.where(real, offsets[sequence] + start, offsets[-1])
        length, turn = (torch.where(real, x, 0) for x in (length, turn))
        table = torch.stack([start, length, turn, begins, ends], dim=1)
        return cls(count, offsets, bounds, table)

    def begins(self, piece: int) -> Tensor:
        """The sequence (1,) that begins with a piece, or `NOBODY`."""
        return self.table[piece, 3:4]

    def ends(self, piece: int) -> Tensor:
        """The one that ends with it; none does with piece -1."""
        return self.table[piece, 4:5]


class Ends:
    """A state of packed sequences at both ends of a walk that goes through one after the other:
    `given` where it enters them, and `kept` where it leaves, both (sequences + 1, heads, numbers),
    the last place being that of `NOBODY`.
    """

    def __init__(self, states: Tensor, heads: int) -> None:
        """From (sequences * heads, numbers), which those without tokens keep."""
        nobody = states.new_zeros(1, heads, states.shape[1])
        self.given = torch.cat([states.unflatten(0, (-1, heads)), nobody])
        self.kept = self.given.clone()

    def enter(self, sequence: Tensor, x: Tensor) -> Tensor:
        """The state (heads, numbers) that is given to a sequence, and x for `NOBODY`."""
        found = self.given.index_select(0, sequence % self.given.shape[0])[0]
        return torch.where(sequence >= 0, found, x)

    def leave(self, sequence: Tensor, x: Tensor) -> None:
        """Keep x as the state of a sequence."""
        self.kept.index_copy_(0, sequence % self.kept.shape[0], x[None])

    @property
    def left(self) -> Tensor:
        """What is kept, shaped as it was given."""
        return self.kept[:-1].flatten(0, 1)
