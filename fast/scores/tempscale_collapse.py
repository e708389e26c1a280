"""TempScale's diagnostics: torch, batched over all heads and layers, in float32 for 16-bit inputs.

The gain is exact, by singular values, and costs O(T^3) a matrix; the spectrum is a fast transform,
and the cosine of all pairs of texts costs no more than their sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import FLOATS, check_same, check_size, product, wide
from attnspec.fast.growing import checkable


def dc(X: Tensor) -> Tensor:
    """The mean token of X (..., T, c), repeated T times."""
    _check_tokens("X", X)
    return wide(X).mean(-2, keepdim=True).to(X.dtype).expand(X.shape).contiguous()


def hc(X: Tensor) -> Tensor:
    """What differs between the tokens of X (..., T, c), same shape."""
    _check_tokens("X", X)
    return _centred(X).to(X.dtype)


def filter_gain(A: Tensor) -> Tensor:
    """The gain (...) of attention matrices A (..., T, T) on what differs between tokens."""
    _check_square(A)
    centred = _centred(A)
    if A.is_cuda:
        # cuSOLVER's batched Jacobi sweeps end some 1e-6 away from a float32 answer.
        centred = centred.double()
    return torch.linalg.svdvals(centred)[..., 0].to(A.dtype)


def retention(A: Tensor, X: Tensor) -> Tensor:
    """The share (...) of what differs between tokens X (..., T, c) that A (..., T, T) keeps."""
    _check_square(A)
    _check_tokens("X", X)
    check_same("X", X, "A", A)
    if X.shape[:-2] != A.shape[:-2]:
        raise ValueError(
            f"X: got leading axes {tuple(X.shape[:-2])}, expected {tuple(A.shape[:-2])}, as A"
        )
    check_size("X", X.shape[-2], A.shape[-1], "T, as in A")
    constant = (X[..., :1, :] == X).all(-1).all(-1)
    before, after = _norm(_centred(X)), _norm(_centred(product(wide(A), wide(X))))
    kept = after / before.masked_fill(constant, 1)
    return kept.masked_fill(constant, 0).to(A.dtype)


def token_spectrum(A: Tensor) -> Tensor:
    """Relative magnitudes (..., T//2 + 1) of the frequencies along the rows of A (..., T, T)."""
    _check_square(A)
    s = torch.fft.rfft(wide(A), dim=-2).abs().mean(-1)
    return (s / torch.where(s[..., :1] == 0, 1, s[..., :1])).to(A.dtype)


def attention_entropy(P: Tensor) -> Tensor:
    """The entropy (..., q_tokens), natural, of each row of weights P (..., q_tokens, k_tokens).

    That no weight is negative is checked on the CPU only.
    """
    _check_axes("P", P, ("q_tokens", "k_tokens"))
    if checkable(P) and bool((P < 0).any()):
        raise ValueError(f"P: got {float(P.min())}, expected weights >= 0")
    return -torch.xlogy(wide(P), wide(P)).sum(-1).to(P.dtype)


def pairwise_cosine(E: Tensor) -> Tensor:
    """The mean cosine (...) over the pairs i < j of embeddings E (..., texts, c).

    A zero vector has cosine 0 with all others. Of unit vectors u, the squared length of their sum
    is the sum over all ordered pairs, each with itself among them.
    """
    _check_axes("E", E, ("texts", "c"))
    texts = E.shape[-2]
    if texts < 2:
        raise ValueError(f"E: got {texts} texts, expected at least 2")
    rows = E.double()
    length = rows.square().sum(-1, keepdim=True).sqrt()
    unit = rows / torch.where(length == 0, 1, length)
    others = unit.sum(-2).square().sum(-1) - unit.square().sum((-1, -2))
    return (others / (texts * (texts - 1))).to(E.dtype)


def centre_distance(E: Tensor) -> Tensor:
    """The mean distance (...) of embeddings E (..., texts, c) to their mean."""
    _check_axes("E", E, ("texts", "c"))
    if E.shape[-2] < 1:
        raise ValueError("E: got 0 texts, expected at least 1")
    return torch.linalg.vector_norm(_centred(E), dim=-1).mean(-1).to(E.dtype)


def _centred(X: Tensor) -> Tensor:
    rows = wide(X)
    return rows - rows.mean(-2, keepdim=True)


def _norm(X: Tensor) -> Tensor:
    return torch.linalg.vector_norm(X, dim=(-2, -1))


def _check_axes(name: str, x: Any, axes: Sequence[str]) -> None:
    """`x` is a float tensor of at least ``len(axes)`` axes."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, expected torch.Tensor")
    if x.dim() < len(axes):
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected (..., {', '.join(axes)})")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}: got dtype {x.dtype}, expected a float dtype")


def _check_tokens(name: str, x: Any) -> None:
    _check_axes(name, x, ("T", "c"))
    if x.shape[-2] < 1:
        raise ValueError(f"{name}: got 0 tokens, expected at least 1")


def _check_square(A: Any) -> None:
    _check_tokens("A", A)
    check_size("A", A.shape[-2], A.shape[-1], "as many rows as columns")
