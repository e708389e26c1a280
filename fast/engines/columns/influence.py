"""How much the loss changes if entries of the attention are hidden, summed over blocks."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from attnspec.fast.backend import check_integer, check_same, choose_backend, load, wide_dtype
from attnspec.fast.engines.columns.op import positive
from attnspec.fast.engines.flash.checks import check_inputs

MODULES = {"numba": "numba_influence", "triton": "triton_influence"}


def _kernels(backend: str) -> ModuleType:
    """The implementation on `backend`, imported on first use."""
    return load(f"attnspec.fast.engines.columns.{MODULES[backend]}")


@torch.library.custom_op("attnspec::block_influence", mutates_args=())
def _block_influence(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, block: int, eps: float, scale: float, backend: str
) -> Tensor:
    return _kernels(backend).block_influence(q, k, v, g, block, eps, scale)


@_block_influence.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, block: int, eps: float, scale: float, backend: str
) -> Tensor:
    blocks = q.shape[2] // block
    return q.new_empty(*q.shape[:2], blocks, blocks, dtype=wide_dtype(q))


def block_influence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    block: int,
    *,
    eps: float,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Sums of |P (G - sum P G) / (1 - P + eps)| over blocks, with P the causal weights, G = g v^T.

    q (batch, heads, T, d), k (batch, kv_heads, T, d), v (batch, kv_heads, T, dv), g (batch, heads,
    T, dv); T is a multiple of `block`. In row 0, and where 1 - P + eps is 0, the entry is |P G|.
    Returns (batch, heads, T/block, T/block), 0 above the diagonal; float32 (float64 for float64).
    A program walks over the keys twice, for the sums of its rows and then for the entries: both see
    the very same products. Not differentiable.
    """
    backend = choose_backend(backend, q) if isinstance(q, Tensor) else "numba"
    check_inputs(q, k, v, backend)
    check_same("g", g, "q", q)
    check_integer("block", block, least=1)
    for name, x, shape in (
        ("k", k, (*k.shape[:2], *q.shape[2:])),
        ("g", g, (*q.shape[:3], v.shape[3])),
    ):
        if tuple(x.shape) != tuple(shape):
            raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected {tuple(shape)}")
    if q.shape[2] % block:
        raise ValueError(f"q: got {q.shape[2]} tokens, expected a multiple of {block}")
    q, k, v, g = (x.detach() for x in (q, k, v, g))
    q, scale = positive(q, scale)
    return _block_influence(q, k, v, g, block, float(eps), scale, backend)
