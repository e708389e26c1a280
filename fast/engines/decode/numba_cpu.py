"""The decode engine in Numba: workers walk equal stretches of the line in parallel threads.

float16 and bfloat16 caches are widened tile by tile, never as a whole; results are rounded back.
float64 is computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from attnspec.fast.backend import count_launch, wide_dtype
from attnspec.fast.engines.decode.numba_loops import (
    BFLOAT16,
    FLOAT16,
    NATIVE,
    accumulate,
    dots,
    scale_and_mask,
    softmax_row,
    widen,
)
from attnspec.fast.engines.decode.numba_rows import (
    accumulate_from_memory,
    dots_from_memory,
    fills_registers,
)

TILE = 512
"""Keys a tile: a stream long enough for hardware to run ahead of, and short enough for the L2."""
ROWS = 64


class Cache(NamedTuple):
    """Keys or values: a flat array from their first element on, and element strides.

    `wide` is set for native dtypes, `half` holds the bits of 16-bit ones; the other is empty.
    """

    wide: np.ndarray
    half: np.ndarray
    batch: int
    head: int
    token: int
    channel: int


class Shape(NamedTuple):
    """The sizes of a call; `pool` is the tokens a cache page, 0 without a block table."""

    batch: int
    kv_heads: int
    group: int
    share: int
    q_tokens: int
    k_tokens: int
    d: int
    dv: int
    page: int
    entries: int
    pool: int
    pages: int
    rows: int
    blocks: int
    tile: int
    causal: bool
    paired: bool
    gathered: bool
    kind: int


@njit(cache=True, nogil=True)
def _block(output: int, shape: Any) -> int:
    """Query block of `output`; in the paired order 0, last, 1, last - 1, ..."""
    i = output % shape.blocks
    if shape.paired:
        return i // 2 if i % 2 == 0 else shape.blocks - 1 - i // 2
    return i


@njit(cache=True, nogil=True)
def _keys(output: int, shape: Any, lengths: Any) -> int:
    """How many keys the last row of `output` sees, from the first of the cache."""
    pair = output // shape.blocks
    length = min(max(lengths[pair % shape.batch, pair // shape.batch], 0), shape.k_tokens)
    if not shape.causal:
        return length
    last = min((_block(output, shape) + 1) * shape.rows, shape.q_tokens * shape.group) - 1
    return min(max(length - shape.q_tokens + last // shape.group + 1, 0), length)


@njit(cache=True, nogil=True)
def _listed(output: int, shape: Any, counts: Any) -> int:
    """Slots of the list that `output` reads: those of its first `counts` entries."""
    pair = output // shape.blocks
    return min(max(counts[pair % shape.batch, pair // shape.batch], 0), shape.entries) * shape.page


@njit(cache=True, nogil=True)
def _line(shape: Any, lengths: Any, counts: Any) -> Any:
    """base (U + 1): where each output starts on the line of tiles, and its end."""
    outputs = shape.batch * shape.kv_heads * shape.blocks
    base = np.zeros(outputs + 1, np.int64)
    for output in range(outputs):
        gathered = shape.gathered
        keys = _listed(output, shape, counts) if gathered else _keys(output, shape, lengths)
        base[output + 1] = base[output] + (keys + shape.tile - 1) // shape.tile
    return base


@njit(cache=True, nogil=True)
def _tile_keys(
    lo: int, hi: int, b: int, head: int, keys: int, shape: Any, index: Any, table: Any, bias: Any,
    k: Any, v: Any, key: Any, gain: Any, at: Any,
) -> int:  # fmt: skip
    """The keys of slots lo .. hi - 1 that may be read: number, bias, offsets; their count.

    The values' offsets are those of the key head's first value head.
    """
    count = 0
    if not (shape.gathered or shape.pool or bias.shape[2]):
        count = max(min(hi, keys) - lo, 0)
        k_next = b * k.batch + head * k.head
        v_next = b * v.batch + head * shape.share * v.head
        k_next, v_next = k_next + lo * k.token, v_next + lo * v.token
        gain[:count] = 0
        for n in range(count):
            key[n], at[0, n], at[1, n] = lo + n, k_next, v_next
            k_next, v_next = k_next + k.token, v_next + v.token
        return count
    for slot in range(lo, hi):
        j = slot
        if shape.gathered:
            entry = index[b, head, slot // shape.page]
            j = entry * shape.page + slot % shape.page if entry >= 0 else -1
        if j < 0 or j >= keys:
            continue
        extra = bias[b, head, slot] if bias.shape[2] else 0.0
        if extra == -np.inf:
            continue
        first, token = b, j
        if shape.pool:
            first, token = table[b, j // shape.pool], j % shape.pool
            if first < 0 or first >= shape.pages:
                continue
        key[count], gain[count] = j, extra
        at[0, count] = first * k.batch + head * k.head + token * k.token
        at[1, count] = first * v.batch + head * shape.share * v.head + token * v.token
        count += 1
    return count


@njit(cache=True, nogil=True)
def _segment(
    output: int, lo: int, hi: int, q: Any, k: Any, v: Any, bias: Any, scale: Any, lengths: Any,
    index: Any, counts: Any, table: Any, shape: Any, m: Any, den: Any, o: Any,
) -> None:  # fmt: skip
    """The triple m (rows), den (rows), o (rows, dv) of tiles lo .. hi - 1 of `output`."""
    pair, block = output // shape.blocks, _block(output, shape)
    b, head = pair % shape.batch, pair // shape.batch
    length = min(max(lengths[b, head], 0), shape.k_tokens)
    keys = _keys(output, shape, lengths)
    slots = _listed(output, shape, counts) if shape.gathered else keys
    rows = min(shape.rows, shape.q_tokens * shape.group - block * shape.rows)
    key, gain = np.empty(shape.tile, np.int64), np.empty(shape.tile, q.dtype)
    scores, at = np.empty(shape.tile, q.dtype), np.empty((1 + shape.share, shape.tile), np.uint64)
    in_place = shape.kind == NATIVE and k.channel == 1 and v.channel == 1
    held = 0 if in_place else shape.tile
    k_buffer = np.empty(held * shape.d, q.dtype)
    v_buffer = np.empty(shape.share * held * shape.dv, q.dtype)
    k_source, v_source = (k.wide, v.wide) if in_place else (k_buffer, v_buffer)
    m[:], den[:], o[:] = -np.inf, 0, 0
    for tile in range(lo, hi):
        first = tile * shape.tile
        count = _tile_keys(
            first, min(first + shape.tile, slots), b, head, keys, shape, index, table, bias,
            k, v, key, gain, at,
        )  # fmt: skip
        for j in range(1, shape.share):
            at[1 + j, :count] = at[1, :count] + np.uint64(j * v.head)
        if not in_place:
            widen(k, at[0], count, shape.d, shape.kind, k_buffer)
            for j in range(shape.share):
                buffer = v_buffer[j * held * shape.dv :]
                widen(v, at[1 + j], count, shape.dv, shape.kind, buffer)
        for r in range(rows if count else 0):
            row = block * shape.rows + r
            token, h = row // shape.group, head * shape.group + row % shape.group
            # The first row of a group brings the tile to the caches.
            far = in_place and r == 0
            if far and fills_registers(q, shape.d):
                dots_from_memory(q[b, h, token], k_source, at[0], count, shape.d, scores)
            else:
                dots(q[b, h, token], k_source, at[0], count, shape.d, scores)
            newest = length - shape.q_tokens + token if shape.causal else length
            scale_and_mask(scores, count, scale, gain, key, newest)
            m[r], total, keep = softmax_row(scores, count, m[r])
            den[r] = den[r] * keep + total
            if keep != 1:
                o[r] *= keep
            j = row % shape.group * shape.share // shape.group
            source = v_source[j * held * shape.dv :]
            if far and fills_registers(q, shape.dv):
                accumulate_from_memory(scores, source, at[1 + j], count, shape.dv, o[r])
            else:
                accumulate(scores, source, at[1 + j], count, shape.dv, o[r])


@njit(cache=True, nogil=True)
def _share_start(worker: int, tiles: int, workers: int) -> int:
    """First tile of `worker`: the first workers take one tile more than the others."""
    active = max(min(workers, tiles), 1)
    share = (tiles + active - 1) // active
    long = tiles - (share - 1) * active
    worker = min(worker, active)
    return min(worker, long) * share + max(worker - long, 0) * (share - 1)


@njit(cache=True, nogil=True)
def _write(
    output: int, m: Any, den: Any, o: Any, sink: Any, shape: Any, out: Any, lse: Any
) -> None:
    """Rows of `output` from their finished triple; the sink logit joins here."""
    pair, block = output // shape.blocks, _block(output, shape)
    b, head = pair % shape.batch, pair // shape.batch
    for r in range(min(shape.rows, shape.q_tokens * shape.group - block * shape.rows)):
        row = block * shape.rows + r
        token, h = row // shape.group, head * shape.group + row % shape.group
        top, total, keep = m[r], den[r], 1.0
        if sink.shape[0] and sink[h] > -np.inf:
            top = max(top, sink[h])
            keep = math.exp(m[r] - top)
            total = total * keep + math.exp(sink[h] - top)
        if total == 0:
            out[b, h, token], lse[b, h, token] = 0, -np.inf
        else:
            out[b, h, token] = o[r] * (keep / total)
            lse[b, h, token] = top + math.log(total)


@njit(cache=True, nogil=True, parallel=True)
def _run(
    q: Any, k: Any, v: Any, bias: Any, sink: Any, scale: Any, lengths: Any, index: Any, counts: Any,
    table: Any, shape: Any, workers: int, out: Any, lse: Any,
) -> None:  # fmt: skip
    base = _line(shape, lengths, counts)
    tiles = base[-1]
    # Slot 2g holds worker g's first triple if another hosts its output, 2g + 1 the one it hosts.
    m, den = (
        np.empty((2 * workers, shape.rows), q.dtype),
        np.empty((2 * workers, shape.rows), q.dtype),
    )
    o = np.empty((2 * workers, shape.rows, shape.dv), q.dtype)
    for worker in prange(workers):
        start, end = _share_start(worker, tiles, workers), _share_start(worker + 1, tiles, workers)
        output = int(np.searchsorted(base, start, side="right")) - 1
        while start < end:
            lo, hi = start - base[output], min(end, base[output + 1]) - base[output]
            slot = 2 * worker + (1 if lo == 0 else 0)
            _segment(output, lo, hi, q, k, v, bias, scale, lengths, index, counts, table, shape,
                     m[slot], den[slot], o[slot])  # fmt: skip
            if lo == 0 and base[output] + hi == base[output + 1]:
                _write(output, m[slot], den[slot], o[slot], sink, shape, out, lse)
            start = base[output] + hi
            output += 1
    _merge(base, workers, m, den, o, sink, shape, out, lse)


@njit(cache=True, nogil=True)
def _merge(
    base: Any, workers: int, m: Any, den: Any, o: Any, sink: Any, shape: Any, out: Any, lse: Any
) -> None:
    """Write the outputs that several workers share, and those without tiles."""
    for output in range(base.shape[0] - 1):
        if base[output] == base[output + 1]:
            empty = np.full(shape.rows, -np.inf, m.dtype)
            zero = np.zeros((shape.rows, shape.dv), o.dtype)
            _write(output, empty, zero[:, 0], zero, sink, shape, out, lse)
    for host in range(workers):
        end = _share_start(host + 1, base[-1], workers)
        start = _share_start(host, base[-1], workers)
        if start == end:
            continue
        output = int(np.searchsorted(base, end - 1, side="right")) - 1
        if base[output] < start or base[output + 1] <= end:
            continue
        top, total, sums = m[2 * host + 1], den[2 * host + 1], o[2 * host + 1]
        helper = host + 1
        while _share_start(helper, base[-1], workers) < base[output + 1]:
            for r in range(shape.rows):
                high = max(top[r], m[2 * helper, r])
                shift = 0.0 if high == -np.inf else high
                keep, add = math.exp(top[r] - shift), math.exp(m[2 * helper, r] - shift)
                top[r] = high
                total[r] = total[r] * keep + den[2 * helper, r] * add
                sums[r] = sums[r] * keep + o[2 * helper, r] * add
            helper += 1
        _write(output, top, total, sums, sink, shape, out, lse)


def _flat(x: Tensor, wide: Any) -> Cache:
    """`x` (four axes, any strides) as a `Cache`, without a copy."""
    x = x.detach()
    extent = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    line = torch.as_strided(x, (extent if x.numel() else 0,), (1,), x.storage_offset())
    halves = x.dtype in (torch.float16, torch.bfloat16)
    bits = line.view(torch.uint16).numpy() if halves else np.empty(0, np.uint16)
    return Cache(np.empty(0, wide) if halves else line.numpy(), bits, *x.stride())


def _array(x: Tensor | None, axes: int, dtype: torch.dtype) -> np.ndarray:
    """`x`, or nothing, as a contiguous array: one compiled kernel serves every layout."""
    x = torch.empty((0,) * axes) if x is None else x
    return x.detach().to(dtype).contiguous().numpy()


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    index: Tensor | None,
    counts: Tensor | None,
    block_table: Tensor | None,
    bias: Tensor | None,
    sink_logit: Tensor | None,
    scale: float,
    causal: bool,
    page: int,
    rows: int,
    tile: int,
    workers: int,
    paired: bool,
) -> tuple[Tensor, Tensor]:
    """out (B, H, Tq, dv) and lse (B, H, Tq); the arguments of `op.decode`, checked."""
    batch, heads, q_tokens, d = q.shape
    kv_heads, dv = k.shape[1], v.shape[3]
    pool = 0 if block_table is None else k.shape[2]
    k_tokens = k.shape[2] if block_table is None else block_table.shape[1] * pool
    wide = wide_dtype(q)
    out = torch.empty((batch, heads, q_tokens, dv), dtype=wide)
    lse = torch.empty((batch, heads, q_tokens), dtype=wide)
    if lse.numel() == 0:
        return out.to(q.dtype), lse
    if lengths is None:
        lengths = torch.tensor(k_tokens)
    elif lengths.dim() == 1:
        lengths = lengths[:, None]
    entries = 0 if index is None else index.shape[2]
    listed = torch.tensor(entries) if counts is None else counts
    packed = heads // kv_heads * q_tokens
    rows = min(packed, rows or ROWS)
    kinds = {torch.float16: FLOAT16, torch.bfloat16: BFLOAT16}
    shape = Shape(
        batch, kv_heads, heads // kv_heads, v.shape[1] // kv_heads, q_tokens, k_tokens, d, dv,
        page, entries, pool, k.shape[0], rows, -(-packed // rows), tile or TILE,
        causal and q_tokens > 1, paired, index is not None, kinds.get(q.dtype, NATIVE),
    )  # fmt: skip
    scalar = out.numpy().dtype.type
    count_launch()
    _run(
        _array(q, 4, wide), _flat(k, scalar), _flat(v, scalar), _array(bias, 3, wide),
        _array(sink_logit, 1, wide), scalar(scale),
        _array(lengths.expand(batch, kv_heads), 2, torch.int64), _array(index, 3, torch.int64),
        _array(listed.expand(batch, kv_heads), 2, torch.int64), _array(block_table, 2, torch.int64),
        shape, workers or numba.get_num_threads(), out.numpy(), lse.numpy(),
    )  # fmt: skip
    return out.to(q.dtype), lse


def prepare(*arguments: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """What serves every call of this kind: `forward` with the options of these arguments."""
    options = arguments[9:]
    return lambda *tensors: forward(*tensors, *options)
