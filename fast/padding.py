"""Sequences padded on the right, given by the number of their real tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import INTEGERS, check_device, check_size, check_tensor
from attnspec.fast.growing import checkable


def real_tokens(q: Tensor, lengths: Any) -> Tensor:
    """bool (batch, T): which tokens of q (batch, heads, T, d) are real, for `lengths` int (batch,).

    That these are 0 to T is checked on CPU tensors only.
    """
    check_tensor("lengths", lengths, ("batch",), INTEGERS)
    check_size("lengths", lengths.shape[0], q.shape[0], "batch, as in q")
    check_device("lengths", lengths, "q", q)
    return tokens_of(lengths, q.shape[2])


def tokens_of(lengths: Tensor, T: int) -> Tensor:
    """bool (batch, T): which of T tokens are real, likewise, for integers (batch,)."""
    if checkable(lengths) and bool(((lengths < 0) | (lengths > T)).any()):
        raise ValueError(f"lengths: got {lengths.tolist()}, expected 0 to {T} tokens")
    return torch.arange(T, device=lengths.device) < lengths[:, None]


def without_padding(out: Tensor, lse: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Output and lse with those of padded rows 0 and -inf: they saw nothing (K4)."""
    rows = real[:, None]
    return out.where(rows[..., None], 0.0), lse.where(rows, -float("inf"))
