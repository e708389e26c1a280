"""Lists of the key blocks that each query block attends to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnspec.fast.backend import check_integer, check_tensor


@dataclass(frozen=True)
class BlockLists:
    """For every batch row, head and query block, which key blocks it sees.

    `index` int32 (batch, heads, q_blocks, most) holds the numbers of the key blocks, ascending, in
    the first `count` int32 (batch, heads, q_blocks) places of each row; what is behind them is not
    read. Blocks are `q_block` queries by `k_block` keys; the last of a sequence may be shorter.

    `full` int32 (batch, heads, q_blocks) may say how many of the listed blocks, then put first, the
    query block sees whole: these lie inside the sequence, and no other rule is asked about them.
    Each of the two parts is ascending.
    """

    index: Tensor
    count: Tensor
    q_block: int
    k_block: int
    full: Tensor | None = None

    @classmethod
    def from_mask(cls, mask: Tensor, q_block: int, k_block: int) -> BlockLists:
        """The lists of a bool (batch, heads, q_blocks, k_blocks) mask, True = attended to."""
        check_tensor("mask", mask, ("batch", "heads", "q_blocks", "k_blocks"), (torch.bool,))
        check_integer("q_block", q_block, least=1)
        check_integer("k_block", k_block, least=1)
        return cls(*compact(mask), q_block, k_block)


def compact(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending column numbers of the True entries of `mask` (..., columns), and how many.

    int32 (..., columns) and int32 (...); places behind the count hold 0.
    """
    columns = mask.shape[-1]
    places = torch.cumsum(mask, dim=-1, dtype=torch.int64) - 1
    # One place more than there are columns takes what is not listed.
    places = torch.where(mask, places, columns)
    numbers = torch.arange(columns, dtype=torch.int32, device=mask.device).expand(mask.shape)
    index = torch.zeros((*mask.shape[:-1], columns + 1), dtype=torch.int32, device=mask.device)
    index.scatter_(-1, places, numbers)
    return index[..., :columns], mask.sum(dim=-1, dtype=torch.int32)


def transposed(index: Tensor, count: Tensor, k_blocks: int) -> tuple[Tensor, Tensor]:
    """The query blocks that see each key block, int32 (batch, heads, k_blocks, q_blocks), and how
    many, int32 (batch, heads, k_blocks).
    """
    return compact(_listed(index, torch.zeros_like(count), count, k_blocks).transpose(-1, -2))


def transposed_parts(
    index: Tensor, count: Tensor, full: Tensor, k_blocks: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `transposed`, of lists in two parts: index (batch, heads, k_blocks, 2 * q_blocks), count
    and full. The query blocks that see a key block whole come *last*.
    """
    q_blocks = index.shape[-2]
    whole = _listed(index, torch.zeros_like(full), full, k_blocks)
    parts = torch.cat([_listed(index, full, count, k_blocks), whole], dim=-2)
    rows, rows_count = compact(parts.transpose(-1, -2))
    return rows % q_blocks, rows_count, whole.sum(dim=-2, dtype=torch.int32)


def _listed(index: Tensor, first: Tensor, last: Tensor, k_blocks: int) -> Tensor:
    """bool (batch, heads, q_blocks, k_blocks): the blocks in places [first, last) of each list."""
    place = torch.arange(index.shape[-1], device=index.device)
    chosen = (place >= first[..., None]) & (place < last[..., None])
    columns = torch.where(chosen, index, k_blocks).long()
    mask = torch.zeros((*index.shape[:-1], k_blocks + 1), dtype=torch.bool, device=index.device)
    return mask.scatter_(-1, columns, True)[..., :k_blocks]
