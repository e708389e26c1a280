"""The memory engine's Python surface: packing of layers, then one custom op each."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from attnspec.fast.backend import choose_backend, wide_dtype
from attnspec.fast.engines.memory.op import memory_op, path_op, scalars_op

Layers = tuple[Tensor, ...]


def memory(
    W: Sequence[Tensor],
    S: Sequence[Tensor],
    k: Tensor,
    v: Tensor,
    q: Tensor,
    rates: tuple[Tensor, Tensor, Tensor],
    b: int,
    *,
    loss_scale: float = 2.0,
    before: bool = False,
    stored: Tensor | None = None,
    offsets: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Layers, Layers]:
    """What a memory with layers W and momentum S (batch, kv_heads, inputs, outputs) answers to q
    (batch, heads, tokens, d) while it stores k (batch, kv_heads, tokens, d) -> v (batch, kv_heads,
    tokens, dv) in gradient chunks of b; the last weights and momentum, float32.

    rates are theta, eta, alpha (batch, kv_heads, tokens). A query reads what is there behind its
    own token's store, or `before` it. Tokens that are not `stored` (batch, tokens) come last and
    change nothing. `offsets` int (sequences + 1), increasing from 0 to tokens, packs sequences in a
    batch of 1: chunks begin anew in each, and W and S have sequences for a batch. Differentiable in
    W, S, k, v, q and rates. Nothing is checked here.
    """
    backend = choose_backend(backend, k)
    if backend == "triton" and not k.is_cuda and k.dtype == torch.bfloat16:
        raise TypeError("k: got dtype torch.bfloat16, expected another in Triton's interpreter")
    widths = [W[0].shape[-2], *(w.shape[-1] for w in W)]
    inputs = (*W, *S, k, v, q, *rates)
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    y, last_W, last_S, _, _ = memory_op(
        pack(W, k), pack(S, k), k, v, q, *rates, stored, offsets, widths, b, float(loss_scale),
        before, keep, backend,
    )  # fmt: skip
    return y, unpack(last_W, widths), unpack(last_S, widths)


def pack(layers: Sequence[Tensor], like: Tensor) -> Tensor:
    """Matrices (batch, heads, inputs, outputs) in a row, in the dtype of states."""
    flat = [x.to(wide_dtype(like)).flatten(2) for x in layers]
    return flat[0].contiguous() if len(flat) == 1 else torch.cat(flat, -1)


def unpack(packed: Tensor, widths: Sequence[int]) -> Layers:
    """The matrices that `pack` laid in a row, views."""
    layers, at = [], 0
    for inputs, outputs in itertools.pairwise(widths):
        layers.append(packed[..., at : at + inputs * outputs].unflatten(-1, (inputs, outputs)))
        at += inputs * outputs
    return tuple(layers)


def scalars(
    theta: Tensor, eta: Tensor, alpha: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """rows (..., C, 3) of beta, m, f, and n, G (..., C, C) of rates (..., C), in float32 (float64
    for float64). Differentiable.
    """
    leading, C = theta.shape[:-1], theta.shape[-1]
    flat = [x.reshape(-1, C) if C else x.reshape(leading.numel(), 0) for x in (theta, eta, alpha)]
    rows, n, G = scalars_op(*flat, choose_backend(backend, theta))
    return rows.view(*leading, C, 3), n.view(*leading, C, C), G.view(*leading, C, C)


def weight_path(
    W: Tensor, S: Tensor, gradients: Tensor, eta: Tensor, alpha: Tensor, *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Weights (heads, chunks + 1, numbers) on the way, and the last momentum (heads, numbers):
    chunk by chunk S = eta S - g, W = (1 - alpha) W + S.

    W, S (heads, numbers), gradients (heads, chunks, numbers), eta, alpha (heads, chunks), all
    float32, or float64 on the CPU. Differentiable.
    """
    wide = wide_dtype(W)
    given = [x.to(wide).contiguous() for x in (W, S, gradients, eta, alpha)]
    return path_op(*given, choose_backend(backend, W))
