"""The softmax beside Synaptic Resonance's memory as a mask function of FlexAttention."""

from __future__ import annotations

import torch
from torch import Tensor

from attnspec.fast.backend import check_integer, check_tensor
from attnspec.fast.flex import MaskMod


def mask_mod(window: int | None = None, valid: Tensor | None = None) -> MaskMod:
    """For a whole sequence; the parameters are those of `synaptic_resonance`.

    `valid` bool (batch, T), on the device of the mask, is True at real tokens: `window` counts only
    these, and rows of padding see nothing.
    """
    if window is not None:
        check_integer("window", window, least=1)
    place = None
    if valid is not None:
        check_tensor("valid", valid, ("batch", "T"), (torch.bool,))
        place = valid.cumsum(1)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = key <= query
        if valid is not None:
            seen = seen & valid[batch, query] & valid[batch, key]
        if window is not None:
            age = query - key if place is None else place[batch, query] - place[batch, key]
            seen = seen & (age < window)
        return seen

    return visible
