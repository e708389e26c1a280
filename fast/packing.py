"""Sequences laid end to end, given by the offsets at which they begin."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnspec.fast.backend import INTEGERS, check_device, check_tensor
from attnspec.fast.growing import checkable


def check_offsets(offsets: Any, name: str, x: Tensor, total: int) -> int:
    """How many sequences `offsets` int (sequences + 1) cut `total` tokens in; they must lie where
    `x` lies, which is called `name`.

    That they increase from 0 to `total` is checked on CPU tensors only: a check on a CUDA device
    would wait for it.
    """
    check_tensor("offsets", offsets, ("sequences + 1",), INTEGERS)
    if offsets.shape[0] < 2:
        raise ValueError(f"offsets: got {offsets.shape[0]} numbers, expected 2 or more")
    check_device("offsets", offsets, name, x)
    if checkable(offsets):
        ends_right = int(offsets[0]) == 0 and int(offsets[-1]) == total
        if not ends_right or bool((offsets.diff() < 0).any()):
            raise ValueError(
                f"offsets: got {offsets.tolist()}, expected offsets that increase from 0 to {total}"
            )
    return int(offsets.shape[0]) - 1
