"""`torch.nn.functional.scaled_dot_product_attention` on the flash engine, argument for argument."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnspec.fast.dense.attention import attend


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention (batch, heads, q_tokens, dv) of query (batch, heads, q_tokens, d) to key
    (batch, kv_heads, k_tokens, d) and value (batch, kv_heads, k_tokens, dv); batch, or batch and
    heads, may be missing.

    Means what torch's function means, with these limits, each refused with an error: `attn_mask`
    is bool (True = visible), `dropout_p` is 0, and `is_causal` needs as many queries as keys,
    because torch aligns it at the top left: `attnspec.fast.attention.attend` with ``causal=True``
    aligns it at the bottom right, as decoding wants. A query that sees no key gets 0 (K4).
    """
    if dropout_p != 0.0:
        raise ValueError(f"dropout_p: got {dropout_p!r}, expected 0.0: dropout is not supported")
    if isinstance(attn_mask, Tensor) and attn_mask.dtype != torch.bool:
        raise TypeError(
            f"attn_mask: got dtype {attn_mask.dtype}, expected bool: "
            "an additive mask is not supported"
        )
    if is_causal and attn_mask is not None:
        raise ValueError("attn_mask: got a mask together with is_causal=True, expected one of them")
    shape = query.shape if isinstance(query, Tensor) else ()
    query, key, value = (_with_heads(x) for x in (query, key, value))
    if isinstance(query, Tensor) and isinstance(key, Tensor) and query.dim() == key.dim() == 4:
        if is_causal and query.shape[2] != key.shape[2]:
            raise ValueError(
                f"is_causal: got True for {query.shape[2]} queries and {key.shape[2]} keys, which "
                "torch aligns at the top left; expected as many queries as keys. Use "
                "attnspec.fast.attention.attend(..., causal=True), aligned at the bottom right"
            )
        if not enable_gqa and query.shape[1] != key.shape[1]:
            raise ValueError(
                f"key: got {key.shape[1]} heads, expected {query.shape[1]} as in query, "
                "or enable_gqa=True"
            )
    out, _ = attend(query, key, value, causal=is_causal, mask=attn_mask, scale=scale)
    return out.reshape(*shape[:-1], out.shape[-1])


def _with_heads(x: Any) -> Any:
    """A tensor of two or three axes with the missing leading ones."""
    if isinstance(x, Tensor) and 2 <= x.dim() < 4:
        return x[(None,) * (4 - x.dim())]
    return x
