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
    """

    index: Tensor
    count: Tensor
    q_block: int
    k_block: int

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
    most = index.shape[-1]
    listed = torch.arange(most, device=index.device) < count[..., None]
    columns = torch.where(listed, index, k_blocks).long()
    mask = torch.zeros((*index.shape[:-1], k_blocks + 1), dtype=torch.bool, device=index.device)
    mask.scatter_(-1, columns, True)
    return compact(mask[..., :k_blocks].transpose(-1, -2))
