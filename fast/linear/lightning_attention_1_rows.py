"""TransNormerLLM row by row: norms and lifts are the rows engine's, the mixer is three products."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import (
    FLOATS,
    check_device,
    check_integer,
    check_same,
    check_size,
    check_tensor,
    product,
)
from attnspec.fast.engines.rows import gated_norm, lift


def srms_norm(x: Tensor, eps: float = 1e-6, *, backend: str | None = None) -> Tensor:
    """x (batch, T, D) over its root mean square; a row of zeros stays zero if eps is 0.

    Differentiable.
    """
    check_tensor("x", x, ("batch", "T", "D"), FLOATS)
    check_eps(eps)
    return gated_norm(x[:, None], eps=eps, backend=backend)


def sglu(x: Tensor, Wv: Tensor, Wu: Tensor, Wo: Tensor, *, backend: str | None = None) -> Tensor:
    """y (batch, T, D) of x (batch, T, D); Wv and Wu (D, F), Wo (F, D). Differentiable."""
    check_tensor("x", x, ("batch", "T", "D"), FLOATS)
    check_tensor("Wv", Wv, ("D", "F"), FLOATS)
    D, F = x.shape[2], Wv.shape[1]
    for name, W, shape in (("Wv", Wv, (D, F)), ("Wu", Wu, (D, F)), ("Wo", Wo, (F, D))):
        check_weight(name, W, shape, x)
    return product(product(x, Wv) * product(x, Wu), Wo)


def lrpe_frequencies(
    H: int, d: int, base: float = 10000.0, *, backend: str | None = None
) -> Tensor:
    """theta (H, d), float64 on the CPU: the frequencies run on from head to head."""
    check_integer("H", H, least=1)
    check_integer("d", d, least=1)
    if isinstance(base, bool) or not isinstance(base, (int, float)):
        raise TypeError(f"base: got {base!r}, expected a finite number > 1")
    if not (math.isfinite(base) and base > 1):
        raise ValueError(f"base: got {base}, expected a finite number > 1")
    place = torch.arange(H * d, dtype=torch.float64)
    return (float(base) ** (-2.0 * place / (H * d))).reshape(H, d)


def lrpe(x: Tensor, theta: Tensor, offset: int = 0, *, backend: str | None = None) -> Tensor:
    """x (batch, H, T, d) lifted to (batch, H, T, 2 d); theta (H, d), first position `offset`.

    theta may be float32 beside an x of half precision. Differentiable in both.
    """
    check_tensor("x", x, ("batch", "H", "T", "d"), FLOATS)
    check_theta(theta, x.shape[1], x.shape[3], x)
    check_integer("offset", offset, least=0)
    return lift(x, theta, offset=offset, backend=backend)


def check_eps(eps: Any) -> None:
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps: got {eps!r}, expected a number >= 0")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps: got {eps}, expected a number >= 0")


def check_theta(theta: Any, H: int, d: int, x: Tensor) -> None:
    check_tensor("theta", theta, ("H", "d"), FLOATS)
    if tuple(theta.shape) != (H, d):
        raise ValueError(f"theta: got shape {tuple(theta.shape)}, expected {(H, d)}")
    check_device("theta", theta, "x", x)


def check_weight(name: str, W: Any, shape: tuple[int, ...], x: Tensor) -> None:
    check_tensor(name, W, ("rows", "columns"), FLOATS)
    for got, wanted in zip(W.shape, shape, strict=True):
        check_size(name, got, wanted, f"of shape {tuple(shape)}")
    check_same(name, W, "x", x)
