"""Exact top-k in Triton: radix selection of the k-th score, then one ordered pass.

A score becomes an unsigned key of the same order, so the k-th largest key is found digit by digit
and ties are broken by counting: nothing is sorted and no buffer of ties can overflow. A few entries
of a long row are found among the best of its chunks, which many programs look for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnspec.fast.engines.prepared import launch
from attnspec.fast.engines.select.configs import config
from attnspec.fast.engines.sizes import cdiv, next_power_of_2

LENGTHS = ["heads", "rows", "n", "k", "length"]
FEW = 128
"""So many rows keep a GPU busy if one program has one of them."""
MASK_CHUNK = 2048


@triton.jit
def ordered(x):
    """float32 bits as an unsigned key of the same order: NaN lowest, -0 equal to +0, none 0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    signed = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    signed = tl.where(x != x, -2147483647, signed)
    return signed.to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def _keys(scores, start, n, stride_n, N: tl.constexpr):
    """The entries from `start` and their keys, 0 where there is none."""
    entry = start + tl.arange(0, N)
    x = tl.load(scores + entry.to(tl.int64) * stride_n, mask=entry < n, other=0.0)
    return entry, tl.where(entry < n, ordered(x.to(tl.float32)), 0)


@triton.jit
def best_of(key, k):
    """Which of the keys above 0 are the k largest; ties go to the lower index.

    The k-th largest is searched between the least and the largest key by halving, until k keys
    reach the bound, which for distinct scores happens long before all 32 bits are known.
    """
    high = tl.max(key, axis=0)
    low = tl.minimum(high, tl.min(tl.where(key > 0, key, 0xFFFFFFFF), axis=0))
    reached = k + 1
    while (low < high) & (reached != k):
        middle = high - ((high - low) >> 1)
        reached = tl.sum((key >= middle).to(tl.int32), axis=0)
        low = tl.where(reached >= k, middle, low)
        high = tl.where(reached >= k, high, middle - 1)
    chosen = (key >= low) & (key > 0)
    if reached != k:
        above = key > low
        tied = (chosen & (key == low)).to(tl.int32)
        wanted = k - tl.sum(above.to(tl.int32), axis=0)
        chosen = above | ((tied > 0) & (tl.cumsum(tied, axis=0) <= wanted))
    return chosen


@triton.jit
def _emit(out, entry, chosen, real, found, MASK: tl.constexpr):
    """Write the chosen entries of one chunk; `found` were written before it."""
    if MASK:
        tl.store(out + entry, chosen, mask=real)
    else:
        place = found + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
        tl.store(out + place, entry.to(out.dtype.element_ty), mask=chosen)


@triton.jit
def _row(scores, out, stride_b, stride_h, stride_r, heads, rows, length):
    line = tl.program_id(0).to(tl.int64)
    b, h, r = line // rows // heads, line // rows % heads, line % rows
    return scores + b * stride_b + h * stride_h + r * stride_r, out + line * length


