"""SinkLoRA's masks: which heads are shifted, who sees whom, and how heads are rolled.

The clauses are those of `sinklora`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from attnspec.reference.conventions import check_array, check_bool, check_choice, check_integer
from attnspec.reference.patterns.longlora_groups import check_groups, s2_mask

ROUNDING = 1e-9
"""A share of heads this little above a whole number is that number."""


def sf_head_kind(H: int, rho: float = 0.5) -> np.ndarray:
    """S1: int64 (H), 0 for a plain head and 1 for a shifted one.

    >>> sf_head_kind(8), sf_head_kind(5, 0.0)
    (array([0, 0, 0, 0, 0, 0, 1, 1]), array([0, 0, 1, 1, 1]))
    """
    check_integer("H", H, least=1)
    return (np.arange(H) >= plain_heads(H, rho)).astype(np.int64)


def sf_mask(
    T: int,
    G: int,
    H: int,
    s: int = 4,
    rho: float = 0.5,
    wrap: bool = False,
    causal: bool = True,
) -> np.ndarray:
    """S2-S4: bool (H, T, T), which tokens each head lets each token see.

    >>> sf_mask(6, 2, 2, s=1, rho=0.0)[1].astype(int)
    array([[1, 0, 0, 0, 0, 0],
           [1, 1, 0, 0, 0, 0],
           [1, 1, 1, 0, 0, 0],
           [1, 0, 0, 1, 0, 0],
           [1, 0, 0, 1, 1, 0],
           [1, 0, 0, 0, 0, 1]])
    """
    check_integer("T", T, least=0)
    check_pattern(T, G, s, rho, wrap, causal)
    groups = s2_mask(T, G, 2, "roll" if wrap else "segments", causal)
    t, u = np.arange(T)[:, None], np.arange(T)
    world = (u < s) | (t < s)
    return groups[sf_head_kind(H, rho)] | (world & (u <= t) if causal else world)


def segment_and_reassemble(x: np.ndarray, G: int, rho: float, sign: int) -> np.ndarray:
    """S3: x (..., H, T, d) with the shifted heads, and no others, rolled by sign G / 2 tokens.

    -1 before attention, so that row r holds token r + G / 2, and 1 to undo it.

    >>> x = np.arange(16.0).reshape(4, 4, 1)
    >>> segment_and_reassemble(x, 2, 0.5, -1)[2:, :, 0]
    array([[ 8.,  9., 10., 11.],
           [13., 14., 15., 12.]])
    """
    check_array("x", x, ("H", "T", "d"))
    check_choice("sign", sign, (-1, 1))
    check_groups(x.shape[-2], G, 2, "roll", "x")
    stay = plain_heads(x.shape[-3], rho)
    rolled = np.roll(x[..., stay:, :, :], sign * (G // 2), axis=-2)
    return np.concatenate([x[..., :stay, :, :], rolled], axis=-3)


def plain_heads(H: int, rho: Any) -> int:
    """S1: how many heads come before the first shifted one.

    >>> plain_heads(32, 0.5), plain_heads(20, 0.7)
    (24, 17)
    """
    if isinstance(rho, bool) or not isinstance(rho, (int, float)):
        raise TypeError(f"rho: got {rho!r}, expected a number from 0 to 1")
    if not 0 <= rho <= 1:
        raise ValueError(f"rho: got {rho}, expected a number from 0 to 1")
    half = H // 2
    return half + max(0, math.ceil(rho * (H - half) - ROUNDING))


def check_pattern(T: int, G: Any, s: Any, rho: Any, wrap: Any, causal: Any) -> None:
    """K14: the groups fit T tokens, and the other parameters are what they should be.

    >>> check_pattern(6, 4, 4, 0.5, True, True)
    Traceback (most recent call last):
    ValueError: G: got 4, expected a divisor of the 6 tokens to roll
    """
    check_bool("wrap", wrap)
    check_bool("causal", causal)
    check_groups(T, G, 2, "roll" if wrap else "segments", "q")
    check_integer("s", s, least=0)
    plain_heads(1, rho)
