"""The additive engine's operations: argument checks, custom ops and their gradients.

A score is sum_a v_a tanh(q_ia + k_ja). The kernels hold a tile of scores and walk along a; the
(steps, slots, width) array of tanh values never exists, and the backward computes it again.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import (
    DTYPES,
    FLOATS,
    check_same,
    check_size,
    check_tensor,
    choose_backend,
    load,
    wide_dtype,
)
from attnspec.fast.engines.operation import operation


def _kernels(backend: str) -> ModuleType:
    """The implementation on `backend`, imported on first use."""
    module = "numba_cpu" if backend == "numba" else "triton_gpu"
    return load(f"attnspec.fast.engines.additive.{module}")


def _refuse_gradient(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError("this operation is differentiable once: its gradient has none")


@operation("attnspec::additive_scores")
def _scores(k: Tensor, q: Tensor, v: Tensor, backend: str) -> Tensor:
    return _kernels(backend).scores(k, q, v)


@_scores.register_fake
def _(k: Tensor, q: Tensor, v: Tensor, backend: str) -> Tensor:
    return q.new_empty(*q.shape[:2], k.shape[1], dtype=wide_dtype(q))


@operation("attnspec::additive_scores_backward")
def _scores_backward(
    dout: Tensor, k: Tensor, q: Tensor, v: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return _kernels(backend).gradients(dout, k, q, v)


@_scores_backward.register_fake
def _(dout: Tensor, k: Tensor, q: Tensor, v: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    return k.new_empty(k.shape), q.new_empty(q.shape), v.new_empty(v.shape)


_scores_backward.register_autograd(_refuse_gradient)


def _scores_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    k, q, v, ctx.backend = inputs
    ctx.save_for_backward(k, q, v)


def _scores_gradient(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    return *_scores_backward(dout, *ctx.saved_tensors, ctx.backend), None


_scores.register_autograd(_scores_gradient, setup_context=_scores_setup)


@operation("attnspec::additive_lse")
def _lse(
    k: Tensor, q: Tensor, v: Tensor, target: Tensor, mask: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    return _kernels(backend).lse(k, q, v, target, mask)


@_lse.register_fake
def _(
    k: Tensor, q: Tensor, v: Tensor, target: Tensor, mask: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape[:2], dtype=wide_dtype(q)), q.new_empty(
        q.shape[:2], dtype=wide_dtype(q)
    )


@operation("attnspec::additive_lse_backward")
def _lse_backward(
    dlse: Tensor, dscore: Tensor, lse: Tensor, k: Tensor, q: Tensor, v: Tensor, target: Tensor,
    mask: Tensor | None, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    kernels = _kernels(backend)
    dout = kernels.score_gradients(dlse, dscore, lse, k, q, v, target, mask)
    return kernels.gradients(dout, k, q, v)


@_lse_backward.register_fake
def _(
    dlse: Tensor, dscore: Tensor, lse: Tensor, k: Tensor, q: Tensor, v: Tensor, target: Tensor,
    mask: Tensor | None, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return k.new_empty(k.shape), q.new_empty(q.shape), v.new_empty(v.shape)


_lse_backward.register_autograd(_refuse_gradient)


def _lse_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    k, q, v, target, mask, ctx.backend = inputs
    ctx.save_for_backward(output[0], k, q, v, target, mask)


def _lse_gradient(ctx: Any, dlse: Tensor, dscore: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _lse_backward(dlse, dscore, *ctx.saved_tensors, ctx.backend)
    return *gradients, None, None, None


_lse.register_autograd(_lse_gradient, setup_context=_lse_setup)


def _check(k: Any, q: Any, v: Any, backend: str | None) -> str:
    backend = choose_backend(backend, q) if isinstance(q, Tensor) else "numba"
    dtypes = FLOATS if backend == "numba" else DTYPES
    check_tensor("q", q, ("batch", "steps", "A"), dtypes)
    check_tensor("k", k, ("batch", "slots", "A"), dtypes)
    check_tensor("v", v, ("A",), dtypes)
    check_same("k", k, "q", q)
    check_same("v", v, "q", q)
    check_size("k", k.shape[0], q.shape[0], "batch, as in q")
    check_size("k", k.shape[2], q.shape[2], "A, as in q")
    check_size("v", v.shape[0], q.shape[2], "A, as in q")
    return backend


def additive_scores(k: Tensor, q: Tensor, v: Tensor, *, backend: str | None = None) -> Tensor:
    """Scores (batch, steps, slots) of projected k (batch, slots, A) for q (batch, steps, A).

    v (A). float32 for 16-bit inputs, float64 for float64. Differentiable in k, q and v; a pair
    whose upstream gradient is exactly 0 is not read (K11).
    """
    return _scores(k, q, v, _check(k, q, v, backend))


def additive_lse(
    k: Tensor,
    q: Tensor,
    v: Tensor,
    target: Tensor,
    *,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Log denominator and score at `target` (batch, steps): what a cross-entropy needs.

    `target` int64 (batch, steps); `mask` bool, broadcastable to (batch, steps, slots), True where
    a slot may be pointed at. Both results are (batch, steps), float32 (float64 for float64); no
    scores are stored. A step with no slot has lse -inf, a masked target has score -inf, and
    neither passes a gradient.
    """
    backend = _check(k, q, v, backend)
    check_tensor("target", target, ("batch", "steps"), (torch.int64,))
    if target.shape != q.shape[:2]:
        raise ValueError(f"target: got shape {tuple(target.shape)}, expected {tuple(q.shape[:2])}")
    if mask is not None:
        check_tensor("mask", mask, ("batch", "steps", "slots"), (torch.bool,))
        shape = (*q.shape[:2], k.shape[1])
        for got, expected in zip(mask.shape, shape, strict=True):
            if got not in (1, expected):
                raise ValueError(f"mask: got shape {tuple(mask.shape)}, expected {shape}")
        mask = mask.expand(shape)
    return _lse(k, q, v, target, mask, backend)
