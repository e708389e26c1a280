"""Composite attention's mask as a mask function of FlexAttention."""

from __future__ import annotations

from torch import Tensor

from attnspec.fast.flex import MaskMod
from attnspec.fast.patterns.ee_mllm_attention import check_tokens


def mask_mod(is_visual: Tensor, positions: Tensor, image_visible: str = "causal") -> MaskMod:
    """For queries and keys of all S tokens; `is_visual` bool (S,) and `positions` int (S,) lie on
    the device of the attention.
    """
    check_tokens(is_visual, "positions", positions, image_visible)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = positions[key] <= positions[query]
        if image_visible == "all":
            seen = seen | is_visual[key]
        return (seen & ~is_visual[query]) | (query == key)

    return visible
