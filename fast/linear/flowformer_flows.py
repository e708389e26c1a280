"""Flowformer's flows in torch: elementwise work and sums of d-vectors, in float32 at least."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import (
    FLOATS,
    check_choice,
    check_device,
    check_integer,
    check_same,
    check_size,
    check_tensor,
    product,
    wide,
)
from attnspec.fast.growing import checkable

KINDS = ("sigmoid", "relu")
Clamp = tuple[float, float] | None


def flow_features(x: Tensor, kind: str = "sigmoid", *, backend: str | None = None) -> Tensor:
    """phi(x) elementwise, sigmoid(x) or relu(x) + 1e-6, in the dtype of x."""
    if isinstance(x, Tensor) and x.dim() == 0:
        raise ValueError("x: got shape (), expected (..., d)")
    check_tensor("x", x, ("...",) * x.dim() if isinstance(x, Tensor) else (), FLOATS)
    return wide_features(x, kind).to(x.dtype)


def flows(
    a: Tensor, b: Tensor, eps: float = 1e-6, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """I (batch, heads, n) of sinks a (batch, heads, n, d), O (batch, heads, m) of sources b."""
    check_pair(a, b, eps)
    I, O = wide_flows(wide(a), wide(b), eps)
    return I.to(a.dtype), O.to(a.dtype)


def conserved_flows(
    a: Tensor,
    b: Tensor,
    I: Tensor,
    O: Tensor,
    eps: float = 1e-6,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Ih (batch, heads, n) and Oh (batch, heads, m)."""
    check_pair(a, b, eps)
    check_flow("I", I, a)
    check_flow("O", O, b)
    Ih, Oh = wide_conserved(wide(a), wide(b), wide(I), wide(O), eps)
    return Ih.to(a.dtype), Oh.to(a.dtype)


