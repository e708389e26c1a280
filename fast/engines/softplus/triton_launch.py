"""The softplus engine on the host side of Triton: operands, stages, grids and launches."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.engines.flash import triton_launch as flash_host
from attnspec.fast.engines.flash.configs import L2_BYTES, FlashConfig
from attnspec.fast.engines.sizes import tile_width
from attnspec.fast.engines.softplus.configs import config

launch = flash_host.launch
shape_arguments = flash_host.shape_arguments
MOST_MULTIPLIED = 32
"""The largest power that is multiplied out."""


def choose_config(kind: str, q: Tensor, v: Tensor) -> FlashConfig:
    """The configuration of a call."""
    width = tile_width(max(q.shape[3], v.shape[3]))
    return config(kind, flash_host.arch(q), q.element_size(), width, q.shape[2])


def inverse_norms(k: Tensor) -> Tensor:
    """float32 (batch, kv_heads, k_tokens): what makes each key a unit vector."""
    norms = torch.linalg.vector_norm(k, dim=-1, dtype=torch.float32)
    return flash_host.empty_numbers(norms.shape, k.device).copy_(1.0 / norms.clamp(min=1e-12))


def scale_arguments(scales: Tensor | None, keys: int, described: bool) -> dict[str, Any]:
    """The arguments of the keys' scales, if there are any, that are read `keys` at a time."""
    if scales is None:
        return {"key_scales": None, "scales_stride": 0, "DESCRIBED": False}
    operand = flash_host.number_operands(("key_scales",), scales, keys, described)
    return {**operand, "scales_stride": scales.stride(-2)}


def operands(
    q: Tensor, k: Tensor, v: Tensor, chosen: FlashConfig, dout: Tensor | None = None
) -> dict[str, Any]:
    """The arguments of q, k, v and of dout if there is one."""
    q, k, v, *more = flash_host.readable(q, k, v, *(() if dout is None else (dout,)))
    how = flash_host.access(q, k, v, *more)
    return {
        **flash_host.operand("q", q, chosen.rows, how),
        **flash_host.operand("k", k, chosen.keys, how),
        **flash_host.operand("v", v, chosen.keys, how),
        **(flash_host.operand("dout", more[0], chosen.rows, how) if more else {}),
        "q_tokens": q.shape[2],
        "k_tokens": k.shape[2],
        "ACCESS": how,
    }


def rule_arguments(causal: bool, key_mask: Tensor | None, mask: Tensor | None) -> dict[str, Any]:
    """The arguments of who sees whom."""
    mask_strides = (0, 0, 0, 0) if mask is None else mask.stride()
    key_strides = (0, 0) if key_mask is None else key_mask.stride()
    return {
        "mask": mask,
        **{f"mask_stride_{a}": s for a, s in zip("bhqk", mask_strides, strict=True)},
        "key_mask": key_mask,
        **{f"key_mask_stride_{a}": s for a, s in zip("bk", key_strides, strict=True)},
        "CAUSAL": causal,
        "ALL_EDGE": mask is not None,
    }


def key_bounds(key_mask: Tensor | None) -> Tensor | None:
    """The bounds of the kept keys, as the flash engine's plans take them."""
    return None if key_mask is None else flash_host.key_bounds(key_mask)


def stage_arguments(
    q: Tensor, eps: float, power: float, warm: int, second_eps: float, dead: float
) -> dict[str, Any]:
    """The numbers of both stages. Whole powers are compiled in, others go through logarithms."""
    whole = int(power) if power == int(power) and 1 <= power <= MOST_MULTIPLIED else -1
    return {
        "eps": eps,
        "power": power,
        "warm": warm,
        "second_eps": second_eps,
        "dead": dead,
        "row_numbers": math.prod(q.shape[:3]),
        "PRECISE": q.dtype == torch.float32,
        "SHARP": power > 0,
        "WHOLE": whole,
    }


def grid(tokens: int, tile: int, sequences: int, walked_bytes: int) -> dict[str, int]:
    """Tiles, and sections of heads whose walked tokens fit in the L2 cache together."""
    return {
        "tiles": math.ceil(tokens / tile),
        "sequences": sequences,
        "section": min(sequences, max(1, L2_BYTES // max(1, walked_bytes))),
    }
