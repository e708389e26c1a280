"""Attention by block patterns on the flash engine, which visits the listed blocks and no others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import FLOATS, check_attention_inputs, check_bool
from attnspec.fast.engines.flash import BlockLists, flash
from attnspec.fast.patterns.s2_attention_patterns import check_blocks


def block_sparse_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Tensor,
    b: int,
    causal: bool = True,
    scale: float | None = None,
    q_start: int = 0,
    kv_start: int = 0,
    *,
    key_mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Output (batch, heads, q_tokens, dv) and lse (batch, heads, q_tokens), float32.

    q (batch, heads, q_tokens, d), k (batch, kv_heads, k_tokens, d), v (batch, kv_heads, k_tokens,
    dv); `pattern` bool (heads or kv_heads or 1, blocks of queries, blocks of keys), on any device,
    `key_mask` bool (batch, k_tokens), True = a real key. Differentiable in q, k and v.

    The lists of blocks are made anew on every call, on q's device and without waiting for it; a
    pattern of fewer heads is cheaper.
    """
    check_attention_inputs(q, k, v, FLOATS)
    check_blocks(pattern, b, q.shape[2], k.shape[2], q_start, kv_start)
    check_bool("causal", causal)
    heads, kv_heads = q.shape[1], k.shape[1]
    if pattern.shape[0] not in (1, kv_heads, heads):
        raise ValueError(
            f"pattern: got {pattern.shape[0]} heads, expected {heads} or {kv_heads}, as in q or k, "
            "or 1"
        )
    lists = BlockLists.from_mask(pattern.to(q.device)[None], b, b)
    return flash(
        q, k, v, blocks=for_heads(lists, q.shape[0], heads), scale=scale, key_mask=key_mask,
        backend=backend, **order(q, k, causal, q_start - kv_start),
    )  # fmt: skip


def for_heads(lists: BlockLists, batch: int, heads: int) -> BlockLists:
    """The lists of one batch row and some heads for all of them; each serves a group of heads."""
    own = lists.index.shape[1]

    def repeated(x: Tensor) -> Tensor:
        x = x if own == 1 else x.repeat_interleave(heads // own, 1)
        return x.expand(batch, heads, *x.shape[2:])

    full = None if lists.full is None else repeated(lists.full)
    return replace(lists, index=repeated(lists.index), count=repeated(lists.count), full=full)


def order(q: Tensor, k: Tensor, causal: bool, ahead: int) -> dict[str, Any]:
    """The engine's options for the causal order, the first query being `ahead` of the first key.

    The engine's own order is aligned at the bottom right.
    """
    if not causal:
        return {}
    if ahead == k.shape[2] - q.shape[2]:
        return {"causal": True}
    return {"row_end": torch.arange(ahead + 1, ahead + 1 + q.shape[2], device=q.device)}
