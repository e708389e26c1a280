"""Synaptic Resonance on Triton as one operation: relevance, attention and memory.

The memory's kernels add to what attention has made, forward and backward, and the trace's to what
these have made: no pass over the tokens only adds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnspec.fast.engines.flash import flash, flash_backward
from attnspec.fast.engines.operation import Operation, operation
from attnspec.fast.engines.scan.hebbian import (
    check_memory_widths,
    run_hebbian,
    run_hebbian_backward,
)
from attnspec.fast.engines.scan.trace import run_trace, run_trace_backward


def resonance(
    q: Tensor, k: Tensor, v: Tensor, S0: Tensor | None, c0: Tensor | None, valid: Tensor | None, *,
    eta: float, lam: float, mu: float, beta: float, window: int | None,
    offsets: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:  # fmt: skip
    """`synaptic_resonance` of checked arguments; q, k and v are 0 at padding, S0 and c0 float32.
    `offsets` (sequences + 1) pack sequences in a batch of one, without padding; states are then one
    for each of them.
    """
    check_memory_widths(q, v)
    numbers = (float(eta), float(lam), float(mu), float(beta))
    y, S, c, *_ = resonance_op(q, k, v, S0, c0, valid, offsets, *numbers, window)
    return y, (S, c)


def run_resonance(
    q: Tensor, k: Tensor, v: Tensor, S0: Tensor | None, c0: Tensor | None, valid: Tensor | None,
    offsets: Tensor | None, eta: float, lam: float, mu: float, beta: float, window: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y, S, c and, for the gradient, attention's output and lse, and rho."""
    with torch.no_grad():
        rho, c = run_trace(k, valid, c0, mu, offsets)
        o, lse = attend_real(q, k, v, valid, window, "triton", offsets)
        y, S = run_hebbian(q, k, v, rho, S0, valid, o, eta, lam, beta, 0, offsets)
    return y, S, c, o, lse, rho


resonance_op = Operation("attnspec::synaptic_resonance", run_resonance)


@resonance_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, S0: Tensor | None, c0: Tensor | None, valid: Tensor | None,
    offsets: Tensor | None, eta: float, lam: float, mu: float, beta: float, window: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    y, o = (q.new_empty(*q.shape[:3], v.shape[3]) for _ in range(2))
    S, c, lse, rho = (
        q.new_empty(shape, dtype=torch.float32)
        for shape in (*_state_shapes(k, v, offsets), q.shape[:3], k.shape[:3])
    )
    return y, S, c, o, lse, rho


@operation("attnspec::synaptic_resonance_backward")
def resonance_backward_op(
    dy: Tensor, dS: Tensor, dc: Tensor, q: Tensor, k: Tensor, v: Tensor, S0: Tensor | None,
    c0: Tensor | None, valid: Tensor | None, offsets: Tensor | None, o: Tensor, lse: Tensor,
    rho: Tensor, eta: float, lam: float, mu: float, beta: float, window: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k, v, S0 and c0; dy is 0 at padding."""
    with torch.no_grad():
        packing = _packing(valid, window)
        masked = valid if packing is None else None
        dout, Q, K, V, out = _gather(packing, 0, dy, q, k, v, o)
        found = flash_backward(
            dout, Q, K, V, out, lse, causal=True, window=window, key_mask=masked,
            offsets=_pair(offsets), backend="triton",
        )  # fmt: skip
        dq, dk, dv = _gather(packing, 1, *found)
        dq, dk, dv, drho, dS0 = run_hebbian_backward(
            dy, dS, q, k, v, rho, S0, valid, eta, lam, beta, 0, (dq, dk, dv), offsets
        )
        dk, dc0 = run_trace_backward(drho, dc, k, valid, c0, mu, dk, offsets)
    return dq, dk, dv, dS0, dc0


@resonance_backward_op.register_fake
def _(
    dy: Tensor, dS: Tensor, dc: Tensor, q: Tensor, k: Tensor, v: Tensor, S0: Tensor | None,
    c0: Tensor | None, valid: Tensor | None, offsets: Tensor | None, o: Tensor, lse: Tensor,
    rho: Tensor, eta: float, lam: float, mu: float, beta: float, window: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dS.new_empty(dS.shape),
        dc.new_empty(dc.shape),
    )  # fmt: skip


def attend_real(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, window: int | None, backend: str | None,
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Causal attention to the real tokens, or the last `window` of them, in each sequence that
    `offsets` pack; and the lse of tokens as they were moved together.
    """
    packing = _packing(valid, window)
    masked = valid if packing is None else None
    Q, K, V = _gather(packing, 0, q, k, v)
    o, lse = flash(
        Q, K, V, causal=True, window=window, key_mask=masked, offsets=_pair(offsets),
        backend=backend,
    )  # fmt: skip
    return _gather(packing, 1, o)[0], lse


def _packing(valid: Tensor | None, window: int | None) -> tuple[Tensor, Tensor] | None:
    """Where packed tokens come from and where they go, both (batch, 1, T, 1), if a window is to
    count real tokens alone: these are moved together, and padding behind them is never seen.
    """
    if valid is None or window is None:
        return None
    real = valid.cumsum(1)
    padding = real[:, -1:] + valid.logical_not().cumsum(1)
    place = torch.where(valid, real, padding) - 1
    order = torch.argsort(valid.logical_not().to(torch.int8), dim=1, stable=True)
    return order[:, None, :, None], place[:, None, :, None]


def _gather(packing: tuple[Tensor, Tensor] | None, back: int, *rows: Tensor) -> tuple[Tensor, ...]:
    """Tokens packed, or put back."""
    if packing is None:
        return rows
    return tuple(torch.take_along_dim(x, packing[back], 2) for x in rows)


def _pair(offsets: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """The offsets of queries and of keys."""
    return None if offsets is None else (offsets, offsets)


def _state_shapes(
    k: Tensor, v: Tensor, offsets: Tensor | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of S and of c."""
    many = k.shape[0] if offsets is None else offsets.shape[0] - 1
    return (many, k.shape[1], k.shape[3], v.shape[3]), (many, k.shape[1], k.shape[3])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.eta, ctx.lam, ctx.mu, ctx.beta, ctx.window = inputs
    ctx.save_for_backward(*tensors, *output[3:])
    # Results kept for the gradient have none, and zeros of their size would be large.
    ctx.set_materialize_grads(False)


def _gradient(
    ctx: Any, dy: Tensor | None, dS: Tensor | None, dc: Tensor | None, *unused: Tensor | None
) -> tuple[Tensor | None, ...]:
    q, k, v, S0, c0, valid, offsets, o, lse, rho = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(o)
    elif valid is not None:
        dy = torch.where(valid[:, None, :, None], dy, 0.0)
    of_S, of_c = _state_shapes(k, v, offsets)
    dS = rho.new_zeros(of_S) if dS is None else dS
    dc = rho.new_zeros(of_c) if dc is None else dc
    dq, dk, dvalues, dS0, dc0 = resonance_backward_op(
        dy, dS, dc, q, k, v, S0, c0, valid, offsets, o, lse, rho, ctx.eta, ctx.lam, ctx.mu,
        ctx.beta, ctx.window,
    )  # fmt: skip
    return (
        dq, dk, dvalues, None if S0 is None else dS0, None if c0 is None else dc0, *[None] * 7
    )  # fmt: skip


def _refuse(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError("Synaptic Resonance is differentiable once: its gradient has none")


resonance_op.register_autograd(_gradient, setup_context=_setup)
resonance_backward_op.register_autograd(_refuse)
