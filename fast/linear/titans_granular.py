"""Titans with rates by chunk: gradients of a whole span at once, then a scan over its chunks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import (
    FLOATS,
    check_attention_inputs,
    check_integer,
    check_size,
    check_tensor,
    product,
    wide,
)
from attnspec.fast.engines.memory import weight_path
from attnspec.fast.linear.titans_checks import Layers, check_rates, check_scale, check_states
from attnspec.fast.linear.titans_memory import mlp_memory, wide_gradients


def titans_chunk_granular(
    W0: tuple[Tensor, ...], S0: tuple[Tensor, ...] | None, k: Tensor, v: Tensor, q: Tensor,
    theta: Tensor, eta: Tensor, alpha: Tensor, c: int, batch_size: int | None = None,
    loss_scale: float = 2.0, *, backend: str | None = None,
) -> tuple[Tensor, Layers, Layers, Layers]:  # fmt: skip
    """y (batch, heads, T, dv), the last W and S, and the path of the weights, float32.

    Arrays as those of `titans_chunk_mlp`; theta (batch, kv_heads, T), eta and alpha (batch,
    kv_heads, T // c); `batch_size` is a multiple of c, None for never. path[l] (batch, kv_heads, T
    // c + 1, inputs, outputs) holds all weights that are read, as the mechanism needs them.
    Differentiable.
    """
    check_attention_inputs(q, k, v, FLOATS)
    check_size("q", q.shape[2], k.shape[2], "tokens, as in k")
    W, S = check_states(W0, S0, k)
    check_size("v", v.shape[3], W[-1].shape[-1], "dv, the width of the last layer of W0")
    check_integer("c", c, least=1)
    check_scale(loss_scale)
    _check_period(batch_size, c)
    chunks = k.shape[2] // c
    _check_rates(theta, eta, alpha, k, chunks)
    span = max(chunks, 1) if batch_size is None else batch_size // c
    shapes = [w.shape[-2:] for w in W]
    weights, momentum = (torch.cat([wide(x).flatten(2) for x in y], -1).flatten(0, 1)
                         for y in (W, S))  # fmt: skip
    paths = [weights[:, None]]
    for first in range(0, chunks, span):
        last = min(first + span, chunks)
        base = _unpack(weights.unflatten(0, k.shape[:2]), shapes)
        gradients = _sums(base, k, v, theta, slice(first, last), c, loss_scale)
        steps = [wide(x[..., first:last]).flatten(0, 1) for x in (eta, alpha)]
        way, momentum = weight_path(weights, momentum, gradients, steps[0], steps[1],
                                    backend=backend)  # fmt: skip
        weights = way[:, -1]
        paths.append(way[:, 1:])
    path = torch.cat(paths, 1).unflatten(0, k.shape[:2])
    by_layer = _unpack(path, shapes)
    y = _read(by_layer, q, c, chunks)
    last_S = _unpack(momentum.unflatten(0, k.shape[:2]), shapes)
    return y, tuple(w[:, :, -1] for w in by_layer), last_S, by_layer


def _sums(
    base: Layers, k: Tensor, v: Tensor, theta: Tensor, chunks: slice, c: int, loss_scale: float
) -> Tensor:
    """The gradients (memories, chunks, numbers) of some chunks, each weighted by theta."""
    rows = slice(chunks.start * c, chunks.stop * c)
    H, Delta = wide_gradients(base, k[:, :, rows], v[:, :, rows], loss_scale)
    steps = wide(theta[:, :, rows])[..., None]
    sums = []
    for h, delta in zip(H, Delta, strict=True):
        keys, errors = (x.unflatten(2, (-1, c)) for x in (h, steps * delta))
        sums.append(product(keys.mT, errors).flatten(3))
    return torch.cat(sums, -1).flatten(0, 1)


def _read(path: Layers, q: Tensor, c: int, chunks: int) -> Tensor:
    """Every token by the weights behind the complete chunks up to it: a chunk reads one late."""
    batch, heads, T, d = q.shape
    kv_heads = path[0].shape[1]
    room = (chunks + 1) * c
    shifted = torch.cat(
        [q.new_zeros(batch, heads, 1, d), q, q.new_zeros(batch, heads, room - T, d)], 2
    )[:, :, :room]
    rows = shifted.unflatten(2, (chunks + 1, c)).unflatten(1, (kv_heads, -1))
    rows = rows.transpose(2, 3).flatten(3, 4)
    y = mlp_memory(path, rows)
    y = y.unflatten(3, (-1, c)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    tail = mlp_memory(tuple(w[:, :, -1] for w in path), q[:, :, T:].reshape(batch, kv_heads, 0, d))
    return torch.cat([y[:, :, 1 : T + 1], tail.reshape(batch, heads, 0, y.shape[3])], 2)


def _unpack(packed: Tensor, shapes: list[Any]) -> Layers:
    layers, at = [], 0
    for inputs, outputs in shapes:
        layers.append(packed[..., at : at + inputs * outputs].unflatten(-1, (inputs, outputs)))
        at += inputs * outputs
    return tuple(layers)


def _check_period(batch_size: Any, c: int) -> None:
    if batch_size is None:
        return
    check_integer("batch_size", batch_size, least=1)
    if batch_size % c:
        raise ValueError(f"batch_size: got {batch_size}, expected a multiple of {c} (c)")


def _check_rates(theta: Any, eta: Any, alpha: Any, k: Tensor, chunks: int) -> None:
    for name, x, tokens in (
        ("theta", theta, k.shape[2]),
        ("eta", eta, chunks),
        ("alpha", alpha, chunks),
    ):
        check_tensor(name, x, ("batch", "kv_heads", "T"), FLOATS)
        if tuple(x.shape) != (*k.shape[:2], tokens):
            wanted = (*k.shape[:2], tokens)
            raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected {tuple(wanted)}")
        if x.dtype != k.dtype:
            raise TypeError(f"{name}: got dtype {x.dtype}, expected {k.dtype}, as k")
    check_rates(theta, torch.zeros_like(theta), torch.zeros_like(theta))
    check_rates(torch.zeros_like(eta), eta, alpha)
