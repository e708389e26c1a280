"""Based's feature map and weights, in torch, with the checks its operations share."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import (
    FLOATS,
    check_attention_inputs,
    check_bool,
    check_tensor,
    product,
    wide,
)
from attnspec.fast.engines.taylor import unpacked_features


def taylor_features(
    x: Tensor, *, packed: bool = False, scale: float | None = None, backend: str | None = None
) -> Tensor:
    """Features (..., D) of x (..., d), D = 1 + d + d * d or, if `packed`, 1 + d + d (d + 1) / 2.

    Formed in float32 at least and returned in the dtype of x. Differentiable. Only to look at: no
    operation of ours needs them in memory.
    """
    if isinstance(x, Tensor) and x.dim() == 0:
        raise ValueError("x: got shape (), expected (..., d)")
    check_tensor("x", x, ("...",) * x.dim() if isinstance(x, Tensor) else (), FLOATS)
    check_bool("packed", packed)
    d = x.shape[-1]
    features = unpacked_features(wide(x), chosen_scale(scale, d))
    if packed:
        row, column = torch.triu_indices(d, d, device=x.device)
        kept = features.index_select(-1, 1 + d + row * d + column)
        factor = 1 + (row < column).to(features.dtype) * (math.sqrt(2) - 1)
        features = torch.cat([features[..., : 1 + d], kept * factor], dim=-1)
    return features.to(x.dtype)


def taylor_weights(
    q: Tensor, k: Tensor, *, scale: float | None = None, backend: str | None = None
) -> Tensor:
    """Weights (batch, heads, q_tokens, k_tokens) before any mask, in the dtype of q."""
    check_attention_inputs(q, k, k, FLOATS)
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    s = chosen_scale(scale, q.shape[3]) * product(wide(q), wide(keys).mT)
    return (1 + s + 0.5 * s * s).to(q.dtype)


def chosen_scale(scale: Any, d: int) -> float:
    """The scale asked for, once it is a number above 0, or 1 / sqrt(d) if it is None."""
    if scale is None:
        return max(d, 1) ** -0.5
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale: got {scale!r}, expected a number above 0 or None")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale: got {scale}, expected a number above 0")
    return float(scale)


def checked_eps(eps: Any) -> float:
    """`eps`, once it is a finite number of at least 0."""
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps: got {eps!r}, expected a number >= 0")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps: got {eps}, expected a number >= 0")
    return float(eps)
