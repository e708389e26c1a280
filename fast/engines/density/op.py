"""The density engine: what it computes, its custom ops and their gradients.

A slice x of l entries along the middle axis has mean mu and variance v (unbiased, plus eps). Entry
j has the log density  E_j = log sum_m exp(C_m - (a_m (x_j - mu - d_m)^2 + b_m) / (2 v))  of M
components (d, a, C, b), and the weight  w_j = exp(E_j - max(log sum_i exp E_i, log eps)).  A head
is a chunk of the axis with components of its own; the last one takes the remainder. The result is
x w, and the kernels never store anything of the size of x but this and w.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnspec.fast.backend import load, wide_dtype


class Options(NamedTuple):
    """What the kernels need beside the arrays.

    `eps` is added to the variance and, if `clamp`, bounds the sum from below. Entries that a mask
    hides count as zeros in the statistics and stay as they are, or, if `exact`, are left out
    altogether. `residual` adds x to the result.
    """

    eps: float
    clamp: bool
    exact: bool
    residual: bool


def _kernels(backend: str) -> ModuleType:
    """The implementation on `backend`, imported on first use."""
    module = "numba_cpu" if backend == "numba" else "triton_gpu"
    return load(f"attnspec.fast.engines.density.{module}")


@torch.library.custom_op("attnspec::density", mutates_args=())
def _density(
    x: Tensor, mask: Tensor | None, components: Tensor, eps: float, clamp: bool, exact: bool,
    residual: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    with torch.cuda.device_of(x):
        options = Options(eps, clamp, exact, residual)
        return _kernels(backend).forward(x, mask, components, options)


def saved_shape(x: Tensor, components: Tensor) -> tuple[int, int]:
    """Of every slice: mean, variance, the log of its greatest raw weight, the log of the sum of all
    in units of that one (a large first log would swallow it), and the number of entries."""
    return x.shape[0] * components.shape[0] * x.shape[2], 5


@_density.register_fake
def _(
    x: Tensor, mask: Tensor | None, components: Tensor, eps: float, clamp: bool, exact: bool,
    residual: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    saved = x.new_empty(saved_shape(x, components), dtype=wide_dtype(x))
    return x.new_empty(x.shape), x.new_empty(x.shape), saved


@torch.library.custom_op("attnspec::density_backward", mutates_args=())
def _density_backward(
    dout: Tensor, dw: Tensor | None, x: Tensor, mask: Tensor | None, components: Tensor,
    saved: Tensor, eps: float, clamp: bool, exact: bool, residual: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    with torch.cuda.device_of(x):
        options = Options(eps, clamp, exact, residual)
        return _kernels(backend).backward(dout, dw, x, mask, components, saved, options)


@_density_backward.register_fake
def _(
    dout: Tensor, dw: Tensor | None, x: Tensor, mask: Tensor | None, components: Tensor,
    saved: Tensor, eps: float, clamp: bool, exact: bool, residual: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape), components.new_empty(components.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, mask, components, *ctx.options = inputs
    ctx.save_for_backward(x, mask, components, output[2])
    ctx.set_materialize_grads(False)


def _gradient(
    ctx: Any, dout: Tensor | None, dw: Tensor | None, dsaved: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, mask, components, saved = ctx.saved_tensors
    if dout is None and dw is None:
        return (None,) * 8
    dout = torch.zeros_like(x) if dout is None else dout
    dx, dcomponents = _density_backward(dout, dw, x, mask, components, saved, *ctx.options)
    return dx, None, dcomponents, None, None, None, None, None


_density.register_autograd(_gradient, setup_context=_setup)


def _refuse_gradient(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError("this operation is differentiable once: its gradient has none")


_density_backward.register_autograd(_refuse_gradient)


def density(
    x: Tensor, axis: int, components: Tensor, mask: Tensor | None, options: Options, backend: str
) -> tuple[Tensor, Tensor]:
    """x w and w along `axis` (counted from the front) of x, both of x's shape and dtype.

    `components` (heads, M, 4), from `collapsed` or `mixture`; `mask` bool, broadcastable to x.
    Differentiable in x and the components. The axes before and behind `axis` are merged, for which
    an x whose strides do not allow it is copied.
    """
    shape = (math.prod(x.shape[:axis]), x.shape[axis], math.prod(x.shape[axis + 1 :]))
    if mask is not None:
        mask = mask.expand(x.shape).reshape(shape)
    out, w, _ = _density(x.reshape(shape), mask, components, *options, backend)
    return out.view(x.shape), w.view(x.shape)


def collapsed(delta: Tensor, c: Tensor) -> Tensor:
    """Components (heads, 1, 4) of a product of Gaussians with offsets and widths (heads, K).

    Completing the square leaves one Gaussian; what is left over is a sum of squares, so nothing
    cancels.
    """
    sharp = c**-2
    a = sharp.sum(1)
    d = (delta * sharp).sum(1) / a
    C = _log_peak(c).sum(1)
    b = ((delta - d[:, None]) ** 2 * sharp).sum(1)
    return torch.stack((d, a, C, b), -1)[:, None]


def mixture(delta: Tensor, c: Tensor) -> Tensor:
    """Components (heads, K, 4) of a mean of Gaussians with offsets and widths (heads, K)."""
    C = _log_peak(c) - math.log(c.shape[1])
    return torch.stack((delta, c**-2, C, torch.zeros_like(c)), -1)


def _log_peak(c: Tensor) -> Tensor:
    return -0.5 * math.log(2 * math.pi) - c.abs().log()
