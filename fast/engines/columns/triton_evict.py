"""What each row of a cache has received and which rows stay, in Triton: four launches a step."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnspec.fast.engines.columns.configs import config
from attnspec.fast.engines.columns.triton_rows import partial_norms
from attnspec.fast.engines.columns.triton_tiles import (
    LOG2E,
    load_keys,
    load_queries,
    options,
    tile_size,
)
from attnspec.fast.engines.flash.triton_launch import readable
from attnspec.fast.engines.prepared import launch
from attnspec.fast.engines.select.triton_top_k import best_of, ordered
from attnspec.fast.engines.sizes import cdiv, next_power_of_2, tile_width

GATHERED_ROWS = 32


@triton.jit(do_not_specialize=["rows", "columns", "before", "tiles", "splits", "scale", "a_h"])
def _received(
    q, k, tops, totals, a, out, q_h, q_t, q_d, k_h, k_t, k_d, a_h, a_t,
    group, rows, columns, before, tiles, splits, d, scale,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """out (kv_heads, columns): `a` of the `before` old rows, and what all rows of the group give.

    The norms come as the parts that the splits of the keys have left.
    """
    program = tl.program_id(0)
    tile, kv_head = program % tiles, (program // tiles).to(tl.int64)
    token = tile * N + tl.arange(0, N)
    part = tl.arange(0, SPLITS)
    k_tile = load_keys(k + kv_head * k_h, tile * N, columns, k_t, k_d, d, N, D)
    sums = tl.zeros([N], tl.float32)
    for g in range(group):
        head = kv_head * group + g
        for at in range(0, rows, M):
            row = at + tl.arange(0, M)
            places = (head * rows + row[:, None]) * splits + part[None, :]
            there = (row < rows)[:, None] & (part < splits)[None, :]
            top = tl.load(tops + places, mask=there, other=float("-inf"))
            total = tl.load(totals + places, mask=there, other=0.0)
            best = tl.max(top, 1)
            base = tl.where(best == float("-inf"), 0.0, best)
            divisor = tl.sum(total * tl.exp2((top - base[:, None]) * scale), 1)
            share = 1.0 / tl.where(divisor > 0, divisor, 1.0)
            norm = tl.where(best == float("-inf"), float("inf"), best)
            q_tile = load_queries(q + head * q_h, row, rows, q_t, q_d, d, D)
            product = tl.dot(k_tile, q_tile, input_precision="ieee")
            weight = tl.exp2((product - norm[None, :]) * scale) * share[None, :]
            seen = token[:, None] <= row[None, :] + (columns - rows)
            sums += tl.sum(tl.where(seen & (row < rows)[None, :], weight, 0.0), 1)
    sums += tl.load(a + kv_head * a_h + token * a_t, mask=token < before, other=0.0).to(tl.float32)
    tl.store(out + kv_head * columns + token, sums, mask=token < columns)


@triton.jit(do_not_specialize=["n", "old", "seen", "hh", "rec", "pos_h"])
def _choose(a, pos, pos_h, pos_t, index, kept_a, kept_pos, n, old, seen, hh, rec, N: tl.constexpr):
    """Rows that stay of a kv head: the `hh` best but the last `rec`, and these."""
    head = tl.program_id(0).to(tl.int64)
    a += head * n
    pos += head * pos_h
    places = head * (hh + rec)
    entry = tl.arange(0, N)
    real = entry < n - rec
    score = tl.load(a + entry, mask=real, other=0.0)
    chosen = best_of(tl.where(real, ordered(score), 0), hh)
    place = places + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    number = tl.load(pos + entry * pos_t, mask=chosen & (entry < old), other=0)
    number = tl.where(entry < old, number, seen + (entry - old))
    tl.store(index + place, entry, mask=chosen)
    tl.store(kept_a + place, score, mask=chosen)
    tl.store(kept_pos + place, number, mask=chosen)
    for start in range(0, rec, N):
        last = start + tl.arange(0, N)
        entry = n - rec + last
        real = last < rec
        place = places + hh + last
        number = tl.load(pos + entry * pos_t, mask=real & (entry < old), other=0)
        number = tl.where(entry < old, number, seen + (entry - old))
        tl.store(index + place, entry, mask=real)
        tl.store(kept_a + place, tl.load(a + entry, mask=real, other=0.0), mask=real)
        tl.store(kept_pos + place, number, mask=real)


@triton.jit(do_not_specialize=["k_h", "v_h", "kept", "tiles"])
def _gather(
    k, v, index, kept_k, kept_v, k_h, k_t, k_d, v_h, v_t, v_d, kept, tiles, d, dv,
    ROWS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """The rows `index` of k and v."""
    head = (tl.program_id(0) // tiles).to(tl.int64)
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    source = tl.load(index + head * kept + row, mask=row < kept, other=0).to(tl.int64)
    target = head * kept + row
    channel, value = tl.arange(0, D), tl.arange(0, DV)
    keys = (row < kept)[:, None] & (channel < d)[None, :]
    values = (row < kept)[:, None] & (value < dv)[None, :]
    k_at = k + head * k_h + source[:, None] * k_t + channel[None, :] * k_d
    v_at = v + head * v_h + source[:, None] * v_t + value[None, :] * v_d
    k_rows = tl.load(k_at, mask=keys, other=0.0)
    v_rows = tl.load(v_at, mask=values, other=0.0)
    tl.store(kept_k + target[:, None] * d + channel[None, :], k_rows, mask=keys)
    tl.store(kept_v + target[:, None] * dv + value[None, :], v_rows, mask=values)


def received(q: Tensor, k: Tensor, a: Tensor, scale: float) -> Tensor:
    """Scores (kv_heads, n) with what the rows q (1, H, w, d) give to k (1, kv_heads, n, d)."""
    (_, heads, rows, d), (kv_heads, columns) = q.shape, k.shape[1:3]
    plan = config(d, q.dtype, few=True)
    q, k = readable(q, k)
    top, total = partial_norms(q, k, None, scale, True)
    M, N = tile_size(rows, 16), tile_size(columns, plan.block_k)
    tiles = cdiv(columns, N)
    out = torch.empty(kv_heads, columns, dtype=torch.float32, device=q.device)
    launch(
        _received, kv_heads * tiles,
        q, k, top, total, a, out, *q.stride()[1:], *k.stride()[1:], *a.stride(),
        heads // kv_heads, rows, columns, a.shape[1], tiles, top.shape[-1], d, scale * LOG2E.value,
        M=M, N=N, D=tile_width(d), SPLITS=next_power_of_2(top.shape[-1]), **options(plan),
    )  # fmt: skip
    return out


def evict(
    k: Tensor, v: Tensor, a: Tensor, pos: Tensor, seen: int, hh: int, rec: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """k, v, a and pos of the rows that stay; `pos` are those of the old rows, `seen` follows."""
    (_, kv_heads, n, d), dv, kept = k.shape, v.shape[3], hh + rec
    index = torch.empty(kv_heads, kept, dtype=torch.int32, device=k.device)
    kept_a, kept_pos = a.new_empty(index.shape), pos.new_empty(index.shape)
    kept_k, kept_v = k.new_empty(1, kv_heads, kept, d), v.new_empty(1, kv_heads, kept, dv)
    if not kept:
        return kept_k, kept_v, kept_a, kept_pos
    size = max(32, next_power_of_2(n - rec))
    launch(
        _choose, kv_heads,
        a, pos, *pos.stride(), index, kept_a, kept_pos, n, pos.shape[1], seen, hh, rec,
        N=size, num_warps=min(16, max(1, size // 512)),
    )  # fmt: skip
    tiles = cdiv(kept, GATHERED_ROWS)
    launch(
        _gather, kv_heads * tiles,
        k, v, index, kept_k, kept_v, *k.stride()[1:], *v.stride()[1:], kept, tiles, d, dv,
        ROWS=GATHERED_ROWS, D=tile_width(d), DV=tile_width(dv), num_warps=4,
    )  # fmt: skip
    return kept_k, kept_v, kept_a, kept_pos
