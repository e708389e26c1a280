"""Music Transformer on the relative engine: the band is computed inside the kernel, sheared there.

The steps that hand out whole matrices of logits are products and views of torch; the headline
operations keep nothing larger than their inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import check_bool, check_integer, check_same, check_scale
from attnspec.fast.engines.relative import relative
from attnspec.fast.scores.music_transformer_checks import check_local_rows, check_self, check_table
from attnspec.fast.scores.music_transformer_steps import (
    attend,
    decode_relative,
    global_logits,
    local_logits,
    local_visibility,
    relative_logits,
    relative_logits_gather,
    relative_table_slice,
    relative_values,
    skew,
    skew_full,
    table_gradient,
    unskew,
)

__all__ = [
    "attend",
    "decode_relative",
    "global_attention",
    "global_logits",
    "local_attention",
    "local_logits",
    "local_visibility",
    "relative_logits",
    "relative_logits_gather",
    "relative_table_slice",
    "relative_values",
    "skew",
    "skew_full",
    "table_gradient",
    "unskew",
]

CLAIMS: dict[str, dict[str, Any]] = {
    "global_attention": {
        "gradient": True,
        "limits": {"Ev": (False,)},
        "blocks": (16, 64),
        "compiled": True,
        "triton": {"graph": True},
    },
    "local_attention": {"gradient": True, "limits": {"Ev": (False,)}, "blocks": (16, 64)},
    **{
        name: {"launches": None}
        for name in (
            "relative_table_slice", "relative_logits", "relative_logits_gather", "skew", "unskew",
            "skew_full", "global_logits", "local_visibility", "local_logits", "attend",
            "decode_relative", "relative_values", "table_gradient",
        )
    },
}  # fmt: skip


def _engine_table(E: Tensor, L: int, causal: bool) -> tuple[Tensor, int]:
    """The rows that L tokens can use, as the engine takes them, and the one of distance 0."""
    rows = E.shape[-2]
    zero = rows - 1 if causal else rows // 2
    first, stop = max(zero - max(L - 1, 0), 0), min(zero + (1 if causal else max(L, 1)), rows)
    used = E[..., first:stop, :]
    return (used[None] if E.dim() == 2 else used), zero - first


def _refuse_values(Ev: Any) -> None:
    if Ev is not None:
        raise ValueError("Ev: got one, expected None: the relative engine has no table of values")


def global_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    E: Tensor,
    *,
    Ev: Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Outputs (batch, heads, L, dv) of global relative attention, in linear memory.

    q (batch, heads, L, d), k (batch, kv_heads, L, d), v (batch, kv_heads, L, dv), d and dv up to
    256; E (heads, M, d), or (heads, 2 M - 1, d) if not causal, without heads if shared.
    Differentiable in q, k, v and E. A table of values `Ev` is refused.
    """
    check_self(q, k, v)
    check_scale(scale)
    check_bool("causal", causal)
    check_table("E", E, q.shape[1], q.shape[3], causal)
    check_same("E", E, "q", q)
    _refuse_values(Ev)
    table, zero = _engine_table(E, q.shape[2], causal)
    return relative(q, k, v, table, zero=zero, scale=scale, causal=causal, backend=backend)[0]


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    E: Tensor,
    b: int,
    *,
    Ev: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Outputs (batch, heads, L, dv) of relative attention in blocks of `b`, in O(L b) time.

    Arguments as in `global_attention`; E needs min(2 b, L) rows.
    """
    check_self(q, k, v)
    check_scale(scale)
    check_table("E", E, q.shape[1], q.shape[3], causal=True)
    check_same("E", E, "q", q)
    check_integer("b", b, least=1)
    _refuse_values(Ev)
    L = q.shape[2]
    check_local_rows(E, L, b)
    table, zero = _engine_table(E, min(L, 2 * b) if 2 * b <= L else L, True)
    row_start = None
    if 2 * b <= L:
        block = torch.arange(L, device=q.device) // b
        row_start = (block - 1).clamp(min=0) * b
    return relative(
        q, k, v, table, zero=zero, scale=scale, causal=True, row_start=row_start, backend=backend
    )[0]
