"""The decode engine in Triton: what a call launches.

Both grids depend on the launch alone, never on the lengths, which only the device reads.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import triton
from torch import Tensor

from attnspec.fast.backend import count_launch
from attnspec.fast.engines.decode.configs import config
from attnspec.fast.engines.decode.triton_kernels import attend_kernel, merge_kernel

LOG2E = 1 / math.log(2)


@cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of `device`; the interpreter counts as four."""
    if device.type == "cpu":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def _architecture(device: torch.device) -> int:
    if device.type == "cpu":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _strides(x: Tensor) -> tuple[int, ...]:
    """Strides of `x`, 0 along an axis of one element, whose stride means nothing."""
    return tuple(s if n > 1 else 0 for n, s in zip(x.shape, x.stride(), strict=True))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    index: Tensor | None,
    block_table: Tensor | None,
    bias: Tensor | None,
    sink_logit: Tensor | None,
    scale: float,
    causal: bool,
    page: int,
    rows: int,
    tile: int,
    workers: int,
    paired: bool,
) -> tuple[Tensor, Tensor]:
    """out (B, H, Tq, dv) and lse (B, H, Tq); the arguments of `op.decode`, checked.

    `rows`, `tile` and `workers` are 0 where the configuration decides.
    """
    batch, heads, q_tokens, d = q.shape
    kv_heads, dv = k.shape[1], v.shape[3]
    pool = 0 if block_table is None else k.shape[2]
    k_tokens = k.shape[2] if block_table is None else block_table.shape[1] * pool
    chosen = 0 if index is None else index.shape[2] * page
    out = torch.empty((batch, heads, q_tokens, dv), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, q_tokens), dtype=torch.float32, device=q.device)
    if lse.numel() == 0:
        return out, lse

    if index is not None and index.stride(2) != 1:
        index = index.contiguous()
    if block_table is not None and block_table.stride(1) != 1:
        block_table = block_table.contiguous()
    if lengths is not None:
        lengths = lengths.contiguous()
    if sink_logit is not None:
        sink_logit = sink_logit.contiguous()
    dp, dvp = max(16, triton.next_power_of_2(d)), max(16, triton.next_power_of_2(dv))
    group = heads // kv_heads
    packed = group * q_tokens
    indirect = index is not None or block_table is not None
    settings = config(
        _architecture(q.device), q.element_size(), max(dp, dvp), packed, indirect, rows, tile
    )
    rows = min(packed, settings.rows)
    workers = workers or settings.workers * _processors(q.device)
    causal = causal and q_tokens > 1
    blocks = triton.cdiv(packed, rows)
    per_head = lengths is not None and lengths.dim() == 2
    alone = batch == 1 and not (per_head and kv_heads > 1)
    uniform = index is not None or ((lengths is None or alone) and (not causal or blocks == 1))
    k_strides, v_strides = _strides(k), _strides(v)
    unit = 8 if all(s % 8 == 0 for s in (*k_strides[:3], *v_strides[:3])) else 1
    outputs = batch * blocks * (kv_heads if per_head else 1)
    span = next((size for size in (32, 256) if outputs <= size), 1024)
    scratch = torch.empty(
        2 * workers * rows * (dv + 2) + 2 * workers, dtype=torch.float32, device=q.device
    )
    flags = {
        "GROUP": group,
        "N": settings.tile,
        "DV": dv,
        "DVP": dvp,
        "CAUSAL": causal,
        "PAIRED": paired,
        "PER_HEAD": per_head,
        "GATHERED": index is not None,
    }
    sizes = (batch, kv_heads, q_tokens, k_tokens, chosen, rows)
    with torch.cuda.device_of(q):
        count_launch()
        attend_kernel[(workers,)](
            q, k, v, out, lse, scratch, lengths, index, block_table, bias, sink_logit,
            scale * LOG2E,
            *q.stride(), *(s // unit for s in k_strides[:3]), k.stride(3),
            *(s // unit for s in v_strides[:3]), v.stride(3),
            *(bias.stride() if bias is not None else (0, 0, 0)),
            *(index.stride()[:2] if index is not None else (0, 0)),
            block_table.stride(0) if block_table is not None else 0,
            *sizes, k.shape[0],
            M=max(16, triton.next_power_of_2(rows)), D=d, DP=dp,
            PAGE=page, POOL=pool, UNIT=unit, ADJACENT=k.stride(3) == 1 and v.stride(3) == 1,
            UNIFORM=uniform, SPAN=span, **flags,
            num_warps=settings.warps, num_stages=settings.stages,
        )  # fmt: skip
        count_launch()
        merge_kernel[(workers, rows)](
            out, lse, scratch, lengths, sink_logit, *sizes, PARTS=16, **flags, num_warps=4
        )
    return out, lse
