"""S2-Attention on the flash engine, by lists of blocks; on the decode engine token by token.

The blocks of a stride are an arithmetic progression: the lists are computed on the device, without
a mask. Two rows of blocks share a query tile where that is allowed (`s2_attention_plan`); dense
heads are plain causal attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import FLOATS, check_attention_inputs, check_integer
from attnspec.fast.engines.flash import SPECIALISED_CONFIGS, flash
from attnspec.fast.patterns.s2_attention_blocks import block_sparse_attend, for_heads, order
from attnspec.fast.patterns.s2_attention_decoding import (
    State,
    decode_step,
    init_state,
    merge_partitions,
)
from attnspec.fast.patterns.s2_attention_layouts import merge_q, to_csc, to_csr
from attnspec.fast.patterns.s2_attention_patterns import (
    block_pattern,
    check_starts,
    check_stride,
    check_window,
    is_kv_efficient,
    live_blocks,
    stride_mask,
    token_mask,
    union_coverage,
)
from attnspec.fast.patterns.s2_attention_plan import distance_lists, rows_a_tile, stride_lists

__all__ = [
    "State",
    "block_pattern",
    "block_sparse_attend",
    "decode_step",
    "init_state",
    "is_kv_efficient",
    "live_blocks",
    "merge_partitions",
    "merge_q",
    "s2_attend",
    "stride_mask",
    "to_csc",
    "to_csr",
    "token_mask",
    "union_coverage",
]
CLAIMS: dict[str, dict[str, Any]] = {
    "s2_attend": {
        "gradient": True,
        "blocks": (16, 64),
        "compiled": True,
        "triton": {"configs": SPECIALISED_CONFIGS},
    },
    "block_sparse_attend": {"gradient": True, "blocks": (16, 64), "compiled": True},
    **{
        name: {"launches": None}
        for name in (
            "block_pattern",
            "is_kv_efficient",
            "live_blocks",
            "merge_partitions",
            "merge_q",
            "stride_mask",
            "to_csc",
            "to_csr",
            "token_mask",
            "union_coverage",
        )
    },
}
"""Patterns, their lists and the merge of parts are a few torch operations."""


def s2_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    b: int = 64,
    local: int | tuple[int, int] = 32,
    v_stride: int = 8,
    step: int | None = None,
    offset: int = 0,
    num_dense_heads: int = 0,
    *,
    homo_head: bool = False,
    causal: bool = True,
    scale: float | None = None,
    q_start: int = 0,
    kv_start: int = 0,
    key_mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Output (batch, heads, q_tokens, dv) and lse (batch, heads, q_tokens), float32.

    q (batch, heads, q_tokens, d), k (batch, kv_heads, k_tokens, d), v (batch, kv_heads, k_tokens,
    dv); `key_mask` bool (batch, k_tokens), True = a real key; the pattern's parameters as in
    `block_pattern`. Blocks of 64 or 128 tokens fill the GPU's tiles. Differentiable in q, k and v.
    """
    check_attention_inputs(q, k, v, FLOATS)
    check_starts(b, q_start, kv_start)
    check_integer("v_stride", v_stride, least=1)
    batch, heads, kv_heads = q.shape[0], q.shape[1], k.shape[1]
    left, right, step = check_stride(
        heads, kv_heads, local, v_stride, num_dense_heads, step, offset, homo_head
    )
    check_window(local, causal)
    ahead = q_start - kv_start
    common = order(q, k, causal, ahead)
    options: dict[str, Any] = {"key_mask": key_mask, "scale": scale, "backend": backend}
    sparse = 0 if v_stride == 1 else kv_heads - num_dense_heads
    if not sparse:
        return flash(q, k, v, **common, **options)
    rows, columns = -(-q.shape[2] // b), -(-k.shape[2] // b)
    starts = None
    if causal:
        # Blocks seen whole are for tiles of a multiple of 16 tokens, and for no other rule.
        alone = ahead >= 0 and "causal" in common and key_mask is None and b % 16 == 0
        merged = rows_a_tile(b, left, alone)
        c = torch.arange(1 if homo_head else sparse, device=q.device)
        phases = -(c * step + (offset + kv_start // b)) % v_stride
        lists, starts = stride_lists(
            phases, rows, columns, b, left, v_stride, ahead // b, merged, alone
        )
    else:
        lists = distance_lists(rows, columns, b, left, right, v_stride, ahead // b, q.device)
    cut = sparse * (heads // kv_heads)
    out, lse = flash(
        q[:, :cut], k[:, :sparse], v[:, :sparse], blocks=for_heads(lists, batch, cut),
        row_start=None if starts is None else starts[: q.shape[2]], **common, **options,
    )  # fmt: skip
    if sparse == kv_heads:
        return out, lse
    rest = flash(q[:, cut:], k[:, sparse:], v[:, sparse:], **common, **options)
    return torch.cat([out, rest[0]], dim=1), torch.cat([lse, rest[1]], dim=1)
