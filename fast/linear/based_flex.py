"""Based beside its recurrence: the sliding window and the Taylor weights for FlexAttention."""

from __future__ import annotations

import torch
from torch import Tensor

from attnspec.fast.backend import check_integer
from attnspec.fast.flex import MaskMod, ScoreMod


def mask_mod(q_tokens: int, k_tokens: int, left: int) -> MaskMod:
    """For `sliding_window_attend` of `q_tokens` queries: a query's own key and the `left` before.

    The queries end where the `k_tokens` keys end (K3).
    """
    check_integer("q_tokens", q_tokens, least=0)
    check_integer("k_tokens", k_tokens, least=0)
    check_integer("left", left, least=0)
    before = k_tokens - q_tokens

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        age = query + before - key
        return (age >= 0) & (age <= left)

    return visible


def score_mod() -> ScoreMod:
    """The log of the Taylor weight of a score, whose softmax is `based_attend` with eps = 0.

    Quadratic in the tokens; the weights are never below 1/2, so that the log is always finite.
    """

    def taylor(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return torch.log(1 + score + score * score / 2)

    return taylor
