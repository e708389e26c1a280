"""The columns kernels in Triton.

A row's norm is its lse, or (RAW) the largest of its raw products together with the sum of
exp(scale * (product - largest)): then no large number is rounded before it cancels. A row that sees
nothing has norm -inf. The kernels replace it by +inf, as they do for rows that do not exist:
exp(score - inf) is 0, so such rows need no predicate in the inner loop.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnspec.fast.engines.columns.configs import ColumnsConfig, config
from attnspec.fast.engines.flash.triton_launch import readable
from attnspec.fast.engines.prepared import launch
from attnspec.fast.engines.sizes import cdiv, next_power_of_2, tile_width

LOG2E = tl.constexpr(1.4426950408889634)
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
def _norms(norm, total, row, rows, RAW: tl.constexpr):
    """Norm (an lse in base 2), +inf for absent rows, and the factor 1 / total if RAW."""
    norm = tl.load(norm + row, mask=row < rows, other=float("inf"))
    norm = tl.where(norm == float("-inf"), float("inf"), norm)
    if RAW:
        divisor = tl.load(total + row, mask=row < rows, other=1.0)
        return norm, 1.0 / tl.where(divisor > 0, divisor, 1.0)
    return norm * LOG2E, norm


@triton.jit
def _weights(product, norm, share, scale, RAW: tl.constexpr):
    """Weights (N, M) of products; `scale` is in base 2."""
    if RAW:
        return tl.exp2((product - norm[None, :]) * scale) * share[None, :]
    return tl.exp2(product * scale - norm[None, :])


@triton.jit
def _seen(
    seen, row, token, shift, real, stride, columns, CAUSAL: tl.constexpr, MASKED: tl.constexpr
):
    """`seen` (M, N) without what the causal rule and the key mask forbid."""
    if CAUSAL:
        seen = seen & (token[None, :] <= row[:, None] + shift)
    if MASKED:
        visible = tl.load(real + token * stride, mask=token < columns, other=0)
        seen = seen & (visible != 0)[None, :]
    return seen


@triton.jit
def _add_tile(product, seen, top, total, scale):
    """Largest product of each row and sum of exp2(scale * (product - largest)), one tile on."""
    product = tl.where(seen, product, float("-inf"))
    best = tl.maximum(top, tl.max(product, axis=1))
    base = tl.where(best == float("-inf"), 0.0, best)
    tile = tl.sum(tl.exp2((product - base[:, None]) * scale), axis=1)
    return best, total * tl.exp2((top - base) * scale) + tile


@triton.jit(do_not_specialize=[*LENGTHS, "splits", "chunk"])
def _row_norms(
    q, k, real, out_top, out_total, q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, real_b, real_t,
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
    stop = tl.minimum(columns, (split + 1) * chunk)
    if CAUSAL:
        stop = tl.minimum(stop, tl.max(tl.where(exists, row, -1), axis=0) + columns - rows + 1)
    for start in range(split * chunk, stop, N):
        token = start + tl.arange(0, N)
        k_tile = _keys(k, start, columns, k_t, k_d, d, N, D)
        product = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        seen = (token < columns)[None, :] & exists[:, None]
        seen = _seen(
            seen, row, token, columns - rows, real + b * real_b, real_t, columns, CAUSAL, MASKED
        )
        top, total = _add_tile(product, seen, top, total, scale)
    place = ((b * kv_heads * group + head) * rows + row) * splits + split
    tl.store(out_top + place, top, mask=exists)
    tl.store(out_total + place, total, mask=exists)


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
            norm, share = _norms(norms + line * rows, totals + line * rows, row, rows, RAW)
            product = tl.dot(k_tile, q_tile, input_precision="ieee")
            weight = _weights(product, norm, share, scale, RAW)
            if CAUSAL and start + N - 1 > at + shift:
                weight = tl.where(token[:, None] <= row[None, :] + shift, weight, 0.0)
            total += tl.sum(weight, axis=1)
        if MASKED:
            visible = tl.load(real + b * real_b + token * real_t, mask=token < columns, other=0)
            total = tl.where(visible != 0, total, 0.0)
        tl.store(out + line * stored + token, total, mask=token < stored)


@triton.jit(do_not_specialize=[*LENGTHS, "row_tiles"])
def _weight_rows(
    q, k, norms, totals, real, out, q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, real_b, real_t,
    heads, group, rows, columns, row_tiles, tiles, d, scale,
    RAW: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tile, row_tile = program % tiles, program // tiles % row_tiles
    line = (program // tiles // row_tiles).to(tl.int64)
    b, head = line // heads, line % heads
    start, row = tile * N, row_tile * M + tl.arange(0, M)
    token = start + tl.arange(0, N)
    k_tile = _keys(k + b * k_b + head // group * k_h, start, columns, k_t, k_d, d, N, D)
    q_tile = _queries(q + b * q_b + head * q_h, row, rows, q_t, q_d, d, D)
    norm, share = _norms(norms + line * rows, totals + line * rows, row, rows, RAW)
    product = tl.dot(k_tile, q_tile, input_precision="ieee")
    real_pair = (row < rows)[:, None] & (token < columns)[None, :]
    seen = _seen(
        real_pair, row, token, columns - rows, real + b * real_b, real_t, columns, CAUSAL, MASKED
    )
    weight = tl.trans(_weights(product, norm, share, scale, RAW))
    address = (line * rows + row[:, None]) * columns + token[None, :]
    tl.store(out + address, tl.where(seen, weight, 0.0), mask=real_pair)


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
    q_tile = tl.trans(_queries(q + b * q_b + head * q_h, row, stop_row, q_t, q_d, d, D))
    k += b * k_b + head // group * k_h
    stop = columns
    if CAUSAL:
        stop = tl.minimum(columns, tl.minimum(stop_row, block_row * block + part * M + M) + shift)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    for start in range(0, stop, N):
        token = start + tl.arange(0, N)
        k_tile = _keys(k, start, columns, k_t, k_d, d, N, D)
        product = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        seen = (token < columns)[None, :] & exists[:, None]
        seen = _seen(seen, row, token, shift, k, 0, columns, CAUSAL, False)
        top, total = _add_tile(product, seen, top, total, scale)
    norm = tl.where(top == float("-inf"), float("inf"), top)
    rest = tl.log2(tl.where(total > 0, total, 1.0))
    out += ((line * row_blocks + block_row) * parts + part) * tiles
    for block_column in range(tiles):
        best = tl.full([M], float("-inf"), tl.float32)
        begin = block_column * block
        for start in range(begin, tl.minimum(stop, begin + block), N):
            token = start + tl.arange(0, N)
            k_tile = _keys(k, start, columns, k_t, k_d, d, N, D)
            product = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
            score = (product - norm[:, None]) * scale - rest[:, None]
            seen = (token < tl.minimum(columns, begin + block))[None, :] & exists[:, None]
            seen = _seen(seen, row, token, shift, k, 0, columns, CAUSAL, False)
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


def _tile(size: int, largest: int) -> int:
    """A power of two that the tensor cores accept, no larger than needed."""
    return min(largest, max(16, next_power_of_2(size)))


def _options(plan: ColumnsConfig) -> dict[str, int]:
    return {"num_warps": plan.num_warps, "num_stages": plan.num_stages}


def _mask_arguments(key_mask: Tensor | None, q: Tensor) -> tuple[Any, ...]:
    """The mask as bytes and its strides, or a placeholder that is never read."""
    if key_mask is None:
        return q, 0, 0
    return key_mask.view(torch.uint8), *key_mask.stride()


def partial_norms(
    q: Tensor, k: Tensor, key_mask: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Largest products and sums relative to them (batch, heads, rows, splits of the keys)."""
    (batch, heads, rows, d), (kv_heads, columns) = q.shape, k.shape[1:3]
    plan, group = config(d, q.dtype), heads // kv_heads
    M = _tile(group * rows, plan.block_q)
    N = _tile(columns, plan.block_k)
    tiles = cdiv(group * rows, M)
    splits = min(cdiv(plan.programs, batch * kv_heads * tiles), cdiv(columns, 4 * N))
    chunk = cdiv(cdiv(columns, splits), N) * N
    real, *real_strides = _mask_arguments(key_mask, q)
    top, total = torch.empty(2, *q.shape[:3], splits, dtype=torch.float32, device=q.device)
    launch(
        _row_norms, batch * kv_heads * tiles * splits,
        q, k, real, top, total, *q.stride(), *k.stride(), *real_strides, kv_heads, group, rows,
        columns, tiles, splits, chunk, d, scale * LOG2E.value, CAUSAL=causal,
        MASKED=key_mask is not None, M=M, N=N, D=tile_width(d), **_options(plan),
    )  # fmt: skip
    return top, total


