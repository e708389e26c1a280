"""Whole rows of weights, their largest ones, and the values of these, in Triton: four launches."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnspec.fast.engines.columns.configs import config
from attnspec.fast.engines.columns.triton_rows import PARTS, partial_norms
from attnspec.fast.engines.columns.triton_tiles import (
    LOG2E,
    group_rows,
    joined_norms,
    load_keys,
    load_rows,
    mask_arguments,
    options,
    seen_pairs,
    tile_size,
)
from attnspec.fast.engines.flash.triton_launch import readable
from attnspec.fast.engines.prepared import launch
from attnspec.fast.engines.select.triton_top_k import top_k
from attnspec.fast.engines.sizes import cdiv, tile_width

VALUES = 32
"""Rows of v that are summed at a time."""


@triton.jit(do_not_specialize=["rows", "columns", "row_tiles", "tiles", "splits", "scale"])
def _packed_weights(
    q, k, tops, totals, real, out, q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, real_b, real_t,
    kv_heads, group, rows, columns, row_tiles, tiles, splits, d, scale,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Weights (rows of a head group, packed) of one tile of keys, which is read once.

    The products are those of the pass that took the norms, so that a weight of 1 comes out as 1.
    """
    program = tl.program_id(0)
    tile, row_tile = program % tiles, program // tiles % row_tiles
    bh = (program // tiles // row_tiles).to(tl.int64)
    b, kv_head = bh // kv_heads, bh % kv_heads
    exists, head, row = group_rows(row_tile, kv_head, group, rows, M)
    line = (b * kv_heads * group + head) * rows + row
    top, total = joined_norms(tops, totals, line, exists, splits, scale, PARTS)
    norm = tl.where(top == float("-inf"), float("inf"), top)
    share = 1.0 / tl.where(total > 0, total, 1.0)
    address = b * q_b + head.to(tl.int64) * q_h + row.to(tl.int64) * q_t
    q_tile = load_rows(q, address, exists, q_d, d, D)
    token = tile * N + tl.arange(0, N)
    k_tile = load_keys(k + b * k_b + kv_head * k_h, tile * N, columns, k_t, k_d, d, N, D)
    product = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
    weight = tl.exp2((product - norm[:, None]) * scale) * share[:, None]
    pair = exists[:, None] & (token < columns)[None, :]
    seen = seen_pairs(
        pair, row, token, columns - rows, real + b * real_b, real_t, columns, CAUSAL, MASKED
    )
    tl.store(out + line[:, None] * columns + token[None, :], tl.where(seen, weight, 0.0), mask=pair)


@triton.jit(do_not_specialize=["rows", "columns", "chosen"])
def _selected(
    weights, index, v, out, v_b, v_h, v_t, v_d, heads, group, rows, columns, chosen, dv,
    RENORMALISE: tl.constexpr, N: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """The weighted sum of a row's chosen values; those of weight 0 are not looked at."""
    line = tl.program_id(0).to(tl.int64)
    b, head = line // rows // heads, line // rows % heads
    v += b * v_b + head // group * v_h
    value = tl.arange(0, DV)
    total = tl.zeros([DV], tl.float32)
    kept = 0.0
    for start in range(0, chosen, N):
        place = start + tl.arange(0, N)
        key = tl.load(index + line * chosen + place, mask=place < chosen, other=0).to(tl.int64)
        weight = tl.load(weights + line * columns + key, mask=place < chosen, other=0.0)
        read = (weight != 0.0)[:, None] & (value < dv)[None, :]
        v_rows = tl.load(v + key[:, None] * v_t + value[None, :] * v_d, mask=read, other=0.0)
        total += tl.sum(weight[:, None] * v_rows.to(tl.float32), 0)
        kept += tl.sum(weight, 0)
    if RENORMALISE:
        total = total / tl.where(kept == 0.0, 1.0, kept)
    tl.store(out + line * dv + value, total.to(out.dtype.element_ty), mask=value < dv)


def selected(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, c: int, scale: float, causal: bool,
    renormalise: bool,
) -> Tensor:  # fmt: skip
    """Outputs (batch, heads, rows, dv) from the values of each row's c heaviest keys."""
    batch, heads, rows, d = q.shape
    (kv_heads, columns), dv = k.shape[1:3], v.shape[3]
    lines = batch * heads * rows
    if not (lines and columns and dv):
        return torch.zeros(batch, heads, rows, dv, dtype=v.dtype, device=v.device)
    q, k = readable(q, k)
    plan, group = config(d, q.dtype, few=True), heads // kv_heads
    top, total = partial_norms(q, k, key_mask, scale, causal)
    M, N = tile_size(group * rows, plan.block_q), tile_size(columns, plan.block_k)
    row_tiles, tiles = cdiv(group * rows, M), cdiv(columns, N)
    real, *real_strides = mask_arguments(key_mask, q)
    weights = torch.empty(batch, heads, rows, columns, dtype=torch.float32, device=q.device)
    launch(
        _packed_weights, batch * kv_heads * row_tiles * tiles,
        q, k, top, total, real, weights, *q.stride(), *k.stride(), *real_strides, kv_heads, group,
        rows, columns, row_tiles, tiles, top.shape[3], d, scale * LOG2E.value, CAUSAL=causal,
        MASKED=key_mask is not None, M=M, N=N, D=tile_width(d), PARTS=PARTS, **options(plan),
    )  # fmt: skip
    index = top_k(weights, c, torch.int32)
    out = torch.empty(batch, heads, rows, dv, dtype=v.dtype, device=v.device)
    launch(
        _selected, lines,
        weights, index, v, out, *v.stride(), heads, heads // v.shape[1], rows, columns, c, dv,
        RENORMALISE=renormalise, N=VALUES, DV=tile_width(dv), num_warps=4,
    )  # fmt: skip
    return out
