"""MoA on the flash engine, a launch for the heads of each rule; on the decode engine by tokens.

A layer has few rules, two by default: its heads are attended to rule by rule, the longest first,
each with the engine's own sinks and window, or row starts where the window moves in blocks. Heads
of a rule that lie side by side are read where they are, and others are gathered: a model does best
to permute its heads once. A window over all of the text is plain causal attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import FLOATS, check_attention_inputs, check_choice, check_size
from attnspec.fast.engines.flash import SPECIALISED_CONFIGS, flash
from attnspec.fast.patterns.moa_cache import (
    Cache,
    cache_update,
    circular_slots,
    decode,
    decode_step,
    init_cache,
    update_in_place,
)
from attnspec.fast.patterns.moa_flex import GRANULARITIES
from attnspec.fast.patterns.moa_influence import (
    block_influence,
    block_sum,
    group_influence,
    influence,
)
from attnspec.fast.patterns.moa_masks import (
    Sizes,
    cache_sizes,
    check_plan,
    moa_block_mask,
    moa_token_mask,
    span,
)
from attnspec.fast.patterns.moa_rules import density, layout, predicted_loss, rule_space
from attnspec.fast.patterns.moa_search import pareto, search, solve

__all__ = [
    "Cache",
    "block_influence",
    "block_sum",
    "cache_sizes",
    "cache_update",
    "circular_slots",
    "decode",
    "decode_step",
    "density",
    "group_influence",
    "influence",
    "init_cache",
    "layout",
    "moa_attend",
    "moa_block_mask",
    "moa_token_mask",
    "pareto",
    "predicted_loss",
    "rule_space",
    "search",
    "solve",
    "span",
    "update_in_place",
]
ONCE: dict[str, Any] = {"dtypes": ("float32",), "launches": None, "triton": None}
"""A search runs once, on the host, in float64."""
CLAIMS: dict[str, dict[str, Any]] = {
    "moa_attend": {
        "gradient": True,
        "blocks": (16, 64),
        "compiled": True,
        "triton": {"configs": SPECIALISED_CONFIGS},
    },
    "block_influence": {"compiled": True},
    "solve": ONCE,
    "search": ONCE,
    **{
        name: {"launches": None}
        for name in (
            "block_sum",
            "cache_sizes",
            "cache_update",
            "circular_slots",
            "density",
            "group_influence",
            "influence",
            "layout",
            "moa_block_mask",
            "moa_token_mask",
            "pareto",
            "predicted_loss",
            "rule_space",
            "span",
        )
    },
}
"""Sizes, masks, layouts and what is written to a cache are a few torch operations."""


def moa_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Sizes,
    c: Sizes,
    *,
    granularity: str = "token",
    block: int = 64,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Output (batch, heads, T, dv) and lse (batch, heads, T), float32.

    q (batch, heads, T, d), k (batch, kv_heads, T, d), v (batch, kv_heads, T, dv); `s` and `c` are a
    head's static and local tokens, one integer a kv head, on the host. `granularity` "block" moves
    the windows in steps of `block` tokens. Differentiable in q, k and v.
    """
    check_attention_inputs(q, k, v, FLOATS)
    check_size("k", k.shape[2], q.shape[2], "tokens, as in q")
    check_choice("granularity", granularity, GRANULARITIES)
    in_blocks = granularity == "block"
    T, kv_heads = q.shape[2], k.shape[1]
    group = q.shape[1] // kv_heads
    plan = check_plan(s, c, kv_heads, block if in_blocks else 1)
    runs: list[tuple[tuple[int, int], int]] = []
    for static, local in zip(*plan, strict=True):
        rule = (static, local) if static + local < T else (0, T)
        if runs and runs[-1][0] == rule:
            runs[-1] = (rule, runs[-1][1] + group)
        else:
            runs.append((rule, group))
    # Split, not sliced: the gradient of all parts is one concatenation.
    sizes = [size for _, size in runs]
    kv_sizes = [size // group for size in sizes]
    parts = list(zip(q.split(sizes, 1), k.split(kv_sizes, 1), v.split(kv_sizes, 1), strict=True))
    outs: list[Tensor] = [q] * len(runs)
    lses: list[Tensor] = [q] * len(runs)
    for static, local in sorted({rule for rule, _ in runs}, key=lambda rule: (-sum(rule), rule)):
        options: dict[str, Any] = {"causal": True, "scale": scale, "backend": backend}
        if local < T and not in_blocks:
            options |= {"window": local, "sinks": static}
        elif local < T:
            row = torch.arange(T, dtype=torch.int32, device=q.device) // block
            starts = ((row + (1 - local // block)) * block).clamp(min=0)
            options |= {"row_start": starts, "sinks": static}
        own = [n for n, (rule, _) in enumerate(runs) if rule == (static, local)]
        Q, K, V = (_joined([parts[n][i] for n in own]) for i in range(3))
        out, lse = flash(Q, K, V, **options)
        if len(runs) == 1:
            return out, lse
        lengths = [sizes[n] for n in own]
        for n, o, log_sum in zip(own, out.split(lengths, 1), lse.split(lengths, 1), strict=True):
            outs[n], lses[n] = o, log_sum
    return torch.cat(outs, dim=1), torch.cat(lses, dim=1)


def _joined(parts: list[Tensor]) -> Tensor:
    """Heads side by side: no copy of one part alone."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
