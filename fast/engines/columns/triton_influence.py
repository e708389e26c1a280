"""The influence of blocks in Triton: rows against all keys before them, twice."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnspec.fast.engines.columns.configs import config
from attnspec.fast.engines.columns.triton_tiles import (
    LOG2E,
    load_keys,
    load_queries,
    options,
    tile_size,
)
from attnspec.fast.engines.flash.triton_launch import readable
from attnspec.fast.engines.prepared import launch
from attnspec.fast.engines.sizes import cdiv, tile_width

LENGTHS = ["tokens", "blocks", "block", "parts", "scale", "eps"]


@triton.jit
def _tile_products(
    q_tile, g_tile, k, v, start, tokens, k_t, k_d, v_t, v_d, d, dv,
    N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """Scores and slopes (M, N) of a tile of rows against the keys from `start` on."""
    k_tile = load_keys(k, start, tokens, k_t, k_d, d, N, D)
    v_tile = load_keys(v, start, tokens, v_t, v_d, dv, N, DV)
    product = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
    slope = tl.dot(g_tile, tl.trans(v_tile), input_precision="ieee")
    return product, slope


@triton.jit(do_not_specialize=LENGTHS)
def influence_kernel(
    q, k, v, g, out, q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d,
    g_b, g_h, g_t, g_d, heads, group, tokens, blocks, block, parts, d, dv, scale, eps,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """Each program: M rows of a block, first for their sums, then block by block."""
    program = tl.program_id(0)
    part, block_row = program % parts, blocks - 1 - program // parts % blocks
    line = (program // parts // blocks).to(tl.int64)
    b, head = line // heads, line % heads
    stop_row = (block_row + 1) * block
    first = block_row * block + part * M
    row = first + tl.arange(0, M)
    exists = row < stop_row
    q_tile = tl.trans(load_queries(q + b * q_b + head * q_h, row, stop_row, q_t, q_d, d, D))
    g_tile = tl.trans(load_queries(g + b * g_b + head * g_h, row, stop_row, g_t, g_d, dv, DV))
    k += b * k_b + head // group * k_h
    v += b * v_b + head // group * v_h
    stop = tl.minimum(stop_row, first + M)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    mean = tl.zeros([M], tl.float32)
    for start in range(0, stop, N):
        token = start + tl.arange(0, N)
        product, slope = _tile_products(
            q_tile, g_tile, k, v, start, tokens, k_t, k_d, v_t, v_d, d, dv, N, D, DV
        )
        seen = (token[None, :] <= row[:, None]) & exists[:, None]
        product = tl.where(seen, product, float("-inf"))
        best = tl.maximum(top, tl.max(product, axis=1))
        base = tl.where(best == float("-inf"), 0.0, best)
        e = tl.exp2((product - base[:, None]) * scale)
        factor = tl.exp2((top - base) * scale)
        total = total * factor + tl.sum(e, axis=1)
        mean = mean * factor + tl.sum(tl.where(seen, e * slope, 0.0), axis=1)
        top = best
    base = tl.where(top == float("-inf"), 0.0, top)
    share = 1.0 / tl.where(total > 0, total, 1.0)
    mean = mean * share
    out += ((line * blocks + block_row) * parts + part) * blocks
    for column in range(block_row + 1):
        begin = column * block
        change = tl.zeros([M], tl.float32)
        for start in range(begin, tl.minimum(stop, begin + block), N):
            token = start + tl.arange(0, N)
            product, slope = _tile_products(
                q_tile, g_tile, k, v, start, tokens, k_t, k_d, v_t, v_d, d, dv, N, D, DV
            )
            weight = tl.exp2((product - base[:, None]) * scale) * share[:, None]
            rest = 1.0 - weight + eps
            alone = (row == 0)[:, None] | (rest == 0.0)
            ratio = (slope - mean[:, None]) / tl.where(alone, 1.0, rest)
            entry = tl.abs(weight * tl.where(alone, slope, ratio))
            seen = (token[None, :] <= row[:, None]) & exists[:, None]
            seen = seen & (token < begin + block)[None, :]
            change += tl.sum(tl.where(seen, entry, 0.0), axis=1)
        tl.store(out + column, tl.sum(change, axis=0))


def block_influence(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, block: int, eps: float, scale: float
) -> Tensor:
    batch, heads, tokens, d = q.shape
    dv, blocks = v.shape[3], tokens // block
    plan = config(max(d, dv), q.dtype)
    M, N = tile_size(block, plan.block_q), tile_size(block, min(plan.block_k, plan.block_q))
    parts = cdiv(block, M)
    # Entries above the diagonal are not written.
    out = torch.zeros(batch, heads, blocks, parts, blocks, dtype=torch.float32, device=q.device)
    if out.numel():
        q, k, v, g = readable(q, k, v, g)
        launch(
            influence_kernel, batch * heads * blocks * parts,
            q, k, v, g, out, *q.stride(), *k.stride(), *v.stride(), *g.stride(), heads,
            heads // k.shape[1], tokens, blocks, block, parts, d, dv, scale * LOG2E.value, eps,
            M=M, N=N, D=tile_width(d), DV=tile_width(dv), **options(plan),
        )  # fmt: skip
    return out.sum(3)
