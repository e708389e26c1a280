"""The memory of Titans on the fast path: its forward pass and the gradients of its loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import FLOATS, check_tensor, product, wide
from attnspec.fast.linear.titans_checks import Layers, check_layers, check_scale


def mlp_memory(W: tuple[Tensor, ...], x: Tensor, *, backend: str | None = None) -> Tensor:
    """M(x) (..., T, dv) for rows x (..., T, d) and layers W (..., d, h), ..., (..., h, dv), with or
    without the leading axes of x. Differentiable.
    """
    _check_rows("x", x)
    check_layers("W", W, x, "x")
    y = wide(x)
    for weights in W[:-1]:
        y = torch.nn.functional.gelu(product(y, wide(weights)))
    return product(y, wide(W[-1])).to(x.dtype)


def memory_grad(
    W: tuple[Tensor, ...], k: Tensor, v: Tensor, loss_scale: float = 2.0, *,
    backend: str | None = None,
) -> tuple[Layers, Layers]:  # fmt: skip
    """The rank-one gradients of the tokens in factors, H and Delta, one pair for each layer.

    k (..., T, d), v (..., T, dv). Differentiable.
    """
    _check_rows("k", k)
    _check_rows("v", v)
    check_layers("W", W, k, "k")
    check_scale(loss_scale)
    if v.dtype != k.dtype:
        raise TypeError(f"v: got dtype {v.dtype}, expected {k.dtype}, as k")
    expected = (*k.shape[:-1], W[-1].shape[-1])
    if v.shape != expected:
        raise ValueError(f"v: got shape {tuple(v.shape)}, expected {tuple(expected)}")
    H, Delta = wide_gradients(W, k, v, loss_scale)
    return tuple(x.to(k.dtype) for x in H), tuple(x.to(k.dtype) for x in Delta)


def wide_gradients(
    W: tuple[Tensor, ...], k: Tensor, v: Tensor, loss_scale: float
) -> tuple[Layers, Layers]:
    """H and Delta of `memory_grad` in float32 for 16-bit inputs.

    A memory that has grown has gradients beyond float16, which small steps make ordinary again.
    """
    H, z = [wide(k)], [product(wide(k), wide(W[0]))]
    for weights in W[1:]:
        H.append(torch.nn.functional.gelu(z[-1]))
        z.append(product(H[-1], wide(weights)))
    Delta = [loss_scale * (z[-1] - wide(v))]
    for layer in reversed(range(len(W) - 1)):
        back = product(Delta[0], wide(W[layer + 1]).mT)
        leaf = z[layer]
        below = 0.5 * (1 + torch.erf(leaf * 0.5**0.5))
        density = torch.exp(-0.5 * leaf * leaf) * (2 * torch.pi) ** -0.5
        Delta.insert(0, back * (below + leaf * density))
    return tuple(H), tuple(Delta)


def _check_rows(name: str, x: Any) -> None:
    if isinstance(x, Tensor) and x.dim() < 2:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected (..., T, d)")
    check_tensor(name, x, ("...",) * x.dim() if isinstance(x, Tensor) else (), FLOATS)
