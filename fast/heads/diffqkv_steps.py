"""DiffQKV attention's steps as whole matrices, in torch: scores, their weights and what they give.

A map says which key or value head each query head reads, and may be any; what it names is gathered.
Sums are float32 at least. Maps are looked at on CPU tensors only: a look at a CUDA device would
wait for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import (
    FLOATS,
    INTEGERS,
    check_device,
    check_mask,
    check_same,
    check_scale,
    check_size,
    check_tensor,
    product,
    wide,
)
from attnspec.fast.growing import checkable


def scores(
    q: Tensor,
    k: Tensor,
    hk: Tensor,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Scores (batch, heads, q_tokens, k_tokens), float32 for 16-bit inputs.

    q (batch, heads, q_tokens, d), k (batch, k_heads, k_tokens, d), hk int (heads,), the key head of
    each query head; `scale` is 1 / sqrt(d) by default. Differentiable.
    """
    check_tensor("q", q, ("batch", "heads", "q_tokens", "d"), FLOATS)
    check_tensor("k", k, ("batch", "k_heads", "k_tokens", "d"), FLOATS)
    check_same("k", k, "q", q)
    check_size("k", k.shape[0], q.shape[0], "batch, as in q")
    check_size("k", k.shape[3], q.shape[3], "d, as in q")
    _check_map("hk", hk, k.shape[1], "q", q)
    check_scale(scale)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    return scale * product(wide(q), wide(k[:, hk.long()]).mT)


def softmax_rows(
    s: Tensor, mask: Tensor | None = None, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Weights P, shaped as s (batch, heads, q_tokens, k_tokens), and lse (batch, heads, q_tokens).

    `mask` is bool and broadcasts to s, True = visible. P has the dtype of s, lse is float32 at
    least; a row that sees nothing has P 0 and lse -inf. Differentiable.
    """
    check_tensor("s", s, ("batch", "heads", "q_tokens", "k_tokens"), FLOATS)
    rows = wide(s)
    if mask is not None:
        check_mask("mask", mask, "s", s, s.shape)
        rows = torch.where(mask, rows, -torch.inf)
    lse = torch.logsumexp(rows, -1)
    P = torch.softmax(rows, -1).masked_fill(torch.isneginf(lse)[..., None], 0.0)
    return P.to(s.dtype), lse


def attend(P: Tensor, v: Tensor, hv: Tensor, *, backend: str | None = None) -> Tensor:
    """Outputs (batch, heads, q_tokens, dv), in v's dtype, of weights and values.

    P (batch, heads, q_tokens, k_tokens), float32 or v's dtype; v (batch, v_heads, k_tokens, dv),
    hv int (heads,), the value head of each query head. A value that no row of a query head weighs
    is not read by it. Differentiable.
    """
    check_tensor("P", P, ("batch", "heads", "q_tokens", "k_tokens"), FLOATS)
    check_tensor("v", v, ("batch", "v_heads", "k_tokens", "dv"), FLOATS)
    check_device("v", v, "P", P)
    if P.dtype != torch.float32 or v.dtype == torch.float64:
        check_same("v", v, "P", P)
    check_size("v", v.shape[0], P.shape[0], "batch, as in P")
    check_size("v", v.shape[2], P.shape[3], "k_tokens, as in P")
    _check_map("hv", hv, v.shape[1], "P", P)
    unread = (P == 0).all(-2)[..., None]
    values = torch.where(unread, 0.0, wide(v[:, hv.long()]))
    return product(wide(P), values).to(v.dtype)


def _check_map(name: str, heads_map: Any, sources: int, other_name: str, other: Tensor) -> None:
    """An int map of the heads of `other` (batch, heads, ...) into `sources` heads."""
    check_tensor(name, heads_map, ("heads",), INTEGERS)
    check_size(name, heads_map.shape[0], other.shape[1], f"heads, as in {other_name}")
    check_device(name, heads_map, other_name, other)
    if checkable(heads_map) and not bool(((heads_map >= 0) & (heads_map < sources)).all()):
        raise ValueError(f"{name}: got {heads_map.tolist()}, expected entries of 0..{sources - 1}")
