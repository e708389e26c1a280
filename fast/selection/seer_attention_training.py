"""SeerAttention's self-distillation on Numba and Triton.

The ground truth comes from passes of its own over the logits, the second of which knows the norms
of its rows: no row maxima are stored and nothing is rounded on the way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import (
    FLOATS,
    check_attention_inputs,
    check_integer,
    check_size,
    check_tensor,
)
from attnspec.fast.engines.columns import block_max, weight_rows
from attnspec.fast.engines.flash import flash

ROWS = 256
"""Query rows whose weights `decode_target` holds at a time."""


def attend_with_block_max(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    b: int,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The causal attention output (batch, heads, T, dv) and A float32 (batch, heads, nb, nb), its
    largest weight in each pair of blocks of b tokens.

    q (batch, heads, T, d), k (batch, kv_heads, T, d), v (batch, kv_heads, T, dv), q and k rotated.
    A is a constant for autograd.
    """
    check_attention_inputs(q, k, v)
    check_size("q", q.shape[2], k.shape[2], "tokens, as in k")
    check_integer("b", b, least=1)
    out, _ = flash(q, k, v, causal=True, scale=scale, backend=backend)
    return out, block_max(q, k, b, scale=scale, backend=backend)


def normalise_gt(A: Tensor, *, backend: str | None = None) -> Tensor:
    """GT, shaped as A (batch, heads, nb, nb): each row divided by its sum."""
    check_tensor("A", A, ("batch", "heads", "nb", "nb"), FLOATS)
    total = A.sum(-1, keepdim=True)
    return A / total.masked_fill(total == 0, 1)


def distill_loss(G: Tensor, GT: Tensor, *, backend: str | None = None) -> Tensor:
    """The loss of one layer, a float32 scalar, for scores G and target GT (batch, heads, nb, nb).

    Differentiable in G; GT is a constant.
    """
    first = _first_row(G, GT)
    target = GT[:, :, first:].detach()
    target = target if target.dtype == torch.float64 else target.float()
    log_gate = torch.log_softmax(G[:, :, first:].to(target.dtype), -1)
    positive = target > 0
    log_gate = torch.where(positive, log_gate, 0)
    return (target * (torch.where(positive, target, 1).log() - log_gate)).mean()


def decode_target(
    q: Tensor,
    k: Tensor,
    b: int,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Training target float32 (batch, kv_heads, T, nb) of the decode gate, from the rotated q
    (batch, heads, T, d) and k (batch, kv_heads, T, d).
    """
    check_attention_inputs(q, k, k)
    check_size("q", q.shape[2], k.shape[2], "tokens, as in k")
    check_integer("b", b, least=1)
    batch, heads, T = q.shape[:3]
    kv_heads, nb = k.shape[1], -(-T // b)
    out = torch.zeros(batch, kv_heads, T, nb, dtype=torch.float32, device=q.device)
    for start in range(0, T, ROWS):
        stop = min(T, start + ROWS)
        rows, keys = q[:, :, start:stop], k[:, :, :stop]
        P = weight_rows(rows, keys, scale=scale, backend=backend)
        P = torch.nn.functional.pad(P, (0, -stop % b))
        blocks = P.view(batch, kv_heads, heads // kv_heads, stop - start, -1, b)
        out[:, :, start:stop, : blocks.shape[4]] = blocks.amax((2, 5))
    return out / (out.sum(-1, keepdim=True) + 1e-9)


def _first_row(G: Any, GT: Any) -> int:
    """The first block row that counts, after a check of the arguments."""
    check_tensor("G", G, ("batch", "heads", "nb", "nb"), FLOATS)
    check_tensor("GT", GT, ("batch", "heads", "nb", "nb"), FLOATS)
    if G.shape != GT.shape or G.numel() == 0:
        raise ValueError(
            f"GT: got shape {tuple(GT.shape)}, expected {tuple(G.shape)}, as G, and not empty"
        )
    return G.shape[2] // 4