@triton.jit(do_not_specialize=LENGTHS)
def _short(
    scores, out, stride_b, stride_h, stride_r, stride_n, heads, rows, n, k, length,
    MASK: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """A row that fits in registers."""
    scores, out = _row(scores, out, stride_b, stride_h, stride_r, heads, rows, length)
    entry, key = _keys(scores, 0, n, stride_n, N)
    _emit(out, entry, best_of(key, k), entry < n, 0, MASK)


@triton.jit(do_not_specialize=[*LENGTHS, "chunks"])
def _candidates(
    scores, best, places, stride_b, stride_h, stride_r, stride_n, heads, rows, n, k, chunks,
    N: tl.constexpr,
):  # fmt: skip
    """The k best of one chunk of a row, ascending, and where they stand; -1 where there are fewer.

    The k best of the row are among those of its chunks.
    """
    line = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    b, h, r = line // rows // heads, line // rows % heads, line % rows
    scores += b * stride_b + h * stride_h + r * stride_r
    entry, key = _keys(scores, chunk * N, n, stride_n, N)
    chosen = best_of(key, k)
    spot = (line * chunks + chunk) * k + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    tl.store(best + spot, key.to(tl.int32, bitcast=True), mask=chosen)
    tl.store(places + spot, entry, mask=chosen)
    found = tl.minimum(k, n - chunk * N)
    rest = tl.arange(0, N)
    tl.store(places + (line * chunks + chunk) * k + rest, -1, mask=(rest >= found) & (rest < k))


@triton.jit(do_not_specialize=["k", "length", "many"])
def _merge(best, places, out, many, k, length, N: tl.constexpr):
    """The k best of `many` candidates of a row, which stand in the order of their places."""
    line = tl.program_id(0).to(tl.int64)
    candidate = tl.arange(0, N)
    place = tl.load(places + line * many + candidate, mask=candidate < many, other=-1)
    key = tl.load(best + line * many + candidate, mask=place >= 0, other=0)
    chosen = best_of(key.to(tl.uint32, bitcast=True), k)
    spot = line * length + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    tl.store(out + spot, place.to(out.dtype.element_ty), mask=chosen)


@triton.jit(do_not_specialize=LENGTHS)
def _long(
    scores, out, stride_b, stride_h, stride_r, stride_n, heads, rows, n, k, length,
    MASK: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """A row read in chunks: the k-th key, a byte at a time from histograms."""
    scores, out = _row(scores, out, stride_b, stride_h, stride_r, heads, rows, length)
    bins = tl.arange(0, 256)
    prefix = tl.full([], 0, tl.uint32)
    wanted = k
    for digit in tl.static_range(4):
        counts = tl.zeros([256], tl.int32)
        for start in range(0, n, N):
            _, key = _keys(scores, start, n, stride_n, N)
            value = (key >> (24 - 8 * digit)) & 255
            real = key > 0
            if digit > 0:
                real = real & ((key >> (32 - 8 * digit)) == prefix)
            # Other entries go to bin 0, which is the choice only if no bin above it is.
            counts += tl.histogram(tl.where(real, value.to(tl.int32), 0), 256)
        at_least = tl.cumsum(counts, axis=0, reverse=True)
        best = tl.max(tl.where(at_least >= wanted, bins, 0), axis=0)
        wanted -= tl.sum(tl.where(bins > best, counts, 0), axis=0)
        prefix = (prefix << 8) | best.to(tl.uint32)
    found = 0
    for start in range(0, n, N):
        entry, key = _keys(scores, start, n, stride_n, N)
        tied = ((key > 0) & (key == prefix)).to(tl.int32)
        chosen = (key > prefix) | ((tied > 0) & (tl.cumsum(tied, axis=0) <= wanted))
        _emit(out, entry, chosen, entry < n, found, MASK)
        found += tl.sum(chosen.to(tl.int32), axis=0)
        wanted -= tl.sum(tied, axis=0)


@triton.jit(do_not_specialize=["rows", "n"])
def _mask_lists(
    mask, index, count, stride_b, stride_h, stride_r, stride_n, heads, rows, n, N: tl.constexpr
):
    line = tl.program_id(0).to(tl.int64)
    mask, index = _row(mask, index, stride_b, stride_h, stride_r, heads, rows, n)
    found = 0
    for start in range(0, n, N):
        entry = start + tl.arange(0, N)
        chosen = tl.load(mask + entry.to(tl.int64) * stride_n, mask=entry < n, other=0) != 0
        _emit(index, entry, chosen, chosen, found, False)
        found += tl.sum(chosen.to(tl.int32), axis=0)
    for start in range(0, n, N):
        entry = start + tl.arange(0, N)
        tl.store(index + entry, 0, mask=(entry >= found) & (entry < n))
    tl.store(count + line, found)


@triton.jit(do_not_specialize=["heads", "rows", "n", "chunks"])
def _mask_chunks(
    mask, index, count, stride_b, stride_h, stride_r, stride_n, heads, rows, n, chunks,
    N: tl.constexpr,
):  # fmt: skip
    """The lists of a few long rows, whose tails are 0 already: a program has N entries of one.

    It counts those before its own itself, which is faster than to wait for others.
    """
    line = (tl.program_id(0) // chunks).to(tl.int64)
    own = tl.program_id(0) % chunks * N
    b, h, r = line // rows // heads, line // rows % heads, line % rows
    mask += b * stride_b + h * stride_h + r * stride_r
    before = tl.zeros([4 * N], tl.int32)
    for start in range(0, own, 4 * N):
        entry = start + tl.arange(0, 4 * N)
        flag = tl.load(mask + entry.to(tl.int64) * stride_n, mask=entry < own, other=0)
        before += (flag != 0).to(tl.int32)
    found = tl.sum(before, axis=0)
    entry = own + tl.arange(0, N)
    chosen = tl.load(mask + entry.to(tl.int64) * stride_n, mask=entry < n, other=0) != 0
    _emit(index + line * n, entry, chosen, chosen, found, False)
    if own + N >= n:
        tl.store(count + line, found + tl.sum(chosen.to(tl.int32), axis=0))


def _select(scores: Tensor, k: int, out: Tensor, mask: bool) -> None:
    batch, heads, rows, n = scores.shape
    lines = batch * heads * rows
    if not lines or not k:
        return
    plan = config()
    fits = n <= plan.row_items
    chunks = cdiv(n, plan.chunk_items)
    if not (fits or mask) and k <= plan.chunk_items and chunks * k <= plan.row_items:
        _select_twice(scores, k, out, chunks, plan.chunk_items)
        return
    size = max(32, next_power_of_2(n)) if fits else plan.chunk_items
    warps = min(8, max(1, size // 1024)) if fits else plan.chunk_warps
    launch(
        (_short if fits else _long), lines,
        scores, out, *scores.stride(), heads, rows, n, k, out.shape[3],
        MASK=mask, N=size, num_warps=warps,
    )  # fmt: skip


def _select_twice(scores: Tensor, k: int, out: Tensor, chunks: int, chunk: int) -> None:
    """A few of a long row: the best of every chunk, then the best of these."""
    _, heads, rows, n = scores.shape
    lines, many = out.numel() // out.shape[3], chunks * k
    best, places = torch.empty(2, lines, many, dtype=torch.int32, device=scores.device)
    launch(
        _candidates, lines * chunks,
        scores, best, places, *scores.stride(), heads, rows, n, k, chunks,
        N=chunk, num_warps=min(8, max(1, chunk // 512)),
    )  # fmt: skip
    size = max(32, next_power_of_2(many))
    launch(
        _merge,
        lines,
        best,
        places,
        out,
        many,
        k,
        out.shape[3],
        N=size,
        num_warps=min(8, max(1, size // 512)),
    )


def top_k(scores: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    index = torch.empty(*scores.shape[:3], k, dtype=dtype, device=scores.device)
    _select(scores, k, index, mask=False)
    return index


def top_k_mask(scores: Tensor, k: int) -> Tensor:
    mask = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    _select(scores, k, mask, mask=True)
    return mask


def mask_lists(mask: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, rows, n = mask.shape
    lines, chunks = batch * heads * rows, cdiv(n, MASK_CHUNK)
    split = chunks > 1 and lines < FEW
    index = (mask.new_zeros if split else mask.new_empty)(mask.shape, dtype=torch.int32)
    count = (mask.new_empty if n else mask.new_zeros)(mask.shape[:3], dtype=torch.int32)
    given = mask.view(torch.uint8), index, count, *mask.stride(), heads, rows, n
    if split:
        launch(_mask_chunks, lines * chunks, *given, chunks, N=MASK_CHUNK, num_warps=4)
    elif mask.numel():
        size = min(1024, max(32, next_power_of_2(n)))
        launch(_mask_lists, lines, *given, N=size, num_warps=2)
    return index, count
