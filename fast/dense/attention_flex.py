"""The causal rule, padding and packing as mask functions of FlexAttention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import (
    INTEGERS,
    check_bool,
    check_device,
    check_integer,
    check_size,
    check_tensor,
)
from attnspec.fast.flex import MaskMod, check_key_mask
from attnspec.fast.growing import checkable


def mask_mod(
    q_tokens: int, k_tokens: int, causal: bool = True, key_mask: Tensor | None = None
) -> MaskMod:
    """For `q_tokens` queries that end where the `k_tokens` keys end (K3).

    `key_mask` bool (batch, k_tokens), on the device of the mask, is True at real keys.
    """
    check_integer("q_tokens", q_tokens, least=0)
    check_integer("k_tokens", k_tokens, least=0)
    check_bool("causal", causal)
    check_key_mask(key_mask, k_tokens)
    before = k_tokens - q_tokens

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = key <= query + before if causal else key >= 0
        return seen if key_mask is None else seen & key_mask[batch, key]

    return visible


def packed_mask_mod(q_offsets: Tensor, k_offsets: Tensor, causal: bool = False) -> MaskMod:
    """For sequences laid end to end in a batch of one; the parameters are those of `attend_packed`.

    Offsets int (sequences + 1), on the device of the mask.
    """
    _check_offsets("q_offsets", q_offsets)
    _check_offsets("k_offsets", k_offsets)
    check_device("k_offsets", k_offsets, "q_offsets", q_offsets)
    check_size("k_offsets", len(k_offsets), len(q_offsets), "as many as q_offsets")
    check_bool("causal", causal)
    q_sequence, k_sequence = _sequences(q_offsets), _sequences(k_offsets)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        n = q_sequence[query]
        seen = n == k_sequence[key]
        if causal:
            seen = seen & (key - k_offsets[n + 1] <= query - q_offsets[n + 1])
        return seen

    return visible


def _check_offsets(name: str, offsets: Any) -> None:
    """What they hold is looked at on the CPU only."""
    check_tensor(name, offsets, ("sequences + 1",), INTEGERS)
    if len(offsets) < 2:
        raise ValueError(f"{name}: got {len(offsets)} offsets, expected at least 2")
    if checkable(offsets) and bool((offsets[0] != 0) | (offsets.diff() < 0).any()):
        raise ValueError(f"{name}: got {offsets.tolist()}, expected offsets that increase from 0")


def _sequences(offsets: Tensor) -> Tensor:
    """The sequence of each token."""
    numbers = torch.arange(len(offsets) - 1, device=offsets.device)
    return numbers.repeat_interleave(offsets.diff())
