"""RCMHA's biases for content and distance as a score function of FlexAttention, and its mask.

The products of the queries with the table are kept in memory, (batch, heads, T, S + T); each pair
looks its own up, which takes the place of the shift.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import FLOATS, check_integer, check_same, check_tensor
from attnspec.fast.flex import MaskMod, ScoreMod


def score_mod(Bmat: Tensor, uk: Tensor, scale: float) -> ScoreMod:
    """Adds what is not q . k: (u . k + q . R + b) times `scale`, the one given to the attention.

    `Bmat` (batch, heads, T, S + T) holds the products q . R + b before `relative_shift`, `uk`
    (batch, heads, S) those of u with the keys, both unscaled and on the device of the attention.
    """
    check_tensor("Bmat", Bmat, ("batch", "heads", "T", "S + T"), FLOATS)
    check_tensor("uk", uk, ("batch", "heads", "S"), FLOATS)
    check_same("uk", uk, "Bmat", Bmat)
    T, expected = Bmat.shape[2], (*Bmat.shape[:2], Bmat.shape[3] - Bmat.shape[2])
    if tuple(uk.shape) != expected or uk.shape[2] < T:
        raise ValueError(
            f"uk: got shape {tuple(uk.shape)}, expected {expected} of at least {T} tokens, as Bmat"
        )
    _check_number("scale", scale)

    def biased(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = Bmat[batch, head, query, T + key - query].to(score.dtype)
        return score + scale * (uk[batch, head, key].to(score.dtype) + distance)

    return biased


def mask_mod(M: int) -> MaskMod:
    """For segments after `M` tokens of memory, all of which is visible."""
    check_integer("M", M, least=0)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key - M <= query

    return visible


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat)):
        raise TypeError(f"{name}: got {value!r}, expected a number")
