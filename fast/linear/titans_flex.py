"""The attention beside Titans' memory, MAC, MAG and MAL, as mask functions of FlexAttention."""

from __future__ import annotations

import torch
from torch import Tensor

from attnspec.fast.backend import check_bool, check_integer
from attnspec.fast.flex import MaskMod


def mac_mask_mod(T: int, C: int, N_p: int, tokenwise: bool = False) -> MaskMod:
    """For `T` rows in segments of `C`, whose keys are [N_p persistent | T memory rows | T rows].

    One segment of `mac_segment` has T = C.
    """
    check_integer("T", T, least=0)
    check_integer("C", C, least=1)
    check_integer("N_p", N_p, least=0)
    check_bool("tokenwise", tokenwise)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        place = key - N_p
        from_memory = place < T
        row = torch.where(from_memory, place, place - T)
        in_order = row <= query
        if not tokenwise:
            in_order = in_order | from_memory
        return (place < 0) | ((row // C == query // C) & in_order)

    return visible


def mag_mask_mod(w: int, N_p: int) -> MaskMod:
    """For `N_p` persistent rows and any number after them: the last `w`, and the persistent."""
    check_integer("w", w, least=1)
    check_integer("N_p", N_p, least=0)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & ((query - key < w) | (key < N_p))

    return visible


def mal_mask_mod(w: int) -> MaskMod:
    """For the rows that the memory hands on, persistent or not: the last `w`."""
    return mag_mask_mod(w, 0)
