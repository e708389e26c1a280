"""The relative engine on CPU tensors: plans the query tiles and calls the Numba kernels.

float32 and float64 are computed as they are; float16 and bfloat16 are widened to a float32 copy and
the results rounded back. All strides are read in place.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from attnspec.fast.engines.flash import numba_cpu as flash_host
from attnspec.fast.engines.flash.numba_lanes import REGISTER_BYTES
from attnspec.fast.engines.relative import numba_kernels


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    table_bias: Tensor | None,
    key_bias: Tensor | None,
    zero: int,
    scale: float,
    causal: bool,
    row_start: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """out (batch, heads, q_tokens, dv) in q's dtype and lse (batch, heads, q_tokens) in float32,
    float64 for float64 inputs.
    """
    wide = flash_host.widened(q)
    batch, heads, q_tokens, d = q.shape
    dv, k_tokens = v.shape[3], k.shape[2]
    out = torch.empty(batch, heads, q_tokens, dv, dtype=wide.dtype)
    lse = torch.empty(batch, heads, q_tokens, dtype=wide.dtype)
    see = flash_host.visible_arguments(
        q, k, causal, None, 0, row_start, None, None, None, None, None, None, 0, 0
    )
    tiles = flash_host.tile_table(q_tokens, k_tokens, 0, None, None)
    arguments = [
        wide.numpy(), *(flash_host.widened(x).numpy() for x in (k, v, table)),
        *biases(table_bias, key_bias, wide.dtype), out.numpy(), lse.numpy(), zero, scale, *see,
        tiles,
    ]  # fmt: skip
    flash_host.run_parts(
        numba_kernels.forward_kernel(flash_host.number_type(wide)), arguments,
        batch * heads * len(tiles), batch * heads * q_tokens * k_tokens * (2 * d + dv), wide.dtype,
        numba_kernels.forward_scratch(d, dv), flash_host.most_spans_of(k_tokens, see[7], 0),
    )  # fmt: skip
    return out.to(q.dtype), lse


def biases(
    table_bias: Tensor | None, key_bias: Tensor | None, dtype: torch.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """The arrays of the biases, empty where absent."""
    return (
        flash_host.option_array(table_bias, 2, dtype),
        flash_host.option_array(key_bias, 3, dtype),
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
    """dq, dk, dv, dtable and those of the biases in the inputs' dtype; empty for absent ones."""
    wide, wide_dout = flash_host.widened(q), flash_host.widened(dout)
    batch, heads, q_tokens, d = q.shape
    kv_heads, k_tokens, d_v = k.shape[1], k.shape[2], v.shape[3]
    shift = dlse.detach() - (wide_dout * flash_host.widened(out)).sum(-1)
    lanes = REGISTER_BYTES // wide.element_size()
    d_padded, dv_padded = -(-d // lanes) * lanes, -(-d_v // lanes) * lanes
    see = flash_host.visible_arguments(
        q, k, causal, None, 0, row_start, None, None, None, None, None, None, 0, 0
    )
    tiles = flash_host.tile_table(q_tokens, k_tokens, 0, None, None)
    shares = flash_host.shares_of(batch * kv_heads, len(tiles))
    dq = torch.empty(batch, heads, q_tokens, d, dtype=wide.dtype)
    dk = torch.zeros(shares, batch, kv_heads, k_tokens, d_padded, dtype=wide.dtype)
    dv = torch.zeros(shares, batch, kv_heads, k_tokens, dv_padded, dtype=wide.dtype)
    dtable = torch.zeros(shares, batch, heads, table.shape[1], d_padded, dtype=wide.dtype)
    rows, keys = table.shape[1] * (table_bias is not None), k_tokens * (key_bias is not None)
    dtable_bias = torch.zeros(shares, batch, heads, rows, dtype=wide.dtype)
    dkey_bias = torch.zeros(shares, batch, heads, keys, dtype=wide.dtype)
    arguments = [
        wide.numpy(), *(flash_host.widened(x).numpy() for x in (k, v, table)),
        *biases(table_bias, key_bias, wide.dtype), wide_dout.numpy(), lse.detach().numpy(),
        shift.numpy(),
        *(x.numpy() for x in (dq, dk, dv, dtable, dtable_bias, dkey_bias)), zero, scale, *see,
        tiles,
    ]  # fmt: skip
    flash_host.run_parts(
        numba_kernels.backward_kernel(flash_host.number_type(wide)), arguments,
        shares * batch * kv_heads, 2 * batch * heads * q_tokens * k_tokens * (2 * d + d_v),
        wide.dtype, numba_kernels.backward_scratch(d_padded, dv_padded),
        flash_host.most_spans_of(k_tokens, see[7], 0),
    )  # fmt: skip
    grad, bias_grad = dtable.sum((0, 1))[..., :d], dtable_bias.sum((0, 1))
    if table.shape[0] == 1:
        grad, bias_grad = grad.sum(0, keepdim=True), bias_grad.sum(0, keepdim=True)
    return (
        dq.to(q.dtype), dk.sum(0)[..., :d].to(k.dtype).contiguous(),
        dv.sum(0)[..., :d_v].to(v.dtype).contiguous(), grad.to(table.dtype).contiguous(),
        bias_grad if rows else bias_grad.new_empty(0),
        dkey_bias.sum(0) if keys else dkey_bias.new_empty(0),
    )  # fmt: skip
