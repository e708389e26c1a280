"""The columns kernels in Triton.

A row that sees nothing has lse -inf. The kernels replace it by +inf, as they do for rows that do
not exist: exp(score - inf) is 0, so such rows need no predicate in the inner loop.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnspec.fast.backend import count_launch
from attnspec.fast.engines.columns.configs import ColumnsConfig, config

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LENGTHS = ["rows", "columns", "tiles", "scale"]


@triton.jit
def _keys(k, start, columns, stride_t, stride_d, d, N: tl.constexpr, D: tl.constexpr):
    """A tile of keys (N, D), 0 beyond the end."""
    token, channel = start + tl.arange(0, N), tl.arange(0, D)
    address = token[:, None].to(tl.int64) * stride_t + channel[None, :] * stride_d
    return tl.load(k + address, mask=(token < columns)[:, None] & (channel < d)[None, :], other=0.0)


@triton.jit
def _queries(q, row, rows, stride_t, stride_d, d, D: tl.constexpr):
    """The queries at `row`, transposed to (D, M), 0 beyond the end."""
    channel = tl.arange(0, D)
    address = row[None, :].to(tl.int64) * stride_t + channel[:, None] * stride_d
    return tl.load(q + address, mask=(row < rows)[None, :] & (channel < d)[:, None], other=0.0)


@triton.jit
def _norms(lse, row, rows):
    """lse in base 2, +inf for rows that see nothing or do not exist."""
    norm = tl.load(lse + row, mask=row < rows, other=float("inf"))
    return tl.where(norm == float("-inf"), float("inf"), norm * LOG2E)


@triton.jit(do_not_specialize=[*LENGTHS, "splits", "chunk"])
def _row_lse(
    q, k, real, out, q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, real_b, real_t,
    kv_heads, group, rows, columns, tiles, splits, chunk, d, scale,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Each program: the rows of a head group, packed, against one chunk of the keys."""
    program = tl.program_id(0)
    split, tile = program % splits, program // splits % tiles
    bh = (program // splits // tiles).to(tl.int64)
    b, kv_head = bh // kv_heads, bh % kv_heads
    packed = tile * M + tl.arange(0, M)
    exists = packed < group * rows
    head, row = kv_head * group + packed // rows, packed % rows
    channel = tl.arange(0, D)
    q += b * q_b
    address = head.to(tl.int64) * q_h + row.to(tl.int64) * q_t
    q_tile = tl.load(
        q + address[:, None] + channel[None, :] * q_d,
        mask=exists[:, None] & (channel < d)[None, :], other=0.0,
    )  # fmt: skip
    k += b * k_b + kv_head * k_h
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    for start in range(split * chunk, tl.minimum(columns, (split + 1) * chunk), N):
        token = start + tl.arange(0, N)
        k_tile = _keys(k, start, columns, k_t, k_d, d, N, D)
        score = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
        seen = (token < columns)[None, :] & exists[:, None]
        if CAUSAL:
            seen = seen & (token[None, :] <= row[:, None] + (columns - rows))
        if MASKED:
            visible = tl.load(real + b * real_b + token * real_t, mask=token < columns, other=0)
            seen = seen & (visible != 0)[None, :]
        score = tl.where(seen, score, float("-inf"))
        best = tl.maximum(top, tl.max(score, axis=1))
        base = tl.where(best == float("-inf"), 0.0, best)
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(score - base[:, None]), axis=1)
        top = best
    safe = tl.where(total > 0, total, 1.0)
    lse = tl.where(total > 0, (top + tl.log2(safe)) * LN2, float("-inf"))
    heads = kv_heads * group
    place = ((b * heads + head) * rows + row) * splits + split
    tl.store(out + place, lse, mask=exists)


