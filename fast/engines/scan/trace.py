"""A moving average of unit keys, and how well each key agrees with that of the keys before it.

With kh_t = k_t / max(|k_t|, FLOOR), c_t = mu c_{t-1} + (1 - mu) kh_t and rho_t = max(0, kh_t .
c_{t-1} / max(|c_{t-1}|, FLOOR)), which is 1 while c_{t-1} is exactly 0. A custom op on Triton; the
CPU's is a scan and a few rows of torch.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import load
from attnspec.fast.engines.operation import Operation, operation
from attnspec.fast.engines.scan.api import WIDEST

FLOOR = 1e-6


@cache
def _kernels() -> ModuleType:
    """The implementation, imported on first use."""
    return load("attnspec.fast.engines.scan.triton_trace")


def run_trace(
    k: Tensor, valid: Tensor | None, c0: Tensor | None, mu: float, offsets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """rho, and the last trace of each batch or, with `offsets`, of each packed sequence."""
    with torch.cuda.device_of(k):
        return _kernels().forward(k, valid, c0, mu, offsets)


def _run(k: Tensor, valid: Tensor | None, c0: Tensor | None, mu: float) -> tuple[Tensor, Tensor]:
    return run_trace(k, valid, c0, mu)


trace_op = Operation("attnspec::trace", _run)


@trace_op.register_fake
def _(k: Tensor, valid: Tensor | None, c0: Tensor | None, mu: float) -> tuple[Tensor, Tensor]:
    rho = k.new_empty(k.shape[:3], dtype=torch.float32)
    return rho, k.new_empty((*k.shape[:2], k.shape[3]), dtype=torch.float32)


def run_trace_backward(
    drho: Tensor, dlast: Tensor, k: Tensor, valid: Tensor | None, c0: Tensor | None, mu: float,
    added: Tensor | None = None, offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of k, added to what is given, contiguous, in place, and of the first traces."""
    with torch.cuda.device_of(k):
        return _kernels().backward(drho, dlast, k, valid, c0, mu, added, offsets)


@operation("attnspec::trace_backward")
def trace_backward_op(
    drho: Tensor, dlast: Tensor, k: Tensor, valid: Tensor | None, c0: Tensor | None, mu: float
) -> tuple[Tensor, Tensor]:
    return run_trace_backward(drho, dlast, k, valid, c0, mu)


@trace_backward_op.register_fake
def _(
    drho: Tensor, dlast: Tensor, k: Tensor, valid: Tensor | None, c0: Tensor | None, mu: float
) -> tuple[Tensor, Tensor]:
    return k.new_empty(k.shape), dlast.new_empty(dlast.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.mu = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx: Any, drho: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
    k, valid, c0 = ctx.saved_tensors
    dk, dc0 = trace_backward_op(drho, dlast, k, valid, c0, ctx.mu)
    return dk, None, None if c0 is None else dc0, None


def _refuse(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError("the trace is differentiable once: its gradient has none")


trace_op.register_autograd(_gradient, setup_context=_setup)
trace_backward_op.register_autograd(_refuse)


def trace(
    k: Tensor, mu: float, valid: Tensor | None = None, c0: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """rho (batch, heads, tokens) and the last c (batch, heads, d), both float32.

    k (batch, heads, tokens, d), float32 or 16 bits; `valid` bool (batch, tokens): elsewhere c stays
    and rho is 0, whatever k holds. c0 is the float32 trace before the first token, zeros if None.
    Differentiable in k and c0. Triton alone; a mechanism has checked the arguments.
    """
    if not 1 <= k.shape[3] <= WIDEST:
        raise ValueError(f"k: got {k.shape[3]} channels, expected 1 to {WIDEST}")
    return trace_op(k, valid, c0, float(mu))
