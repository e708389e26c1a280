"""The relative engine's specialised kernel on the host."""

from __future__ import annotations

import torch
from torch import Tensor

from attnspec.fast.engines import prepared
from attnspec.fast.engines.flash import triton_launch as flash_host
from attnspec.fast.engines.flash.triton_specialised_host import balanced, tiles_of
from attnspec.fast.engines.relative import triton_launch as host
from attnspec.fast.engines.relative.configs import KEYS
from attnspec.fast.engines.relative.triton_specialised import specialised_relative_kernel
from attnspec.fast.engines.sizes import tile_width


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
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
    q, k, v, with_batch = flash_host.readable(q, k, v, table[None])
    prepared.launch(
        specialised_relative_kernel,
        programs,
        q=tiles_of(q, chosen.rows // 2),
        k=tiles_of(k, KEYS),
        v=tiles_of(v, KEYS),
        table=tiles_of(with_batch, KEYS),
        out=out,
        lse=lse,
        row_start=row_start,
        q_tokens=q_tokens,
        k_tokens=k.shape[2],
        **place,
        zero=zero,
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
