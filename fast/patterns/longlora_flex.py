"""LongLoRA's groups as mask functions of FlexAttention."""

from __future__ import annotations

from torch import Tensor

from attnspec.fast.backend import check_bool, check_integer
from attnspec.fast.flex import MaskMod
from attnspec.fast.patterns.longlora_groups import check_groups, rows_and_groups


def mask_mod(
    T: int,
    G: int,
    H: int,
    variant: str = "segments",
    lengths: Tensor | None = None,
    causal: bool = True,
) -> MaskMod:
    """For texts of `T` tokens and `H` query heads; the parameters are those of `grouped_attend`.

    `lengths` int (batch,), on the device of the mask, hides padding on the right, whose rows then
    see nothing.
    """
    check_integer("T", T, least=0)
    check_integer("H", H, least=1)
    check_groups(T, G, H, variant, "H")
    check_bool("causal", causal)
    if lengths is not None and variant == "roll":
        raise ValueError("lengths: got some with variant 'roll', expected None")

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        shifted = head >= H // 2
        row, group = rows_and_groups(query, shifted, T, G, variant)
        other, other_group = rows_and_groups(key, shifted, T, G, variant)
        seen = group == other_group
        if causal:
            seen = seen & (row >= other)
        if lengths is not None:
            seen = seen & (query < lengths[batch]) & (key < lengths[batch])
        return seen

    return visible
