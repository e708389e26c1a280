"""What LongLoRA trains: adapters beside frozen weights, norms, embeddings; and its positions.

Two thin products and a few sums, which are torch's: products in the dtype of the weights, with
float32 inside, sums in float32 at least. Gradients are autograd's.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import (
    FLOATS,
    INTEGERS,
    check_device,
    check_integer,
    check_same,
    check_size,
    check_tensor,
    product,
    wide,
)
from attnspec.fast.growing import checkable

ADAPTER = "lora_"


def lora_forward(
    x: Tensor,
    W: Tensor,
    A: Tensor,
    B: Tensor,
    alpha: float = 16.0,
    *,
    keep: Tensor | None = None,
    dropout: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """y (..., n_out) of x (..., n_in), frozen W (n_out, n_in), A (r, n_in) and B (n_out, r).

    `keep` bool, shaped as x, says which entries the adapter's `dropout` leaves; these are scaled by
    1 / (1 - dropout). The frozen part sees all of x. Differentiable in x, A and B; W gets no
    gradient.
    """
    _check_adapter(W, A, B, alpha)
    _check_input(x, W, keep, dropout)
    dropped = x if keep is None else torch.where(keep, x / (1.0 - dropout), 0.0)
    low = product(dropped, A.mT)
    frozen = product(x, W.detach().mT)
    return torch.add(frozen, product(low, B.mT), alpha=alpha / A.shape[0])


def lora_merge(
    W: Tensor, A: Tensor, B: Tensor, alpha: float = 16.0, *, backend: str | None = None
) -> Tensor:
    """W + alpha / r B A, a new tensor (n_out, n_in), added up in float32 at least."""
    _check_adapter(W, A, B, alpha)
    update = product(wide(B), wide(A))
    return torch.add(wide(W), update, alpha=alpha / A.shape[0]).to(W.dtype)


def is_trained(
    name: str, trainable_params: str = "embed,norm", *, backend: str | None = None
) -> bool:
    """Whether the parameter called `name` is trained: an adapter's, or one listed."""
    for argument, text in (("name", name), ("trainable_params", trainable_params)):
        if not isinstance(text, str):
            raise TypeError(f"{argument}: got {type(text).__name__}, expected a string")
    parts = [part.strip() for part in trainable_params.split(",")]
    return any(part in name for part in (ADAPTER, *parts) if part)


def rmsnorm(x: Tensor, w: Tensor, eps: float = 1e-6, *, backend: str | None = None) -> Tensor:
    """x (..., D) by its root mean square, times w (D,). Differentiable in both."""
    check_floats("x", x, 1)
    check_tensor("w", w, ("D",), FLOATS)
    check_size("w", w.shape[0], x.shape[-1], "D, as in x")
    check_same("w", w, "x", x)
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps: got {eps!r}, expected a number of at least 0")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps: got {eps}, expected a number of at least 0")
    rows = wide(x)
    size = torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps)
    return (rows * size * wide(w)).to(x.dtype)


def embedding_backward(
    ids: Tensor, dout: Tensor, vocab: int, *, backend: str | None = None
) -> Tensor:
    """dE (vocab, D): for each token of the vocabulary the sum of dout (..., D) over its uses.

    `ids` int (...), 0 <= ids < vocab, which is checked on CPU tensors only. The order of the sum is
    fixed, on a CUDA device too.
    """
    if not isinstance(ids, Tensor):
        raise TypeError(f"ids: got {type(ids).__name__}, expected torch.Tensor")
    if ids.dtype not in INTEGERS:
        raise TypeError(f"ids: got dtype {ids.dtype}, expected int32 or int64")
    check_floats("dout", dout, 1)
    check_integer("vocab", vocab, least=1)
    if dout.shape[:-1] != ids.shape:
        raise ValueError(
            f"dout: got shape {tuple(dout.shape)}, expected {(*ids.shape, 'D')}, as ids"
        )
    check_device("ids", ids, "dout", dout)
    tokens = ids.reshape(-1).long()
    if checkable(ids) and bool(((tokens < 0) | (tokens >= vocab)).any()):
        raise ValueError(f"ids: got {ids.min()} to {ids.max()}, expected 0 to {vocab - 1}")
    rows = wide(dout).reshape(-1, dout.shape[-1])
    summed = torch.ops.aten.embedding_dense_backward(rows, tokens, vocab, -1, False)
    return summed.to(dout.dtype)


def interpolation_factor(
    new_len: int, orig_len: int, rope_factor: float = 1.0, *, backend: str | None = None
) -> float:
    """What positions are divided by, for texts of `new_len` tokens.

    `orig_len` tokens is what the model knows, times the `rope_factor` it already has.
    """
    check_integer("new_len", new_len, least=1)
    check_integer("orig_len", orig_len, least=1)
    _check_positive("rope_factor", rope_factor)
    return float(math.ceil(new_len / (orig_len * rope_factor)))


def interpolate_positions(pos: Tensor, factor: float, *, backend: str | None = None) -> Tensor:
    """Positions pos (...) to rotate by, divided; whole ones come back as float64."""
    if not isinstance(pos, Tensor):
        raise TypeError(f"pos: got {type(pos).__name__}, expected torch.Tensor")
    if pos.dtype not in (*INTEGERS, *FLOATS):
        raise TypeError(f"pos: got dtype {pos.dtype}, expected integers or floats")
    _check_positive("factor", factor)
    return (pos if pos.is_floating_point() else pos.double()) / factor


def check_floats(name: str, x: Any, axes: int) -> None:
    """`x` is a tensor of floats with at least so many axes."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, expected torch.Tensor")
    if x.dim() < axes:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected at least {axes} axes")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}: got dtype {x.dtype}, expected float16, bfloat16 or wider")


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {value!r}, expected a number above 0")
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: got {value}, expected a number above 0")


def _check_adapter(W: Any, A: Any, B: Any, alpha: Any) -> None:
    """The adapter fits the weights."""
    for name, x, axes in (
        ("W", W, ("n_out", "n_in")), ("A", A, ("r", "n_in")), ("B", B, ("n_out", "r")),
    ):  # fmt: skip
        check_tensor(name, x, axes, FLOATS)
        check_same(name, x, "W", W)
    if A.shape[0] < 1:
        raise ValueError("A: got rank 0, expected at least 1")
    check_size("A", A.shape[1], W.shape[1], "n_in, as in W")
    check_size("B", B.shape[0], W.shape[0], "n_out, as in W")
    check_size("B", B.shape[1], A.shape[0], "r, as in A")
    _check_positive("alpha", alpha)


def _check_input(x: Any, W: Tensor, keep: Any, dropout: Any) -> None:
    """x fits the weights, and `keep` fits x."""
    check_floats("x", x, 1)
    check_size("x", x.shape[-1], W.shape[1], "n_in, as in W")
    check_same("x", x, "W", W)
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)):
        raise TypeError(f"dropout: got {dropout!r}, expected a number from 0 and below 1")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: got {dropout}, expected a number from 0 and below 1")
    if keep is None:
        return
    if not isinstance(keep, Tensor):
        raise TypeError(f"keep: got {type(keep).__name__}, expected torch.Tensor")
    if keep.dtype != torch.bool:
        raise TypeError(f"keep: got dtype {keep.dtype}, expected bool")
    if keep.shape != x.shape or keep.device != x.device:
        raise ValueError(
            f"keep: got shape {tuple(keep.shape)} on {keep.device}, expected {tuple(x.shape)} on "
            f"{x.device}, as x"
        )
