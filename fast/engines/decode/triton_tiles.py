"""The decode engine's loop: key tiles of one output, added up as a triple."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def attend_tiles(
    lo, hi, q_tile, k_at, v_at, next_v, part, ends, strides, at_list, at_bias, at_table, pages,
    scale,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr,
    DVP: tl.constexpr, PAGE: tl.constexpr, POOL: tl.constexpr, UNIT: tl.constexpr,
    ADJACENT: tl.constexpr, CAUSAL: tl.constexpr, GATHERED: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """m, den [M] and acc [M, DVP], in base 2, of tiles lo .. hi - 1.

    The values of the next head are `next_v` elements on, and `part` is the head that a row takes,
    of SHARE. ends = (keys, slots of the list, the newest key that a row sees).
    """
    keys, slots, newest = ends
    k_b, k_t, k_d, v_b, v_t, v_d, bias_t = strides
    channel, value = tl.arange(0, DP), tl.arange(0, DVP)
    if ADJACENT:
        k_channel, v_channel = channel, value
    else:
        k_channel, v_channel = channel.to(tl.int64) * k_d, value.to(tl.int64) * v_d
    m = tl.full([M], float("-inf"), tl.float32)
    # Sums of few rows meet at the end: every meeting of warps costs more than the numbers.
    LATE: tl.constexpr = M <= 16
    if LATE:
        den = tl.zeros([M, N], tl.float32)
    else:
        den = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, DVP], tl.float32)
    for tile in tl.range(lo, hi):
        slot = tile * N + tl.arange(0, N)
        if GATHERED:
            entry = tl.load(at_list + slot // PAGE, mask=slot < slots, other=-1).to(tl.int32)
            key = entry * PAGE + slot % PAGE
            seen = (entry >= 0) & (key < keys)
        else:
            key = slot
            seen = key < keys
        if at_bias is not None:
            gain = tl.load(
                at_bias + slot.to(tl.int64) * bias_t, mask=seen, other=float("-inf")
            ).to(tl.float32)  # fmt: skip
            seen = seen & (gain > float("-inf"))
        if POOL > 0:
            page = tl.load(at_table + key // POOL, mask=seen, other=-1).to(tl.int64)
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
        if at_bias is not None:
            scores += gain[None, :] * LOG2E
        visible = seen[None, :]
        if CAUSAL:
            visible = visible & (key[None, :] <= newest[:, None])
        scores = tl.where(visible, scores, float("-inf"))
        top = tl.maximum(m, tl.max(scores, 1))
        shift = tl.where(top == float("-inf"), 0.0, top)
        weights = tl.exp2(scores - shift[:, None])
        keep = tl.exp2(m - shift)
        if LATE:
            den = den * keep[:, None] + weights
        else:
            den = den * keep + tl.sum(weights, 1)
        acc = acc * keep[:, None]
        for j in tl.static_range(SHARE):
            v_tile = tl.load(
                v_at + j * next_v + v_row[:, None] + v_channel[None, :],
                mask=seen[:, None] & (value[None, :] < DV),
                other=0.0,
            )
            own = weights
            if SHARE > 1:
                own = tl.where((part == j)[:, None], weights, 0.0)
            acc = tl.dot(own.to(v_tile.dtype), v_tile, acc, input_precision="ieee")
        m = top
    if LATE:
        den = tl.sum(den, 1)
    return m, den, acc
