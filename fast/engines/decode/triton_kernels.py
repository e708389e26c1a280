"""The decode engine's kernels: workers write outputs or parts, and a second launch joins parts."""

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.fast.engines.decode.triton_schedule import (
    cache_length,
    causal_end,
    listed_slots,
    locate,
    output_tiles,
    owner,
    place,
    query_block,
)
from attnspec.fast.engines.decode.triton_tiles import LOG2E, attend_tiles
from attnspec.fast.engines.flash.triton_visible import has_nan

LN2 = tl.constexpr(0.6931471805599453)
RUNTIME = ["workers", "batch", "kv_heads", "q_tokens", "k_tokens", "chosen", "rows", "pages"]
RUNTIME += [f"{x}_{axis}" for x in ("q", "k", "v", "bias") for axis in "bhtd"[: 4 - (x == "bias")]]
RUNTIME += ["index_b", "index_h", "table_b"]


@triton.jit
def _finish(m, den, acc, h, sink):
    """out and natural-log lse of triples in base 2; the sink logit of head `h` joins here."""
    if sink is not None:
        logit = tl.load(sink + h).to(tl.float32) * LOG2E
        top = tl.maximum(m, logit)
        shift = tl.where(top == float("-inf"), 0.0, top)
        keep = tl.exp2(m - shift)
        den = den * keep + tl.exp2(logit - shift)
        acc = acc * keep[:, None]
        m = top
    empty = den == 0.0
    out = acc / tl.where(empty, 1.0, den)[:, None]
    lse = tl.where(empty, float("-inf"), (m + tl.log2(tl.where(empty, 1.0, den))) * LN2)
    return out, lse


@triton.jit
def _write(
    m, den, acc, output, lane, out, lse, sink, batch, kv_heads, q_tokens, rows,
    GROUP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, PAIRED: tl.constexpr,
):  # fmt: skip
    """The real ones of rows `lane` of `output`, from their triples m, den [L], acc [L, DVP]."""
    blocks = tl.cdiv(q_tokens * GROUP, rows)
    row = query_block(output, blocks, PAIRED) * rows + lane
    real = (lane < rows) & (row < q_tokens * GROUP)
    pair = output // blocks
    b, head = pair % batch, pair // batch
    h = tl.where(real, head * GROUP + row % GROUP, 0)
    finished, log_sum = _finish(m, den, acc, h, sink)
    at = (b.to(tl.int64) * (kv_heads * GROUP) + h) * q_tokens + row // GROUP
    value = tl.arange(0, DVP)
    tl.store(
        out + at[:, None] * DV + value[None, :],
        finished.to(out.dtype.element_ty),
        mask=real[:, None] & (value[None, :] < DV),
    )
    tl.store(lse + at, log_sum, mask=real)


