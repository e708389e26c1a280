"""Composite attention's mask as a mask function of FlexAttention."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def mask_mod(
    is_visual: Tensor, positions: Tensor, image_visible: str = "causal"
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """For queries and keys of all S tokens; `is_visual` bool (S,) and `positions` int (S,) lie on
    the device of the attention.
    """

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = positions[key] <= positions[query]
        if image_visible == "all":
            seen = seen | is_visual[key]
        return (seen & ~is_visual[query]) | (query == key)

    return visible
