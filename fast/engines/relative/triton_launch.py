"""The relative engine on the host side of Triton: operands, grids and launches."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from attnspec.fast.engines import prepared
from attnspec.fast.engines.flash import triton_launch as flash_host
from attnspec.fast.engines.flash.configs import L2_BYTES
from attnspec.fast.engines.relative.configs import KEYS, RelativeConfig, config, specialises
from attnspec.fast.engines.sizes import tile_width

operand = flash_host.operand
access = flash_host.access
aligned = flash_host.aligned


def choose_config(kind: str, q: Tensor, v: Tensor) -> RelativeConfig:
    """The configuration of a call."""
    width = tile_width(max(q.shape[3], v.shape[3]))
    return config(kind, flash_host.arch(q), q.element_size(), width, q.shape[2])


def can_specialise(q: Tensor, v: Tensor) -> bool:
    """Whether the specialised kernel, which is for Hopper, takes a call."""
    narrow = q.element_size() == 2 and max(q.shape[3], v.shape[3]) <= flash_host.SPECIALISED_WIDTH
    hopper = q.is_cuda and flash_host.arch(q) == 90 and flash_host.SPEAKS_GLUON
    return narrow and hopper and specialises(q.shape[2])


def inputs(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, chosen: RelativeConfig, *more: Tensor
) -> dict[str, Any]:
    """The arguments of the operands: q, k, v, the table as (1, heads, rows, d), and dout if any."""
    q, k, v, with_batch, *rest = flash_host.readable(q, k, v, table[None], *more)
    how = access(q, k, v, with_batch, *rest)
    return {
        **operand("q", q, chosen.rows, how),
        **operand("k", k, KEYS, how),
        **operand("v", v, KEYS, how),
        **operand("table", with_batch, KEYS, how),
        **(operand("dout", rest[0], chosen.rows, how) if rest else {}),
        "ACCESS": how,
        "TABLE_HEADS": table.shape[0],
        "table_rows": table.shape[1],
    }


def shared_arguments(
    q: Tensor, k: Tensor, v: Tensor, chosen: RelativeConfig, zero: int, scale: float, causal: bool
) -> dict[str, Any]:
    """Sizes and rules every kernel takes."""
    sizes = flash_host.shape_arguments(q, k, v, flash_host.FlashConfig(chosen.rows, KEYS, 0, 0))
    del sizes["KEYS"]
    return {
        **sizes,
        "q_tokens": q.shape[2],
        "k_tokens": k.shape[2],
        "zero": zero,
        "scale": scale,
        "CAUSAL": causal,
    }


def grid(tokens: int, tile: int, sequences: int, walked_bytes: int) -> dict[str, int]:
    """Tiles, and sections of heads whose walked tokens fit in the L2 cache together."""
    return {
        "tiles": math.ceil(tokens / tile),
        "sequences": sequences,
        "section": min(sequences, max(1, L2_BYTES // max(1, walked_bytes))),
    }


def launch(kernel: Any, programs: int, chosen: RelativeConfig, arguments: dict[str, Any]) -> None:
    """Start `programs` programs, unless there are none."""
    prepared.launch(kernel, programs, **arguments, num_warps=chosen.warps, num_stages=chosen.stages)
