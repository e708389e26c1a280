"""What the mask and score functions for FlexAttention share: their types and their checks.

`torch.nn.attention.flex_attention` calls them with indices, a score function with the scaled score
before. A tensor that such a function reads lies on the device of the attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import check_size, check_tensor

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(batch, head, query, key): whether the query of this head sees the key."""

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(score, batch, head, query, key): the score that takes part in the softmax."""


def check_key_mask(key_mask: Any, k_tokens: int | None = None) -> None:
    """`key_mask` is None or bool (batch, k_tokens)."""
    if key_mask is None:
        return
    check_tensor("key_mask", key_mask, ("batch", "k_tokens"), (torch.bool,))
    if k_tokens is not None:
        check_size("key_mask", key_mask.shape[1], k_tokens, "k_tokens")


def check_by_token(name: str, x: Any, tokens: str, dtypes: tuple[torch.dtype, ...]) -> None:
    """`x` is (tokens,), or (batch, tokens) where sequences differ."""
    batched = isinstance(x, Tensor) and x.dim() == 2
    check_tensor(name, x, ("batch", tokens) if batched else (tokens,), dtypes)


def by_token(x: Tensor, batch: Tensor, token: Tensor) -> Tensor:
    """What `x` (tokens,) or (batch, tokens) holds for a token."""
    return x[token] if x.dim() == 1 else x[batch, token]
