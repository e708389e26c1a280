"""Music Transformer's relative term as a score function of FlexAttention, and its local blocks.

The products of the queries with the table are kept in memory, (batch, heads, L, rows); each pair
looks its own up, which takes the place of skewing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnspec.fast.backend import FLOATS, check_bool, check_integer, check_tensor
from attnspec.fast.flex import MaskMod, ScoreMod


def score_mod(R: Tensor, causal: bool = True) -> ScoreMod:
    """Adds the relative term of `R` (batch, heads, L, M), or 2 M - 1 columns without `causal`.

    R are the `relative_logits` of the *scaled* queries with a whole table, on the device of the
    attention. Distances that the table lacks add 0; who sees whom is left to a mask function.
    """
    check_tensor("R", R, ("batch", "heads", "L", "rows"), FLOATS)
    check_bool("causal", causal)
    rows = R.shape[3]
    if rows < 1 or (not causal and rows % 2 == 0):
        expected = "at least 1" if causal else "2 M - 1"
        raise ValueError(f"R: got {rows} columns, expected {expected}")
    zero = rows - 1 if causal else rows // 2

    def relative(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        row = zero + key - query
        term = R[batch, head, query, row.clamp(0, rows - 1)].to(score.dtype)
        return score + torch.where((row >= 0) & (row < rows), term, torch.zeros_like(term))

    return relative


def mask_mod(b: int) -> MaskMod:
    """For local attention in blocks of `b`: the own block up to oneself, and the one before.

    Fewer than 2 b tokens, which are one block, all lie in these.
    """
    check_integer("b", b, least=1)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key // b >= query // b - 1)

    return visible
