"""The relative engine's backward pass on Triton: four launches, and sums over heads if shared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnspec.fast.engines.flash.triton_backward import row_sums
from attnspec.fast.engines.relative import triton_launch as host
from attnspec.fast.engines.relative.configs import KEYS, RelativeConfig
from attnspec.fast.engines.relative.triton_gradients import (
    relative_dkdv_kernel,
    relative_dq_kernel,
    relative_dtable_kernel,
)


def backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    table_bias: Tensor | None,
    key_bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    zero: int,
    scale: float,
    causal: bool,
    row_start: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv and dtable in the inputs' dtype, those of the biases, empty if absent, in float32.

    An upstream gradient whose rows are not aligned is copied, as in the flash engine.
    """
    batch, heads, q_tokens, d = q.shape
    kv_heads, k_tokens = k.shape[1], k.shape[2]
    if not host.aligned(dout):
        dout = dout.contiguous()
    lse2, delta = row_sums(dout, out, lse, dlse)

    def prepared(kind: str) -> tuple[RelativeConfig, dict[str, Any]]:
        chosen = host.choose_config(kind, q, v)
        return chosen, {
            **host.inputs(q, k, v, table, chosen, dout),
            **host.shared_arguments(q, k, v, chosen, zero, scale, causal),
            "row_start": row_start,
            "table_bias": table_bias,
            "key_bias": key_bias,
            "lse2": lse2,
            "delta": delta,
        }

    token_bytes = (d + v.shape[3]) * q.element_size()
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    chosen, arguments = prepared("dq")
    place = host.grid(q_tokens, chosen.rows, batch * heads, k_tokens * token_bytes)
    programs = place["tiles"] * batch * heads
    host.launch(relative_dq_kernel, programs, chosen, {**arguments, **place, "dq": dq})

    buffer = k.dtype if heads == kv_heads else torch.float32
    dk = k.new_empty((batch, heads, *k.shape[2:]), dtype=buffer)
    dv = v.new_empty((batch, heads, *v.shape[2:]), dtype=buffer)
    chosen, arguments = prepared("dkdv")
    place = host.grid(k_tokens, KEYS, batch * heads, q_tokens * token_bytes)
    dkey_bias = lse.new_empty(0 if key_bias is None else key_bias.shape)
    arguments |= {
        **place, "dk": dk, "dv": dv, "dkey_bias": dkey_bias,
        "row_end": row_ends(row_start, k_tokens),
    }  # fmt: skip
    host.launch(relative_dkdv_kernel, place["tiles"] * batch * heads, chosen, arguments)
    if heads != kv_heads:
        dk = dk.unflatten(1, (kv_heads, -1)).sum(2).to(k.dtype)
        dv = dv.unflatten(1, (kv_heads, -1)).sum(2).to(v.dtype)

    dtable = torch.empty(heads, *table.shape[1:], dtype=torch.float32, device=q.device)
    chosen, arguments = prepared("dtable")
    place = host.grid(table.shape[1], KEYS, heads, 2 * k_tokens * token_bytes)
    dtable_bias = lse.new_empty((heads, table.shape[1]) if table_bias is not None else 0)
    arguments |= {**place, "dtable": dtable, "dtable_bias": dtable_bias, "batches": batch}
    host.launch(relative_dtable_kernel, place["tiles"] * heads, chosen, arguments)
    if table.shape[0] == 1:
        dtable = dtable.sum(0, keepdim=True)
        dtable_bias = dtable_bias if table_bias is None else dtable_bias.sum(0, keepdim=True)
    return dq, dk, dv, dtable.to(table.dtype), dtable_bias, dkey_bias


def row_ends(row_start: Tensor | None, k_tokens: int) -> Tensor | None:
    """int32 (k_tokens): how many rows' ranges start at or before each key."""
    if row_start is None:
        return None
    keys = torch.arange(k_tokens, device=row_start.device, dtype=row_start.dtype)
    return torch.searchsorted(row_start, keys, right=True).to(torch.int32)
