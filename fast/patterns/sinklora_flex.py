"""SinkLoRA's groups and global tokens as mask functions of FlexAttention."""

from __future__ import annotations

from torch import Tensor

from attnspec.fast.backend import check_integer
from attnspec.fast.flex import MaskMod
from attnspec.fast.patterns.longlora_groups import rows_and_groups
from attnspec.fast.patterns.sinklora_heads import check_pattern, plain_heads


def mask_mod(
    T: int,
    G: int,
    H: int,
    s: int = 4,
    rho: float = 0.5,
    wrap: bool = False,
    causal: bool = True,
) -> MaskMod:
    """For texts of `T` tokens and `H` query heads; the parameters are those of `sf_attend`."""
    check_integer("T", T, least=0)
    check_integer("H", H, least=1)
    check_pattern(T, G, s, rho, wrap, causal)
    variant, stay = "roll" if wrap else "segments", plain_heads(H, rho)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        shifted = head >= stay
        row, group = rows_and_groups(query, shifted, T, G, variant)
        other, other_group = rows_and_groups(key, shifted, T, G, variant)
        near, world = group == other_group, (key < s) | (query < s)
        if causal:
            near, world = near & (row >= other), world & (query >= key)
        return near | world

    return visible
