"""The select engine's operations: argument checks, custom ops and their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import (
    DTYPES,
    FLOATS,
    INTEGERS,
    check_choice,
    check_integer,
    check_same,
    check_size,
    check_tensor,
    choose_backend,
    load,
    wide_dtype,
)
from attnspec.fast.engines.flash import BlockLists
from attnspec.fast.engines.operation import operation

KINDS = ("max", "min", "avg")


def _kernels(backend: str, part: str) -> ModuleType:
    """The implementation of `part` on `backend`, imported on first use."""
    module = "numba_cpu" if backend == "numba" else f"triton_{part}"
    return load(f"attnspec.fast.engines.select.{module}")


def _dtypes(backend: str) -> tuple[torch.dtype, ...]:
    return FLOATS if backend == "numba" else DTYPES


def _as_four(x: Tensor) -> Tensor:
    """`x` with exactly four axes; a view whenever its leading axes allow one."""
    if x.dim() > 4:
        return x.reshape(-1, *x.shape[-3:])
    return x[(None,) * (4 - x.dim())]


def _refuse_gradient(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError("this operation is differentiable once: its gradient has none")


@operation("attnspec::pool_blocks")
def _pool(x: Tensor, block: int, kinds: list[int], backend: str) -> Tensor:
    return _kernels(backend, "pool").pool(x, block, kinds)


@_pool.register_fake
def _(x: Tensor, block: int, kinds: list[int], backend: str) -> Tensor:
    batch, heads, tokens, d = x.shape
    return x.new_empty(batch, heads, (tokens + block - 1) // block, len(kinds) * d)


@operation("attnspec::pool_blocks_backward")
def _pool_backward(dout: Tensor, x: Tensor, block: int, kinds: list[int], backend: str) -> Tensor:
    return _kernels(backend, "pool").pool_backward(dout, x, block, kinds)


@_pool_backward.register_fake
def _(dout: Tensor, x: Tensor, block: int, kinds: list[int], backend: str) -> Tensor:
    return x.new_empty(x.shape)


_pool_backward.register_autograd(_refuse_gradient)


def _pool_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.block, ctx.kinds, ctx.backend = inputs
    ctx.save_for_backward(x)


def _pool_gradient(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None, None]:
    (x,) = ctx.saved_tensors
    return _pool_backward(dout, x, ctx.block, ctx.kinds, ctx.backend), None, None, None


_pool.register_autograd(_pool_gradient, setup_context=_pool_setup)


def pool_blocks(
    x: Tensor, block: int, kinds: Sequence[str], *, backend: str | None = None
) -> Tensor:
    """Pool `x` (..., tokens, d) over blocks of tokens: (..., ceil(tokens/block), len(kinds) * d).

    `kinds` names reductions ("max", "min", "avg"), concatenated along channels in the order
    given; a ragged last block pools over the tokens it has. Differentiable: an extremum passes its
    gradient to its first occurrence. One pass over `x`, in float32 (float64 for float64).
    """
    backend = choose_backend(backend, x) if isinstance(x, Tensor) else "numba"
    axes: tuple[str, ...] = ("batch", "heads", "tokens", "d")
    if isinstance(x, Tensor) and x.dim() < 4:
        axes = axes[4 - max(x.dim(), 2) :]
    elif isinstance(x, Tensor):
        axes = ("...",) * (x.dim() - 4) + axes
    check_tensor("x", x, axes, _dtypes(backend))
    check_integer("block", block, least=1)
    if isinstance(kinds, str) or not kinds:
        raise ValueError(f"kinds: got {kinds!r}, expected a sequence of some of {KINDS}")
    for kind in kinds:
        check_choice("kinds", kind, KINDS)
    pooled = _pool(_as_four(x), block, [KINDS.index(kind) for kind in kinds], backend)
    return pooled.reshape(*x.shape[:-2], *pooled.shape[-2:])


@operation("attnspec::block_scores")
def _scores(q: Tensor, k: Tensor, scale: float, causal: bool, fill: float, backend: str) -> Tensor:
    return _kernels(backend, "scores").scores(q, k, scale, causal, fill)


@_scores.register_fake
def _(q: Tensor, k: Tensor, scale: float, causal: bool, fill: float, backend: str) -> Tensor:
    # Rounding scores would make ties.
    return q.new_empty(*q.shape[:3], k.shape[2], dtype=wide_dtype(q))


@operation("attnspec::block_scores_backward")
def _scores_backward(
    dout: Tensor, q: Tensor, k: Tensor, scale: float, causal: bool, backend: str
) -> tuple[Tensor, Tensor]:
    return _kernels(backend, "scores").scores_backward(dout, q, k, scale, causal)


@_scores_backward.register_fake
def _(
    dout: Tensor, q: Tensor, k: Tensor, scale: float, causal: bool, backend: str
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


_scores_backward.register_autograd(_refuse_gradient)


def _scores_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, ctx.scale, ctx.causal, _, ctx.backend = inputs
    ctx.save_for_backward(q, k)


def _scores_gradient(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
    q, k = ctx.saved_tensors
    dq, dk = _scores_backward(dout, q, k, ctx.scale, ctx.causal, ctx.backend)
    return dq, dk, None, None, None, None


_scores.register_autograd(_scores_gradient, setup_context=_scores_setup)


def block_scores(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    fill: float = float("-inf"),
    backend: str | None = None,
) -> Tensor:
    """Scores (batch, heads, q_blocks, k_blocks) of pooled q (batch, heads, q_blocks, width)
    against pooled k (batch, kv_heads, k_blocks, width): scale * q . k.

    With `causal`, pairs above the bottom-right diagonal (K3) hold `fill` and pass no gradient. The
    result is float32 for 16-bit inputs, so that rounding makes no ties. Differentiable in q and k.
    """
    backend = choose_backend(backend, q) if isinstance(q, Tensor) else "numba"
    check_tensor("q", q, ("batch", "heads", "q_blocks", "width"), _dtypes(backend))
    check_tensor("k", k, ("batch", "kv_heads", "k_blocks", "width"), _dtypes(backend))
    check_same("k", k, "q", q)
    check_size("k", k.shape[0], q.shape[0], "batch, as in q")
    check_size("k", k.shape[3], q.shape[3], "width, as in q")
    if k.shape[1] < 1 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"k: got {k.shape[1]} kv heads for {q.shape[1]} query heads, "
            f"expected a divisor of {q.shape[1]}"
        )
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    return _scores(q, k, scale, causal, float(fill), backend)


@operation("attnspec::top_k")
def _top_k(scores: Tensor, k: int, dtype: torch.dtype, backend: str) -> Tensor:
    return _kernels(backend, "top_k").top_k(scores, k, dtype)


@_top_k.register_fake
def _(scores: Tensor, k: int, dtype: torch.dtype, backend: str) -> Tensor:
    return scores.new_empty(*scores.shape[:3], k, dtype=dtype)


@operation("attnspec::top_k_mask")
def _top_k_mask(scores: Tensor, k: int, backend: str) -> Tensor:
    return _kernels(backend, "top_k").top_k_mask(scores, k)


@_top_k_mask.register_fake
def _(scores: Tensor, k: int, backend: str) -> Tensor:
    return scores.new_empty(scores.shape, dtype=torch.bool)


def _check_top_k(scores: Any, k: Any, backend: str | None) -> str:
    backend = choose_backend(backend, scores) if isinstance(scores, Tensor) else "numba"
    axes = ("...",) * (scores.dim() - 1) if isinstance(scores, Tensor) else ()
    check_tensor("scores", scores, (*axes, "n"), _dtypes(backend))
    check_integer("k", k, least=0)
    return backend


def top_k(
    scores: Tensor, k: int, *, dtype: torch.dtype = torch.int64, backend: str | None = None
) -> Tensor:
    """Indices (..., min(k, n)) of the highest of `scores` (..., n), sorted ascending.

    Exact under ties: equal scores go to the lower index (K6). -inf is an ordinary lowest score and
    NaN ranks below it. `dtype` of the indices is int64 or int32.
    """
    backend = _check_top_k(scores, k, backend)
    check_choice("dtype", dtype, INTEGERS)
    index = _top_k(_as_four(scores.detach()), min(k, scores.shape[-1]), dtype, backend)
    return index.reshape(*scores.shape[:-1], index.shape[-1])


def top_k_mask(scores: Tensor, k: int, *, backend: str | None = None) -> Tensor:
    """bool, shaped as `scores` (..., n): True at the entries `top_k` selects."""
    backend = _check_top_k(scores, k, backend)
    chosen = _top_k_mask(_as_four(scores.detach()), min(k, scores.shape[-1]), backend)
    return chosen.reshape(scores.shape)


def top_k_lists(
    scores: Tensor,
    k: int,
    q_block: int,
    k_block: int,
    *,
    causal: bool = True,
    backend: str | None = None,
) -> BlockLists:
    """The flash engine's lists of the best `k` key blocks of every query block.

    `scores` (batch, heads, q_blocks, k_blocks). With `causal`, chosen blocks above the
    bottom-right diagonal (K3) are dropped: they are the tail of an ascending list.
    """
    check_tensor("scores", scores, ("batch", "heads", "q_blocks", "k_blocks"), DTYPES)
    index = top_k(scores, k, dtype=torch.int32, backend=backend)
    q_blocks, k_blocks = scores.shape[2:]
    if causal:
        first = k_blocks - q_blocks
        last = torch.arange(first, k_blocks, dtype=torch.int32, device=scores.device)
        last = last[:, None].expand(*index.shape[:3], 1).contiguous()
        count = torch.searchsorted(index, last, right=True, out_int32=True)[..., 0]
    else:
        count = index.new_full(scores.shape[:3], index.shape[-1])
    return BlockLists(index, count, q_block, k_block)


@operation("attnspec::mask_lists")
def _mask_lists(mask: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return _kernels(backend, "top_k").mask_lists(mask)


@_mask_lists.register_fake
def _(mask: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    index = mask.new_empty(mask.shape, dtype=torch.int32)
    return index, mask.new_empty(mask.shape[:3], dtype=torch.int32)


def mask_lists(
    mask: Tensor, q_block: int, k_block: int, *, backend: str | None = None
) -> BlockLists:
    """The flash engine's lists of the True entries of `mask` (batch, heads, q_blocks, k_blocks)."""
    check_tensor("mask", mask, ("batch", "heads", "q_blocks", "k_blocks"), (torch.bool,))
    index, count = _mask_lists(mask, choose_backend(backend, mask))
    return BlockLists(index, count, q_block, k_block)
