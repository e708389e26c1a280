"""Entropy-ABF's row scale as a score function of FlexAttention, and its order as a mask function.

The rotation comes before: queries and keys are turned with `rope_rotate`.
"""

from __future__ import annotations

from torch import Tensor

from attnspec.fast.backend import FLOATS, INTEGERS, check_bool
from attnspec.fast.flex import MaskMod, ScoreMod, by_token, check_by_token, check_key_mask


def mask_mod(
    pq: Tensor, pk: Tensor, causal: bool = True, key_mask: Tensor | None = None
) -> MaskMod:
    """For queries at `pq` int (T) or (batch, T) and keys at `pk` int (S) or (batch, S).

    `key_mask` bool (batch, S) is True at real keys. All lie on the device of the mask.
    """
    check_by_token("pq", pq, "T", INTEGERS)
    check_by_token("pk", pk, "S", INTEGERS)
    check_bool("causal", causal)
    check_key_mask(key_mask, pk.shape[-1])

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = key >= 0
        if causal:
            seen = by_token(pk, batch, key) <= by_token(pq, batch, query)
        return seen if key_mask is None else seen & key_mask[batch, key]

    return visible


def score_mod(lam: Tensor) -> ScoreMod:
    """For rows scaled by `lam` (T) or (batch, T), the `row_scale` of their positions.

    Exempt layers have no score function.
    """
    check_by_token("lam", lam, "T", FLOATS)

    def scaled(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score * by_token(lam, batch, query).to(score.dtype)

    return scaled
