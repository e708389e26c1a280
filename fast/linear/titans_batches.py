"""Titans over packed sequences: calls of the memory engine, which begins anew in each of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import FLOATS, check_tensor, wide
from attnspec.fast.engines.memory import memory
from attnspec.fast.linear.titans_checks import Layers, check_layers, check_memory_inputs
from attnspec.fast.packing import check_offsets


def titans_packed_linear(
    W0: Tensor, S0: Tensor | None, k: Tensor, v: Tensor, q: Tensor, rates: tuple[Any, Any, Any],
    offsets: Tensor, b: int, *, loss_scale: float = 2.0, read: str = "inclusive",
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y (heads, total, dv) and the last W and S, float32 (sequences, kv_heads, d, dv), of linear
    memories over sequences laid end to end.

    k (kv_heads, total, d), v (kv_heads, total, dv), q (heads, total, d); rates theta, eta, alpha,
    each a number or (kv_heads, total); offsets int (sequences + 1), increasing from 0 to the total,
    which is checked on the CPU only. W0 and S0 as W, in any float dtype, or (kv_heads, d, dv) or
    (d, dv) for all sequences. On CUDA d and dv up to 256 run in the linear memory's own kernels,
    all sequences side by side. Differentiable.
    """
    if W0 is None:
        raise TypeError("W0: got NoneType, expected torch.Tensor")
    momentum = None if S0 is None else (S0,)
    y, (W,), (S,) = titans_packed_mlp(
        (W0,), momentum, k, v, q, rates, offsets, b, loss_scale=loss_scale, read=read,
        backend=backend,
    )  # fmt: skip
    return y, W, S


def titans_packed_mlp(
    W0: tuple[Tensor, ...], S0: tuple[Tensor, ...] | None, k: Tensor, v: Tensor, q: Tensor,
    rates: tuple[Any, Any, Any], offsets: Tensor, b: int, *, loss_scale: float = 2.0,
    read: str = "inclusive", backend: str | None = None,
) -> tuple[Tensor, Layers, Layers]:  # fmt: skip
    """As `titans_packed_linear` for memories of any depth; W0, S0, W and S are tuples of layers.

    Memories of two or more layers take as long as one sequence of all tokens, one behind the other.
    """
    for name, x in (("k", k), ("v", v), ("q", q)):
        check_tensor(name, x, ("heads", "total", "width"), FLOATS)
    check_offsets(offsets, "k", k, k.shape[1])
    leading = (offsets.shape[0] - 1, k.shape[0])
    W = _spread("W0", W0, k, leading)
    S = tuple(torch.zeros_like(wide(w)) for w in W) if S0 is None else _spread("S0", S0, k, leading)
    if isinstance(rates, (tuple, list)):
        rates = tuple(r[None] if isinstance(r, Tensor) else r for r in rates)  # type: ignore[assignment]
    key, value, query = (x[None] for x in (k, v, q))
    _, _, full = check_memory_inputs(
        tuple(w[:1] for w in W), tuple(s[:1] for s in S), key, value, query, rates, b, loss_scale,
        read, None,
    )  # fmt: skip
    y, last_W, last_S = memory(
        W, S, key, value, query, full, b, loss_scale=loss_scale, before=read == "exclusive",
        offsets=offsets, backend=backend,
    )  # fmt: skip
    return y[0], last_W, last_S


def _spread(name: str, layers: Any, k: Tensor, leading: tuple[int, int]) -> Layers:
    """Layers (sequences, kv_heads, inputs, outputs), if they have some of these leading axes."""
    if not isinstance(layers, (tuple, list)):
        check_layers(name, layers, k, "k")
    for x in layers:
        axes = ("...",) * x.dim() if isinstance(x, Tensor) else ()
        check_tensor(name, x, axes, FLOATS)
        if x.dim() < 2 or tuple(x.shape[:-2]) not in ((), leading[1:], leading):
            raise ValueError(
                f"{name}: got shape {tuple(x.shape)}, expected (inputs, outputs) behind no other "
                f"axes, {leading[1:]} or {leading}, heads of k and sequences"
            )
    spread = tuple(x.expand(*leading, *x.shape[-2:]) for x in layers)
    check_layers(name, tuple(x[0] for x in spread), k, "k")
    return spread
