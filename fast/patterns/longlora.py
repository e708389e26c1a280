"""LongLoRA's grouped attention on the flash engine: each half of the heads is one causal pass.

A row's keys begin where its segment does, which is arithmetic: nothing is rolled, gathered or
masked, and kv heads are not repeated. A kv head whose query heads are of both halves is passed
twice, each time with its own share of them. Rolled groups are segments too, but for the last, whose
two ends are joined and attended to alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import FLOATS, check_attention_inputs, check_bool, check_size
from attnspec.fast.engines.flash import SPECIALISED_CONFIGS, flash
from attnspec.fast.padding import real_tokens, without_padding
from attnspec.fast.patterns.longlora_groups import (
    Results,
    check_groups,
    choose_group_size,
    group_starts,
    head_shares,
    joined,
    s2_mask,
    segment_bounds,
    shares_of_heads,
    shift_heads,
)
from attnspec.fast.patterns.longlora_tuning import (
    embedding_backward,
    interpolate_positions,
    interpolation_factor,
    is_trained,
    lora_forward,
    lora_merge,
    rmsnorm,
)

__all__ = [
    "choose_group_size",
    "embedding_backward",
    "group_starts",
    "grouped_attend",
    "interpolate_positions",
    "interpolation_factor",
    "is_trained",
    "lora_forward",
    "lora_merge",
    "rmsnorm",
    "s2_mask",
    "shift_heads",
]
CLAIMS: dict[str, dict[str, Any]] = {
    "grouped_attend": {
        "gradient": True,
        "blocks": (16, 64),
        "compiled": True,
        "triton": {"configs": SPECIALISED_CONFIGS},
    },
    "lora_forward": {"gradient": True, "compiled": True, "launches": None},
    "rmsnorm": {"gradient": True, "compiled": True, "launches": None},
    **{
        name: {"launches": None}
        for name in (
            "choose_group_size",
            "embedding_backward",
            "group_starts",
            "interpolate_positions",
            "interpolation_factor",
            "lora_merge",
            "s2_mask",
            "shift_heads",
        )
    },
}
"""Adapters, norms and sums are products and reductions of torch's."""


def grouped_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    G: int,
    variant: str = "segments",
    lengths: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    *,
    backend: str | None = None,
) -> Results:
    """Output (batch, H, T, dv) and lse (batch, H, T), float32, in the order of the tokens.

    q (batch, H, T, d), k (batch, Hk, T, d), v (batch, Hk, T, dv); G tokens a group; `variant`
    "segments" or "roll"; `lengths` int (batch,), the real tokens of each sequence, for segments
    only; that they are 0 to T is checked on CPU tensors only. Differentiable in q, k and v.
    """
    check_attention_inputs(q, k, v, FLOATS)
    H, T, kv_heads = q.shape[1], q.shape[2], k.shape[1]
    check_size("k", k.shape[2], T, "tokens, as in q: there is no cache in training")
    check_groups(T, G, H, variant, "q")
    check_bool("causal", causal)
    real = None if lengths is None else _real(q, lengths, variant)
    if real is not None:
        # What padded rows hold must reach no gradient, not even times 0.
        q = q.where(real[:, None, :, None], 0.0)
    options = {"causal": causal, "scale": scale, "backend": backend, "key_mask": real}
    parts = []
    shares = head_shares(H // 2, H, kv_heads)
    split = shares_of_heads(shares, q, k, v)
    for (_, _, shifted), inputs in zip(shares, split, strict=True):
        if variant == "roll" and shifted:
            parts.append(_rolled(*inputs, G, options))
        else:
            parts.append(_cut(*inputs, G, G // 2 if shifted else G, options))
    out, lse = joined(parts, dim=1)
    return (out, lse) if real is None else without_padding(out, lse, real)


def _cut(q: Tensor, k: Tensor, v: Tensor, G: int, first: int, options: dict[str, Any]) -> Results:
    """Attention in segments: the first has `first` tokens, all others G, the last may be short."""
    T = q.shape[2]
    if first >= T:
        return flash(q, k, v, **options)
    starts, ends = segment_bounds(T, G, first, q.device)
    return flash(q, k, v, row_start=starts, row_end=None if options["causal"] else ends, **options)


def _rolled(q: Tensor, k: Tensor, v: Tensor, G: int, options: dict[str, Any]) -> Results:
    """Attention of rolled heads in the order of the tokens: the ends of the text are one group."""
    T, g = q.shape[2], G // 2
    last = max(T - g, 0)
    joined = flash(*(torch.cat([x[:, :, last:], x[:, :, :g]], 2) for x in (q, k, v)), **options)
    inner = [x[:, :, g:last] for x in (q, k, v)]
    middle = _cut(inner[0], inner[1], inner[2], G, G, options)
    out, lse = (
        torch.cat([ends[:, :, g:], between, ends[:, :, :g]], dim=2)
        for ends, between in zip(joined, middle, strict=True)
    )
    return out, lse


def _real(q: Tensor, lengths: Any, variant: str) -> Tensor:
    """bool (batch, T), which tokens are real."""
    if variant == "roll":
        raise ValueError("lengths: got some with variant 'roll', expected None")
    return real_tokens(q, lengths)
