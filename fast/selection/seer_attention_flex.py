"""SeerAttention's block mask, once selected, as a mask function of FlexAttention."""

from __future__ import annotations

import torch
from torch import Tensor

from attnspec.fast.backend import check_integer, check_size, check_tensor
from attnspec.fast.flex import MaskMod


def mask_mod(M: Tensor, b: int) -> MaskMod:
    """For `M` bool (batch, heads, nb, nb) over blocks of `b` tokens, causal inside them.

    The parameters are those of `block_sparse_attend`; M lies on the device of the mask.
    """
    check_tensor("M", M, ("batch", "heads", "nb", "nb"), (torch.bool,))
    check_size("M", M.shape[3], M.shape[2], "columns, as many as rows")
    check_integer("b", b, least=1)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return M[batch, head, query // b, key // b] & (key <= query)

    return visible
