"""SinkLoRA's masks as tensors on the CPU, and the roll of shifted heads on any device."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import FLOATS, check_bool, check_choice, check_integer, check_tensor
from attnspec.fast.patterns.longlora_groups import check_groups, s2_mask

ROUNDING = 1e-9
"""A share of heads this little above a whole number is that number."""


def sf_head_kind(H: int, rho: float = 0.5, *, backend: str | None = None) -> Tensor:
    """int64 (H), 0 for a plain head and 1 for a shifted one."""
    check_integer("H", H, least=1)
    return (torch.arange(H) >= plain_heads(H, rho)).long()


def sf_mask(
    T: int,
    G: int,
    H: int,
    s: int = 4,
    rho: float = 0.5,
    wrap: bool = False,
    causal: bool = True,
    *,
    backend: str | None = None,
) -> Tensor:
    """bool (H, T, T), which tokens each head lets each token see."""
    check_integer("T", T, least=0)
    check_pattern(T, G, s, rho, wrap, causal)
    groups = s2_mask(T, G, 2, "roll" if wrap else "segments", causal)
    t, u = torch.arange(T)[:, None], torch.arange(T)
    world = (u < s) | (t < s)
    return groups[sf_head_kind(H, rho)] | (world & (u <= t) if causal else world)


def segment_and_reassemble(
    x: Tensor, G: int, rho: float, sign: int, *, backend: str | None = None
) -> Tensor:
    """x (batch, H, T, d) with the shifted heads, and no others, rolled by sign G / 2 tokens.

    -1 before attention, so that row r holds token r + G / 2, and 1 to undo it. A copy.
    """
    check_tensor("x", x, ("batch", "H", "T", "d"), FLOATS)
    check_choice("sign", sign, (-1, 1))
    check_groups(x.shape[2], G, 2, "roll", "x")
    stay = plain_heads(x.shape[1], rho)
    return torch.cat([x[:, :stay], x[:, stay:].roll(sign * (G // 2), 2)], dim=1)


def plain_heads(H: int, rho: Any) -> int:
    """How many heads come before the first shifted one."""
    if isinstance(rho, bool) or not isinstance(rho, (int, float)):
        raise TypeError(f"rho: got {rho!r}, expected a number from 0 to 1")
    if not 0 <= rho <= 1:
        raise ValueError(f"rho: got {rho}, expected a number from 0 to 1")
    half = H // 2
    return half + max(0, math.ceil(rho * (H - half) - ROUNDING))


def check_pattern(T: int, G: Any, s: Any, rho: Any, wrap: Any, causal: Any) -> None:
    """The groups fit T tokens, and the other parameters are what they should be."""
    check_bool("wrap", wrap)
    check_bool("causal", causal)
    check_groups(T, G, 2, "roll" if wrap else "segments", "q")
    check_integer("s", s, least=0)
    plain_heads(1, rho)
