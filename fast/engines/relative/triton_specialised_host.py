"""The relative engine's specialised kernel on the host."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from attnspec.fast.engines import prepared
from attnspec.fast.engines.flash import triton_launch as flash_host
from attnspec.fast.engines.flash.triton_specialised_host import balanced, tiles_of
from attnspec.fast.engines.relative import triton_launch as host
from attnspec.fast.engines.relative.configs import KEYS
from attnspec.fast.engines.relative.triton_specialised import specialised_relative_kernel
from attnspec.fast.engines.sizes import tile_width

NUMBERS = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
UNIT = 4
"""Of float32 numbers: what descriptors address in whole, 16 bytes."""


def numbers_of(bias: Tensor | None, slack: int) -> TensorDescriptor | None:
    """`bias` (..., entries) in float32, `slack` places further on, as many at a time as a tile has
    keys.
    """
    if bias is None:
        return None
    entries = bias.shape[-1]
    lines = bias.view(-1, entries)
    if slack or entries % UNIT:
        lines = torch.nn.functional.pad(lines, (slack, -(slack + entries) % UNIT))
    elif bias.data_ptr() % (UNIT * 4):
        lines = lines.clone()
    return TensorDescriptor(lines, list(lines.shape), list(lines.stride()), [1, KEYS], NUMBERS)


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
    """out (batch, heads, q_tokens, dv) in q's dtype and lse (batch, heads, q_tokens) in float32."""
    batch, heads, q_tokens, d = q.shape
    out = q.new_empty(batch, heads, q_tokens, v.shape[3])
    lse = q.new_empty(batch, heads, q_tokens, dtype=torch.float32)
    chosen = host.choose_config("specialised", q, v)
    walked = k.shape[2] * (2 * d + v.shape[3]) * q.element_size()
    place = host.grid(q_tokens, chosen.rows, batch * heads, walked)
    units = torch.cuda.get_device_properties(q.device).multi_processor_count
    programs = min(units, place["tiles"] * batch * heads)
    if causal and row_start is None:
        place["section"] = balanced(place["tiles"], place["sequences"], place["section"], programs)
    # Chunks of the table begin at zero + base - first - shift - 127, base and first at multiples of
    # four.
    slack = (127 + k.shape[2] - q_tokens - zero) % UNIT
    q, k, v, with_batch = flash_host.readable(q, k, v, table[None])
    prepared.launch(
        specialised_relative_kernel,
        programs,
        q=tiles_of(q, chosen.rows // 2),
        k=tiles_of(k, KEYS),
        v=tiles_of(v, KEYS),
        table=tiles_of(with_batch, KEYS),
        table_bias=numbers_of(table_bias, slack),
        key_bias=numbers_of(key_bias, 0),
        out=out,
        lse=lse,
        row_start=row_start,
        q_tokens=q_tokens,
        k_tokens=k.shape[2],
        **place,
        zero=zero,
        slack=slack,
        scale=scale,
        HEADS=heads,
        GROUP=heads // k.shape[1],
        TABLE_HEADS=table.shape[0],
        DV=v.shape[3],
        WIDTH=tile_width(d, 64),
        WIDTH_V=tile_width(v.shape[3], 64),
        STAGES=chosen.stages,
        CHUNKS=chosen.stages + 1,
        CAUSAL=causal,
        num_warps=chosen.warps // 2,
    )
    return out, lse
