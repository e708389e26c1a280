"""The flash engine's operation, its custom ops and their gradient.

Calls are planned once for their kind: shapes, strides, dtypes and options. A later one of the same
kind is not checked again, and where nobody looks on (no graph, tracer or transform) it goes past
the custom op as well.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import (
    check_scale,
    choose_backend,
    untraced,
    wants_gradient,
    wide_dtype,
)
from attnspec.fast.engines.flash import checks, plans
from attnspec.fast.engines.flash.blocks import BlockLists
from attnspec.fast.engines.flash.plans import SINK_LOGIT, Plan, kind_of, plan_of


def flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: int | None = None,
    sinks: int = 0,
    row_start: Tensor | None = None,
    row_end: Tensor | None = None,
    key_mask: Tensor | None = None,
    mask: Tensor | None = None,
    blocks: BlockLists | None = None,
    offsets: tuple[Tensor, Tensor] | None = None,
    sink_logit: Tensor | None = None,
    slopes: Tensor | None = None,
    slope_positions: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Exact attention over the visible keys: out (B, H, Tq, dv) and lse (B, H, Tq) float32.

    q (B, H, Tq, d), k (B, Hk, Tk, d), v (B, Hk, Tk, dv); any strides, d and dv up to 256; query
    head h reads kv head h // (H / Hk). Query i stands at position p = i + Tk - Tq (K3) and sees key
    j if all of these allow it:

    - `causal`: j <= p;
    - the range: j > p - `window` (K8, needs `causal`) and j >= `row_start`[i], an integer (Tq,)
      that must not decrease; the first `sinks` keys are exempt from the range;
    - the end: j < `row_end`[i], an integer (Tq,) that must not decrease either;
    - `key_mask` bool (B, Tk), True = a real key; `mask` bool, broadcastable to (B, H, Tq, Tk);
    - `blocks`: the key's block is listed for the query's block; where the lists say that a query
      block sees all of a key block, the rules above do not count, and there are no masks;
    - `offsets` = (q_offsets, k_offsets), integers (sequences + 1): sequences laid end to end with
      B = 1; positions, ranges and row starts count inside the sequence. Not with masks or blocks.

    `sink_logit` (H,) adds exp(sink_logit) to the softmax denominator and to lse. `slopes` (H,) adds
    slopes[h] * (j - p) to the scores, or with `slope_positions` (Tq,) slopes[h] * (j - position).

    A row that sees nothing has output 0 and lse -inf, or lse = sink_logit (K4); NaN in hidden keys
    and values reaches nothing (K11). Differentiable in q, k, v and sink_logit, once, from the
    gradients of both outputs; the gradients are bitwise repeatable. Numba also takes float64, with
    lse in float64.
    """
    lists: tuple[Any, ...] = (None, None, None, 0, 0)
    if isinstance(blocks, BlockLists):
        lists = blocks.index, blocks.count, blocks.full, blocks.q_block, blocks.k_block
    # Offsets on the CPU are looked into at every call.
    packed = isinstance(offsets, tuple) and len(offsets) == 2
    packed = packed and all(isinstance(x, Tensor) and x.is_cuda for x in offsets or ())
    plain = (blocks is None or isinstance(blocks, BlockLists)) and (offsets is None or packed)
    given = (
        q, k, v, scale, causal, window, sinks, row_start, row_end, key_mask, mask, *lists,
        *(offsets if offsets is not None and packed else (None, None)), sink_logit, slopes,
        slope_positions,
    )  # fmt: skip
    direct = untraced(*(x for x in given if isinstance(x, Tensor)))
    kind: Hashable = None
    if direct and plain:
        kind = kind_of(given, backend)
        known = plans.known(kind)
        if known is not None:
            return _run(known, given)
    backend = choose_backend(backend, q) if isinstance(q, Tensor) else "numba"
    checks.check_inputs(q, k, v, backend)
    check_scale(scale)
    checks.check_ranges(q, causal, window, sinks, row_start, row_end)
    mask = checks.check_masks(q, k, key_mask, mask)
    q_offsets = k_offsets = None
    if offsets is not None:
        for name, option in (("key_mask", key_mask), ("mask", mask), ("blocks", blocks)):
            if option is not None:
                raise ValueError(f"{name}: got one together with offsets, expected one of the two")
        q_offsets, k_offsets = checks.check_offsets(q, k, offsets, backend)
    if blocks is not None:
        checks.check_blocks(q, k, blocks, key_mask, mask)
    if sink_logit is not None:
        checks.check_heads(q, "sink_logit", sink_logit)
    if slopes is not None:
        checks.check_heads(q, "slopes", slopes)
    if slope_positions is not None:
        checks.check_slope_positions(q, slopes, slope_positions)
    factor = q.shape[3] ** -0.5 if scale is None else float(scale)
    if factor <= 0:
        # The kernels take the maximum of the scores before they scale them.
        q, factor = (-q, -factor) if factor < 0 else (q * 0.0, 1.0)
    # One number a head or a row: a copy costs nothing, and the kernels then need no stride.
    sink_logit, slopes, slope_positions, row_start, row_end = (
        None if x is None else x.contiguous()
        for x in (sink_logit, slopes, slope_positions, row_start, row_end)
    )
    resolved = (
        q, k, v, factor, causal, window, sinks, row_start, row_end, key_mask, mask, *lists,
        q_offsets, k_offsets, sink_logit, slopes, slope_positions,
    )  # fmt: skip
    if not direct:
        return _forward(*resolved, backend)
    plan = plan_of(resolved, backend)
    # What had to be changed first goes through the checks every time.
    if kind is not None and q is given[0] and all(map(operator.is_, given[4:], resolved[4:])):
        plans.plans[kind] = plan
    return _run(plan, resolved)


