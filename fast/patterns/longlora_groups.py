"""LongLoRA's groups as tensors on the CPU, and the roll of shifted heads on any device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import FLOATS, check_bool, check_choice, check_integer, check_tensor
from attnspec.fast.kept import kept

Results = tuple[Tensor, Tensor]
"""Output and lse of attention."""
VARIANTS = ("segments", "roll")
WHOLE_CONTEXT = 4096
"""Supervised training takes T / 4 where T is a multiple of this, else a fixed group size."""


def choose_group_size(
    T: int, ratio: float = 0.25, sft_group_size: int | None = None, *, backend: str | None = None
) -> int:
    """The group size G for texts of T tokens.

    Without `sft_group_size` T must be a multiple of G = T `ratio`, a whole number. With it (the
    authors use 8192) any T will do: G is T / 4 if T is a multiple of 4096, else `sft_group_size`,
    and `ratio` is not used.
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


def group_starts(T: int, G: int, shifted: bool, *, backend: str | None = None) -> Tensor:
    """int64, where the segments of a plain or of a shifted head begin; each ends at the next."""
    check_integer("T", T, least=0)
    check_integer("G", G, least=1)
    check_bool("shifted", shifted)
    if not shifted or not T:
        return torch.arange(0, T, G)
    return torch.tensor(sorted({0, *range(G // 2, T, G)}))


def s2_mask(
    T: int,
    G: int,
    H: int,
    variant: str = "segments",
    causal: bool = True,
    *,
    backend: str | None = None,
) -> Tensor:
    """bool (H, T, T), which tokens each head lets each token see."""
    check_integer("T", T, least=0)
    check_integer("H", H, least=1)
    check_groups(T, G, H, variant, "H")
    check_bool("causal", causal)
    t = torch.arange(T)
    row, group = rows_and_groups(t, torch.arange(H)[:, None] >= H // 2, T, G, variant)
    same = group[:, :, None] == group[:, None, :]
    return same & (row[:, :, None] >= row[:, None, :]) if causal else same


def rows_and_groups(
    t: Tensor, shifted: Tensor, T: int, G: int, variant: str
) -> tuple[Tensor, Tensor]:
    """The row of token t in its head, and the number of its group; `shifted` broadcasts with t."""
    g = G // 2
    if variant == "roll":
        row = torch.where(shifted, (t - g) % max(T, 1), t)
        return row, row // G
    row = t + torch.zeros_like(shifted, dtype=t.dtype)
    return row, (row + torch.where(shifted, G - g, 0)) // G


def head_shares(plain: int, H: int, kv_heads: int) -> list[tuple[slice, slice, bool]]:
    """Query heads with the kv heads that serve them alike, and whether they are shifted.

    The first `plain` of H heads are not. A kv head that serves both kinds is in two shares.
    """
    group = H // kv_heads
    whole, upper = plain // group, -(-plain // group)
    shares = [
        (slice(0, whole * group), slice(0, whole), False),
        (slice(whole * group, plain), slice(whole, upper), False),
        (slice(plain, upper * group), slice(whole, upper), True),
        (slice(upper * group, H), slice(upper, kv_heads), True),
    ]
    return [share for share in shares if share[0].start < share[0].stop]


def joined(parts: list[Results], dim: int) -> Results:
    """Results of consecutive heads (`dim` 1) or tokens (2) as one."""
    out, lse = (x[0] if len(x) == 1 else torch.cat(x, dim) for x in zip(*parts, strict=True))
    return out, lse


def segment_bounds(T: int, G: int, first: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """int32 (T) each, where a token's segment starts and ends: the first has `first` tokens, all
    others G. The last end may be beyond T. Not to be written to.
    """
    starts, ends = kept(_segment_bounds, device, T, G, first)
    return starts, ends


def _segment_bounds(device: torch.device, T: int, G: int, first: int) -> tuple[Tensor, Tensor]:
    t = torch.arange(T, device=device, dtype=torch.int32)
    ends = torch.div(t + (G - first), G, rounding_mode="floor") * G + first
    return (ends - G).clamp(min=0), ends


def shares_of_heads(
    shares: Sequence[tuple[slice, slice, bool]], q: Tensor, k: Tensor, v: Tensor
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The heads of q, k and v of each share. Where no kv head is in two, tensors are split, whose
    gradients are joined; slices would each have one of full size, to be added up.
    """
    q_heads = [heads.stop - heads.start for heads, _, _ in shares]
    kv_heads = [served.stop - served.start for _, served, _ in shares]
    if sum(kv_heads) != k.shape[1]:
        return [(q[:, heads], k[:, served], v[:, served]) for heads, served, _ in shares]
    parts = q.split(q_heads, 1), k.split(kv_heads, 1), v.split(kv_heads, 1)
    return list(zip(*parts, strict=True))


def shift_heads(x: Tensor, G: int, sign: int, *, backend: str | None = None) -> Tensor:
    """x (batch, H, T, d) with the heads from H // 2 on rolled by sign G / 2 tokens, copied.

    -1 before attention, so that row r holds token r + G / 2, and 1 to undo it.
    """
    check_tensor("x", x, ("batch", "H", "T", "d"), FLOATS)
    check_groups(x.shape[2], G, x.shape[1], "roll", "x")
    check_choice("sign", sign, (-1, 1))
    half = x.shape[1] // 2
    return torch.cat([x[:, :half], x[:, half:].roll(sign * (G // 2), 2)], dim=1)


def check_groups(T: int, G: Any, H: int, variant: Any, owner: str) -> None:
    """The groups fit T tokens and the H heads of argument `owner`."""
    check_choice("variant", variant, VARIANTS)
    check_integer("G", G, least=1)
    if variant == "roll":
        if G % 2:
            raise ValueError(f"G: got {G}, expected an even group size to roll")
        if T % G:
            raise ValueError(f"G: got {G}, expected a divisor of the {T} tokens to roll")
        if H % 2:
            raise ValueError(f"{owner}: got {H} heads, expected an even number of them to roll")
