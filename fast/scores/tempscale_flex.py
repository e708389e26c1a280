"""TempScale as a score function of FlexAttention, the bias included."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import FLOATS, check_positive, check_tensor
from attnspec.fast.flex import ScoreMod
from attnspec.fast.growing import checkable


def score_mod(tau: float | Tensor = 1.0, bias: Tensor | None = None) -> ScoreMod:
    """For scores at temperature `tau`, a number or (heads,); the scale is given to the attention.

    `bias` broadcasts to the scores (batch, heads, q_tokens, k_tokens) and is divided too. Tensors
    lie on the device of the attention; temperatures are looked at on the CPU only.
    """
    _check_temperature(tau)
    table = None if bias is None else _four_axes(bias)

    def tempered(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if table is not None:
            places = zip((batch, head, query, key), table.shape, strict=True)
            score = score + table[tuple(x * (n > 1) for x, n in places)].to(score.dtype)
        return score / (tau[head].to(score.dtype) if isinstance(tau, Tensor) else float(tau))

    return tempered


def _check_temperature(tau: Any) -> None:
    if not isinstance(tau, Tensor):
        check_positive("tau", tau)
        return
    check_tensor("tau", tau, ("heads",), FLOATS)
    if checkable(tau) and not bool(((tau > 0) & torch.isfinite(tau)).all()):
        raise ValueError(f"tau: got {tau.tolist()}, expected finite numbers > 0")


def _four_axes(bias: Any) -> Tensor:
    axes = ("batch", "heads", "q_tokens", "k_tokens")
    given = min(max(bias.dim(), 1), 4) if isinstance(bias, Tensor) else 4
    check_tensor("bias", bias, axes[4 - given :], FLOATS)
    return bias[(None,) * (4 - bias.dim())]
