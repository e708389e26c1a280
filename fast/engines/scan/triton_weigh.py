"""Launches that weigh rows by a decay per channel and make the products inside blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnspec.fast.engines.scan.configs import REACH
from attnspec.fast.engines.scan.triton_pairs import pairs_kernel, steep_pairs_kernel
from attnspec.fast.engines.scan.triton_plan import Call, Weighted, odd_programs
from attnspec.fast.engines.sizes import tile_width


def weighted_rows(call: Call) -> Weighted:
    """Room for weighted rows."""
    blocks = call.segments.total * -(-call.segments.length // call.block)
    return Weighted(
        call.rows(call.d, call.dtype),
        call.rows(call.d, call.dtype),
        call.empty(blocks, call.heads, call.d),
        call.rows(call.block, call.dtype),
        call.empty(blocks * call.heads if call.dtype in REACH else 0, dtype=torch.int8),
    )


def weigh(call: Call, q: Tensor, k: Tensor) -> Weighted:
    """Weighted rows and the products inside the blocks under a decay per channel."""
    made = weighted_rows(call)
    if call.dtype in REACH:
        arguments, options = _weighing(call, q, k, made)
        call.recorder.launch(
            pairs_kernel, made.totals.shape[0] * call.heads,
            *arguments, *_place(call, q, k), BC=min(call.cfg.pairs_tile, tile_width(call.d)),
            **options, num_warps=call.cfg.pairs_warps, num_stages=call.cfg.pairs_stages,
        )  # fmt: skip
    weigh_steep(call, q, k, made)
    return made


def weigh_steep(call: Call, q: Tensor, k: Tensor, made: Weighted) -> None:
    """The same for the steep blocks alone, which `made` tells."""
    arguments, options = _weighing(call, q, k, made)
    many = made.totals.shape[0] * call.heads
    span = call.span(many)
    call.recorder.launch(
        steep_pairs_kernel, odd_programs(many, span),
        *arguments, many, span, *_place(call, q, k),
        BC=min(call.cfg.steep_tile, tile_width(call.d)), **options,
        num_warps=call.cfg.steep_warps, num_stages=1,
    )  # fmt: skip


def _weighing(
    call: Call, q: Tensor, k: Tensor, made: Weighted
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The tensors of the kernels that weigh rows, and their constants."""
    assert call.gates is not None
    tensors = (
        q, *q.stride(), k, *k.stride(), call.gates, *call.gates.stride(),
        made.pairs, made.q, made.k, made.totals, made.steep,
    )  # fmt: skip
    return tensors, {
        "D": call.d, "C": call.block, "LEVELS": call.block.bit_length() - 1,
        "REACH": REACH.get(call.dtype, 0.0), "PACKED": call.segments.table is not None,
        **call.layout(q, k, call.gates),
    }  # fmt: skip


def _place(call: Call, q: Tensor, k: Tensor) -> tuple[Any, ...]:
    """Where the blocks lie."""
    groups = (call.heads // q.shape[1], call.heads // k.shape[1])
    return call.table(q), call.scale, *call.place(), *groups
