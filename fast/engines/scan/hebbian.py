"""A decaying memory of unit keys and their values that is read before it is written.

m_t = scale S^T qh_t, then S <- lam S + eta rho_t kh_t v_t^T, with kh and qh rows of unit length. A
custom op on Triton, which adds m to something else while it is at it. The CPU's is the scan and a
few rows of torch.
"""

from __future__ import annotations

import math
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import load
from attnspec.fast.engines.operation import Operation, operation
from attnspec.fast.engines.scan.api import WIDEST

FORGETS = 1e4
"""The slope of a decay of 0: its exponential is 0 in every dtype, and 0 times it is 0."""


def constant_decay(
    kept: float, like: Tensor, heads: int, valid: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """How `scan` is told to keep a share `kept` of its state at every real token: `slopes` (heads,)
    or, with `valid` bool (batch, tokens), `log_decay` (batch, heads, tokens); in the dtype of
    `like`.
    """
    slope = min(-math.log(kept), FORGETS) if kept > 0 else FORGETS
    if slope == 0:
        return None, None
    if valid is None:
        return like.new_full((heads,), slope), None
    steps = torch.where(valid, like.new_full((), -slope), 0.0)
    return None, steps[:, None].expand(-1, heads, -1)


@cache
def _kernels(part: str) -> ModuleType:
    """The implementation, imported on first use."""
    return load(f"attnspec.fast.engines.scan.triton_hebbian{part}")


def run_hebbian(
    q: Tensor, k: Tensor, v: Tensor, rho: Tensor, S0: Tensor | None, valid: Tensor | None,
    onto: Tensor | None, eta: float, lam: float, scale: float, block: int,
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """m, added to `onto`, and the last state of each batch or, with `offsets`, of each packed
    sequence.
    """
    with torch.cuda.device_of(q):
        return _kernels("").forward(q, k, v, rho, S0, valid, onto, eta, lam, scale, block, offsets)


def _run(
    q: Tensor, k: Tensor, v: Tensor, rho: Tensor, S0: Tensor | None, valid: Tensor | None,
    onto: Tensor | None, eta: float, lam: float, scale: float, block: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return run_hebbian(q, k, v, rho, S0, valid, onto, eta, lam, scale, block)


hebbian_op = Operation("attnspec::hebbian", _run)


@hebbian_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, rho: Tensor, S0: Tensor | None, valid: Tensor | None,
    onto: Tensor | None, eta: float, lam: float, scale: float, block: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    d, dv = q.shape[3], v.shape[3]
    out = q.new_empty(*q.shape[:3], dv)
    return out, q.new_empty(*k.shape[:2], d, dv, dtype=torch.float32)


Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def run_hebbian_backward(
    dy: Tensor, dS: Tensor, q: Tensor, k: Tensor, v: Tensor, rho: Tensor, S0: Tensor | None,
    valid: Tensor | None, eta: float, lam: float, scale: float, block: int,
    added: tuple[Tensor, Tensor, Tensor] | None = None, offsets: Tensor | None = None,
) -> Gradients:  # fmt: skip
    """The gradients of q, k, v, rho and S0; dy is 0 at padding. Those of q, k and v are added to
    what is given, contiguous, in place. `offsets` pack sequences in a batch of one.
    """
    with torch.cuda.device_of(q):
        return _kernels("_gradient").backward(
            dy, dS, q, k, v, rho, S0, valid, eta, lam, scale, block, added, offsets
        )


@operation("attnspec::hebbian_backward")
def hebbian_backward_op(
    dy: Tensor, dS: Tensor, q: Tensor, k: Tensor, v: Tensor, rho: Tensor, S0: Tensor | None,
    valid: Tensor | None, eta: float, lam: float, scale: float, block: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return run_hebbian_backward(dy, dS, q, k, v, rho, S0, valid, eta, lam, scale, block)


@hebbian_backward_op.register_fake
def _(
    dy: Tensor, dS: Tensor, q: Tensor, k: Tensor, v: Tensor, rho: Tensor, S0: Tensor | None,
    valid: Tensor | None, eta: float, lam: float, scale: float, block: int,
) -> Gradients:  # fmt: skip
    return (
        q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), rho.new_empty(rho.shape),
        dS.new_empty(dS.shape),
    )  # fmt: skip


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, rho, S0, valid, onto, *ctx.numbers = inputs
    ctx.added = onto is not None
    ctx.save_for_backward(q, k, v, rho, S0, valid)
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, dy: Tensor | None, dS: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, rho, S0, valid = ctx.saved_tensors
    if dy is None:
        dy = q.new_zeros(*q.shape[:3], v.shape[3])
    elif valid is not None:
        dy = torch.where(valid[:, None, :, None], dy, 0.0)
    if dS is None:
        dS = rho.new_zeros(*k.shape[:2], k.shape[3], v.shape[3])
    dq, dk, dv, drho, dS0 = hebbian_backward_op(dy, dS, q, k, v, rho, S0, valid, *ctx.numbers)
    return (
        dq, dk, dv, drho, None if S0 is None else dS0, None, dy if ctx.added else None,
        None, None, None, None,
    )  # fmt: skip


def _refuse(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError("the memory is differentiable once: its gradient has none")


hebbian_op.register_autograd(_gradient, setup_context=_setup)
hebbian_backward_op.register_autograd(_refuse)


def hebbian(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rho: Tensor,
    *,
    eta: float,
    lam: float,
    scale: float = 1.0,
    state: Tensor | None = None,
    valid: Tensor | None = None,
    onto: Tensor | None = None,
    block: int | None = None,
) -> tuple[Tensor, Tensor]:
    """m (batch, heads, tokens, dv), added to `onto` if that is given, and the last state, float32
    (batch, kv_heads, d, dv).

    q (batch, heads, tokens, d), k (batch, kv_heads, tokens, d), v (batch, kv_heads, tokens, dv),
    float32 or 16 bits; rho (batch, kv_heads, tokens) and `state`, shaped as the last, float32.
    `valid` bool (batch, tokens): elsewhere nothing is read or written and the result is 0, whatever
    q, k and rho hold; v holds 0 there. `block` is a hint as for `scan`. Differentiable in q, k, v,
    rho, `state` and `onto`. Triton alone; a mechanism has checked the arguments.
    """
    check_memory_widths(q, v)
    if valid is not None:
        q, k = (torch.where(valid[:, None, :, None], x, 0.0) for x in (q, k))
    numbers = (float(eta), float(lam), float(scale), block or 0)
    out, last = hebbian_op(q, k, v, rho, state, valid, onto, *numbers)
    return out, last


def check_memory_widths(q: Tensor, v: Tensor) -> None:
    """Tokens that the kernels can take."""
    for name, width in (("q", q.shape[3]), ("v", v.shape[3])):
        if not 1 <= width <= WIDEST:
            raise ValueError(f"{name}: got {width} channels, expected 1 to {WIDEST}")
    if not q.is_cuda and q.dtype == torch.bfloat16:
        raise TypeError("q: got dtype torch.bfloat16, expected another in Triton's interpreter")
