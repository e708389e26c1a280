"""Entropy-ABF's probe as tensor operations, for the weights that a model returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import FLOATS, check_tensor, wide_dtype
from attnspec.fast.growing import checkable


def attention_entropy(P: Tensor, *, backend: str | None = None) -> Tensor:
    """The entropy (...), natural, of weights P (..., keys), summed in float32 or wider.

    Weights below 0 are found on CPU tensors only.
    """
    if not isinstance(P, Tensor):
        raise TypeError(f"P: got {type(P).__name__}, expected torch.Tensor")
    if P.dtype not in FLOATS:
        raise TypeError(f"P: got dtype {P.dtype}, expected a floating-point one")
    if P.dim() < 1:
        raise ValueError("P: got shape (), expected (..., keys)")
    _check_values("P", P)
    return _entropy(P).to(P.dtype)


def entropy_growth(
    P_by_length: Mapping[int, Tensor], *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Lengths (n), ascending, int64 on the CPU, and the mean entropies E (n, layers, heads) over
    documents.

    `P_by_length` gives for each length the weights (documents, layers, heads, length) of the last
    query. The mean of E over its heads is the curve of a layer.
    """
    if not isinstance(P_by_length, Mapping) or not P_by_length:
        raise TypeError("P_by_length: got no mapping, expected weights for one length or more")
    lengths = sorted(P_by_length)
    for length in lengths:
        P: Any = P_by_length[length]
        check_tensor("P_by_length", P, ("documents", "layers", "heads", "length"), FLOATS)
        expected = (*P_by_length[lengths[0]].shape[1:3], length)
        if tuple(P.shape[1:]) != expected or not len(P):
            raise ValueError(
                f"P_by_length: got shape {tuple(P.shape)}, expected (documents, "
                f"{', '.join(map(str, expected))})"
            )
        _check_values("P_by_length", P)
    E = [_entropy(P_by_length[n]).mean(0).to(P_by_length[n].dtype) for n in lengths]
    return torch.tensor(lengths), torch.stack(E)


def _check_values(name: str, P: Tensor) -> None:
    if checkable(P) and bool((P < 0).any()):
        raise ValueError(f"{name}: got {P.min()}, expected weights >= 0")


def _entropy(P: Tensor) -> Tensor:
    """The entropy (...) of each row, wide; 0 ln 0 = 0."""
    return torch.special.entr(P.to(wide_dtype(P))).sum(-1)