def row_norms(
    q: Tensor, k: Tensor, key_mask: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    if not q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]:
        total = torch.zeros(q.shape[:3], dtype=torch.float32, device=q.device)
        return total - float("inf"), total
    q, k = readable(q, k)
    top, total = partial_norms(q, k, key_mask, scale, causal)
    best = top.amax(-1)
    base = best.masked_fill(best == float("-inf"), 0)[..., None]
    return best, (total * torch.exp((top - base) * scale)).sum(-1)


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
    M, N = _tile(rows, plan.block_q), _tile(columns, plan.block_k)
    tiles = cdiv(columns, N)
    real, *real_strides = _mask_arguments(key_mask, q)
    raw, norm = total is not None, norm.contiguous()
    total = norm if total is None else total.contiguous()
    launch(
        _column_sums, batch * kv_heads * tiles,
        q, k, norm, total, real, out, *q.stride(), *k.stride(), *real_strides, kv_heads,
        heads // kv_heads, rows, k.shape[2], columns, tiles, d, scale * LOG2E.value,
        RAW=raw, CAUSAL=causal, MASKED=key_mask is not None, M=M, N=N, D=tile_width(d),
        **_options(plan),
    )  # fmt: skip
    return out


def weight_rows(
    q: Tensor, k: Tensor, norm: Tensor, total: Tensor | None, key_mask: Tensor | None,
    scale: float, causal: bool,
) -> Tensor:  # fmt: skip
    batch, heads, rows, d = q.shape
    columns, plan = k.shape[2], config(d, q.dtype)
    out = torch.empty(*q.shape[:3], columns, dtype=torch.float32, device=q.device)
    if not out.numel():
        return out
    q, k = readable(q, k)
    M, N = _tile(rows, plan.block_q), _tile(columns, plan.block_k)
    row_tiles, tiles = cdiv(rows, M), cdiv(columns, N)
    real, *real_strides = _mask_arguments(key_mask, q)
    raw, norm = total is not None, norm.contiguous()
    total = norm if total is None else total.contiguous()
    launch(
        _weight_rows, batch * heads * row_tiles * tiles,
        q, k, norm, total, real, out, *q.stride(), *k.stride(), *real_strides, heads,
        heads // k.shape[1], rows, columns, row_tiles, tiles, d, scale * LOG2E.value,
        RAW=raw, CAUSAL=causal, MASKED=key_mask is not None, M=M, N=N, D=tile_width(d),
        **_options(plan),
    )  # fmt: skip
    return out


def block_max(q: Tensor, k: Tensor, block: int, scale: float, causal: bool) -> Tensor:
    batch, heads, rows, d = q.shape
    columns, plan = k.shape[2], config(d, q.dtype)
    row_blocks, tiles = cdiv(rows, block), cdiv(columns, block)
    M, N = _tile(block, plan.block_q), _tile(block, plan.block_k)
    parts = cdiv(block, M)
    out = torch.empty(batch, heads, row_blocks, parts, tiles, dtype=torch.float32, device=q.device)
    if out.numel():
        q, k = readable(q, k)
        launch(
            _block_max, batch * heads * row_blocks * parts,
            q, k, out, *q.stride(), *k.stride(), heads, heads // k.shape[1], rows, columns,
            row_blocks, tiles, block, parts, d, scale * LOG2E.value, CAUSAL=causal, M=M, N=N,
            D=tile_width(d), **_options(plan),
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
