"""LongLoRA's groups: where they begin, who sees whom in them, and how heads are rolled.

The clauses are those of `longlora`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np

from attnspec.reference.conventions import (
    check_array,
    check_attention_inputs,
    check_bool,
    check_choice,
    check_integer,
    check_lengths,
    check_size,
)

VARIANTS = ("segments", "roll")
WHOLE_CONTEXT = 4096
"""Supervised training takes T / 4 where T is a multiple of this, else a fixed group size."""


def choose_group_size(T: int, ratio: float = 0.25, sft_group_size: int | None = None) -> int:
    """S7: the group size G for texts of T tokens.

    Without `sft_group_size` T must be a multiple of G = T `ratio`, a whole number; ValueError
    otherwise. With it (the authors use 8192) any T will do: G is T / 4 if T is a multiple of 4096,
    else `sft_group_size`, and `ratio` is not used.

    >>> choose_group_size(8192), choose_group_size(10000, sft_group_size=8192)
    (2048, 8192)
    """
    check_integer("T", T, least=1)
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)):
        raise TypeError(f"ratio: got {ratio!r}, expected a number above 0 and up to 1")
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio: got {ratio}, expected a number above 0 and up to 1")
    if sft_group_size is not None:
        check_integer("sft_group_size", sft_group_size, least=2)
        if sft_group_size % 2:
            raise ValueError(f"sft_group_size: got {sft_group_size}, expected an even number")
        return T // 4 if T % WHOLE_CONTEXT == 0 else sft_group_size
    G = round(T * ratio)
    if G < 1 or abs(T * ratio - G) > 1e-9 * T or T % G:
        raise ValueError(
            f"ratio: got {ratio}, expected a whole part of the {T} tokens that divides"
        )
    return G


def group_starts(T: int, G: int, shifted: bool) -> np.ndarray:
    """S2: int64, where the segments of a plain or of a shifted head begin; each ends at the next.

    >>> group_starts(12, 4, False), group_starts(12, 4, True)
    (array([0, 4, 8]), array([ 0,  2,  6, 10]))
    """
    check_integer("T", T, least=0)
    check_integer("G", G, least=1)
    check_bool("shifted", shifted)
    starts = range(G // 2, T, G) if shifted else range(0, T, G)
    return np.array(sorted({0, *starts} if T else ()), np.int64)


def s2_mask(T: int, G: int, H: int, variant: str = "segments", causal: bool = True) -> np.ndarray:
    """S2, S3: bool (H, T, T), which tokens each head lets each token see.

    >>> s2_mask(4, 2, 2)[1].astype(int)
    array([[1, 0, 0, 0],
           [0, 1, 0, 0],
           [0, 1, 1, 0],
           [0, 0, 0, 1]])
    >>> s2_mask(4, 2, 2, "roll")[1].astype(int)[0]
    array([1, 0, 0, 1])
    """
    check_integer("T", T, least=0)
    check_integer("H", H, least=1)
    check_groups(T, G, H, variant, "H")
    check_bool("causal", causal)
    t, g = np.arange(T), G // 2
    plain = shifted = t
    if variant == "roll":
        shifted = (t - g) % max(T, 1)
    masks = []
    for row, moved in ((plain, 0), (shifted, G - g if variant == "segments" else 0)):
        group = (row + moved) // G
        same = group[:, None] == group
        masks.append(same & (row[:, None] >= row) if causal else same)
    return np.stack([masks[h >= H // 2] for h in range(H)])


def shift_heads(x: np.ndarray, G: int, sign: int) -> np.ndarray:
    """S3: x (..., H, T, d) with the heads from H // 2 on rolled by sign G / 2 tokens.

    -1 before attention, so that row r holds token r + G / 2, and 1 to undo it.

    >>> shift_heads(np.arange(8.0).reshape(2, 4, 1), 2, -1)[..., 0]
    array([[0., 1., 2., 3.],
           [5., 6., 7., 4.]])
    """
    check_array("x", x, ("H", "T", "d"))
    check_groups(x.shape[-2], G, x.shape[-3], "roll", "x")
    check_choice("sign", sign, (-1, 1))
    half = x.shape[-3] // 2
    rolled = np.roll(x[..., half:, :, :], sign * (G // 2), axis=-2)
    return np.concatenate([x[..., :half, :, :], rolled], axis=-3)


def segments(T: int, G: int, H: int, variant: str) -> Iterator[tuple[slice, slice]]:
    """S2, S3: heads and rows that attend together; rolled heads have the groups of plain ones.

    >>> [(heads.start, rows.start, rows.stop) for heads, rows in segments(4, 4, 2, "segments")]
    [(0, 0, 4), (1, 0, 2), (1, 2, 4)]
    """
    for heads, shifted in ((slice(0, H // 2), False), (slice(H // 2, H), True)):
        if heads.start == heads.stop:
            continue
        starts = group_starts(T, G, shifted and variant == "segments").tolist()
        for first, last in pairwise([*starts, T]):
            yield heads, slice(first, last)


def real_pairs(lengths: np.ndarray | None, rows: slice) -> np.ndarray | None:
    """S5: bool (..., 1, rows, rows), the pairs of which neither is padding.

    >>> real_pairs(np.array(3), slice(2, 4)).astype(int)
    array([[[1, 0],
            [0, 0]]])
    """
    if lengths is None:
        return None
    real = np.arange(rows.start, rows.stop) < lengths[..., None]
    return real[..., None, :, None] & real[..., None, None, :]


def check_groups(T: int, G: Any, H: int, variant: Any, owner: str) -> None:
    """K14: the groups fit T tokens and the H heads of argument `owner`.

    >>> check_groups(6, 4, 2, "roll", "q")
    Traceback (most recent call last):
    ValueError: G: got 4, expected a divisor of the 6 tokens to roll
    """
    check_choice("variant", variant, VARIANTS)
    check_integer("G", G, least=1)
    if variant == "roll":
        if G % 2:
            raise ValueError(f"G: got {G}, expected an even group size to roll")
        if T % G:
            raise ValueError(f"G: got {G}, expected a divisor of the {T} tokens to roll")
        if H % 2:
            raise ValueError(f"{owner}: got {H} heads, expected an even number of them to roll")


def check_inputs(q: Any, k: Any, v: Any, G: Any, variant: Any, lengths: Any, causal: Any) -> None:
    """K14: one text's q, k and v, groups that fit it, and lengths within it.

    >>> check_inputs(*(np.zeros((1, n, 2)) for n in (2, 3, 3)), 2, "segments", None, True)
    Traceback (most recent call last):
    ValueError: k: got 3, expected 2 (tokens, as in q: there is no cache in training)
    """
    check_attention_inputs(q, k, v)
    H, T = q.shape[-3:-1]
    check_size("k", k.shape[-2], T, "tokens, as in q: there is no cache in training")
    check_groups(T, G, H, variant, "q")
    check_bool("causal", causal)
    if lengths is None:
        return
    if variant == "roll":
        raise ValueError("lengths: got some with variant 'roll', expected None")
    check_lengths(lengths, q.shape[:-3], T)
