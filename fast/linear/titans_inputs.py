"""What a token gives to the memory of Titans, in torch: query, key, value and rates."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import FLOATS, check_same, check_size, check_tensor, product, wide

EPSILON = 1e-6


def token_inputs(
    x: Tensor, W: Tensor, filters: Tensor | None = None, *, normalise: bool = True,
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Queries, keys or values (..., T, d) of rows x (..., T, D), with W (D, d) and the depthwise
    causal filters (width, d), the last of them the token's own. Differentiable.
    """
    _check_rows(x)
    _check_matrix("W", W, x)
    y = torch.nn.functional.silu(product(wide(x), wide(W)))
    if filters is not None:
        check_tensor("filters", filters, ("width", "d"), FLOATS)
        check_size("filters", filters.shape[1], W.shape[1], "d, as in W")
        if filters.shape[0] < 1:
            raise ValueError("filters: got 0 rows, expected an integer >= 1")
        past, T = filters.shape[0] - 1, y.shape[-2]
        rows = torch.nn.functional.pad(y, (0, 0, past, 0))
        weights = wide(filters)
        y = sum(
            (weights[i] * rows[..., i : i + T, :] for i in range(past + 1)),
            start=torch.zeros_like(y),
        )
    if normalise:
        y = y * torch.rsqrt((y * y).sum(-1, keepdim=True) + EPSILON)
    return y.to(x.dtype)


def token_step_sizes(
    x: Tensor, W_theta: Tensor, W_eta: Tensor, W_alpha: Tensor, *, theta_max: float = 1.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """theta, eta, alpha (..., heads, T) of rows x (..., T, D), with W of each (D, heads).
    Differentiable.
    """
    _check_rows(x)
    matrices = (W_theta, W_eta, W_alpha)
    for name, W in zip(("W_theta", "W_eta", "W_alpha"), matrices, strict=True):
        _check_matrix(name, W, x)
    if isinstance(theta_max, bool) or not isinstance(theta_max, (int, float)):
        raise TypeError(f"theta_max: got {theta_max!r}, expected a finite number > 0")
    if not (math.isfinite(theta_max) and theta_max > 0):
        raise ValueError(f"theta_max: got {theta_max}, expected a finite number > 0")
    theta, eta, alpha = (torch.sigmoid(product(wide(x), wide(W))).mT for W in matrices)
    return (theta_max * theta).to(x.dtype), eta.to(x.dtype), alpha.to(x.dtype)


def _check_rows(x: Any) -> None:
    if isinstance(x, Tensor) and x.dim() < 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (..., T, D)")
    check_tensor("x", x, ("...",) * x.dim() if isinstance(x, Tensor) else (), FLOATS)


def _check_matrix(name: str, W: Any, x: Tensor) -> None:
    check_tensor(name, W, ("D", "d"), FLOATS)
    check_size(name, W.shape[0], x.shape[-1], "D, as in x")
    check_same(name, W, "x", x)
