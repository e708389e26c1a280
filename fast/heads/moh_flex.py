"""MoH's active heads as a mask function of FlexAttention."""

from __future__ import annotations

import torch
from torch import Tensor

from attnspec.fast.backend import check_tensor
from attnspec.fast.flex import MaskMod


def mask_mod(active: Tensor) -> MaskMod:
    """For `active` bool (batch, q_tokens, heads), in the layout of gates, on the mask's device.

    Rows of idle heads see nothing, so their output is 0. It says nothing of order and padding:
    `torch.nn.attention.flex_attention.and_masks` joins it with what does.
    """
    check_tensor("active", active, ("batch", "q_tokens", "heads"), (torch.bool,))

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return active[batch, query, head] & (key >= 0)

    return visible
