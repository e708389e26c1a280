"""The columns kernels of a few rows in Triton: the rows stay on chip, and the keys pass by.

A program has the rows of one head, or of several heads of a group, and a stretch of the keys, whose
tiles are loaded ahead. Tiles that every row sees whole have no predicate.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnspec.fast.engines.columns.configs import ColumnsConfig, config
from attnspec.fast.engines.columns.triton_tiles import (
    LOG2E,
    add_tile,
    group_rows,
    joined_norms,
    load_keys,
    load_norms,
    load_rows,
    mask_arguments,
    options,
    seen_pairs,
    tile_size,
    weights_of,
)
from attnspec.fast.engines.flash.triton_launch import readable
from attnspec.fast.engines.prepared import launch
from attnspec.fast.engines.sizes import cdiv, next_power_of_2, tile_width

STRETCHES = ["rows", "columns", "splits", "chunk", "scale"]
PARTS = 32
"""Splits of the keys whose norms are joined at a time."""


@triton.jit
def _clear_end(
    begin, stop, row, exists, rows, shift, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """Where the tiles from `begin` on end that lie before `stop` and that all rows see whole."""
    clear = stop
    if CAUSAL:
        first = tl.min(tl.where(exists, row, rows), axis=0)
        clear = tl.minimum(stop, first + shift + 1)
    if MASKED:
        clear = begin
    return begin + tl.maximum(clear - begin, 0) // N * N


@triton.jit(do_not_specialize=[*STRETCHES, "tiles"])
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
    exists, head, row = group_rows(tile, kv_head, group, rows, M)
    shift = columns - rows
    address = b * q_b + head.to(tl.int64) * q_h + row.to(tl.int64) * q_t
    q_tile = load_rows(q, address, exists, q_d, d, D)
    k += b * k_b + kv_head * k_h
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    begin, stop = split * chunk, tl.minimum(columns, (split + 1) * chunk)
    if CAUSAL:
        stop = tl.minimum(stop, tl.max(tl.where(exists, row, -1), axis=0) + shift + 1)
    clear = _clear_end(begin, stop, row, exists, rows, shift, CAUSAL, MASKED, N)
    for start in range(begin, clear, N):
        k_tile = load_keys(k, start, columns, k_t, k_d, d, N, D)
        product = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        top, total = add_tile(product, None, top, total, scale)
    for start in range(clear, stop, N):
        token = start + tl.arange(0, N)
        k_tile = load_keys(k, start, columns, k_t, k_d, d, N, D)
        product = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        seen = (token < columns)[None, :] & exists[:, None]
        seen = seen_pairs(
            seen, row, token, shift, real + b * real_b, real_t, columns, CAUSAL, MASKED
        )
        top, total = add_tile(product, seen, top, total, scale)
    place = ((b * kv_heads * group + head) * rows + row) * splits + split
    tl.store(out_top + place, top, mask=exists)
    tl.store(out_total + place, total, mask=exists)


@triton.jit(do_not_specialize=["lines", "splits", "scale"])
def _join_norms(
    tops, totals, top, total, lines, splits, scale, L: tl.constexpr, PARTS: tl.constexpr
):
    """The norms of L rows from those that the splits of the keys have left."""
    line = tl.program_id(0).to(tl.int64) * L + tl.arange(0, L)
    best, sums = joined_norms(tops, totals, line, line < lines, splits, scale, PARTS)
    tl.store(top + line, best, mask=line < lines)
    tl.store(total + line, sums, mask=line < lines)


@triton.jit(do_not_specialize=[*STRETCHES, "stored", "parts"])
def _sums_of_few(
    q, k, norms, totals, real, out, q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, real_b, real_t,
    kv_heads, group, rows, columns, stored, parts, splits, chunk, d, scale,
    RAW: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    G: tl.constexpr, R: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Each program: all rows of G heads of a group against one chunk of the keys."""
    program = tl.program_id(0)
    part, split = program % parts, program // parts % splits
    bh = (program // parts // splits).to(tl.int64)
    b, kv_head = bh // kv_heads, bh % kv_heads
    packed = tl.arange(0, G * R)
    local, row = part * G + packed // R, packed % R
    exists = (local < group) & (row < rows)
    line = (b * kv_heads + kv_head) * group + local
    address = b * q_b + (kv_head * group + local) * q_h + row.to(tl.int64) * q_t
    q_tile = load_rows(q, address, exists, q_d, d, D)
    norm, share = load_norms(norms, totals, line * rows + row, exists, RAW)
    own = part * G + tl.arange(0, G)
    out += ((b * kv_heads + kv_head) * group + own) * stored
    k += b * k_b + kv_head * k_h
    shift = columns - rows
    begin, stop = split * chunk, tl.minimum(stored, (split + 1) * chunk)
    clear = _clear_end(begin, stop, row, exists, rows, shift, CAUSAL, MASKED, N)
    for start in range(begin, clear, N):
        token = start + tl.arange(0, N)
        k_tile = load_keys(k, start, columns, k_t, k_d, d, N, D)
        product = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
        weight = weights_of(product, norm[None, :], share[None, :], scale, RAW)
        sums = tl.sum(tl.reshape(weight, (N, G, R)), axis=2)
        tl.store(out[None, :] + token[:, None], sums, mask=(own < group)[None, :])
    for start in range(clear, stop, N):
        token = start + tl.arange(0, N)
        k_tile = load_keys(k, start, columns, k_t, k_d, d, N, D)
        product = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
        weight = weights_of(product, norm[None, :], share[None, :], scale, RAW)
        if CAUSAL:
            weight = tl.where(token[:, None] <= row[None, :] + shift, weight, 0.0)
        sums = tl.sum(tl.reshape(weight, (N, G, R)), axis=2)
        if MASKED:
            visible = tl.load(real + b * real_b + token * real_t, mask=token < columns, other=0)
            sums = tl.where((visible != 0)[:, None], sums, 0.0)
        there = (token < stored)[:, None] & (own < group)[None, :]
        tl.store(out[None, :] + token[:, None], sums, mask=there)


@triton.jit(do_not_specialize=[*STRETCHES, "tiles"])
def _weight_rows(
    q, k, norms, totals, real, out, q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, real_b, real_t,
    heads, group, rows, columns, tiles, splits, chunk, d, scale,
    RAW: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    WIDE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Each program: a tile of rows against one chunk of the keys.

    Heads of a group are neighbours, so that the cache serves all but the first. Rows of results
    span more than 32 bits if WIDE.
    """
    program = tl.program_id(0)
    within, tile = program % group, program // group % tiles
    split = program // group // tiles % splits
    bh = (program // group // tiles // splits).to(tl.int64)
    line = bh * group + within
    b, head = line // heads, line % heads
    row = tile * M + tl.arange(0, M)
    exists = row < rows
    shift = columns - rows
    address = b * q_b + head * q_h + row.to(tl.int64) * q_t
    q_tile = load_rows(q, address, exists, q_d, d, D)
    norm, share = load_norms(norms, totals, line * rows + row, exists, RAW)
    k += b * k_b + head // group * k_h
    out += (line * rows + tile * M) * columns
    places = tl.arange(0, M).to(tl.int64 if WIDE else tl.int32) * columns
    begin, stop = split * chunk, tl.minimum(columns, (split + 1) * chunk)
    clear = _clear_end(begin, stop, row, exists, rows, shift, CAUSAL, MASKED, N)
    for start in range(begin, clear, N):
        token = start + tl.arange(0, N)
        k_tile = load_keys(k, start, columns, k_t, k_d, d, N, D)
        product = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        weight = weights_of(product, norm[:, None], share[:, None], scale, RAW)
        tl.store(out + (places[:, None] + token[None, :]), weight, mask=exists[:, None])
    for start in range(clear, stop, N):
        token = start + tl.arange(0, N)
        k_tile = load_keys(k, start, columns, k_t, k_d, d, N, D)
        product = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        weight = weights_of(product, norm[:, None], share[:, None], scale, RAW)
        pair = exists[:, None] & (token < columns)[None, :]
        seen = seen_pairs(
            pair, row, token, shift, real + b * real_b, real_t, columns, CAUSAL, MASKED
        )
        tl.store(out + (places[:, None] + token[None, :]), tl.where(seen, weight, 0.0), mask=pair)


def _stretches(columns: int, programs: int, N: int, plan: ColumnsConfig) -> tuple[int, int]:
    """How many chunks to split the keys in, and their size, for so many programs a chunk."""
    splits = min(cdiv(plan.programs, programs), cdiv(columns, 4 * N))
    chunk = cdiv(cdiv(columns, splits), N) * N
    return cdiv(columns, chunk), chunk


def partial_norms(
    q: Tensor, k: Tensor, key_mask: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Largest products and sums relative to them (batch, heads, rows, splits of the keys)."""
    (batch, heads, rows, d), (kv_heads, columns) = q.shape, k.shape[1:3]
    plan, group = config(d, q.dtype, few=True), heads // kv_heads
    M = tile_size(group * rows, plan.block_q)
    N = tile_size(columns, plan.block_k)
    tiles = cdiv(group * rows, M)
    splits, chunk = _stretches(columns, batch * kv_heads * tiles, N, plan)
    real, *real_strides = mask_arguments(key_mask, q)
    top, total = torch.empty(2, *q.shape[:3], splits, dtype=torch.float32, device=q.device)
    launch(
        _row_norms, batch * kv_heads * tiles * splits,
        q, k, real, top, total, *q.stride(), *k.stride(), *real_strides, kv_heads, group, rows,
        columns, tiles, splits, chunk, d, scale * LOG2E.value, CAUSAL=causal,
        MASKED=key_mask is not None, M=M, N=N, D=tile_width(d), **options(plan),
    )  # fmt: skip
    return top, total


def row_norms(
    q: Tensor, k: Tensor, key_mask: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    if not q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]:
        total = torch.zeros(q.shape[:3], dtype=torch.float32, device=q.device)
        return total - float("inf"), total
    q, k = readable(q, k)
    tops, totals = partial_norms(q, k, key_mask, scale, causal)
    top, total = (torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) for _ in range(2))
    lines, L = top.numel(), 16
    launch(
        _join_norms, cdiv(lines, L),
        tops, totals, top, total, lines, tops.shape[3], scale * LOG2E.value, L=L, PARTS=PARTS,
        num_warps=4,
    )  # fmt: skip
    return top, total


def sums_of_few(
    q: Tensor, k: Tensor, norm: Tensor, total: Tensor, raw: bool, key_mask: Tensor | None,
    out: Tensor, scale: float, causal: bool,
) -> None:  # fmt: skip
    """Write the sums (batch, heads, columns) of at most `block_q` rows a head to `out`."""
    (batch, heads, rows, d), (kv_heads, columns) = q.shape, k.shape[1:3]
    plan, group, stored = config(d, q.dtype, few=True), heads // kv_heads, out.shape[2]
    R = tile_size(rows, plan.block_q)
    G = min(next_power_of_2(group), plan.block_q // R)
    parts = cdiv(group, G)
    N = tile_size(stored, plan.block_k)
    splits, chunk = _stretches(stored, batch * kv_heads * parts, N, plan)
    real, *real_strides = mask_arguments(key_mask, q)
    launch(
        _sums_of_few, batch * kv_heads * parts * splits,
        q, k, norm, total, real, out, *q.stride(), *k.stride(), *real_strides, kv_heads, group,
        rows, columns, stored, parts, splits, chunk, d, scale * LOG2E.value, RAW=raw,
        CAUSAL=causal, MASKED=key_mask is not None, G=G, R=R, N=N, D=tile_width(d),
        **options(plan),
    )  # fmt: skip


def weight_rows(
    q: Tensor, k: Tensor, norm: Tensor, total: Tensor | None, key_mask: Tensor | None,
    scale: float, causal: bool,
) -> Tensor:  # fmt: skip
    (batch, heads, rows, d), (kv_heads, columns) = q.shape, k.shape[1:3]
    plan, group = config(d, q.dtype, few=True), heads // kv_heads
    out = torch.empty(*q.shape[:3], columns, dtype=torch.float32, device=q.device)
    if not out.numel():
        return out
    q, k = readable(q, k)
    M, N = tile_size(rows, plan.block_q), tile_size(columns, plan.block_k)
    tiles = cdiv(rows, M)
    splits, chunk = _stretches(columns, batch * heads * tiles, N, plan)
    real, *real_strides = mask_arguments(key_mask, q)
    raw, norm = total is not None, norm.contiguous()
    total = norm if total is None else total.contiguous()
    launch(
        _weight_rows, batch * heads * tiles * splits,
        q, k, norm, total, real, out, *q.stride(), *k.stride(), *real_strides, heads, group, rows,
        columns, tiles, splits, chunk, d, scale * LOG2E.value, RAW=raw, CAUSAL=causal,
        MASKED=key_mask is not None, WIDE=M * columns > 2**31 - 1, M=M, N=N, D=tile_width(d),
        **options(plan),
    )  # fmt: skip
    return out
