"""The neighborhood engine's operations, their custom ops and their gradients."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

from torch import Tensor

from attnspec.fast.backend import choose_backend, load, wide_dtype
from attnspec.fast.engines.neighborhood.grid import (
    Grid,
    flatten,
    token_count,
    unflatten,
    window_size,
)
from attnspec.fast.engines.operation import operation

DEVICE_MODULES = {"numba": "numba_cpu", "triton": "triton_gpu"}


def neighborhood(
    q: Tensor, k: Tensor, v: Tensor, grid: Grid, *, scale: float, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Every query over the keys of its window, and over those behind the grid's.

    q (B, H, tokens, d), k (B, Hk, tokens + extra, d), v (B, Hk, tokens + extra, dv) for the tokens
    of `grid`, row-major, any strides; query head h reads kv head h // (H / Hk). Returns out (B, H,
    tokens, dv) and lse (B, H, tokens) float32. NaN in a key or value reaches only queries that see
    it (K11). Differentiable in q, k and v, once, from the gradients of both outputs; the gradients
    are bitwise repeatable. Numba also takes float64, with lse in float64.
    """
    if scale <= 0:
        # The kernels take the maximum of the scores before they scale them.
        q, scale = (-q, -scale) if scale < 0 else (q * 0.0, 1.0)
    return _forward(q, k, v, flatten(grid), scale, choose_backend(backend, q))


def window_scores(
    q: Tensor, k: Tensor, grid: Grid, *, scale: float, backend: str | None = None
) -> Tensor:
    """scale * q . k for the keys of each window, (B, H, tokens, window) in q's dtype.

    In window order, row-major offsets from the window's start; -inf behind the end of a causal
    axis. Differentiable in q and k.
    """
    return _scores(q, k, flatten(grid), scale, choose_backend(backend, q))


def window_values(p: Tensor, v: Tensor, grid: Grid, *, backend: str | None = None) -> Tensor:
    """Sum of the values of each window, (B, H, tokens, dv), with weights p (B, H, tokens, window).

    Weights behind the end of a causal axis are not read. Differentiable in p and v.
    """
    return _values(p, v, flatten(grid), 1.0, choose_backend(backend, p))


def _device(backend: str) -> Any:
    """The module that computes on `backend`, imported on first use."""
    module: ModuleType = load(f"attnspec.fast.engines.neighborhood.{DEVICE_MODULES[backend]}")
    return module


@operation("attnspec::neighborhood_forward")
def _forward(
    q: Tensor, k: Tensor, v: Tensor, grid: list[int], scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    if q.numel() == 0 or v.numel() == 0:
        lse = q.new_full(q.shape[:3], -math.inf, dtype=wide_dtype(q))
        return q.new_zeros(*q.shape[:3], v.shape[3]), lse
    return _device(backend).forward(q, k, v, unflatten(grid), scale)


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, grid: list[int], scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=wide_dtype(q))


@operation("attnspec::neighborhood_backward")
def _backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grid: list[int],
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if q.numel() == 0 or v.numel() == 0:
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    return _device(backend).backward(dout, dlse, q, k, v, out, lse, unflatten(grid), scale)


@_backward.register_fake
def _(
    dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@operation("attnspec::window_scores")
def _scores(q: Tensor, k: Tensor, grid: list[int], scale: float, backend: str) -> Tensor:
    if q.numel() == 0:
        return q.new_zeros(*q.shape[:3], window_size(unflatten(grid)))
    return _device(backend).scores(q, k, unflatten(grid), scale)


@_scores.register_fake
def _(q: Tensor, k: Tensor, grid: list[int], scale: float, backend: str) -> Tensor:
    return q.new_empty(*q.shape[:3], window_size(unflatten(grid)))


@operation("attnspec::window_values")
def _values(p: Tensor, v: Tensor, grid: list[int], scale: float, backend: str) -> Tensor:
    """`window_values` times `scale`."""
    if p.numel() == 0 or v.numel() == 0:
        return p.new_zeros(*p.shape[:3], v.shape[3])
    return _device(backend).values(p, v, unflatten(grid), scale)


@_values.register_fake
def _(p: Tensor, v: Tensor, grid: list[int], scale: float, backend: str) -> Tensor:
    return p.new_empty(*p.shape[:3], v.shape[3])


@operation("attnspec::window_keys")
def _keys(
    p: Tensor, x: Tensor, grid: list[int], kv_heads: int, scale: float, backend: str
) -> Tensor:
    """For each key, the sum of the rows of x (B, H, tokens, width) whose windows hold it, weighted
    by scale * p (B, H, tokens, window) and summed over the heads of a group.
    """
    if p.numel() == 0 or x.numel() == 0:
        return x.new_zeros(x.shape[0], kv_heads, token_count(unflatten(grid)), x.shape[3])
    return _device(backend).keys(p, x, unflatten(grid), kv_heads, scale)


@_keys.register_fake
def _(p: Tensor, x: Tensor, grid: list[int], kv_heads: int, scale: float, backend: str) -> Tensor:
    return x.new_empty(x.shape[0], kv_heads, x.shape[2], x.shape[3])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.grid, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, *output)


def _gradient(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse = ctx.saved_tensors
    given = (dout, dlse, q, k, v, out, lse, ctx.grid, ctx.scale, ctx.backend)
    return *_backward(*given), None, None, None


def _setup_scores(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, ctx.grid, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(q, k)


def _gradient_of_scores(ctx: Any, ds: Tensor) -> tuple[Tensor | None, ...]:
    q, k = ctx.saved_tensors
    dq = _values(ds, k, ctx.grid, ctx.scale, ctx.backend)
    dk = _keys(ds, q, ctx.grid, k.shape[1], ctx.scale, ctx.backend)
    return dq, dk, None, None, None


def _setup_values(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    p, v, ctx.grid, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(p, v)


def _gradient_of_values(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    p, v = ctx.saved_tensors
    dp = _scores(dout, v, ctx.grid, ctx.scale, ctx.backend)
    if any(axis.causal for axis in unflatten(ctx.grid)):
        dp = dp.masked_fill(dp == -math.inf, 0.0)
    dv = _keys(p, dout, ctx.grid, v.shape[1], ctx.scale, ctx.backend)
    return dp, dv, None, None, None


def _refuse_gradient(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError("neighborhood attention is differentiable once")


_forward.register_autograd(_gradient, setup_context=_setup)
_backward.register_autograd(_refuse_gradient)
_scores.register_autograd(_gradient_of_scores, setup_context=_setup_scores)
_values.register_autograd(_gradient_of_values, setup_context=_setup_values)
_keys.register_autograd(_refuse_gradient)
