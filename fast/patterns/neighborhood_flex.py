"""The static mask of neighborhood attention as a mask function of torch's FlexAttention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnspec.fast.backend import check_integer
from attnspec.fast.engines.neighborhood import Axis, check_grid
from attnspec.fast.engines.neighborhood.grid import token_count
from attnspec.fast.flex import MaskMod


def neighborhood_mask_mod(
    shape: Sequence[int],
    kernel: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    extra: int = 0,
) -> MaskMod:
    """mask_mod(b, h, q_idx, kv_idx) for `torch.nn.attention.flex_attention.create_block_mask`.

    Arguments as in `na_attend`: tokens are row-major, and the last `extra` keys are seen by all.
    """
    grid = check_grid(shape, kernel, stride, dilation, causal)
    check_integer("extra", extra, least=0)
    tokens = token_count(grid)

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        seen = kv_idx >= 0
        query, key = q_idx, kv_idx
        for axis in reversed(grid):
            seen = seen & _in_window(query % axis.X, key % axis.X, axis)
            query, key = query // axis.X, key // axis.X
        return (kv_idx >= tokens) | seen

    return mask_mod


def _in_window(x: Tensor, y: Tensor, axis: Axis) -> Tensor:
    """Whether coordinate y lies in the window of coordinate x."""
    group, at, key = x % axis.dil, x // axis.dil, y // axis.dil
    length = axis.X // axis.dil + (group < axis.X % axis.dil).to(at.dtype)
    first = at // axis.s * axis.s
    if axis.causal:
        leader = torch.minimum(first + axis.s - 1, length - 1)
        seen = (key <= at) & (key > leader - axis.k)
    else:
        left, right = axis.k // 2, (axis.k - 1) // 2
        leader = torch.minimum(first + axis.s // 2, length - 1)
        centre = torch.minimum(leader.clamp(min=left), length - 1 - right)
        seen = (key >= centre - left) & (key <= centre + right)
    return seen & (y % axis.dil == group)
