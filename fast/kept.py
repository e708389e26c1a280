"""Small tensors that depend on numbers alone, such as where the blocks of a text begin.

Making one takes a few launches, more time than the kernel that reads it may run, so those of recent
calls are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from attnspec.fast.backend import untraced
from attnspec.fast.recent import Recent

MOST = 64
"""Calls whose tensors are kept, in all."""
LARGEST = 1 << 18
"""The most numbers of a tensor that is kept."""

_kept: Recent[Hashable, tuple[Tensor, ...]] = Recent(MOST)


def kept(
    make: Callable[..., tuple[Tensor, ...]], device: torch.device, *numbers: Hashable
) -> tuple[Tensor, ...]:
    """``make(device, *numbers)``, perhaps of an earlier call; nobody may write into it.

    Each stream has its own, since no other waits for their making; a graph always makes them anew,
    because it would outlive what is kept.
    """
    on_gpu, stream = device.type == "cuda", 0
    if not untraced() or (on_gpu and torch.cuda.is_current_stream_capturing()):
        return make(device, *numbers)
    if on_gpu:
        stream = torch.cuda.current_stream(device).cuda_stream
    key = (make, device, stream, *numbers)
    found = _kept.get(key)
    if found is None:
        # A tensor of inference mode could not be used in training later.
        with torch.inference_mode(False):
            found = make(device, *numbers)
        if all(x.numel() <= LARGEST for x in found):
            _kept[key] = found
    return found


def counting(device: torch.device, count: int) -> Tensor:
    """0, 1, ... in int64; nobody may write into it."""
    return kept(_counting, device, count)[0]


def _counting(device: torch.device, count: int) -> tuple[Tensor]:
    return (torch.arange(count, device=device),)
