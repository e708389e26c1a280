"""SinkLoRA on Numba and Triton: grouped attention with global sink tokens, and H2O's cache.

SF-Attn is a plan for the flash engine: a row's keys begin where its segment does, and the sinks are
exempt from that, so that each kind of heads is one causal pass in which a sink counts once. Nothing
is rolled or gathered, but for the first half group of rolled heads, which comes behind the last one
of the text. H2O is decoding, or a prompt's flash attention, with the columns engine behind it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import FLOATS, check_attention_inputs, check_size
from attnspec.fast.engines.flash import SPECIALISED_CONFIGS, flash
from attnspec.fast.patterns.longlora_groups import (
    Results,
    head_shares,
    joined,
    segment_bounds,
    shares_of_heads,
)
from attnspec.fast.patterns.sinklora_h2o import (
    State,
    h2o_accumulate,
    h2o_budgets,
    h2o_keep,
    h2o_mask_step,
    h2o_step,
    init_state,
)
from attnspec.fast.patterns.sinklora_heads import (
    check_pattern,
    plain_heads,
    segment_and_reassemble,
    sf_head_kind,
    sf_mask,
)
from attnspec.fast.patterns.sinklora_prompt import h2o_global_mask, h2o_local_mask

__all__ = [
    "State",
    "h2o_accumulate",
    "h2o_budgets",
    "h2o_global_mask",
    "h2o_keep",
    "h2o_local_mask",
    "h2o_mask_step",
    "h2o_step",
    "init_state",
    "segment_and_reassemble",
    "sf_attend",
    "sf_head_kind",
    "sf_mask",
]
CLAIMS: dict[str, dict[str, Any]] = {
    "sf_attend": {
        "gradient": True,
        "blocks": (16, 64),
        "compiled": True,
        "triton": {"configs": SPECIALISED_CONFIGS},
    },
    **{
        name: {"launches": None}
        for name in (
            "h2o_accumulate",
            "h2o_budgets",
            "h2o_global_mask",
            "h2o_keep",
            "h2o_local_mask",
            "h2o_mask_step",
            "segment_and_reassemble",
            "sf_head_kind",
            "sf_mask",
        )
    },
}
"""Masks, sums and gathers are torch's; a choice of all rows, or of none, launches nothing."""


def sf_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    G: int,
    s: int = 4,
    rho: float = 0.5,
    wrap: bool = False,
    causal: bool = True,
    scale: float | None = None,
    *,
    backend: str | None = None,
) -> Results:
    """Output (batch, H, T, dv) and lse (batch, H, T), float32, in the order of the tokens.

    q (batch, H, T, d), k (batch, Hk, T, d), v (batch, Hk, T, dv); G tokens a group, s sinks, `rho`
    the share of shifted heads that is returned. Differentiable in q, k and v.
    """
    check_attention_inputs(q, k, v, FLOATS)
    H, T, kv_heads = q.shape[1], q.shape[2], k.shape[1]
    check_size("k", k.shape[2], T, "tokens, as in q: there is no cache in training")
    check_pattern(T, G, s, rho, wrap, causal)
    options = {"scale": scale, "backend": backend}
    plan = _causal if causal else _both_ways
    parts = []
    shares = head_shares(plain_heads(H, rho), H, kv_heads)
    split = shares_of_heads(shares, q, k, v)
    for (_, _, shifted), inputs in zip(shares, split, strict=True):
        first = G // 2 if shifted else G
        parts.append(plan(*inputs, G, first, s, wrap and shifted, options))
    return joined(parts, dim=1)


def _causal(
    q: Tensor, k: Tensor, v: Tensor, G: int, first: int, s: int, rolled: bool,
    options: dict[str, Any],
) -> Results:  # fmt: skip
    """Heads whose first segment has `first` tokens and all others G, in causal order.

    The first segment of rolled heads comes behind the last one of the text.
    """
    T = q.shape[2]
    if first >= T:
        return flash(q, k, v, causal=True, **options)
    starts, _ = segment_bounds(T, G, first, q.device)
    ranged = {"causal": True, "sinks": s, **options}
    if not rolled:
        return flash(q, k, v, row_start=starts, **ranged)
    early = (
        q[:, :, :first],
        *(torch.cat([x[:, :, T - first :], x[:, :, :first]], 2) for x in (k, v)),
    )
    late = flash(q[:, :, first:], k, v, row_start=starts[first:], **ranged)
    return joined([flash(*early, causal=True, **options), late], dim=2)


def _both_ways(
    q: Tensor, k: Tensor, v: Tensor, G: int, first: int, s: int, rolled: bool,
    options: dict[str, Any],
) -> Results:  # fmt: skip
    """The same without causal order: sinks see all, and the ends of rolled heads one another."""
    T = q.shape[2]
    s = min(s, T)
    if first >= T or s == T:
        return flash(q, k, v, **options)
    starts, ends = segment_bounds(T, G, first, q.device)

    def inner(low: int, high: int) -> Results:
        """Tokens [low, high), none of them a sink, with their segments and the sinks."""
        rows, start, end = q[:, :, low:high], starts[low:high], ends[low:high]
        return flash(rows, k, v, sinks=s, row_start=start, row_end=end, **options)

    parts = [flash(q[:, :, :s], k, v, **options)] if s else []
    if not rolled:
        return joined([*parts, inner(s, T)], dim=2)
    # The group of the text's two ends is one range of keys, up to which more sinks stand.
    low, high, last = max(s, first), max(s, T - first), T - first
    rows = torch.cat([q[:, :, s:low], q[:, :, high:]], dim=2)
    start = torch.full_like(starts[: rows.shape[2]], last)
    ends_of_text = flash(rows, k, v, row_start=start, sinks=low, **options)
    before, after = zip(*(x.tensor_split([low - s], dim=2) for x in ends_of_text), strict=True)
    middle = [inner(low, high)] if low < high else []
    return joined([*parts, before, *middle, after], dim=2)