@triton.jit(do_not_specialize=RUNTIME)
def attend_kernel(
    q, k, v, out, lse, scratch, lengths, index, counts, table, bias, sink,
    scale,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d,
    bias_b, bias_h, bias_t, index_b, index_h, table_b,
    batch, kv_heads, q_tokens, k_tokens, chosen, rows, pages,
    GROUP: tl.constexpr, SHARE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    PAGE: tl.constexpr, POOL: tl.constexpr, UNIT: tl.constexpr, ADJACENT: tl.constexpr,
    CAUSAL: tl.constexpr, PAIRED: tl.constexpr, PER_HEAD: tl.constexpr, GATHERED: tl.constexpr,
    UNIFORM: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """One worker: walks its stretch of the line, output by output. Outputs without a tile are not
    on it, and are left to `join_kernel`.

    A key head serves GROUP query heads and SHARE value heads, and these serve a part of them each.
    Parts of an output wait for that kernel in `scratch`: a worker has two at most, the last rows
    of the output that it enters and the first ones of the output that it leaves.
    """
    worker = tl.program_id(0)
    workers = tl.num_programs(0)
    position, end, output, base = locate(
        worker, workers, lengths, counts, batch, kv_heads, q_tokens, k_tokens, chosen,
        rows, N, GROUP, CAUSAL, PAIRED, PER_HEAD, GATHERED, PAGE, UNIFORM, SPAN,
    )  # fmt: skip
    blocks = tl.cdiv(q_tokens * GROUP, rows)
    lane = tl.arange(0, M)
    channel, value = tl.arange(0, DP), tl.arange(0, DVP)

    while position < end:
        n = output_tiles(
            output, lengths, counts, output >= 0, batch, kv_heads, q_tokens, k_tokens, chosen,
            rows, N, GROUP, CAUSAL, PAIRED, PER_HEAD, GATHERED, PAGE,
        )  # fmt: skip
        lo, hi = position - base, tl.minimum(n, end - base)
        pair, block = output // blocks, query_block(output, blocks, PAIRED)
        b, head = pair % batch, pair // batch
        row = block * rows + lane
        real = (lane < rows) & (row < q_tokens * GROUP)
        token, h = row // GROUP, head * GROUP + row % GROUP
        length = cache_length(lengths, b, head, kv_heads, k_tokens, output >= 0, PER_HEAD)
        keys = length
        if CAUSAL:
            keys = causal_end(length, block, q_tokens, rows, GROUP)
        newest = length - q_tokens + token
        slots = listed_slots(counts, b, head, kv_heads, chosen, output >= 0, PAGE)

        q_at = q + b.to(tl.int64) * q_b + h.to(tl.int64) * q_h + token.to(tl.int64) * q_t
        q_tile = tl.load(
            q_at[:, None] + channel.to(tl.int64)[None, :] * q_d,
            mask=real[:, None] & (channel[None, :] < D),
            other=0.0,
        )
        if POOL > 0:
            k_at = k + head.to(tl.int64) * (k_h.to(tl.int64) * UNIT)
            v_at = v + head.to(tl.int64) * (SHARE * v_h.to(tl.int64) * UNIT)
        else:
            k_at = (
                k
                + b.to(tl.int64) * (k_b.to(tl.int64) * UNIT)
                + head.to(tl.int64) * (k_h.to(tl.int64) * UNIT)
            )
            v_at = (
                v
                + b.to(tl.int64) * (v_b.to(tl.int64) * UNIT)
                + head.to(tl.int64) * (SHARE * v_h.to(tl.int64) * UNIT)
            )

        at_list, at_bias, at_table = index, bias, table
        if GATHERED:
            at_list = index + b.to(tl.int64) * index_b + head.to(tl.int64) * index_h
        if bias is not None:
            at_bias = bias + b.to(tl.int64) * bias_b + head.to(tl.int64) * bias_h
        if POOL > 0:
            at_table = table + b.to(tl.int64) * table_b
        part = row % GROUP // (GROUP // SHARE)
        next_v = v_h.to(tl.int64) * UNIT
        ends = (keys, slots, newest)
        strides = (k_b, k_t, k_d, v_b, v_t, v_d, bias_t)
        m, den, acc = attend_tiles(
            lo, hi, q_tile, k_at, v_at, next_v, part, ends, strides, at_list, at_bias, at_table,
            pages, scale, M, N, D, DV, DP, DVP, PAGE, POOL, UNIT, ADJACENT, CAUSAL, GATHERED, SHARE,
        )  # fmt: skip
        if SHARE > 1:
            # The product spreads 0 * NaN to rows of other value heads: then one head at a time.
            again = tl.where(has_nan(acc), SHARE, 0)
            for j in tl.range(again):
                _, _, alone = attend_tiles(
                    lo, hi, q_tile, k_at, v_at + j * next_v, next_v, part, ends, strides, at_list,
                    at_bias, at_table, pages, scale, M, N, D, DV, DP, DVP, PAGE, POOL, UNIT,
                    ADJACENT, CAUSAL, GATHERED, 1,
                )  # fmt: skip
                acc = tl.where((part == j)[:, None], alone, acc)

        if (lo == 0) & (hi == n):
            _write(
                m, den, acc, output, lane, out, lse, sink, batch, kv_heads, q_tokens, rows,
                GROUP, DV, DVP, PAIRED,
            )  # fmt: skip
        else:
            parts = 2 * workers * rows
            part = (2 * worker + tl.where(lo == 0, 1, 0)) * rows + lane
            stored = lane < rows
            tl.store(
                scratch + part[:, None] * DV + value[None, :],
                acc,
                mask=stored[:, None] & (value[None, :] < DV),
            )
            tl.store(scratch + parts * DV + part, m, mask=stored)
            tl.store(scratch + parts * (DV + 1) + part, den, mask=stored)
        base += n
        position = tl.minimum(base, end)
        output += 1


@triton.jit(do_not_specialize=RUNTIME)
def join_kernel(
    scratch, out, lse, lengths, counts, sink,
    k_tokens, workers, batch, kv_heads, q_tokens, chosen, rows,
    GROUP: tl.constexpr, N: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, PAGE: tl.constexpr,
    CAUSAL: tl.constexpr, PAIRED: tl.constexpr, PER_HEAD: tl.constexpr, GATHERED: tl.constexpr,
    UNIFORM: tl.constexpr, SPAN: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One row of an output that several workers share, or none: their triples merged, in order."""
    output, lane = tl.program_id(0) // rows, tl.program_id(0) % rows
    tiles, base, n = place(
        output, lengths, counts, batch, kv_heads, q_tokens, k_tokens, chosen,
        rows, N, GROUP, CAUSAL, PAIRED, PER_HEAD, GATHERED, PAGE, UNIFORM, SPAN,
    )  # fmt: skip
    first, last = owner(base, tiles, workers), owner(base + tl.maximum(n, 1) - 1, tiles, workers)
    if (n == 0) | (first < last):
        value = tl.arange(0, DVP)
        slots = 2 * workers * rows
        m = tl.full([1], float("-inf"), tl.float32)
        den = tl.zeros([1], tl.float32)
        acc = tl.zeros([1, DVP], tl.float32)
        for start in tl.range(first, tl.where(n == 0, first, last + 1), PARTS, num_stages=1):
            part = start + tl.arange(0, PARTS)
            there = part <= last
            at = (2 * part + tl.where(part == first, 1, 0)) * rows + lane
            m_part = tl.load(scratch + slots * DV + at, mask=there, other=float("-inf"))
            den_part = tl.load(scratch + slots * (DV + 1) + at, mask=there, other=0.0)
            o_part = tl.load(
                scratch + at[:, None] * DV + value[None, :],
                mask=there[:, None] & (value < DV)[None, :],
                other=0.0,
            )
            top = tl.maximum(m, tl.max(m_part, 0))
            shift = tl.where(top == float("-inf"), 0.0, top)
            keep, weight = tl.exp2(m - shift), tl.exp2(m_part - shift)
            den = den * keep + tl.sum(den_part * weight, 0)
            acc = acc * keep[:, None] + tl.sum(o_part * weight[:, None], 0)[None, :]
            m = top
        _write(
            m, den, acc, output, lane + tl.arange(0, 1), out, lse, sink, batch, kv_heads, q_tokens,
            rows, GROUP, DV, DVP, PAIRED,
        )  # fmt: skip
