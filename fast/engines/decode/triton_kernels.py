"""The decode engine's kernel: workers write whole outputs or parts; who comes last joins these."""

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
    query_block,
)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
RUNTIME = ["batch", "kv_heads", "q_tokens", "k_tokens", "chosen", "rows", "pages"]
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


@triton.jit
def _join(
    output, first, last, workers, scratch, out, lse, sink, batch, kv_heads, q_tokens, rows,
    GROUP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, PAIRED: tl.constexpr,
    LANES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Merge the triples of workers `first`, which hosts `output`, to `last`, and write the rows.

    The order depends on the workers' numbers alone. The loads pass by the L1 cache, which is not
    coherent with the stores of other multiprocessors.
    """
    value = tl.arange(0, DVP)
    slots = 2 * workers * rows
    for row in tl.range(0, rows, LANES, num_stages=1):
        lane = row + tl.arange(0, LANES)
        m = tl.full([LANES], float("-inf"), tl.float32)
        den = tl.zeros([LANES], tl.float32)
        acc = tl.zeros([LANES, DVP], tl.float32)
        for start in tl.range(first, last + 1, PARTS, num_stages=1):
            part = start + tl.arange(0, PARTS)
            at = ((2 * part + tl.where(part == first, 1, 0)) * rows)[:, None] + lane[None, :]
            there = (part <= last)[:, None] & (lane < rows)[None, :]
            m_part = tl.load(
                scratch + slots * DV + at, mask=there, other=float("-inf"), cache_modifier=".cg"
            )
            den_part = tl.load(
                scratch + slots * (DV + 1) + at, mask=there, other=0.0, cache_modifier=".cg"
            )
            o_part = tl.load(
                scratch + at[:, :, None] * DV + value[None, None, :],
                mask=there[:, :, None] & (value < DV)[None, None, :],
                other=0.0,
                cache_modifier=".cg",
            )
            top = tl.maximum(m, tl.max(m_part, 0))
            shift = tl.where(top == float("-inf"), 0.0, top)
            keep, weight = tl.exp2(m - shift), tl.exp2(m_part - shift[None, :])
            den = den * keep + tl.sum(den_part * weight, 0)
            acc = acc * keep[:, None] + tl.sum(o_part * weight[:, :, None], 0)
            m = top
        _write(
            m, den, acc, output, lane, out, lse, sink, batch, kv_heads, q_tokens, rows,
            GROUP, DV, DVP, PAIRED,
        )  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME)
def attend_kernel(
    q, k, v, out, lse, scratch, arrivals, lengths, index, counts, table, bias, sink,
    scale,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d,
    bias_b, bias_h, bias_t, index_b, index_h, table_b,
    batch, kv_heads, q_tokens, k_tokens, chosen, rows, pages,
    GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    PAGE: tl.constexpr, POOL: tl.constexpr, UNIT: tl.constexpr, ADJACENT: tl.constexpr,
    CAUSAL: tl.constexpr, PAIRED: tl.constexpr, PER_HEAD: tl.constexpr, GATHERED: tl.constexpr,
    UNIFORM: tl.constexpr, SPAN: tl.constexpr, LANES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One worker: walks its stretch of the line, output by output.

    `arrivals` int32, one an output, is 0 before and after: it counts the workers that have stored
    their part of an output. Whoever comes last joins them; nobody waits.
    """
    worker = tl.program_id(0)
    workers = tl.num_programs(0)
    tiles, position, end, output, base = locate(
        worker, workers, lengths, counts, batch, kv_heads, q_tokens, k_tokens, chosen,
        rows, N, GROUP, CAUSAL, PAIRED, PER_HEAD, GATHERED, PAGE, UNIFORM, SPAN,
    )  # fmt: skip
    blocks = tl.cdiv(q_tokens * GROUP, rows)
    lane = tl.arange(0, M)
    channel, value = tl.arange(0, DP), tl.arange(0, DVP)
    if ADJACENT:
        k_channel, v_channel = channel, value
    else:
        k_channel, v_channel = channel.to(tl.int64) * k_d, value.to(tl.int64) * v_d

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
        if GATHERED:
            slots = listed_slots(counts, b, head, kv_heads, chosen, output >= 0, PAGE)

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
                    mask=slot < slots,
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
            first, last = owner(base, tiles, workers), owner(base + n - 1, tiles, workers)
            # One thread counts for the whole worker, so all have to have stored.
            tl.debug_barrier()
            if tl.atomic_add(arrivals + output, 1) == last - first:
                _join(
                    output, first, last, workers, scratch, out, lse, sink, batch, kv_heads,
                    q_tokens, rows, GROUP, DV, DVP, PAIRED, LANES, PARTS,
                )  # fmt: skip
                tl.store(arrivals + output, 0)
        base += n
        position = tl.minimum(base, end)
        output += 1

    for empty in tl.range(worker, batch * kv_heads * blocks, workers, num_stages=1):
        n = output_tiles(
            empty, lengths, counts, empty >= 0, batch, kv_heads, q_tokens, k_tokens, chosen,
            rows, N, GROUP, CAUSAL, PAIRED, PER_HEAD, GATHERED, PAGE,
        )  # fmt: skip
        if n == 0:
            _write(
                tl.full([M], float("-inf"), tl.float32), tl.zeros([M], tl.float32),
                tl.zeros([M, DVP], tl.float32), empty, lane, out, lse, sink, batch, kv_heads,
                q_tokens, rows, GROUP, DV, DVP, PAIRED,
            )  # fmt: skip
