"""Lists of the active rows of every group of heads in Triton: one count and one pass that writes.

Rows are numbered sequence by sequence, a sequence being a batch entry's group of heads with its
tokens ascending; the active ones come first. Each program counts what is active before its chunk.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnspec.fast.engines.prepared import launch
from attnspec.fast.engines.sizes import cdiv

CHUNK = 1024
COUNTS = 1024
"""Counts of chunks that are added at a time."""


@triton.jit
def _flags(active, chunk, chunks, tokens, heads, kv_heads, a_b, a_t, a_h, N: tl.constexpr):
    """A chunk of a sequence: which rows it has, their tokens and heads, and which are active."""
    sequence = chunk // chunks
    b, kv_head, group = sequence // kv_heads, sequence % kv_heads, heads // kv_heads
    entry = chunk % chunks * N + tl.arange(0, N)
    real = entry < tokens * group
    token, head = entry // group, kv_head * group + entry % group
    at = b.to(tl.int64) * a_b + token.to(tl.int64) * a_t + head.to(tl.int64) * a_h
    return b, token, head, real, (tl.load(active + at, mask=real, other=0) != 0) & real


@triton.jit(do_not_specialize=["a_b", "a_t", "a_h", "chunks", "tokens"])
def _count(active, counts, a_b, a_t, a_h, chunks, tokens, heads, kv_heads, N: tl.constexpr):
    chunk = tl.program_id(0)
    _, _, _, _, flag = _flags(active, chunk, chunks, tokens, heads, kv_heads, a_b, a_t, a_h, N)
    tl.store(counts + chunk, tl.sum(flag.to(tl.int32), 0))


@triton.jit(do_not_specialize=["a_b", "a_t", "a_h", "sequences", "chunks", "tokens", "keys"])
def _list(
    active, counts, order, back, places, source, ends, offsets, k_offsets, a_b, a_t, a_h,
    sequences, chunks, tokens, keys, heads, kv_heads,
    CAUSAL: tl.constexpr, TOKEN_FIRST: tl.constexpr, N: tl.constexpr, COUNTS: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    sequence = chunk // chunks
    before = tl.zeros([COUNTS], tl.int32)
    total = tl.zeros([COUNTS], tl.int32)
    for start in range(0, sequences * chunks, COUNTS):
        at = start + tl.arange(0, COUNTS)
        count = tl.load(counts + at, mask=at < sequences * chunks, other=0)
        total += count
        before += tl.where(at < chunk, count, 0)
    all_active, first = tl.sum(total, 0), tl.sum(before, 0)
    b, token, head, real, flag = _flags(
        active, chunk, chunks, tokens, heads, kv_heads, a_b, a_t, a_h, N
    )
    group = heads // kv_heads
    entry = sequence * tokens * group + chunk % chunks * N + tl.arange(0, N)
    up_to = first + tl.cumsum(flag.to(tl.int32), 0)
    place = tl.where(flag, up_to - 1, all_active + entry - up_to)
    by_token = (b * tokens + token) * heads + head
    row = by_token
    if not TOKEN_FIRST:
        row = (b * heads + head) * tokens + token
    end = tl.full([N], 0, tl.int32) + keys
    if CAUSAL:
        end = tl.maximum(token + keys - tokens + 1, 0)
    tl.store(order + place, row, mask=real)
    tl.store(back + row, place, mask=real)
    tl.store(places + by_token, place, mask=real)
    tl.store(source + place, by_token, mask=real)
    tl.store(ends + place, tl.where(flag, end, 0), mask=real)
    if chunk % chunks == chunks - 1:
        tl.store(offsets + sequence + 1, (first + tl.sum(flag.to(tl.int32), 0)).to(tl.int64))
        tl.store(k_offsets + sequence + 1, (sequence + 1).to(tl.int64) * keys)
    if chunk == 0:
        tl.store(offsets, tl.zeros([], tl.int64))
        tl.store(k_offsets, tl.zeros([], tl.int64))
        tl.store(offsets + sequences + 1, tl.cast(sequences, tl.int64) * tokens * group)
        tl.store(k_offsets + sequences + 1, tl.cast(sequences, tl.int64) * keys)


def packed_rows(
    active: Tensor, kv_heads: int, keys: int, causal: bool, token_first: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `packed.packed_rows`."""
    batch, tokens, heads = active.shape
    rows, sequences = active.numel(), batch * kv_heads
    lists = [torch.empty(rows, dtype=torch.int32, device=active.device) for _ in range(5)]
    offsets = [torch.empty(sequences + 2, dtype=torch.int64, device=active.device) for _ in "qk"]
    chunks = cdiv(tokens * (heads // kv_heads), CHUNK)
    counts = torch.empty(sequences * chunks, dtype=torch.int32, device=active.device)
    flags = active.view(torch.uint8)
    launch(
        _count, sequences * chunks,
        flags, counts, *flags.stride(), chunks, tokens, heads, kv_heads, N=CHUNK, num_warps=4,
    )  # fmt: skip
    launch(
        _list, sequences * chunks,
        flags, counts, *lists, *offsets, *flags.stride(), sequences, chunks, tokens, keys, heads,
        kv_heads, CAUSAL=causal, TOKEN_FIRST=token_first, N=CHUNK, COUNTS=COUNTS, num_warps=4,
    )  # fmt: skip
    order, back, places, source, ends = lists
    return order, back, places, source, ends, offsets[0], offsets[1]
