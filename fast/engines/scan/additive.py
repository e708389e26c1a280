"""Gates of an additive recurrence: logits in, moving-average weights and log decays out.

kbar_t = e^(k_t - z_t) and log_decay_t = z_(t-1) - z_t, where z is the running logsumexp of k over
time; the scan under these gates; and the summary of all keys and values under a softmax over time,
which is where such a recurrence ends. Custom ops with their gradients.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import choose_backend, load, unobserved, wide_dtype
from attnspec.fast.engines.scan.api import WIDEST, scan
from attnspec.fast.engines.scan.op import scan_backward_op


@cache
def _kernels(backend: str) -> ModuleType:
    """The implementation on `backend`, imported on first use."""
    module = "numba_additive" if backend == "numba" else "triton_additive"
    return load(f"attnspec.fast.engines.scan.{module}")


def run_gates(k: Tensor, z0: Tensor | None, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    with torch.cuda.device_of(k):
        return _kernels(backend).gates(k, z0)


gates_op = torch.library.custom_op("attnspec::additive_gates", run_gates, mutates_args=())


@gates_op.register_fake
def _(k: Tensor, z0: Tensor | None, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, _, d = k.shape
    return (
        k.new_empty(k.shape),
        k.new_empty(k.shape, dtype=wide_dtype(k)),
        k.new_empty(batch, heads, d, dtype=wide_dtype(k)),
    )


@torch.library.custom_op("attnspec::additive_gates_backward", mutates_args=())
def gates_backward_op(
    dkbar: Tensor, dlog_decay: Tensor, dz: Tensor, kbar: Tensor, log_decay: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    """dk, and the gradient of z0 if that was finite."""
    with torch.cuda.device_of(kbar):
        return _kernels(backend).gates_backward(dkbar, dlog_decay, dz, kbar, log_decay)


@gates_backward_op.register_fake
def _(
    dkbar: Tensor, dlog_decay: Tensor, dz: Tensor, kbar: Tensor, log_decay: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    return kbar.new_empty(kbar.shape), dz.new_empty(dz.shape)


def _setup_gates(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, z0, ctx.backend = inputs
    ctx.save_for_backward(output[0], output[1], z0)


def _gates_gradient(
    ctx: Any, dkbar: Tensor, dlog_decay: Tensor, dz: Tensor
) -> tuple[Tensor | None, ...]:
    kbar, log_decay, z0 = ctx.saved_tensors
    dk, dz0 = gates_backward_op(dkbar, dlog_decay, dz, kbar, log_decay, ctx.backend)
    if z0 is not None:
        dz0 = torch.where(z0 == -torch.inf, 0.0, dz0).to(z0.dtype)
    return dk, None if z0 is None else dz0, None


gates_op.register_autograd(_gates_gradient, setup_context=_setup_gates)


def additive_gates(
    k: Tensor, z0: Tensor | None = None, *, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """kbar (batch, heads, tokens, d), log_decay likewise in float32, and the last z (batch, heads,
    d) in float32, of logits k; z0 (batch, heads, d) precedes the first token. Differentiable.

    The log decay of a first token, which nothing precedes, is 0, and so is that of a k of -inf. A
    NaN in k makes kbar NaN from its row on, which is told there alone: log decays stay numbers.
    """
    run = run_gates if unobserved(k, z0) else gates_op
    return run(k, z0, choose_backend(backend, k))


def run_additive_scan(
    q: Tensor, k: Tensor, v: Tensor, S0: Tensor | None, z0: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.cuda.device_of(q):
        kernels = load("attnspec.fast.engines.scan.triton_additive_scan")
        made: tuple[Tensor, Tensor, Tensor] = kernels.forward(q, k, v, S0, z0, scale)
        return made


additive_scan_op = torch.library.custom_op(
    "attnspec::additive_scan", run_additive_scan, mutates_args=()
)


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


def _setup_scan(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, output[1])


def _scan_gradient(ctx: Any, do: Tensor, dS: Tensor, dz: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, S0, z0, S = ctx.saved_tensors
    kbar, log_decay, _ = gates_op(k, z0, "triton")
    dq, dkbar, dv, dlog_decay, dS0 = scan_backward_op(
        do.to(q.dtype), dS, q, kbar, v, None, log_decay, S0, None, S, ctx.scale, 0, True, "triton"
    )
    dk, dz0 = gates_backward_op(dkbar, dlog_decay, dz, kbar, log_decay, "triton")
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
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """o and the last S of `scan` for keys and log decays from `additive_gates` of k, and the last
    z; one kv head for each head. Differentiable.

    In 16 bit on CUDA gates are neither written nor read, and formed again for a gradient.
    """
    if choose_backend(backend, q) == "triton" and _direct(q, v):
        run = run_additive_scan if unobserved(q, k, v, S0, z0) else additive_scan_op
        return run(q, k, v, S0, z0, float(scale))
    kbar, log_decay, z = additive_gates(k, z0, backend=backend)
    o, S = scan(q, kbar, v, log_decay=log_decay, state=S0, scale=scale, backend=backend)
    return o, S, z


def _direct(q: Tensor, v: Tensor) -> bool:
    """Whether the kernels take q and v as they are; the interpreter has no bfloat16."""
    whole = q.shape[3] % 16 == 0 and v.shape[3] % 16 == 0 and 0 < v.shape[3] <= WIDEST
    known = q.dtype == torch.float16 or (q.dtype == torch.bfloat16 and q.is_cuda)
    return whole and known and v.numel() > 0


def run_summary(k: Tensor, v: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    with torch.cuda.device_of(k):
        return _kernels(backend).summary(k, v)


summary_op = torch.library.custom_op("attnspec::time_summary", run_summary, mutates_args=())


@summary_op.register_fake
def _(k: Tensor, v: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    batch, heads, _, d = k.shape
    return (
        k.new_empty(batch, heads, d, v.shape[3], dtype=wide_dtype(k)),
        k.new_empty(batch, heads, d, dtype=wide_dtype(k)),
    )


@torch.library.custom_op("attnspec::time_summary_backward", mutates_args=())
def summary_backward_op(
    dKV: Tensor, KV: Tensor, z: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """dk and dv: products of the whole sequence with small matrices."""
    z = torch.where(z == -torch.inf, 0.0, z)[:, :, None]
    P = torch.exp(k.to(z.dtype) - z)
    small = dKV.to(v.dtype)
    dv = P.to(v.dtype) @ small
    dP = v.to(z.dtype) @ small.mT.to(z.dtype)
    # Both terms see the same rounded dKV, so that they cancel where one key has all the weight.
    dk = P * (dP - (KV * small.to(z.dtype)).sum(-1)[:, :, None])
    return dk.to(k.dtype).contiguous(), dv.contiguous()


@summary_backward_op.register_fake
def _(dKV: Tensor, KV: Tensor, z: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_summary(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output, *inputs[:2])
    ctx.mark_non_differentiable(output[1])


def _summary_gradient(ctx: Any, dKV: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *summary_backward_op(dKV, *ctx.saved_tensors), None


summary_op.register_autograd(_summary_gradient, setup_context=_setup_summary)


def time_summary(k: Tensor, v: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """P^T v (batch, heads, d, dv) with P the softmax of k over time, channel by channel, and its
    logsumexp (batch, heads, d); float32. Zeros where a channel has no key. One read of k and v.
    """
    run = run_summary if unobserved(k, v) else summary_op
    return run(k, v, choose_backend(backend, k))
