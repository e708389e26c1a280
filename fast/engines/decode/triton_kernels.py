"""The decode engine's kernels: workers write whole outputs or partial triples, a merge joins."""

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.fast.engines.decode.triton_schedule import (
    cache_length,
    causal_end,
    locate,
    output_tiles,
    owner,
    query_block,
)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FLAT = ["batch", "kv_heads", "q_tokens", "k_tokens", "chosen", "rows"]
STRIDES = [f"{x}_{axis}" for x in ("q", "k", "v", "bias") for axis in "bhtd"[: 4 - (x == "bias")]]
STRIDES += ["index_b", "index_h", "table_b"]


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


@triton.jit(do_not_specialize=[*FLAT, "pages", *STRIDES])
def attend_kernel(
    q, k, v, out, lse, scratch, lengths, index, table, bias, sink,
    scale,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d,
    bias_b, bias_h, bias_t, index_b, index_h, table_b,
    batch, kv_heads, q_tokens, k_tokens, chosen, rows, pages,
    GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    PAGE: tl.constexpr, POOL: tl.constexpr, UNIT: tl.constexpr, ADJACENT: tl.constexpr,
    CAUSAL: tl.constexpr, PAIRED: tl.constexpr, PER_HEAD: tl.constexpr, GATHERED: tl.constexpr,
    UNIFORM: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """One worker: walks its stretch of the line, output by output."""
    worker = tl.program_id(0)
    workers = tl.num_programs(0)
    tiles, position, end, output, base = locate(
        worker, workers, lengths, batch, kv_heads, q_tokens, k_tokens, chosen,
        rows, N, GROUP, CAUSAL, PAIRED, PER_HEAD, GATHERED, UNIFORM, SPAN,
    )  # fmt: skip
    blocks = tl.cdiv(q_tokens * GROUP, rows)
    lane = tl.arange(0, M)
    channel, value = tl.arange(0, DP), tl.arange(0, DVP)
    if ADJACENT:
        k_channel, v_channel = channel, value
    else:
        k_channel, v_channel = channel.to(tl.int64) * k_d, value.to(tl.int64) * v_d
    hosted, last_helper = tl.full((), -1, tl.int32), tl.full((), -1, tl.int32)

    while position < end:
        n = output_tiles(
            output, lengths, output >= 0, batch, kv_heads, q_tokens, k_tokens, chosen,
            rows, N, GROUP, CAUSAL, PAIRED, PER_HEAD, GATHERED,
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

        q_at = q + b.to(tl.int64) * q_b + h.to(tl.int64) * q_h + token.to(tl.int64) * q_t
        q_tile = tl.load(
            q_at[:, None] + channel.to(tl.int64)[None, :] * q_d,
            mask=real[:, None] & (channel[None, :] < D),
            other=0.0,
        )
        if POOL > 0:
            k_at = k + head.to(tl.int64) * (k_h.to(tl.int64) * UNIT)
            v_at = v + head.to(tl.int64) * (v_h.to(tl.int64) * UNIT)
        else:
            k_at = (
                k
                + b.to(tl.int64) * (k_b.to(tl.int64) * UNIT)
                + head.to(tl.int64) * (k_h.to(tl.int64) * UNIT)
            )
            v_at = (
                v
                + b.to(tl.int64) * (v_b.to(tl.int64) * UNIT)
                + head.to(tl.int64) * (v_h.to(tl.int64) * UNIT)
            )

        m = tl.full([M], float("-inf"), tl.float32)
        den = tl.zeros([M], tl.float32)
        acc = tl.zeros([M, DVP], tl.float32)
        for tile in tl.range(lo, hi):
            slot = tile * N + tl.arange(0, N)
            if GATHERED:
                entry = tl.load(
                    index + b.to(tl.int64) * index_b + head.to(tl.int64) * index_h + slot // PAGE,
                    mask=slot < chosen,
                    other=-1,
                ).to(tl.int32)
                key = entry * PAGE + slot % PAGE
                seen = (entry >= 0) & (key < keys)
            else:
                key = slot
                seen = key < keys
            if bias is not None:
                gain = tl.load(
                    bias + b.to(tl.int64) * bias_b + head.to(tl.int64) * bias_h
                    + slot.to(tl.int64) * bias_t,
                    mask=seen,
                    other=float("-inf"),
                ).to(tl.float32)  # fmt: skip
                seen = seen & (gain > float("-inf"))
            if POOL > 0:
                page = tl.load(
                    table + b.to(tl.int64) * table_b + key // POOL, mask=seen, other=-1
                ).to(tl.int64)
                seen = seen & (page >= 0) & (page < pages)
                spot = (key % POOL).to(tl.int64)
                k_row = page * (k_b.to(tl.int64) * UNIT) + spot * (k_t.to(tl.int64) * UNIT)
                v_row = page * (v_b.to(tl.int64) * UNIT) + spot * (v_t.to(tl.int64) * UNIT)
            else:
                k_row = key.to(tl.int64) * (k_t.to(tl.int64) * UNIT)
                v_row = key.to(tl.int64) * (v_t.to(tl.int64) * UNIT)
            k_tile = tl.load(
                k_at + k_row[:, None] + k_channel[None, :],
                mask=seen[:, None] & (channel[None, :] < D),
                other=0.0,
            )
            scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
            if bias is not None:
                scores += gain[None, :] * LOG2E
            visible = seen[None, :]
            if CAUSAL:
                visible = visible & (key[None, :] <= newest[:, None])
            scores = tl.where(visible, scores, float("-inf"))
            top = tl.maximum(m, tl.max(scores, 1))
            shift = tl.where(top == float("-inf"), 0.0, top)
            weights = tl.exp2(scores - shift[:, None])
            keep = tl.exp2(m - shift)
            den = den * keep + tl.sum(weights, 1)
            v_tile = tl.load(
                v_at + v_row[:, None] + v_channel[None, :],
                mask=seen[:, None] & (value[None, :] < DV),
                other=0.0,
            )
            acc = tl.dot(
                weights.to(v_tile.dtype), v_tile, acc * keep[:, None], input_precision="ieee"
            )
            m = top

        inside = value[None, :] < DV
        if (lo == 0) & (hi == n):
            finished, log_sum = _finish(m, den, acc, tl.where(real, h, 0), sink)
            at = (b.to(tl.int64) * (kv_heads * GROUP) + h) * q_tokens + token
            tl.store(
                out + at[:, None] * DV + value[None, :],
                finished.to(out.dtype.element_ty),
                mask=real[:, None] & inside,
            )
            tl.store(lse + at, log_sum, mask=real)
        else:
            slots = 2 * workers * rows
            part = (2 * worker + tl.where(lo == 0, 1, 0)) * rows + lane
            tl.store(
                scratch + part[:, None] * DV + value[None, :], acc, mask=real[:, None] & inside
            )
            tl.store(scratch + slots * DV + part, m, mask=real)
            tl.store(scratch + slots * (DV + 1) + part, den, mask=real)
            if lo == 0:
                hosted = output
                last_helper = owner(base + n - 1, tiles, workers)
        base += n
        position = tl.minimum(base, end)
        output += 1

    record = scratch + 2 * workers * rows * (DV + 2) + 2 * worker
    tl.store(record, hosted.to(tl.float32, bitcast=True))
    tl.store(record + 1, last_helper.to(tl.float32, bitcast=True))


@triton.jit
def _write_row(
    m, den, acc, output, lane, out, lse, sink, batch, kv_heads, q_tokens, rows,
    GROUP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    PAIRED: tl.constexpr,
):  # fmt: skip
    """Row `lane` of `output`, if it is a real one, from its triple m [1], den [1], acc [1, DVP]."""
    blocks = tl.cdiv(q_tokens * GROUP, rows)
    row = query_block(output, blocks, PAIRED) * rows + lane
    if row < q_tokens * GROUP:
        pair = output // blocks
        b, head = pair % batch, pair // batch
        h = head * GROUP + row % GROUP
        finished, log_sum = _finish(m, den, acc, h, sink)
        at = (b.to(tl.int64) * (kv_heads * GROUP) + h) * q_tokens + row // GROUP
        value = tl.arange(0, DVP)[None, :]
        tl.store(out + at * DV + value, finished.to(out.dtype.element_ty), mask=value < DV)
        tl.store(lse + at + tl.arange(0, 1), log_sum)


@triton.jit(do_not_specialize=FLAT)
def merge_kernel(
    out, lse, scratch, lengths, sink,
    batch, kv_heads, q_tokens, k_tokens, chosen, rows,
    GROUP: tl.constexpr, N: tl.constexpr, DV: tl.constexpr,
    DVP: tl.constexpr, PARTS: tl.constexpr, CAUSAL: tl.constexpr, PAIRED: tl.constexpr,
    PER_HEAD: tl.constexpr, GATHERED: tl.constexpr,
):  # fmt: skip
    """Row `lane` of the output that `worker` hosts, and of the outputs without tiles."""
    worker, lane = tl.program_id(0), tl.program_id(1)
    workers = tl.num_programs(0)
    blocks = tl.cdiv(q_tokens * GROUP, rows)
    value = tl.arange(0, DVP)
    slots = 2 * workers * rows
    record = scratch + slots * (DV + 2) + 2 * worker
    output = tl.load(record).to(tl.int32, bitcast=True)
    last_helper = tl.load(record + 1).to(tl.int32, bitcast=True)

    if output >= 0:
        m = tl.full([1], float("-inf"), tl.float32)
        den = tl.zeros([1], tl.float32)
        acc = tl.zeros([1, DVP], tl.float32)
        for first in tl.range(0, last_helper - worker + 1, PARTS):
            part = first + tl.arange(0, PARTS)
            there = part <= last_helper - worker
            at = (2 * (worker + part) + tl.where(part == 0, 1, 0)) * rows + lane
            m_part = tl.load(scratch + slots * DV + at, mask=there, other=float("-inf"))
            den_part = tl.load(scratch + slots * (DV + 1) + at, mask=there, other=0.0)
            o_part = tl.load(
                scratch + at[:, None] * DV + value[None, :],
                mask=there[:, None] & (value[None, :] < DV),
                other=0.0,
            )
            top = tl.maximum(m, tl.max(m_part, 0))
            shift = tl.where(top == float("-inf"), 0.0, top)
            keep, weight = tl.exp2(m - shift), tl.exp2(m_part - shift)
            den = den * keep + tl.sum(den_part * weight, 0)
            acc = acc * keep[:, None] + tl.sum(o_part * weight[:, None], 0)[None, :]
            m = top
        _write_row(
            m, den, acc, output, lane, out, lse, sink, batch, kv_heads, q_tokens,
            rows, GROUP, DV, DVP, PAIRED,
        )  # fmt: skip

    for empty in tl.range(worker, batch * kv_heads * blocks, workers):
        n = output_tiles(
            empty, lengths, empty >= 0, batch, kv_heads, q_tokens, k_tokens, chosen,
            rows, N, GROUP, CAUSAL, PAIRED, PER_HEAD, GATHERED,
        )  # fmt: skip
        if n == 0:
            _write_row(
                tl.full([1], float("-inf"), tl.float32), tl.zeros([1], tl.float32),
                tl.zeros([1, DVP], tl.float32), empty, lane, out, lse, sink, batch, kv_heads,
                q_tokens, rows, GROUP, DV, DVP, PAIRED,
            )  # fmt: skip
