"""The flash engine's backward pass on Triton: three launches, and sums over heads where needed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnspec.fast.engines.flash import triton_launch as host
from attnspec.fast.engines.flash.blocks import transposed, transposed_parts
from attnspec.fast.engines.flash.configs import FlashConfig
from attnspec.fast.engines.flash.triton_gradients import (
    flash_dkdv_kernel,
    flash_dq_kernel,
    flash_rows_kernel,
)

MANY_KEYS = 1 << 15
"""So many keys, over all kv heads, give every multiprocessor two tiles of them."""


def backward(
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
    slopes: Tensor | None = None,
    slope_positions: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk and dv in the inputs' dtype, and dsink (heads,) in float32, zeros without a sink.

    An upstream gradient whose rows are not aligned, such as the expanded one of a sum, is copied:
    it must not force q, k and v off the fast path.
    """
    rules = host.Rules(
        scale, causal, window, sinks, row_start, row_end, key_mask, mask, block_index, block_count,
        block_full, q_block, k_block, q_offsets, k_offsets, slopes, slope_positions,
    )  # fmt: skip
    if not host.aligned(dout):
        dout = dout.contiguous()
    lse2, delta = row_sums(dout, out, lse, dlse)
    dq = differentiate_rows(dout, q, k, v, lse2, delta, rules)
    dk, dv = differentiate_keys(dout, q, k, v, lse2, delta, rules)
    dsink = torch.zeros(q.shape[1], dtype=torch.float32, device=q.device)
    if sink_logit is not None:
        weight = torch.exp(sink_logit.float()[:, None] - lse)
        dsink = -torch.where(lse == -float("inf"), 0.0, weight * delta).sum((0, 2))
    return dq, dk, dv, dsink


def row_sums(dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor) -> tuple[Tensor, Tensor]:
    """What the other kernels need of each row, as `flash_rows_kernel` defines it."""
    batch, heads, q_tokens, dv = dout.shape
    lse2, delta = torch.empty_like(lse), torch.empty_like(lse)
    rows, block = batch * heads * q_tokens, 64
    strides = {f"dout_stride_{axis}": n for axis, n in zip("bhtd", dout.stride(), strict=True)}
    arguments: dict[str, Any] = {
        "dout": dout, "out": out.contiguous(), "lse": lse, "dlse": dlse.contiguous(),
        "lse2": lse2, "delta": delta, **strides, "rows": rows, "q_tokens": q_tokens,
        "HEADS": heads, "DV": dv, "WIDTH_V": host.padded(dv), "ROWS": block,
    }  # fmt: skip
    host.launch(flash_rows_kernel, -(-rows // block), FlashConfig(0, 0, 4, 1), arguments)
    return lse2, delta


def operands(
    kind: str, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, rules: host.Rules, heads: int
) -> tuple[FlashConfig, dict[str, Any]]:
    """The configuration and the arguments that both gradient kernels take."""
    chosen = host.choose_config(kind, q, v, rules)
    dout, q, k, v = host.readable(dout, q, k, v)
    how = host.access(q, k, v, dout)
    return chosen, {
        **host.operand("q", q, chosen.rows, how),
        **host.operand("dout", dout, chosen.rows, how),
        **host.operand("k", k, chosen.keys, how),
        **host.operand("v", v, chosen.keys, how),
        **host.rule_arguments(rules),
        **host.grid_arguments(kind, chosen, q, k, v, rules, heads),
        **host.shape_arguments(q, k, v, chosen),
        "ACCESS": how,
    }


def differentiate_rows(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse2: Tensor, delta: Tensor, rules: host.Rules
) -> Tensor:
    """dq, by tiles of rows."""
    batch, heads = q.shape[:2]
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    chosen, arguments = operands("dq", dout, q, k, v, rules, heads)
    arguments |= {
        **host.list_arguments(rules.block_index, rules.block_count, rules.block_full),
        "lse2": lse2,
        "delta": delta,
        "dq": dq,
        "key_bounds": None if rules.key_mask is None else host.key_bounds(rules.key_mask),
        "ALL_EDGE": host.all_key_edges(rules, chosen),
    }
    host.launch(flash_dq_kernel, arguments["tiles"] * batch * heads, chosen, arguments)
    return dq


def differentiate_keys(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse2: Tensor, delta: Tensor, rules: host.Rules
) -> tuple[Tensor, Tensor]:
    """dk and dv, by tiles of keys.

    A program sums over the query heads of its kv head; with too few kv heads to fill the device, or
    with sinks, whose tiles see every row, it takes one query head and the sum follows.
    """
    batch, heads, k_tokens = q.shape[0], q.shape[1], k.shape[2]
    kv_heads, group = k.shape[1], heads // k.shape[1]
    few = batch * kv_heads * k_tokens < MANY_KEYS
    share = 1 if few or rules.kept_sinks is not None else group
    owners, buffer = heads // share, k.dtype if share == group else torch.float32
    dk = k.new_empty((batch, owners, *k.shape[2:]), dtype=buffer)
    dv = v.new_empty((batch, owners, *v.shape[2:]), dtype=buffer)
    chosen, arguments = operands("dkdv", dout, q, k, v, rules, owners)
    index, count, full = rules.block_index, rules.block_count, rules.block_full
    if index is not None and count is not None:
        k_blocks = -(-k_tokens // rules.k_block)
        if full is None:
            index, count = transposed(index, count, k_blocks)
        else:
            index, count, full = transposed_parts(index, count, full, k_blocks)
    arguments |= {
        **host.list_arguments(index, count, full),
        "lse2": lse2,
        "delta": delta,
        "dk": dk,
        "dv": dv,
        "started": host.rows_before(rules, rules.row_start, k_tokens),
        "ended": host.rows_before(rules, rules.row_end, k_tokens),
        "SHARE": share,
        "ALL_EDGE": host.all_row_edges(rules, chosen),
        "EARLY": chosen.early,
    }
    host.launch(flash_dkdv_kernel, arguments["tiles"] * batch * owners, chosen, arguments)
    if share != group:
        dk = dk.unflatten(1, (kv_heads, group)).sum(2).to(k.dtype)
        dv = dv.unflatten(1, (kv_heads, group)).sum(2).to(v.dtype)
    return dk, dv
