"""The flash engine's operation, its custom ops and their gradient."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import check_scale, choose_backend, load, wide_dtype
from attnspec.fast.engines.flash import checks
from attnspec.fast.engines.flash.blocks import BlockLists

DEVICE_MODULES = {
    ("numba", "forward"): "numba_cpu",
    ("numba", "backward"): "numba_cpu",
    ("triton", "forward"): "triton_forward",
    ("triton", "backward"): "triton_backward",
}


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
        q_offsets, k_offsets = checks.check_offsets(q, k, offsets)
    if blocks is not None:
        checks.check_blocks(q, k, blocks, key_mask, mask)
    if sink_logit is not None:
        checks.check_heads(q, "sink_logit", sink_logit)
    if slopes is not None:
        checks.check_heads(q, "slopes", slopes)
    if slope_positions is not None:
        checks.check_slope_positions(q, slopes, slope_positions)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    if scale <= 0:
        # The kernels take the maximum of the scores before they scale them.
        q, scale = (-q, -scale) if scale < 0 else (q * 0.0, 1.0)
    # One number a head or a row: a copy costs nothing, and the kernels then need no stride.
    sink_logit, slopes, slope_positions, row_start, row_end = (
        None if x is None else x.contiguous()
        for x in (sink_logit, slopes, slope_positions, row_start, row_end)
    )
    index, count, full, q_block, k_block = None, None, None, 0, 0
    if blocks is not None:
        index, count, full = blocks.index, blocks.count, blocks.full
        q_block, k_block = blocks.q_block, blocks.k_block
    return _forward(
        q, k, v, scale, causal, window, sinks, row_start, row_end, key_mask, mask, index, count,
        full, q_block, k_block, q_offsets, k_offsets, sink_logit, slopes, slope_positions, backend,
    )  # fmt: skip


def _kernel(backend: str, part: str) -> Any:
    """The function that computes `part` on `backend`; its module is imported on first use."""
    module: ModuleType = load(f"attnspec.fast.engines.flash.{DEVICE_MODULES[backend, part]}")
    return getattr(module, part)


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
    if q.numel() == 0 or k.numel() == 0:
        lse = q.new_full(q.shape[:3], -float("inf"), dtype=wide_dtype(q))
        if sink_logit is not None:
            lse = torch.zeros_like(lse) + sink_logit[:, None]
        return q.new_zeros(*q.shape[:3], v.shape[3]), lse
    return _kernel(backend, "forward")(
        q, k, v, scale, causal, window, sinks, row_start, row_end, key_mask, mask, block_index,
        block_count, block_full, q_block, k_block, q_offsets, k_offsets, sink_logit, slopes,
        slope_positions,
    )  # fmt: skip


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
    if q.numel() == 0 or k.numel() == 0:
        dsink = dlse.sum((0, 2)) if sink_logit is not None else lse.new_zeros(q.shape[1])
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape), dsink
    return _kernel(backend, "backward")(
        dout, dlse, q, k, v, out, lse, scale, causal, window, sinks, row_start, row_end, key_mask,
        mask, block_index, block_count, block_full, q_block, k_block, q_offsets, k_offsets,
        sink_logit, slopes, slope_positions,
    )  # fmt: skip


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


def _gradient(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    out, lse, *tensors = ctx.saved_tensors
    inputs = [
        plain if tensor is None else tensor
        for tensor, plain in zip(tensors, ctx.plain, strict=True)
    ]
    q, k, v, *options = inputs
    dq, dk, dv, dsink = _backward(dout, dlse, q, k, v, out, lse, *options)
    sink_logit = options[15]
    dsink = None if sink_logit is None else dsink.to(sink_logit.dtype)
    return dq, dk, dv, *[None] * 15, dsink, None, None, None


def _refuse_gradient(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError("flash attention is differentiable once: its gradient has none")


_forward.register_autograd(_gradient, setup_context=_setup)
_backward.register_autograd(_refuse_gradient)
