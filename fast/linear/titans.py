"""Titans on Numba and Triton: the memory engine, and the flash engine for attention beside it.

Memories of one and of two layers have kernels of their own on CUDA; deeper ones, and all on the
CPU, are batched products of torch between the engine's coefficient kernels. Everything is
differentiable. Weights and momentum come back in float32. Values of rates and of `valid` are
checked on the CPU only: on a GPU the check would stall it.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from attnspec.fast.engines.memory import CANDIDATES, DEEP, MemoryConfig, scalars, use_config
from attnspec.fast.linear.titans_batches import titans_packed_linear, titans_packed_mlp
from attnspec.fast.linear.titans_checks import Layers, check_rates
from attnspec.fast.linear.titans_decode import MemoryState, decode_step
from attnspec.fast.linear.titans_deep import titans_chunk_mlp
from attnspec.fast.linear.titans_granular import titans_chunk_granular
from attnspec.fast.linear.titans_inputs import token_inputs, token_step_sizes
from attnspec.fast.linear.titans_layouts import (
    gate,
    mac_segment,
    mag,
    mal,
    persistent_prefix,
    titans_mask_mac,
    titans_mask_mag,
)
from attnspec.fast.linear.titans_memory import memory_grad, mlp_memory

__all__ = [
    "MemoryState",
    "decode_step",
    "gate",
    "mac_segment",
    "mag",
    "mal",
    "memory_grad",
    "mlp_memory",
    "persistent_prefix",
    "titans_chunk_granular",
    "titans_chunk_linear",
    "titans_chunk_mlp",
    "titans_coefficients",
    "titans_mask_mac",
    "titans_mask_mag",
    "titans_packed_linear",
    "titans_packed_mlp",
    "titans_sequential",
    "token_inputs",
    "token_step_sizes",
]

_PRODUCTS = (
    "mlp_memory", "memory_grad", "decode_step", "token_inputs", "token_step_sizes",
    "persistent_prefix", "titans_mask_mac", "titans_mask_mag", "gate",
)  # fmt: skip


def _chunked(configs: tuple[MemoryConfig, ...]) -> dict[str, Any]:
    return {
        "gradient": True,
        "compiled": True,
        "triton": {
            "graph": True,
            "dtypes": ("float32", "bfloat16"),
            "configs": {str(c): functools.partial(use_config, c) for c in configs},
        },
    }


CLAIMS = {
    **{name: {"launches": None} for name in _PRODUCTS},
    **{
        name: {"gradient": True, "triton": {"dtypes": ("float32",)}}
        for name in ("mac_segment", "mag", "mal")
    },
    "titans_chunk_granular": {"gradient": True},
    "titans_coefficients": {"gradient": True, "compiled": True, "triton": {"graph": True}},
    **{name: _chunked(CANDIDATES) for name in ("titans_chunk_linear", "titans_packed_linear")},
    **{name: _chunked(DEEP[:2]) for name in ("titans_chunk_mlp", "titans_packed_mlp")},
    "titans_sequential": {"triton": {"dtypes": ("float32",)}},
}
"""What the suite is told beyond the defaults; the first ones are a few products of torch. The
layouts run in 16 bits on CUDA too, which no law has seen there; gradients of the linear memory
underflow in float16, which is not claimed."""


def titans_coefficients(
    theta: Tensor, eta: Tensor, alpha: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """beta, m, f (..., C), n, G (..., C, C) of rates theta, eta, alpha (..., C). Differentiable;
    formed in float32 or wider.
    """
    check_rates(theta, eta, alpha)
    rows, n, G = scalars(theta, eta, alpha, backend=backend)
    beta, m, f = (x.to(theta.dtype) for x in rows.unbind(-1))
    return beta, m, f, n.to(theta.dtype), G.to(theta.dtype)


def titans_sequential(
    W0: tuple[Tensor, ...], S0: tuple[Tensor, ...] | None, k: Tensor, v: Tensor, q: Tensor,
    rates: tuple[Any, Any, Any], b: int, *, loss_scale: float = 2.0, read: str = "inclusive",
    valid: Tensor | None = None, backend: str | None = None,
) -> tuple[Tensor, Layers, Layers]:  # fmt: skip
    """As `titans_chunk_mlp`, which it is: the two forms compute the same."""
    return titans_chunk_mlp(
        W0, S0, k, v, q, rates, b, loss_scale=loss_scale, read=read, valid=valid, backend=backend
    )


def titans_chunk_linear(
    W0: Tensor, S0: Tensor | None, k: Tensor, v: Tensor, q: Tensor, rates: tuple[Any, Any, Any],
    b: int, *, loss_scale: float = 2.0, read: str = "inclusive", valid: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y (batch, heads, T, dv) and the last W and S, float32 (batch, kv_heads, d, dv).

    W0 and S0 (batch, kv_heads, d, dv) or (d, dv), in any float dtype; k (batch, kv_heads, T, d), v
    (batch, kv_heads, T, dv), q (batch, heads, T, d); rates theta, eta, alpha, each a number or
    (batch, kv_heads, T); `valid` bool (batch, T), True at real tokens. On CUDA d and dv up to 256
    run in the linear memory's own kernels.
    """
    first, momentum = (x if x is None else (x,) for x in (W0, S0))
    if first is None:
        raise TypeError("W0: got NoneType, expected torch.Tensor")
    y, (W,), (S,) = titans_chunk_mlp(
        first, momentum, k, v, q, rates, b, loss_scale=loss_scale, read=read, valid=valid,
        backend=backend,
    )  # fmt: skip
    return y, W, S
