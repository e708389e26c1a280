"""The density engine: what it computes, its custom ops and their gradients.

A slice x of l entries along the middle axis has mean mu and variance v (unbiased, plus eps). Entry
j has the log density  E_j = log sum_m exp(C_m - (a_m (x_j - mu - d_m)^2 + b_m) / (2 v))  of M
components (d, a, C, b), and the weight  w_j = exp(E_j - max(log sum_i exp E_i, log eps)).  A head
is a chunk of the axis with components of its own; the last one takes the remainder. The result is
x w, and the kernels never store anything of the size of x but this and w.
"""

from __future__ import annotations

import math
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnspec.fast.backend import load, wide_dtype
from attnspec.fast.engines.operation import Operation


class Options(NamedTuple):
    """What the kernels need beside the arrays.

    `eps` is added to the variance and, if `clamp`, bounds the sum from below. Entries that a mask
    hides count as zeros in the statistics and stay as they are, or, if `exact`, are left out
    altogether. `residual` adds x to the result. A head's Gaussians are multiplied if `product`, and
    else their mean is taken.
    """

    eps: float
    clamp: bool
    exact: bool
    residual: bool
    product: bool


@cache
def _kernels(backend: str) -> ModuleType:
    """The implementation on `backend`, imported on first use."""
    module = "numba_cpu" if backend == "numba" else "triton_gpu"
    return load(f"attnspec.fast.engines.density.{module}")


def _run(
    x: Tensor, mask: Tensor | None, delta: Tensor, c: Tensor, eps: float, clamp: bool, exact: bool,
    residual: bool, product: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    options = Options(eps, clamp, exact, residual, product)
    out, w, saved = _kernels(backend).forward(x, mask, delta, c, options)
    return out, w, saved


_density = Operation("attnspec::density", _run)


def saved_shape(x: Tensor, delta: Tensor) -> tuple[int, int]:
    """Five numbers of every slice, with which a kernel finds its weights again."""
    return x.shape[0] * delta.shape[0] * x.shape[2], 5


@_density.register_fake
def _(x: Tensor, mask: Tensor | None, delta: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    saved = x.new_empty(saved_shape(x, delta), dtype=wide_dtype(x))
    return x.new_empty(x.shape), x.new_empty(x.shape), saved


def _run_backward(
    dout: Tensor, dw: Tensor | None, x: Tensor, mask: Tensor | None, delta: Tensor, c: Tensor,
    saved: Tensor, eps: float, clamp: bool, exact: bool, residual: bool, product: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    options = Options(eps, clamp, exact, residual, product)
    dx, ddelta, dc = _kernels(backend).backward(dout, dw, x, mask, delta, c, saved, options)
    return dx, ddelta, dc


_density_backward = Operation("attnspec::density_backward", _run_backward)


@_density_backward.register_fake
def _(
    dout: Tensor, dw: Tensor | None, x: Tensor, mask: Tensor | None, delta: Tensor, c: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape), delta.new_empty(delta.shape), c.new_empty(c.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *arrays, ctx.options = *inputs[:4], inputs[4:]
    ctx.save_for_backward(*arrays, output[2])
    ctx.set_materialize_grads(False)


def _gradient(
    ctx: Any, dout: Tensor | None, dw: Tensor | None, dsaved: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, mask, delta, c, saved = ctx.saved_tensors
    none = (None,) * 6
    if dout is None and dw is None:
        return None, None, None, None, *none
    dout = torch.zeros_like(x) if dout is None else dout
    dx, ddelta, dc = _density_backward(dout, dw, x, mask, delta, c, saved, *ctx.options)
    return dx, None, ddelta, dc, *none


_density.register_autograd(_gradient, setup_context=_setup)


def _refuse_gradient(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError("this operation is differentiable once: its gradient has none")


_density_backward.register_autograd(_refuse_gradient)


def density(
    x: Tensor,
    axis: int,
    delta: Tensor,
    c: Tensor,
    mask: Tensor | None,
    options: Options,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """x w and w along `axis` (counted from the front) of x, both of x's shape and dtype.

    Offsets `delta` and widths `c`, (heads, K) of any float dtype; `mask` bool, broadcastable to x.
    Differentiable in x, delta and c, once. The axes before and behind `axis` are merged, for which
    an x whose strides do not allow it is copied.
    """
    shape = (math.prod(x.shape[:axis]), x.shape[axis], math.prod(x.shape[axis + 1 :]))
    if mask is not None:
        mask = mask.expand(x.shape).reshape(shape)
    out, w, _ = _density(x.reshape(shape), mask, delta, c, *options, backend)
    return out.view(x.shape), w.view(x.shape)