def competition(
    Oh: Tensor,
    clamp: Clamp = (-1.0, 1.0),
    mask: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """c (batch, heads, m); `mask` bool (batch, m), True = a source that counts."""
    check_tensor("Oh", Oh, ("batch", "heads", "sources"), FLOATS)
    if mask is not None:
        check_mask("mask", mask, (Oh.shape[0], Oh.shape[2]), Oh)
    return wide_competition(clip(wide(Oh), clamp), mask).to(Oh.dtype)


def allocation(Ih: Tensor, n: Any, m: Any, *, backend: str | None = None) -> Tensor:
    """g (batch, heads, n) = sigmoid(Ih n / m); n and m are integers or int tensors (batch,)."""
    check_tensor("Ih", Ih, ("batch", "heads", "sinks"), FLOATS)
    return torch.sigmoid(wide(Ih) * _share(n, m, wide(Ih))).to(Ih.dtype)


def flows_causal(
    a: Tensor, b: Tensor, eps: float = 1e-6, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """I and O (batch, heads, T), each token's sums ending with its own."""
    check_pair(a, b, eps, causal=True)
    A, B = wide(a), wide(b)
    return dot(A + eps, B.cumsum(2) + eps).to(a.dtype), dot(B + eps, A.cumsum(2) + eps).to(a.dtype)


def conserved_flows_causal(
    a: Tensor,
    b: Tensor,
    I: Tensor,
    O: Tensor,
    eps: float = 1e-6,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Ih and Oh (batch, heads, T)."""
    check_pair(a, b, eps, causal=True)
    check_flow("I", I, a)
    check_flow("O", O, b)
    A, B = wide(a), wide(b)
    N = torch.arange(1, a.shape[2] + 1, device=a.device).to(A.dtype)
    into, out_of = (quotient(x, wide(flow) / N).cumsum(2) for x, flow in ((B, O), (A, I)))
    return (dot(A + eps, into + eps) / N).to(a.dtype), (dot(B + eps, out_of + eps) / N).to(a.dtype)


def competition_causal(
    Oh: Tensor, clamp: Clamp = (-1.0, 1.0), *, backend: str | None = None
) -> Tensor:
    """c (batch, heads, T), each token's share among those up to it, times their number."""
    check_tensor("Oh", Oh, ("batch", "heads", "T"), FLOATS)
    x = clip(wide(Oh), clamp)
    N = torch.arange(1, x.shape[2] + 1, device=x.device).to(x.dtype)
    return (N * torch.exp(x - torch.logcumsumexp(x, 2))).to(Oh.dtype)


def wide_features(x: Tensor, kind: str) -> Tensor:
    check_choice("kind", kind, KINDS)
    return torch.sigmoid(wide(x)) if kind == "sigmoid" else torch.relu(wide(x)) + 1e-6


def wide_flows(a: Tensor, b: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return with_all(a, b.sum(2), eps), with_all(b, a.sum(2), eps)


def wide_conserved(a: Tensor, b: Tensor, I: Tensor, O: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    into, out_of = (product(inverse(f)[..., None, :], x)[..., 0, :] for x, f in ((b, O), (a, I)))
    return with_all(a, into, eps), with_all(b, out_of, eps)


def wide_competition(x: Tensor, mask: Tensor | None) -> Tensor:
    """Number of sources times the softmax of x over those that count."""
    if mask is None:
        return x.shape[2] * torch.softmax(x, dim=2)
    real = mask[:, None]
    top = x.detach().masked_fill(~real, -torch.inf).amax(2, keepdim=True) if x.shape[2] else 0.0
    shifted = torch.where(real, x - top, -torch.inf)
    weights = torch.where(real, torch.exp(torch.where(real, shifted, 0.0)), 0.0)
    total = weights.sum(2, keepdim=True)
    return real.sum(2, keepdim=True) * weights / torch.where(total == 0, 1.0, total)


def dot(x: Tensor, y: Tensor) -> Tensor:
    """The sum of products over the last axis."""
    return (x * y).sum(-1)


def with_all(x: Tensor, total: Tensor, eps: float) -> Tensor:
    """dot(x + eps, total + eps) of each of x (..., tokens, d) with the one `total` (..., d): a
    product, which reads x once and writes nothing of its size.
    """
    total = total + eps
    return product(x, total[..., None])[..., 0] + eps * total.sum(-1, keepdim=True)


def inverse(flow: Tensor) -> Tensor:
    """1 / flow, and 0 where the flow is 0."""
    nothing = flow == 0
    return torch.where(nothing, 0.0, 1 / torch.where(nothing, 1.0, flow))


def quotient(x: Tensor, flow: Tensor) -> Tensor:
    """x (..., tokens, d) / flow (..., tokens), and 0 where the flow is 0."""
    return x * inverse(flow)[..., None]


def clip(Oh: Tensor, clamp: Any) -> Tensor:
    """Oh within the pair `clamp`, or as it is for None; the gradient is 0 beyond the pair."""
    bounds = check_clamp(clamp)
    return Oh if bounds is None else Oh.clamp(*bounds)


def _share(n: Any, m: Any, like: Tensor) -> Tensor:
    """n / m in the dtype of `like` (batch, heads, sinks)."""
    counts = []
    for name, count in (("n", n), ("m", m)):
        if isinstance(count, Tensor):
            check_tensor(name, count, ("batch",), (torch.int64, torch.int32))
        else:
            # Filled on the device: a copy from the host would end the capture of a graph.
            check_integer(name, count, least=0)
            count = torch.full((), count, device=like.device)
        if checkable(count) and bool((count < 0).any()):
            raise ValueError(f"{name}: got {count!r}, expected numbers >= 0")
        counts.append(count.to(like.dtype)[..., None, None])
    return counts[0] / counts[1].clamp(min=1)


def check_pair(a: Any, b: Any, eps: Any, causal: bool = False) -> None:
    """Sinks a and sources b fit one another."""
    check_tensor("a", a, ("batch", "heads", "sinks", "d"), FLOATS)
    check_tensor("b", b, ("batch", "heads", "sources", "d"), FLOATS)
    check_same("b", b, "a", a)
    if a.shape[:2] != b.shape[:2]:
        raise ValueError(f"b: got leading axes {tuple(b.shape[:2])}, expected {tuple(a.shape[:2])}")
    check_size("b", b.shape[3], a.shape[3], "d, as in a")
    if causal:
        check_size("b", b.shape[2], a.shape[2], "tokens, as in a")
    check_eps(eps)


def check_flow(name: str, x: Any, tokens: Tensor) -> None:
    """`x` has one number for each of the tokens (batch, heads, tokens, d)."""
    check_tensor(name, x, ("batch", "heads", "tokens"), FLOATS)
    if x.shape != tokens.shape[:3]:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected {tuple(tokens.shape[:3])}")


def check_mask(name: str, mask: Any, shape: tuple[int, ...], like: Tensor) -> None:
    """`mask` is bool, of this shape and on the device of `like`."""
    check_tensor(name, mask, ("batch", "tokens"), (torch.bool,))
    if tuple(mask.shape) != tuple(shape):
        raise ValueError(f"{name}: got shape {tuple(mask.shape)}, expected {tuple(shape)}")
    check_device(name, mask, "the tokens", like)


def check_clamp(clamp: Any) -> Clamp:
    """`clamp` as floats: a pair that rises, or None."""
    if clamp is None:
        return None
    pair = isinstance(clamp, tuple) and len(clamp) == 2
    if not pair or not all(isinstance(x, (int, float)) for x in clamp):
        raise TypeError(f"clamp: got {clamp!r}, expected a pair of numbers or None")
    if not clamp[0] <= clamp[1]:
        raise ValueError(f"clamp: got {clamp!r}, expected a pair that rises")
    return float(clamp[0]), float(clamp[1])


def check_eps(eps: Any) -> None:
    """`eps` is a finite number of at least 0."""
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps: got {eps!r}, expected a number >= 0")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps: got {eps}, expected a number >= 0")