def _run(plan: Plan, given: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """out and lse where nobody looks on, with a gradient if one is wanted."""
    arguments = (*given[:3], plan.scale, *given[4:])
    if wants_gradient(*(x for x in arguments if isinstance(x, Tensor))):
        out, lse = _Flash.apply(plan, *arguments)
        return out, lse
    out, lse = plan.forward(*arguments)
    return out, lse


class _Flash(torch.autograd.Function):
    """The gradient where nobody looks on; all others find it behind the custom op."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, *arguments: Any) -> tuple[Tensor, Tensor]:
        out, lse = plan.forward(*arguments)
        _setup(ctx, arguments, (out, lse))
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        out, lse, inputs = _saved(ctx)
        dout = torch.zeros_like(out) if dout is None else dout
        tensors = [x for x in (dout, dlse, *inputs) if isinstance(x, Tensor)]
        if wants_gradient(*tensors) or not untraced(*tensors):
            dlse = torch.zeros_like(lse) if dlse is None else dlse
            gradients = _backward(dout, dlse, *inputs[:3], out, lse, *inputs[3:], ctx.plan.backend)
        else:
            gradients = ctx.plan.backward(dout, dlse, *inputs[:3], out, lse, *inputs[3:])
        return None, *_by_argument(inputs, gradients)


@torch.library.custom_op("attnspec::flash_forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    sinks: int,
    row_start: Tensor | None,
    row_end: Tensor | None,
    key_mask: Tensor | None,
    mask: Tensor | None,
    block_index: Tensor | None,
    block_count: Tensor | None,
    block_full: Tensor | None,
    q_block: int,
    k_block: int,
    q_offsets: Tensor | None,
    k_offsets: Tensor | None,
    sink_logit: Tensor | None,
    slopes: Tensor | None,
    slope_positions: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    arguments = (
        q, k, v, scale, causal, window, sinks, row_start, row_end, key_mask, mask, block_index,
        block_count, block_full, q_block, k_block, q_offsets, k_offsets, sink_logit, slopes,
        slope_positions,
    )  # fmt: skip
    out, lse = plan_of(arguments, backend).forward(*arguments)
    return out, lse


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=wide_dtype(q))


@torch.library.custom_op("attnspec::flash_backward", mutates_args=())
def _backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    sinks: int,
    row_start: Tensor | None,
    row_end: Tensor | None,
    key_mask: Tensor | None,
    mask: Tensor | None,
    block_index: Tensor | None,
    block_count: Tensor | None,
    block_full: Tensor | None,
    q_block: int,
    k_block: int,
    q_offsets: Tensor | None,
    k_offsets: Tensor | None,
    sink_logit: Tensor | None,
    slopes: Tensor | None,
    slope_positions: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = (
        scale, causal, window, sinks, row_start, row_end, key_mask, mask, block_index, block_count,
        block_full, q_block, k_block, q_offsets, k_offsets, sink_logit, slopes, slope_positions,
    )  # fmt: skip
    plan = plan_of((q, k, v, *options), backend)
    dq, dk, dv, dsink = plan.backward(dout, dlse, q, k, v, out, lse, *options)
    return dq, dk, dv, lse.new_zeros(q.shape[1]) if dsink is None else dsink


@_backward.register_fake
def _(
    dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dsink = q.new_empty(q.shape[1], dtype=wide_dtype(q))
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsink


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors = [x if isinstance(x, Tensor) else None for x in inputs]
    ctx.save_for_backward(*output, *tensors)
    ctx.plain = [None if isinstance(x, Tensor) else x for x in inputs]


def _saved(ctx: Any) -> tuple[Tensor, Tensor, list[Any]]:
    """out, lse and the arguments of the forward pass."""
    out, lse, *tensors = ctx.saved_tensors
    inputs = [
        plain if tensor is None else tensor
        for tensor, plain in zip(tensors, ctx.plain, strict=True)
    ]
    return out, lse, inputs


def _by_argument(inputs: list[Any], gradients: tuple[Any, ...]) -> list[Tensor | None]:
    """The gradient of each argument of the forward pass."""
    dq, dk, dv, dsink = gradients
    found: list[Tensor | None] = [None] * len(inputs)
    found[:3] = dq, dk, dv
    if inputs[SINK_LOGIT] is not None:
        found[SINK_LOGIT] = dsink.to(inputs[SINK_LOGIT].dtype)
    return found


def _gradient(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    out, lse, inputs = _saved(ctx)
    gradients = _backward(dout, dlse, *inputs[:3], out, lse, *inputs[3:])
    return tuple(_by_argument(inputs, gradients))


def _refuse_gradient(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError("flash attention is differentiable once: its gradient has none")


_forward.register_autograd(_gradient, setup_context=_setup)
_backward.register_autograd(_refuse_gradient)
