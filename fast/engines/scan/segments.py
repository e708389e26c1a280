"""How sequences are cut in segments: by arithmetic, or by a table for packed sequences."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def marked_tiles(tokens: int, rows: int, offsets: Tensor | None) -> int:
    """Tiles of `rows` rows, those of packed sequences as `tile_starts` has them; none if `rows` is
    0.
    """
    if not rows:
        return 0
    return -(-tokens // rows) if offsets is None else tokens // rows + offsets.shape[0] - 1


def tile_starts(tokens: int, rows: int, offsets: Tensor) -> Tensor:
    """Where tiles of at most `rows` rows of packed sequences start, and their sequences end: int64
    (tokens // rows + sequences, 2). The tile from row t on of sequence n has place t // rows + n;
    places between two sequences may be nobody's, and start where the first ends or behind.
    """
    offsets = offsets.to(torch.int64)
    sequences = offsets.shape[0] - 1
    numbers = torch.arange(tokens // rows + sequences, device=offsets.device)
    bases = offsets[:-1].div(rows, rounding_mode="floor") + numbers[:sequences]
    sequence = torch.searchsorted(bases, numbers, right=True) - 1
    start = offsets[sequence] + (numbers - bases[sequence]) * rows
    return torch.stack([start, offsets[sequence + 1]], dim=1)


@dataclass(frozen=True)
class Segments:
    """`total` segments of at most `length` rows, `each` of them in every sequence.

    Packed sequences have a `table` (total, 5) int64 of sequence, first row, rows, starts and ends
    its sequence, and `bounds` (sequences + 1), the first segment of each sequence; segments in
    excess have 0 rows. Neither is ever read on the host.
    """

    sequences: int
    total: int
    each: int
    length: int
    table: Tensor | None = None
    bounds: Tensor | None = None

    @property
    def chained(self) -> bool:
        """Whether a sequence may have more than one segment."""
        return self.each > 1 or self.packed

    @property
    def packed(self) -> bool:
        """Whether sequences are packed."""
        return self.table is not None

    def tables(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """`table` and `bounds`; `like` stands in for none."""
        if self.table is None or self.bounds is None:
            return like, like
        return self.table, self.bounds


def cut(batch: int, tokens: int, length: int, offsets: Tensor | None) -> Segments:
    """Segments of `length` rows of `batch` sequences of `tokens`, or of one packed batch."""
    if offsets is None:
        each = -(-tokens // length)
        return Segments(batch, batch * each, each, length)
    offsets = offsets.to(torch.int64)
    sequences = offsets.shape[0] - 1
    total = tokens // length + sequences
    parts = (offsets.diff() + (length - 1)).div(length, rounding_mode="floor")
    bounds = torch.nn.functional.pad(parts.cumsum(0), (1, 0))
    slots = torch.arange(total, device=offsets.device)
    sequence = torch.searchsorted(bounds[1:], slots, right=True).clamp(max=sequences - 1)
    start = offsets[sequence] + (slots - bounds[sequence]) * length
    rows = (offsets[sequence + 1] - start).clamp(0, length)
    starts = (slots == bounds[sequence]) & (rows > 0)
    ends = (slots == bounds[sequence + 1] - 1) & (rows > 0)
    table = torch.stack([sequence, start, rows, starts.long(), ends.long()], dim=1)
    return Segments(sequences, total, total, length, table, bounds)
