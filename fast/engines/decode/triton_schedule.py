"""Where the workers of a stream-K line start and stop, worked out on the device.

The line lays the key tiles of all outputs end to end; `workers` walk equal stretches of it. An
output is one block of packed query rows of one (kv head, batch entry).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def share_start(worker, tiles, workers):
    """First tile of `worker`: the first workers take one tile more than the others."""
    active = tl.maximum(tl.minimum(workers, tiles), 1)
    share = tl.cdiv(tiles, active)
    long = tiles - (share - 1) * active
    worker = tl.minimum(worker, active)
    return tl.minimum(worker, long) * share + tl.maximum(worker - long, 0) * (share - 1)


@triton.jit
def owner(tile, tiles, workers):
    """The worker whose stretch holds `tile`; any on a line without tiles."""
    active = tl.maximum(tl.minimum(workers, tiles), 1)
    share = tl.cdiv(tiles, active)
    long = tiles - (share - 1) * active
    beyond = tile - long * share
    return tl.where(
        beyond < 0, tile // tl.maximum(share, 1), long + beyond // tl.maximum(share - 1, 1)
    )


@triton.jit
def query_block(output, blocks, PAIRED: tl.constexpr):
    """Query block of `output`; in the paired order 0, last, 1, last - 1, ..."""
    i = output % blocks
    if PAIRED:
        i = tl.where(i % 2 == 0, i // 2, blocks - 1 - i // 2)
    return i


@triton.jit
def cache_length(lengths, b, head, kv_heads, k_tokens, mask, PER_HEAD: tl.constexpr):
    """Keys in the cache of (b, head), never more than it can hold."""
    if lengths is None:
        length = k_tokens + b * 0
    else:
        at = b * kv_heads + head if PER_HEAD else b
        length = tl.load(lengths + at, mask=mask, other=0).to(tl.int32)
        length = tl.minimum(tl.maximum(length, 0), k_tokens)
    return length


@triton.jit
def listed_slots(counts, b, head, kv_heads, chosen, mask, PAGE: tl.constexpr):
    """Slots of the list of (b, head): those of its first `counts` entries, or all `chosen`."""
    if counts is None:
        slots = chosen + b * 0
    else:
        entries = tl.load(counts + b * kv_heads + head, mask=mask, other=0)
        slots = tl.minimum(tl.maximum(entries, 0), chosen // PAGE).to(tl.int32) * PAGE
    return slots


@triton.jit
def causal_end(length, block, q_tokens, rows, GROUP: tl.constexpr):
    """One past the last key that the last row of query block `block` sees (K3)."""
    last = tl.minimum((block + 1) * rows, q_tokens * GROUP) - 1
    end = length - q_tokens + last // GROUP + 1
    return tl.minimum(tl.maximum(end, 0), length)


@triton.jit
def output_tiles(
    output,
    lengths, counts, mask, batch, kv_heads, q_tokens, k_tokens, chosen, rows,
    N: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, PAIRED: tl.constexpr,
    PER_HEAD: tl.constexpr, GATHERED: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Key tiles of `output` (a scalar or a block of them); outputs off `mask` have none."""
    blocks = tl.cdiv(q_tokens * GROUP, rows)
    pair = output // blocks
    b, head = pair % batch, pair // batch
    if GATHERED:
        keys = listed_slots(counts, b, head, kv_heads, chosen, mask, PAGE)
    else:
        keys = cache_length(lengths, b, head, kv_heads, k_tokens, mask, PER_HEAD)
        if CAUSAL:
            keys = causal_end(keys, query_block(output, blocks, PAIRED), q_tokens, rows, GROUP)
    return tl.where(mask, tl.cdiv(keys, N), 0)


