"""Softmax and average of whole matrices of scores, in torch: for steps that hand them out."""

from __future__ import annotations

import torch
from torch import Tensor

from attnspec.fast.backend import product, wide_dtype


def average(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs (..., rows, dv) and weights (..., rows, keys) of scores, -inf where hidden.

    `values` (..., keys, dv), of which those that no row sees are not read. A row that sees nothing
    has weights 0. Computed in float32 at least.
    """
    wide = wide_dtype(scores)
    shifted = scores.to(wide)
    if scores.shape[-1]:
        top = shifted.amax(-1, keepdim=True)
        shifted = shifted - torch.where(torch.isneginf(top), 0.0, top)
    weights = torch.exp(shifted)
    total = weights.sum(-1, keepdim=True)
    P = weights / torch.where(total == 0, 1.0, total)
    unread = (P == 0).all(-2)[..., None]
    out = product(P, torch.where(unread, 0.0, values.to(wide)))
    return out.to(values.dtype), P.to(scores.dtype)
