"""Attention to each row's heaviest keys alone, whole: a custom op on Triton."""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from attnspec.fast.backend import load
from attnspec.fast.engines.columns.op import positive
from attnspec.fast.engines.operation import Operation


@cache
def _kernels() -> ModuleType:
    """The implementation, imported on first use."""
    return load("attnspec.fast.engines.columns.triton_selected")


def run(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, c: int, scale: float, causal: bool,
    renormalise: bool,
) -> Tensor:  # fmt: skip
    with torch.cuda.device_of(q):
        return _kernels().selected(q, k, v, key_mask, c, scale, causal, renormalise)


selected_op = Operation("attnspec::selected_attention", run)


@selected_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, c: int, scale: float, causal: bool,
    renormalise: bool,
) -> Tensor:  # fmt: skip
    return v.new_empty(*q.shape[:3], v.shape[3])


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    c: int,
    *,
    causal: bool = False,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    renormalise: bool = False,
) -> Tensor:
    """out (batch, heads, q_tokens, dv) from the min(c, k_tokens) largest weights of each row, which
    are `weight_rows`; among equal ones lower indices count.

    q (batch, heads, q_tokens, d), k (batch, k_heads, k_tokens, d), v (batch, v_heads, k_tokens,
    dv), float32 or 16 bits; the counts of k and v heads may differ. No gradient.
    """
    q, scale = positive(q, scale)
    return selected_op(q, k, v, key_mask, min(c, k.shape[2]), scale, causal, renormalise)
