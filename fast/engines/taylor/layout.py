"""How features and states are laid out: unpacked, as users see them, and packed, as kernels do.

Packed, a 1 stands in front of the channels, feature b (b + 1) / 2 + a belongs to the entries
a <= b, and the two equal features of a pair of channels are one, sqrt(2) times as large.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def packed_count(d: int) -> int:
    """Packed features of d channels: 153 for 16."""
    return (d + 1) * (d + 2) // 2


def unpacked_count(d: int) -> int:
    """Unpacked features of d channels: 273 for 16."""
    return 1 + d + d * d


def unpacked_features(x: Tensor, scale: float) -> Tensor:
    """phi(x) (..., 1 + d + d * d): 1, then the scaled channels, then all their products by rows."""
    second = (x[..., :, None] * x[..., None, :]).flatten(-2) * (scale / math.sqrt(2))
    return torch.cat([torch.ones_like(x[..., :1]), math.sqrt(scale) * x, second], dim=-1)


def packed_features(x: Tensor, scale: float) -> Tensor:
    """phi(x) in the packed order."""
    b, a = _pairs(x.shape[-1], x.device)
    entries = torch.cat([torch.ones_like(x[..., :1]), math.sqrt(scale) * x], dim=-1)
    factor = _either((a == b) & (a > 0), 1 / math.sqrt(2), 1.0, x)
    return entries.index_select(-1, a) * entries.index_select(-1, b) * factor


def pack(x: Tensor, d: int, dim: int) -> Tensor:
    """A state, unpacked along `dim`, as one that gives packed features the same products."""
    b, a = _pairs(d, x.device)
    low, high = (1 + d + (i - 1) * d + (j - 1) for i, j in ((a, b), (b, a)))
    low, high = (torch.where(a == 0, b, place) for place in (low, high))
    factor = _either((a == b) | (a == 0), 0.5, 1 / math.sqrt(2), x)
    both = x.index_select(dim, low) + x.index_select(dim, high)
    return both * factor.view(-1, *(1,) * (-dim - 1))


def unpack(x: Tensor, d: int, dim: int) -> Tensor:
    """A packed state unpacked along `dim`."""
    channel = torch.arange(1, d + 1, device=x.device)
    row, column = channel.repeat_interleave(d, output_size=d * d), channel.repeat(d)
    low, high = torch.minimum(row, column), torch.maximum(row, column)
    single = torch.arange(d + 1, device=x.device)
    place = torch.cat([single * (single + 1) // 2, high * (high + 1) // 2 + low])
    equal = torch.cat([torch.ones_like(single, dtype=torch.bool), row == column])
    factor = _either(equal, 1.0, 1 / math.sqrt(2), x)
    return x.index_select(dim, place) * factor.view(-1, *(1,) * (-dim - 1))


def _pairs(d: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The entries b >= a of every packed feature."""
    b, a = torch.tril_indices(d + 1, d + 1, device=device)
    return b, a


def _either(condition: Tensor, yes: float, no: float, like: Tensor) -> Tensor:
    """`yes` or `no` in the dtype of `like`."""
    return condition.to(like.dtype) * (yes - no) + no
