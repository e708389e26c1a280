"""What it costs the loss to hide an entry of the attention, tile by tile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import (
    FLOATS,
    check_attention_inputs,
    check_integer,
    check_same,
    check_size,
    check_tensor,
    wide,
    wide_dtype,
)
from attnspec.fast.engines import columns

EPSILON = 2.0**-23


def influence(
    P: Tensor, V: Tensor, g: Tensor, eps: float = EPSILON, *, backend: str | None = None
) -> Tensor:
    """E (batch, heads, T, T), the change of the loss if an entry is hidden, from weights P.

    V (batch, kv_heads, T, dv), g (batch, heads, T, dv). For a look at single entries: it takes
    buffers of the size of P, where `block_influence` takes none.
    """
    check_tensor("P", P, ("batch", "heads", "T", "T"), FLOATS)
    check_tensor("V", V, ("batch", "kv_heads", "T", "dv"), FLOATS)
    check_same("V", V, "P", P)
    check_size("P", P.shape[3], P.shape[2], "keys, as many as queries")
    check_size("V", V.shape[0], P.shape[0], "batch, as in P")
    check_size("V", V.shape[2], P.shape[3], "tokens, as in P")
    heads, kv_heads = P.shape[1], V.shape[1]
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"V: got {kv_heads} kv heads, expected a divisor of {heads}, as in P")
    _check_gradient(g, "P", P, (*P.shape[:3], V.shape[3]))
    check_epsilon(eps)
    weights = wide(P.detach())
    values = wide(V.detach()).repeat_interleave(heads // kv_heads, dim=1)
    slopes = torch.where(P == 0, 0.0, wide(g.detach()) @ values.transpose(2, 3))
    mean = (weights * slopes).sum(dim=3, keepdim=True)
    rest = 1 - weights + eps
    first = torch.arange(P.shape[2], device=P.device)[:, None] == 0
    alone = first | (rest == 0)
    share = torch.where(alone, slopes, (slopes - mean) / torch.where(alone, 1.0, rest))
    return torch.where(P == 0, 0.0, -weights * share).to(P.dtype)


def block_sum(E: Tensor, b: int = 64, *, backend: str | None = None) -> Tensor:
    """(..., T / b, T / b), sums of `E` (..., T, T) over blocks, entries u > t left out."""
    leading = ("...",) * max(0, E.dim() - 2) if isinstance(E, Tensor) else ()
    check_tensor("E", E, (*leading, "T", "T"), FLOATS)
    check_integer("b", b, least=1)
    T = E.shape[-1]
    check_size("E", E.shape[-2], T, "rows, as many as columns")
    check_blocks("E", T, b)
    lower = torch.ones(T, T, dtype=torch.bool, device=E.device).tril()
    blocks = torch.where(lower, E, 0.0).unflatten(-1, (-1, b)).unflatten(-3, (-1, b))
    summed = wide_dtype(E)
    return blocks.sum(dim=(-3, -1), dtype=summed).to(E.dtype)


def block_influence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: int = 64,
    *,
    eps: float = EPSILON,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """The influence (batch, heads, T / b, T / b) of causal attention, 0 above the diagonal.

    q (batch, heads, T, d), k (batch, kv_heads, T, d), v (batch, kv_heads, T, dv), g (batch, heads,
    T, dv) the gradient of the loss with respect to the output. float32 (float64 for float64). Two
    sweeps over the keys in one launch, and nothing of the size T x T.
    """
    check_attention_inputs(q, k, v, FLOATS)
    check_size("k", k.shape[2], q.shape[2], "tokens, as in q")
    _check_gradient(g, "q", q, (*q.shape[:3], v.shape[3]))
    check_integer("b", b, least=1)
    check_blocks("q", q.shape[2], b)
    check_epsilon(eps)
    return columns.block_influence(q, k, v, g, b, eps=eps, scale=scale, backend=backend)


def group_influence(
    I: Tensor, kv_heads: int, interleaved: bool = False, *, backend: str | None = None
) -> Tensor:
    """(..., kv_heads, nb, nb), the largest influence I (..., heads, nb, nb) of a group.

    `interleaved` takes heads h, h + kv_heads, ... together, not neighbours.
    """
    leading = ("...",) * max(0, I.dim() - 3) if isinstance(I, Tensor) else ()
    check_tensor("I", I, (*leading, "heads", "nb", "nb"), FLOATS)
    check_integer("kv_heads", kv_heads, least=1)
    heads = I.shape[-3]
    if heads % kv_heads:
        raise ValueError(f"kv_heads: got {kv_heads}, expected a divisor of {heads} heads")
    if interleaved:
        return I.unflatten(-3, (heads // kv_heads, kv_heads)).amax(dim=-4)
    return I.unflatten(-3, (kv_heads, heads // kv_heads)).amax(dim=-3)


def check_blocks(name: str, T: int, b: int) -> None:
    """`T` tokens are whole blocks."""
    if T % b:
        raise ValueError(f"{name}: got {T} tokens, expected a multiple of {b} (b)")


def check_epsilon(eps: Any) -> None:
    """`eps` is a number >= 0."""
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps: got {eps!r}, expected a number >= 0")
    if not eps >= 0:
        raise ValueError(f"eps: got {eps}, expected a number >= 0")


def _check_gradient(g: Any, name: str, like: Tensor, shape: tuple[int, ...]) -> None:
    check_tensor("g", g, ("batch", "heads", "T", "dv"), FLOATS)
    if tuple(g.shape) != shape:
        raise ValueError(f"g: got shape {tuple(g.shape)}, expected {shape}")
    check_same("g", g, name, like)
