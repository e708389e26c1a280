"""Gates of an additive recurrence: logits in, moving-average weights and log decays out.

kbar_t = e^(k_t - z_t) and log_decay_t = z_(t-1) - z_t, where z is the running logsumexp of k over
time; and the scan under these gates. Custom ops with their gradients.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import choose_backend, load, wide_dtype
from attnspec.fast.engines.operation import Operation, operation
from attnspec.fast.engines.scan.api import WIDEST, scan


@cache
def _kernels(backend: str) -> ModuleType:
    """The implementation on `backend`, imported on first use."""
    module = "numba_additive" if backend == "numba" else "triton_additive"
    return load(f"attnspec.fast.engines.scan.{module}")


def run_gates(
    k: Tensor, z0: Tensor | None, offsets: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.cuda.device_of(k):
        return _kernels(backend).gates(k, z0, offsets)


gates_op = Operation("attnspec::additive_gates", run_gates)


@gates_op.register_fake
def _(
    k: Tensor, z0: Tensor | None, offsets: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, _, d = k.shape
    sequences = batch if offsets is None else offsets.shape[0] - 1
    return (
        k.new_empty(k.shape),
        k.new_empty(k.shape, dtype=wide_dtype(k)),
        k.new_empty(sequences, heads, d, dtype=wide_dtype(k)),
    )


@operation("attnspec::additive_gates_backward")
def gates_backward_op(
    dkbar: Tensor, dlog_decay: Tensor, dz: Tensor, kbar: Tensor, log_decay: Tensor,
    offsets: Tensor | None, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dk, and the gradient of z0 if that was finite."""
    with torch.cuda.device_of(kbar):
        return _kernels(backend).gates_backward(dkbar, dlog_decay, dz, kbar, log_decay, offsets)


@gates_backward_op.register_fake
def _(
    dkbar: Tensor, dlog_decay: Tensor, dz: Tensor, kbar: Tensor, log_decay: Tensor,
    offsets: Tensor | None, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return kbar.new_empty(kbar.shape), dz.new_empty(dz.shape)


def _setup_gates(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, z0, offsets, ctx.backend = inputs
    ctx.save_for_backward(output[0], output[1], z0, offsets)


def _gates_gradient(
    ctx: Any, dkbar: Tensor, dlog_decay: Tensor, dz: Tensor
) -> tuple[Tensor | None, ...]:
    kbar, log_decay, z0, offsets = ctx.saved_tensors
    dk, dz0 = gates_backward_op(dkbar, dlog_decay, dz, kbar, log_decay, offsets, ctx.backend)
    if z0 is not None:
        dz0 = torch.where(z0 == -torch.inf, 0.0, dz0).to(z0.dtype)
    return dk, None if z0 is None else dz0, None, None


gates_op.register_autograd(_gates_gradient, setup_context=_setup_gates)


def additive_gates(
    k: Tensor,
    z0: Tensor | None = None,
    *,
    offsets: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """kbar (batch, heads, tokens, d), log_decay likewise in float32, and the last z (batch, heads,
    d) in float32, of logits k; z0 (batch, heads, d) precedes the first token. Differentiable.
    `offsets` packs sequences, as in `scan`: there is a z, and a z0, for each.

    The log decay of a first token, which nothing precedes, is 0, and so is that of a k of -inf. A
    NaN in k makes kbar NaN from its row on, which is told there alone: log decays stay numbers.
    """
    return gates_op(k, z0, offsets, choose_backend(backend, k))


def run_additive_scan(
    q: Tensor, k: Tensor, v: Tensor, S0: Tensor | None, z0: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.cuda.device_of(q):
        kernels = load("attnspec.fast.engines.scan.triton_additive_scan")
        made: tuple[Tensor, Tensor, Tensor] = kernels.forward(q, k, v, S0, z0, scale)
        return made


additive_scan_op = Operation("attnspec::additive_scan", run_additive_scan)


@additive_scan_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, S0: Tensor | None, z0: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, tokens, d = q.shape
    return (
        q.new_empty(batch, heads, tokens, v.shape[3]),
        q.new_empty(batch, heads, d, v.shape[3], dtype=wide_dtype(q)),
        q.new_empty(batch, heads, d, dtype=wide_dtype(q)),
    )


@operation("attnspec::additive_scan_backward")
def additive_scan_backward_op(
    do: Tensor, dS: Tensor, dz: Tensor, q: Tensor, k: Tensor, v: Tensor, S0: Tensor | None,
    z0: Tensor | None, S: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, and the gradients of S0 and, if it was finite, of z0."""
    with torch.cuda.device_of(q):
        kernels = load("attnspec.fast.engines.scan.triton_additive_gradient")
        made: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = kernels.backward(
            do, dS, dz, q, k, v, S0, z0, S, scale
        )
        return made


@additive_scan_backward_op.register_fake
def _(
    do: Tensor, dS: Tensor, dz: Tensor, q: Tensor, k: Tensor, v: Tensor, S0: Tensor | None,
    z0: Tensor | None, S: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dS.new_empty(dS.shape),
        dz.new_empty(dz.shape),
    )  # fmt: skip


def _setup_scan(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, output[1])


def _scan_gradient(ctx: Any, do: Tensor, dS: Tensor, dz: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, S0, z0, S = ctx.saved_tensors
    dq, dk, dv, dS0, dz0 = additive_scan_backward_op(
        do.to(q.dtype), dS, dz, q, k, v, S0, z0, S, ctx.scale
    )
    if z0 is not None:
        dz0 = torch.where(z0 == -torch.inf, 0.0, dz0).to(z0.dtype)
    return dq, dk, dv, None if S0 is None else dS0, None if z0 is None else dz0, None


additive_scan_op.register_autograd(_scan_gradient, setup_context=_setup_scan)


def additive_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    S0: Tensor | None = None,
    z0: Tensor | None = None,
    *,
    scale: float = 1.0,
    offsets: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """o and the last S of `scan` for keys and log decays from `additive_gates` of k, and the last
    z; one kv head for each head. Differentiable. `offsets` packs sequences, as in `scan`.

    In 16 bit on CUDA gates are neither written nor read, and formed again for a gradient, unless
    sequences are packed.
    """
    if offsets is None and choose_backend(backend, q) == "triton" and _direct(q, v):
        return additive_scan_op(q, k, v, S0, z0, float(scale))
    kbar, log_decay, z = additive_gates(k, z0, offsets=offsets, backend=backend)
    o, S = scan(
        q, kbar, v, log_decay=log_decay, state=S0, scale=scale, offsets=offsets, backend=backend
    )
    return o, S, z


def _direct(q: Tensor, v: Tensor) -> bool:
    """Whether the kernels take q and v as they are; the interpreter has no bfloat16."""
    whole = q.shape[3] % 16 == 0 and v.shape[3] % 16 == 0 and 0 < v.shape[3] <= WIDEST
    known = q.dtype == torch.float16 or (q.dtype == torch.bfloat16 and q.is_cuda)
    return whole and known and v.numel() > 0