@triton.jit
def scan(
    output,
    lengths, counts, batch, kv_heads, q_tokens, k_tokens, chosen, rows,
    N: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, PAIRED: tl.constexpr,
    PER_HEAD: tl.constexpr, GATHERED: tl.constexpr, PAGE: tl.constexpr,
    SPAN: tl.constexpr,
):  # fmt: skip
    """Where outputs differ in their tiles: how many are scanned, SPAN at a time, how often the line
    repeats these, how many tiles they have, and where `output` starts on the line.

    Where tiles do not depend on the kv head, one head's outputs are scanned and the others repeat
    them.
    """
    outputs, repeats = batch * tl.cdiv(q_tokens * GROUP, rows), kv_heads
    if PER_HEAD or counts is not None:
        outputs = outputs * kv_heads
        repeats = 1
    head, within = output // outputs, output % outputs
    lanes = tl.arange(0, SPAN)
    span, before = 0, 0
    for first in tl.range(0, outputs, SPAN, num_stages=1):
        n = output_tiles(
            first + lanes, lengths, counts, first + lanes < outputs, batch, kv_heads, q_tokens,
            k_tokens, chosen, rows, N, GROUP, CAUSAL, PAIRED, PER_HEAD, GATHERED, PAGE,
        )  # fmt: skip
        span += tl.sum(n, 0)
        before += tl.sum(tl.where(first + lanes < within, n, 0), 0)
    return outputs, repeats, span, head * span + before


@triton.jit
def locate(
    worker, workers,
    lengths, counts, batch, kv_heads, q_tokens, k_tokens, chosen, rows,
    N: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, PAIRED: tl.constexpr,
    PER_HEAD: tl.constexpr, GATHERED: tl.constexpr, PAGE: tl.constexpr,
    UNIFORM: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """The stretch of `worker`: its start and end, its first output and where that one starts.

    UNIFORM: all outputs have equally many tiles, so a division finds the output. Otherwise the
    outputs are scanned.
    """
    if UNIFORM:
        outputs = batch * tl.cdiv(q_tokens * GROUP, rows)
        each = output_tiles(
            0, lengths, counts, worker >= 0, batch, kv_heads, q_tokens, k_tokens, chosen,
            rows, N, GROUP, CAUSAL, PAIRED, PER_HEAD, GATHERED, PAGE,
        )  # fmt: skip
        tiles = each * outputs * kv_heads
        start = share_start(worker, tiles, workers)
        output = start // tl.maximum(each, 1)
        base = output * each
    else:
        outputs, repeats, span, _ = scan(
            0, lengths, counts, batch, kv_heads, q_tokens, k_tokens, chosen,
            rows, N, GROUP, CAUSAL, PAIRED, PER_HEAD, GATHERED, PAGE, SPAN,
        )  # fmt: skip
        tiles = span * repeats
        start = share_start(worker, tiles, workers)
        head = start // tl.maximum(span, 1)
        within = start - head * span
        output = head * outputs
        base = head * span
        before = 0
        lanes = tl.arange(0, SPAN)
        for first in tl.range(0, outputs, SPAN, num_stages=1):
            n = output_tiles(
                first + lanes, lengths, counts, first + lanes < outputs, batch, kv_heads, q_tokens,
                k_tokens, chosen, rows, N, GROUP, CAUSAL, PAIRED, PER_HEAD, GATHERED, PAGE,
            )  # fmt: skip
            end = before + tl.cumsum(n, 0)
            passed = end <= within
            output += tl.sum((passed & (first + lanes < outputs)).to(tl.int32), 0)
            base += tl.sum(tl.where(passed, n, 0), 0)
            before += tl.sum(n, 0)
    return start, share_start(worker + 1, tiles, workers), output, base


@triton.jit
def place(
    output,
    lengths, counts, batch, kv_heads, q_tokens, k_tokens, chosen, rows,
    N: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, PAIRED: tl.constexpr,
    PER_HEAD: tl.constexpr, GATHERED: tl.constexpr, PAGE: tl.constexpr,
    UNIFORM: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Tiles of the whole line, where `output` starts on it and how many tiles are its own; UNIFORM
    and SPAN as for `locate`.
    """
    own = output_tiles(
        output, lengths, counts, output >= 0, batch, kv_heads, q_tokens, k_tokens, chosen,
        rows, N, GROUP, CAUSAL, PAIRED, PER_HEAD, GATHERED, PAGE,
    )  # fmt: skip
    if UNIFORM:
        outputs = batch * tl.cdiv(q_tokens * GROUP, rows)
        tiles, base = own * outputs * kv_heads, own * output
    else:
        _, repeats, span, base = scan(
            output, lengths, counts, batch, kv_heads, q_tokens, k_tokens, chosen,
            rows, N, GROUP, CAUSAL, PAIRED, PER_HEAD, GATHERED, PAGE, SPAN,
        )  # fmt: skip
        tiles = span * repeats
    return tiles, base, own
