"""The lists of blocks of the ready patterns, computed by arithmetic on the device.

Of a row of blocks I, a sparse head of a causal pattern reads the blocks of its stride before the
window, an arithmetic progression, and then the window. Two rows of blocks may share a query tile,
which is then filled better. All that both rows read whole is put first in the tile's list, and the
engine asks no rule about it; what is left are the block that only the first row still has in its
window, and the diagonal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnspec.fast.engines.flash import BlockLists

TILE = 128
"""Queries that fill a tile of the flash engine."""


def rows_a_tile(b: int, local: int, alone: bool) -> int:
    """How many rows of blocks share the lists: two where they fit a tile and the order is `alone`.

    Two rows need a window of two blocks, so that the second row sees the first one's diagonal.
    """
    return 2 if alone and 2 * b <= TILE and local >= 2 else 1


def stride_lists(
    phases: Tensor,
    rows: int,
    columns: int,
    b: int,
    local: int,
    v: int,
    first: int,
    merged: int,
    alone: bool,
) -> tuple[BlockLists, Tensor | None]:
    """The lists (1, heads, tiles, most) of a causal pattern, and the row starts that merged ones
    need.

    `phases` int (heads,) is the first column of each head's stride; row 0 stands `first` columns
    after column 0. `merged` rows share a tile: 1, or 2 as `rows_a_tile` says. `alone` says that the
    causal order is the only rule, so that a row sees whole what is listed before its diagonal.
    """
    device = phases.device
    top = first + merged * torch.arange(-(-rows // merged), device=device, dtype=torch.int32)
    phases = phases.to(torch.int32)[:, None]
    # Strided blocks before the part of the window that all rows of the tile have.
    window = (top + (merged - local)).clamp(0, columns)
    strided = torch.div(window - phases + (v - 1), v, rounding_mode="floor").clamp(min=0)
    end = (top + 1).clamp(0, columns) if merged == 1 else top
    whole = strided + (end - window).clamp(min=0)
    most = min(columns, -(-columns // v) + local + merged)
    place = torch.arange(most, device=device, dtype=torch.int32)
    strided = strided[..., None]
    progression = phases[..., None] + v * place
    index = torch.where(place < strided, progression, window[:, None] + place - strided)
    if merged == 1:
        count = whole[None]
        seen = count - (top < columns).to(torch.int32) if alone else None
        return BlockLists(index[None], count, b, b, seen), None
    # Behind what both rows see: the block that left the second row's window, and the diagonal.
    left = top - (local - 1)
    kept = ((left >= 0) & ((left - phases) % v != 0)).to(torch.int32)
    behind = place - (whole + kept)[..., None]
    index = torch.where(behind >= 0, top[:, None] + behind, index)
    index = torch.where((behind == -1) & (kept[..., None] > 0), left[:, None], index)
    count = whole + kept + (columns - top).clamp(0, 2)
    row = first + torch.arange(rows * b, device=device, dtype=torch.int32) // b
    starts = ((row - (local - 1)) * b).clamp(min=0)
    return BlockLists(index[None], count[None], 2 * b, b, whole[None]), starts


def distance_lists(
    rows: int, columns: int, b: int, left: int, right: int, v: int, first: int, device: torch.device
) -> BlockLists:
    """The lists (1, 1, rows, columns) of a noncausal pattern, which all sparse heads share."""
    row = first + torch.arange(rows, device=device)[:, None]
    column = torch.arange(columns, device=device)
    beyond = (row - column - left + 1).clamp(min=0) + (column - row - right + 1).clamp(min=0)
    return BlockLists.from_mask((beyond % v == 0)[None, None], b, b)
