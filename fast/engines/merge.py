"""The merge of attentions over disjoint key sets, each given by its output and lse."""

from __future__ import annotations

import torch
from torch import Tensor


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint key sets, from each set's own result.

    out (..., dv) and lse (...), natural logarithm. Associative and commutative; the unit is output
    0 with lse -inf, also for the gradients. Weights and sums are float32 at least; the output
    comes back in the dtype of `out_a`. Differentiable in all four.
    """
    top = torch.maximum(lse_a, lse_b).detach()
    top = torch.where(top == -torch.inf, 0.0, top)
    mass_a, mass_b = torch.exp(lse_a - top), torch.exp(lse_b - top)
    total = mass_a + mass_b
    empty = total == 0
    filled = torch.where(empty, 1.0, total)
    lse = torch.where(empty, -torch.inf, top + torch.log(filled))
    out = out_a * (mass_a / filled)[..., None] + out_b * (mass_b / filled)[..., None]
    return out.to(out_a.dtype), lse
