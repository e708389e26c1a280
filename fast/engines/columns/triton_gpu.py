"""The columns kernels of many rows in Triton, and the entry points of the engine on a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnspec.fast.engines.columns.configs import config
from attnspec.fast.engines.columns.triton_rows import row_norms, sums_of_few, weight_rows
from attnspec.fast.engines.columns.triton_tiles import (
    LOG2E,
    add_tile,
    load_keys,
    load_norms,
    load_queries,
    mask_arguments,
    options,
    seen_pairs,
    tile_size,
    weights_of,
)
from attnspec.fast.engines.flash.triton_launch import readable
from attnspec.fast.engines.prepared import launch
from attnspec.fast.engines.sizes import cdiv, next_power_of_2, tile_width

__all__ = ["block_max", "column_sums", "row_norms", "smooth", "weight_rows"]

LENGTHS = ["rows", "columns", "tiles", "scale"]


@triton.jit(do_not_specialize=[*LENGTHS, "stored"])
def _column_sums(
    q, k, norms, totals, real, out, q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, real_b, real_t,
    kv_heads, group, rows, columns, stored, tiles, d, scale,
    RAW: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Each program: one tile of keys, read once, against all rows of its head group."""
    program = tl.program_id(0)
    tile, bh = program % tiles, (program // tiles).to(tl.int64)
    b, kv_head = bh // kv_heads, bh % kv_heads
    start, shift = tile * N, columns - rows
    token = start + tl.arange(0, N)
    k_tile = load_keys(k + b * k_b + kv_head * k_h, start, columns, k_t, k_d, d, N, D)
    first = 0
    if CAUSAL:
        first = tl.maximum(0, start - shift) // M * M
    for g in range(group):
        head = kv_head * group + g
        total = tl.zeros([N], tl.float32)
        line = b * kv_heads * group + head
        for at in range(first, rows, M):
            row = at + tl.arange(0, M)
            q_tile = load_queries(q + b * q_b + head * q_h, row, rows, q_t, q_d, d, D)
            norm, share = load_norms(norms, totals, line * rows + row, row < rows, RAW)
            product = tl.dot(k_tile, q_tile, input_precision="ieee")
            weight = weights_of(product, norm[None, :], share[None, :], scale, RAW)
            if CAUSAL and start + N - 1 > at + shift:
                weight = tl.where(token[:, None] <= row[None, :] + shift, weight, 0.0)
            total += tl.sum(weight, axis=1)
        if MASKED:
            visible = tl.load(real + b * real_b + token * real_t, mask=token < columns, other=0)
            total = tl.where(visible != 0, total, 0.0)
        tl.store(out + line * stored + token, total, mask=token < stored)


@triton.jit(do_not_specialize=[*LENGTHS, "row_blocks", "block", "parts"])
def _block_max(
    q, k, out, q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d,
    heads, group, rows, columns, row_blocks, tiles, block, parts, d, scale,
    CAUSAL: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Each program: M rows of a block of queries, first for their norms, then block by block."""
    program = tl.program_id(0)
    part, block_row = program % parts, row_blocks - 1 - program // parts % row_blocks
    line = (program // parts // row_blocks).to(tl.int64)
    b, head = line // heads, line % heads
    shift = columns - rows
    stop_row = tl.minimum(rows, (block_row + 1) * block)
    row = block_row * block + part * M + tl.arange(0, M)
    exists = row < stop_row
    q_tile = tl.trans(load_queries(q + b * q_b + head * q_h, row, stop_row, q_t, q_d, d, D))
    k += b * k_b + head // group * k_h
    stop = columns
    if CAUSAL:
        stop = tl.minimum(columns, tl.minimum(stop_row, block_row * block + part * M + M) + shift)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    for start in range(0, stop, N):
        token = start + tl.arange(0, N)
        k_tile = load_keys(k, start, columns, k_t, k_d, d, N, D)
        product = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        seen = (token < columns)[None, :] & exists[:, None]
        seen = seen_pairs(seen, row, token, shift, k, 0, columns, CAUSAL, False)
        top, total = add_tile(product, seen, top, total, scale)
    norm = tl.where(top == float("-inf"), float("inf"), top)
    rest = tl.log2(tl.where(total > 0, total, 1.0))
    out += ((line * row_blocks + block_row) * parts + part) * tiles
    for block_column in range(tiles):
        best = tl.full([M], float("-inf"), tl.float32)
        begin = block_column * block
        for start in range(begin, tl.minimum(stop, begin + block), N):
            token = start + tl.arange(0, N)
            k_tile = load_keys(k, start, columns, k_t, k_d, d, N, D)
            product = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
            score = (product - norm[:, None]) * scale - rest[:, None]
            seen = (token < tl.minimum(columns, begin + block))[None, :] & exists[:, None]
            seen = seen_pairs(seen, row, token, shift, k, 0, columns, CAUSAL, False)
            best = tl.maximum(best, tl.max(tl.where(seen, score, float("-inf")), axis=1))
        tl.store(out + block_column, tl.exp2(tl.max(best, axis=0)))


@triton.jit(do_not_specialize=["n", "tiles", "width"])
def _smooth(
    s, out, s_b, s_h, s_n, heads, group, n, tiles, width,
    AVERAGE: tl.constexpr, MEAN: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tile, line = program % tiles, (program // tiles).to(tl.int64)
    b, h = line // heads, line % heads
    place = tile * N + tl.arange(0, N)
    result = tl.full([N], 0.0 if MEAN else float("-inf"), tl.float32)
    for g in range(group):
        row = s + b * s_b + (h * group + g) * s_h
        pooled = tl.full([N], 0.0 if AVERAGE else float("-inf"), tl.float32)
        for step in range(width):
            at = place + (step - width // 2)
            inside = (at >= 0) & (at < n)
            value = tl.load(row + at.to(tl.int64) * s_n, mask=inside, other=0.0).to(tl.float32)
            if AVERAGE:
                pooled += value
            else:
                pooled = tl.maximum(pooled, tl.where(inside, value, float("-inf")))
        if AVERAGE:
            pooled = pooled / width
        if MEAN:
            result += pooled
        else:
            result = tl.maximum(result, pooled)
    if MEAN:
        result = result / group
    tl.store(out + line * n + place, result.to(out.dtype.element_ty), mask=place < n)


def column_sums(
    q: Tensor, k: Tensor, norm: Tensor, total: Tensor | None, key_mask: Tensor | None,
    scale: float, causal: bool, columns: int,
) -> Tensor:  # fmt: skip
    batch, heads, rows, d = q.shape
    kv_heads, plan = k.shape[1], config(d, q.dtype)
    out = torch.empty(batch, heads, columns, dtype=torch.float32, device=q.device)
    if not out.numel():
        return out
    q, k = readable(q, k)
    raw, norm = total is not None, norm.contiguous()
    total = norm if total is None else total.contiguous()
    if rows <= config(d, q.dtype, few=True).block_q:
        sums_of_few(q, k, norm, total, raw, key_mask, out, scale, causal)
        return out
    M, N = plan.block_q, tile_size(columns, plan.block_k)
    tiles = cdiv(columns, N)
    real, *real_strides = mask_arguments(key_mask, q)
    launch(
        _column_sums, batch * kv_heads * tiles,
        q, k, norm, total, real, out, *q.stride(), *k.stride(), *real_strides, kv_heads,
        heads // kv_heads, rows, k.shape[2], columns, tiles, d, scale * LOG2E.value,
        RAW=raw, CAUSAL=causal, MASKED=key_mask is not None, M=M, N=N, D=tile_width(d),
        **options(plan),
    )  # fmt: skip
    return out


def block_max(q: Tensor, k: Tensor, block: int, scale: float, causal: bool) -> Tensor:
    batch, heads, rows, d = q.shape
    columns, plan = k.shape[2], config(d, q.dtype)
    row_blocks, tiles = cdiv(rows, block), cdiv(columns, block)
    M, N = tile_size(block, plan.block_q), tile_size(block, plan.block_k)
    parts = cdiv(block, M)
    out = torch.empty(batch, heads, row_blocks, parts, tiles, dtype=torch.float32, device=q.device)
    if out.numel():
        q, k = readable(q, k)
        launch(
            _block_max, batch * heads * row_blocks * parts,
            q, k, out, *q.stride(), *k.stride(), heads, heads // k.shape[1], rows, columns,
            row_blocks, tiles, block, parts, d, scale * LOG2E.value, CAUSAL=causal, M=M, N=N,
            D=tile_width(d), **options(plan),
        )  # fmt: skip
    return out.amax(3)


def smooth(s: Tensor, width: int, kind: str, heads: int, reduce: str) -> Tensor:
    batch, s_heads, n = s.shape
    out = torch.empty(batch, heads, n, dtype=s.dtype, device=s.device)
    if not out.numel():
        return out
    size = min(1024, max(32, next_power_of_2(n)))
    tiles = cdiv(n, size)
    launch(
        _smooth, batch * heads * tiles,
        s, out, *s.stride(), heads, s_heads // heads, n, tiles, width,
        AVERAGE=kind == "avg", MEAN=reduce == "mean", N=size, num_warps=4,
    )  # fmt: skip
    return out
