"""Lean attention's lengths as a mask function of FlexAttention; its schedule is no mask."""

from __future__ import annotations

from torch import Tensor

from attnspec.fast.backend import INTEGERS, check_bool, check_integer, check_tensor
from attnspec.fast.flex import MaskMod
from attnspec.fast.growing import checkable


def mask_mod(Tq: int, lengths: Tensor, causal: bool = False) -> MaskMod:
    """For `Tq` queries, the last of which stands at the last of a sequence's `lengths` keys.

    `lengths` int (batch,) lie on the device of the mask and are looked at on the CPU only.
    """
    check_integer("Tq", Tq, least=0)
    check_tensor("lengths", lengths, ("batch",), INTEGERS)
    if checkable(lengths) and bool((lengths < 0).any()):
        raise ValueError(f"lengths: got {lengths.tolist()}, expected lengths >= 0")
    check_bool("causal", causal)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = key < lengths[batch]
        return seen & (key <= lengths[batch] - Tq + query) if causal else seen

    return visible
