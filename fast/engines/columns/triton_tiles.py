"""What the columns kernels share: tiles, norms, weights and predicates.

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

from attnspec.fast.engines.columns.configs import ColumnsConfig
from attnspec.fast.engines.sizes import next_power_of_2

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_keys(k, start, columns, stride_t, stride_d, d, N: tl.constexpr, D: tl.constexpr):
    """A tile of keys (N, D), 0 beyond the end."""
    token, channel = start + tl.arange(0, N), tl.arange(0, D)
    address = token[:, None].to(tl.int64) * stride_t + channel[None, :] * stride_d
    return tl.load(k + address, mask=(token < columns)[:, None] & (channel < d)[None, :], other=0.0)


@triton.jit
def load_queries(q, row, rows, stride_t, stride_d, d, D: tl.constexpr):
    """The queries at `row`, transposed to (D, M), 0 beyond the end."""
    channel = tl.arange(0, D)
    address = row[None, :].to(tl.int64) * stride_t + channel[:, None] * stride_d
    return tl.load(q + address, mask=(row < rows)[None, :] & (channel < d)[:, None], other=0.0)


@triton.jit
def load_rows(q, address, exists, stride_d, d, D: tl.constexpr):
    """The rows (M, D) of queries at `address`, 0 where they do not exist."""
    channel = tl.arange(0, D)
    return tl.load(
        q + address[:, None] + channel[None, :] * stride_d,
        mask=exists[:, None] & (channel < d)[None, :], other=0.0,
    )  # fmt: skip


@triton.jit
def group_rows(tile, kv_head, group, rows, M: tl.constexpr):
    """A tile of a head group's rows, packed: which of them exist, their heads and rows (M,)."""
    packed = tile * M + tl.arange(0, M)
    return packed < group * rows, kv_head * group + packed // rows, packed % rows


@triton.jit
def joined_norms(tops, totals, line, exists, splits, scale, PARTS: tl.constexpr):
    """Norm and sum (M,) of rows `line` from those that the splits of the keys have left."""
    top = tl.full(line.shape, float("-inf"), tl.float32)
    total = tl.zeros(line.shape, tl.float32)
    for start in range(0, splits, PARTS):
        part = start + tl.arange(0, PARTS)
        places = line[:, None] * splits + part[None, :]
        there = exists[:, None] & (part < splits)[None, :]
        tops_here = tl.load(tops + places, mask=there, other=float("-inf"))
        totals_here = tl.load(totals + places, mask=there, other=0.0)
        best = tl.maximum(top, tl.max(tops_here, 1))
        base = tl.where(best == float("-inf"), 0.0, best)
        joined = tl.sum(totals_here * tl.exp2((tops_here - base[:, None]) * scale), 1)
        total = total * tl.exp2((top - base) * scale) + joined
        top = best
    return top, total


@triton.jit
def load_norms(norm, total, place, exists, RAW: tl.constexpr):
    """Norm (an lse in base 2), +inf for absent rows, and the factor 1 / total if RAW."""
    norm = tl.load(norm + place, mask=exists, other=float("inf"))
    norm = tl.where(norm == float("-inf"), float("inf"), norm)
    if RAW:
        divisor = tl.load(total + place, mask=exists, other=1.0)
        return norm, 1.0 / tl.where(divisor > 0, divisor, 1.0)
    return norm * LOG2E, norm


@triton.jit
def weights_of(product, norm, share, scale, RAW: tl.constexpr):
    """Weights of products, with the norms and shares of their rows; `scale` is in base 2."""
    if RAW:
        return tl.exp2((product - norm) * scale) * share
    return tl.exp2(product * scale - norm)


@triton.jit
def seen_pairs(
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
def add_tile(product, seen, top, total, scale):
    """Largest product of each row and sum of exp2(scale * (product - largest)), one tile on.

    All pairs are seen if `seen` is None.
    """
    if seen is not None:
        product = tl.where(seen, product, float("-inf"))
    best = tl.maximum(top, tl.max(product, axis=1))
    base = tl.where(best == float("-inf"), 0.0, best)
    tile = tl.sum(tl.exp2((product - base[:, None]) * scale), axis=1)
    return best, total * tl.exp2((top - base) * scale) + tile


def tile_size(size: int, largest: int) -> int:
    """A power of two that the tensor cores accept, no larger than needed."""
    return min(largest, max(16, next_power_of_2(size)))


def options(plan: ColumnsConfig) -> dict[str, int]:
    return {"num_warps": plan.num_warps, "num_stages": plan.num_stages}


def mask_arguments(key_mask: Tensor | None, q: Tensor) -> tuple[Any, ...]:
    """The mask as bytes and its strides, or a placeholder that is never read."""
    if key_mask is None:
        return q, 0, 0
    return key_mask.view(torch.uint8), *key_mask.stride()