@triton.jit(do_not_specialize=[*LENGTHS, "stored"])
def _column_sums(
    q, k, lse, real, out, q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, real_b, real_t,
    kv_heads, group, rows, columns, stored, tiles, d, scale,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Each program: one tile of keys, read once, against all rows of its head group."""
    program = tl.program_id(0)
    tile, bh = program % tiles, (program // tiles).to(tl.int64)
    b, kv_head = bh // kv_heads, bh % kv_heads
    start, shift = tile * N, columns - rows
    token = start + tl.arange(0, N)
    k_tile = _keys(k + b * k_b + kv_head * k_h, start, columns, k_t, k_d, d, N, D)
    first = 0
    if CAUSAL:
        first = tl.maximum(0, start - shift) // M * M
    for g in range(group):
        head = kv_head * group + g
        total = tl.zeros([N], tl.float32)
        line = b * kv_heads * group + head
        for at in range(first, rows, M):
            row = at + tl.arange(0, M)
            q_tile = _queries(q + b * q_b + head * q_h, row, rows, q_t, q_d, d, D)
            norm = _norms(lse + line * rows, row, rows)
            score = tl.dot(k_tile, q_tile, input_precision="ieee")
            weight = tl.exp2(score * scale - norm[None, :])
            if CAUSAL and start + N - 1 > at + shift:
                weight = tl.where(token[:, None] <= row[None, :] + shift, weight, 0.0)
            total += tl.sum(weight, axis=1)
        if MASKED:
            visible = tl.load(real + b * real_b + token * real_t, mask=token < columns, other=0)
            total = tl.where(visible != 0, total, 0.0)
        tl.store(out + line * stored + token, total, mask=token < stored)


@triton.jit(do_not_specialize=[*LENGTHS, "row_tiles"])
def _weight_rows(
    q, k, lse, real, out, q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, real_b, real_t,
    heads, group, rows, columns, row_tiles, tiles, d, scale,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tile, row_tile = program % tiles, program // tiles % row_tiles
    line = (program // tiles // row_tiles).to(tl.int64)
    b, head = line // heads, line % heads
    start, row = tile * N, row_tile * M + tl.arange(0, M)
    token = start + tl.arange(0, N)
    k_tile = _keys(k + b * k_b + head // group * k_h, start, columns, k_t, k_d, d, N, D)
    q_tile = _queries(q + b * q_b + head * q_h, row, rows, q_t, q_d, d, D)
    norm = _norms(lse + line * rows, row, rows)
    score = tl.dot(k_tile, q_tile, input_precision="ieee")
    seen = (token < columns)[:, None] & (row < rows)[None, :]
    real_pair = seen
    if CAUSAL:
        seen = seen & (token[:, None] <= row[None, :] + (columns - rows))
    if MASKED:
        visible = tl.load(real + b * real_b + token * real_t, mask=token < columns, other=0)
        seen = seen & (visible != 0)[:, None]
    weight = tl.where(seen, tl.exp2(score * scale - norm[None, :]), 0.0)
    address = (line * rows + row[None, :]) * columns + token[:, None]
    tl.store(out + address, weight, mask=real_pair)


@triton.jit(do_not_specialize=[*LENGTHS, "row_blocks", "block"])
def _block_max(
    q, k, lse, out, q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d,
    heads, group, rows, columns, row_blocks, tiles, block, d, scale,
    CAUSAL: tl.constexpr, M: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Each program: one block of queries against every block of keys, M x M at a time."""
    program = tl.program_id(0)
    block_row = row_blocks - 1 - program % row_blocks
    line = (program // row_blocks).to(tl.int64)
    b, head = line // heads, line % heads
    shift, offset = columns - rows, tl.arange(0, M)
    q += b * q_b + head * q_h
    k += b * k_b + head // group * k_h
    lse += line * rows
    out += (line * row_blocks + block_row) * tiles
    stop_row = tl.minimum(rows, (block_row + 1) * block)
    for block_column in range(tiles):
        best = tl.full([M], float("-inf"), tl.float32)
        begin = block_column * block
        stop = tl.minimum(columns, begin + block)
        if CAUSAL:
            stop = tl.minimum(stop, stop_row + shift)
        for start in range(begin, stop, M):
            token = start + offset
            k_tile = _keys(k, start, columns, k_t, k_d, d, M, D)
            for at in range(block_row * block, stop_row, M):
                row = at + offset
                q_tile = _queries(q, row, stop_row, q_t, q_d, d, D)
                norm = _norms(lse, row, stop_row)
                score = tl.dot(k_tile, q_tile, input_precision="ieee") * scale - norm[None, :]
                seen = (token < stop)[:, None] & (row < stop_row)[None, :]
                if CAUSAL:
                    seen = seen & (token[:, None] <= row[None, :] + shift)
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
            pooled = pooled / width.to(tl.float32)
        if MEAN:
            result += pooled
        else:
            result = tl.maximum(result, pooled)
    if MEAN:
        result = result / group.to(tl.float32)
    tl.store(out + line * n + place, result.to(out.dtype.element_ty), mask=place < n)


def _tile(size: int, largest: int) -> int:
    """A power of two that the tensor cores accept, no larger than needed."""
    return min(largest, max(16, triton.next_power_of_2(size)))


def _options(plan: ColumnsConfig) -> dict[str, int]:
    return {"num_warps": plan.num_warps, "num_stages": plan.num_stages}


def _mask_arguments(key_mask: Tensor | None, q: Tensor) -> tuple[Any, ...]:
    """The mask as bytes and its strides, or a placeholder that is never read."""
    if key_mask is None:
        return q, 0, 0
    return key_mask.view(torch.uint8), *key_mask.stride()


def _width(d: int) -> int:
    return max(16, triton.next_power_of_2(d))


def row_lse(q: Tensor, k: Tensor, key_mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    batch, heads, rows, d = q.shape
    kv_heads, columns = k.shape[1:3]
    plan, group = config(d, q.dtype), heads // kv_heads
    if not batch * heads * rows * columns:
        return torch.full(q.shape[:3], float("-inf"), dtype=torch.float32, device=q.device)
    M = _tile(group * rows, plan.block_q)
    N = _tile(columns, plan.block_k)
    tiles = triton.cdiv(group * rows, M)
    splits = min(triton.cdiv(plan.programs, batch * kv_heads * tiles), triton.cdiv(columns, 4 * N))
    chunk = triton.cdiv(triton.cdiv(columns, splits), N) * N
    real, *real_strides = _mask_arguments(key_mask, q)
    partial = torch.empty(*q.shape[:3], splits, dtype=torch.float32, device=q.device)
    count_launch()
    _row_lse[(batch * kv_heads * tiles * splits,)](
        q, k, real, partial, *q.stride(), *k.stride(), *real_strides, kv_heads, group, rows,
        columns, tiles, splits, chunk, d, scale * LOG2E.value, CAUSAL=causal,
        MASKED=key_mask is not None, M=M, N=N, D=_width(d), **_options(plan),
    )  # fmt: skip
    return torch.logsumexp(partial, -1)


def column_sums(
    q: Tensor, k: Tensor, lse: Tensor, key_mask: Tensor | None, scale: float, causal: bool,
    columns: int,
) -> Tensor:  # fmt: skip
    batch, heads, rows, d = q.shape
    kv_heads, plan = k.shape[1], config(d, q.dtype)
    out = torch.empty(batch, heads, columns, dtype=torch.float32, device=q.device)
    if not out.numel():
        return out
    M, N = _tile(rows, plan.block_q), _tile(columns, plan.block_k)
    tiles = triton.cdiv(columns, N)
    real, *real_strides = _mask_arguments(key_mask, q)
    count_launch()
    _column_sums[(batch * kv_heads * tiles,)](
        q, k, lse.contiguous(), real, out, *q.stride(), *k.stride(), *real_strides, kv_heads,
        heads // kv_heads, rows, k.shape[2], columns, tiles, d, scale * LOG2E.value,
        CAUSAL=causal, MASKED=key_mask is not None, M=M, N=N, D=_width(d), **_options(plan),
    )  # fmt: skip
    return out


def weight_rows(
    q: Tensor, k: Tensor, lse: Tensor, key_mask: Tensor | None, scale: float, causal: bool
) -> Tensor:
    batch, heads, rows, d = q.shape
    columns, plan = k.shape[2], config(d, q.dtype)
    out = torch.empty(*q.shape[:3], columns, dtype=torch.float32, device=q.device)
    if not out.numel():
        return out
    M, N = _tile(rows, plan.block_q), _tile(columns, plan.block_k)
    row_tiles, tiles = triton.cdiv(rows, M), triton.cdiv(columns, N)
    real, *real_strides = _mask_arguments(key_mask, q)
    count_launch()
    _weight_rows[(batch * heads * row_tiles * tiles,)](
        q, k, lse.contiguous(), real, out, *q.stride(), *k.stride(), *real_strides, heads,
        heads // k.shape[1], rows, columns, row_tiles, tiles, d, scale * LOG2E.value,
        CAUSAL=causal, MASKED=key_mask is not None, M=M, N=N, D=_width(d), **_options(plan),
    )  # fmt: skip
    return out


def block_max(q: Tensor, k: Tensor, lse: Tensor, block: int, scale: float, causal: bool) -> Tensor:
    batch, heads, rows, d = q.shape
    columns, plan = k.shape[2], config(d, q.dtype)
    row_blocks, tiles = triton.cdiv(rows, block), triton.cdiv(columns, block)
    out = torch.empty(batch, heads, row_blocks, tiles, dtype=torch.float32, device=q.device)
    if not out.numel():
        return out
    count_launch()
    _block_max[(batch * heads * row_blocks,)](
        q, k, lse.contiguous(), out, *q.stride(), *k.stride(), heads, heads // k.shape[1], rows,
        columns, row_blocks, tiles, block, d, scale * LOG2E.value, CAUSAL=causal,
        M=_tile(block, min(plan.block_k, plan.block_q)), D=_width(d), **_options(plan),
    )  # fmt: skip
    return out


def smooth(s: Tensor, width: int, kind: str, heads: int, reduce: str) -> Tensor:
    batch, s_heads, n = s.shape
    out = torch.empty(batch, heads, n, dtype=s.dtype, device=s.device)
    if not out.numel():
        return out
    size = min(1024, max(32, triton.next_power_of_2(n)))
    tiles = triton.cdiv(n, size)
    count_launch()
    _smooth[(batch * heads * tiles,)](
        s, out, *s.stride(), heads, s_heads // heads, n, tiles, width,
        AVERAGE=kind == "avg", MEAN=reduce == "mean", N=size, num_warps=4,
    )  # fmt: skip
    return out
