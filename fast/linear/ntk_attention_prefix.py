"""NTK-Attention's prefix: its features, state and terms, and how they are merged into a softmax.

On CUDA a kernel of the prefix engine merges; the steps of which that consists are torch here, as on
the CPU.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import (
    FLOATS,
    check_choice,
    check_device,
    check_positive,
    check_same,
    check_size,
    check_tensor,
    choose_backend,
    product,
    wide,
)
from attnspec.fast.engines.prefix import add_prefix

POSITIVITY = ("abs", "softplus")


def phi(x: Tensor, *, backend: str | None = None) -> Tensor:
    """Positive features elu(x / d^(1/4)) + 1 of x (..., d), in its dtype."""
    if isinstance(x, Tensor) and x.dim() == 0:
        raise ValueError("x: got shape (), expected (..., d)")
    check_tensor("x", x, ("...",) * x.dim() if isinstance(x, Tensor) else (), FLOATS)
    return _features(x).to(x.dtype)


def prefix_state(K_P: Tensor, V_P: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Z (heads, d, dv) and k (heads, d), float32, of K_P (heads, m, d) and V_P (heads, m, dv).

    The states of prefixes laid end to end add. Differentiable.
    """
    check_tensor("K_P", K_P, ("heads", "m", "d"), FLOATS)
    check_tensor("V_P", V_P, ("heads", "m", "dv"), FLOATS)
    check_same("V_P", V_P, "K_P", K_P)
    check_size("V_P", V_P.shape[0], K_P.shape[0], "heads, as in K_P")
    check_size("V_P", V_P.shape[1], K_P.shape[1], "m, as in K_P")
    features = _features(K_P)
    return product(features.transpose(1, 2), wide(V_P)), features.sum(1)


def prefix_terms(
    q: Tensor, Z: Tensor, k: Tensor, *, positivity: str = "abs", backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """num (batch, heads, q_tokens, dv) and den (batch, heads, q_tokens), float32.

    q (batch, heads, q_tokens, d), Z (heads, d, dv), k (heads, d); Z and k may be float32 beside a
    q of half precision. Differentiable.
    """
    check_tensor("q", q, ("batch", "heads", "q_tokens", "d"), FLOATS)
    check_prefix(q, Z, k, positivity)
    features, keys = _features(q), wide(k)
    kappa = keys.abs() if positivity == "abs" else torch.nn.functional.softplus(keys)
    return product(features, wide(Z)), product(features, kappa[..., None])[..., 0]


def merge_prefix(
    softmax_out: Tensor, lse: Tensor, num: Tensor, den: Tensor, *, backend: str | None = None
) -> Tensor:
    """Outputs (..., q_tokens, dv) from those of softmax attention and the prefix terms.

    softmax_out and num (..., q_tokens, dv), lse and den (..., q_tokens), lse natural and -inf where
    no key is visible. Computed in float32 at least; the result has softmax_out's dtype.
    Differentiable in all four.
    """
    axes = ("batch", "heads", "q_tokens", "dv")
    check_tensor("softmax_out", softmax_out, axes, FLOATS)
    for name, x, shape in (
        ("lse", lse, softmax_out.shape[:3]),
        ("num", num, softmax_out.shape),
        ("den", den, softmax_out.shape[:3]),
    ):
        check_tensor(name, x, axes[: len(shape)], FLOATS)
        if x.shape != shape:
            raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected {tuple(shape)}")
    soft, lse, num, den = wide(softmax_out), wide(lse), wide(num), wide(den)
    held = (den != 0) | (num != 0).any(-1)
    top = torch.where(held, lse.clamp(min=0), lse).detach()
    top = torch.where(top == -torch.inf, 0.0, top)
    # Only a row without a prefix has top < 0. Kept finite there, the factor times 0 is 0.
    unit = torch.exp((-top).clamp(max=math.log(torch.finfo(top.dtype).max) - 1))
    mass = torch.exp(lse - top)
    total = mass + unit * den
    empty = total == 0
    total = torch.where(empty, 1.0, total)[..., None]
    unit = torch.where(empty, 0.0, unit)
    out = mass[..., None] / total * soft + unit[..., None] * num / total
    return out.to(softmax_out.dtype)


def merge_in(
    q: Tensor, soft: Tensor, lse: Tensor, Z: Tensor, k: Tensor, positivity: str, backend: str | None
) -> Tensor:
    """`merge_prefix` of `prefix_terms`; with Triton in one kernel, which passes over the rows once
    and stores no terms.
    """
    if choose_backend(backend, q) == "triton":
        return add_prefix(q, soft, lse, Z, k, positivity=positivity)
    return merge_prefix(soft, lse, *prefix_terms(q, Z, k, positivity=positivity))


def _features(x: Tensor) -> Tensor:
    """`phi` in float32 at least. exp, not elu + 1: far below 0 the features stay positive."""
    y = wide(x) / x.shape[-1] ** 0.25
    return torch.exp(y.clamp(max=0)) + y.relu()


def check_inputs(q: Any, K: Any, V: Any, Z: Any, scale: Any) -> None:
    check_tensor("q", q, ("batch", "heads", "q_tokens", "d"), FLOATS)
    check_tensor("K", K, ("batch", "kv_heads", "k_tokens", "d"), FLOATS)
    check_tensor("V", V, ("batch", "kv_heads", "k_tokens", "dv"), FLOATS)
    check_same("K", K, "q", q)
    check_same("V", V, "q", q)
    check_size("K", K.shape[0], q.shape[0], "batch, as in q")
    check_size("K", K.shape[3], q.shape[3], "d, as in q")
    for axis, what in enumerate(("batch", "kv_heads", "k_tokens")):
        check_size("V", V.shape[axis], K.shape[axis], f"{what}, as in K")
    if K.shape[1] < 1 or q.shape[1] % K.shape[1]:
        raise ValueError(
            f"K: got {K.shape[1]} kv heads for {q.shape[1]} query heads, "
            f"expected a divisor of {q.shape[1]}"
        )
    check_tensor("Z", Z, ("heads", "d", "dv"), FLOATS)
    check_size("Z", Z.shape[2], V.shape[3], "dv, as in V")
    if scale is not None:
        check_positive("scale", scale)


def check_prefix(q: Tensor, Z: Any, k: Any, positivity: Any) -> None:
    check_tensor("Z", Z, ("heads", "d", "dv"), FLOATS)
    check_tensor("k", k, ("heads", "d"), FLOATS)
    for name, x in (("Z", Z), ("k", k)):
        if x.dtype != torch.float32 or q.dtype == torch.float64:
            check_same(name, x, "q", q)
        check_size(name, x.shape[0], q.shape[1], "heads, as in q")
        check_size(name, x.shape[1], q.shape[3], "d, as in q")
        check_device(name, x, "q", q)
    check_choice("positivity", positivity, POSITIVITY)
