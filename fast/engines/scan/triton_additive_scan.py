"""The scan of an additive recurrence in Triton, straight from its logits.

With T_t = sum of e^(k_s) over s <= t, a block that is entered by T_0 and left by T_n needs no gate:
its decays up to row t are T_0 / T_t, its keys weigh e^(k_t) / T_n behind it, and the pair (i, j)
weighs e^(k_j) / T_i, split in two factors by sqrt(T_0 T_n). So gates are never written, except for
blocks that are steep (or the first of a sequence): these go the way of any decay per channel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnspec.fast.engines.scan.configs import REACH
from attnspec.fast.engines.scan.triton_additive import Totals, spread
from attnspec.fast.engines.scan.triton_common import load_tile, locate, offset, store_tile
from attnspec.fast.engines.scan.triton_levels import LOG2E, fits, group_pairs
from attnspec.fast.engines.scan.triton_plan import (
    Call,
    Weighted,
    enter,
    power,
    walk,
    weigh_steep,
    weighted_rows,
)
from attnspec.fast.engines.scan.triton_widths import tiled

MOST_REACH = 60.0
"""A sum of e^k keeps what is e^-60 of it with all digits, far from float32's least number."""


@triton.jit(
    do_not_specialize=["segments", "length", "tokens", "slots", "q_b", "q_h", "k_b", "k_h"]
)  # fmt: skip
def additive_pairs_kernel(
    q, q_b, q_h, q_t, q_d, k, k_b, k_h, k_t, k_d, tops, sums, pairs, q_weighted, k_weighted, totals,
    steep, scale, segments, length, tokens, heads, slots,
    D: tl.constexpr, BC: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, REACH: tl.constexpr,
    ALIGNED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """As `pairs_kernel`, for one block of logits k and the maxima and sums (batch, heads, slots, D)
    that enter the blocks.
    """
    ragged: tl.constexpr = D % BC != 0
    program = tl.program_id(0)
    head = (program % heads).to(tl.int64)
    block = program // heads
    blocks_per_segment = tl.cdiv(length, C)
    segment = block // blocks_per_segment
    _, batch, start, count, _, _ = locate(q, segment, segments, length, tokens, False)
    skipped = (block % blocks_per_segment) * C
    left = count - skipped
    if left <= 0:
        tl.store(steep + program, 0)
        return
    start += skipped
    q += offset(batch, q_b, head, q_h, start, q_t, ALIGNED)
    k += offset(batch, k_b, head, k_h, start, k_t, ALIGNED)
    row = (batch * heads + head) * tokens + start
    entered = ((batch * heads + head) * slots + start // C) * D
    inside = (tl.arange(0, C) < left)[:, None]
    channels = tl.arange(0, BC)
    P = tl.zeros((C, C), tl.float32)
    gentle = left > 0
    for channel in range(0, D, BC):
        width = D - channel
        wide = tl.cast(channel, tl.int64)
        Q = load_tile(q + wide * q_d, q_t, q_d, left, width, C, BC, ragged, WIDE)
        K = load_tile(k + wide * k_d, k_t, k_d, left, width, C, BC, ragged, WIDE).to(tl.float32)
        K = tl.where(inside, K, float("-inf"))
        at = entered + channel + channels
        top = tl.load(tops + at, mask=channels < width, other=0.0)
        first = tl.load(sums + at, mask=channels < width, other=1.0)
        base = spread(tl.maximum(top, tl.max(K, 0)))
        first *= tl.exp(top - base)
        E = tl.exp2(K * LOG2E - (base * LOG2E)[None, :])
        running = first[None, :] + tl.cumsum(E, 0)
        last = 1.0 / (first + tl.sum(E, 0))
        decay = first * last
        total = tl.log(decay)
        gentle = gentle & fits(total, REACH)
        half = tl.rsqrt(decay)
        shared = Q / running
        Q_risen = (shared * (first * half)[None, :]).to(Q.dtype)
        K_fallen = (E * (last * half)[None, :]).to(Q.dtype)
        P = tl.dot(Q_risen, tl.trans(K_fallen), P)
        here = row * D + channel
        Q_weighted = shared * (first * scale)[None, :]
        store_tile(q_weighted + here, D, Q_weighted, left, width, C, BC, ragged)
        store_tile(k_weighted + here, D, E * last[None, :], left, width, C, BC, ragged)
        at = (block.to(tl.int64) * heads + head) * D + channel + channels
        tl.store(totals + at, total, mask=channels < width)
    P = tl.where(group_pairs(LEVELS, C), P * scale, 0.0)
    store_tile(pairs + row * C, C, P, left, C, C, C, False)
    tl.store(steep + program, (~gentle).to(tl.int8))


def forward(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, z0: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """o (batch, heads, tokens, dv), the last S (batch, heads, d, dv) and z (batch, heads, d).

    q and k (batch, heads, tokens, d) and v (batch, heads, tokens, dv) of a 16-bit dtype, a token or
    more, widths multiples of 16.
    """
    q, k, v = tiled(q, k, v)
    log_decay = torch.empty(k.shape, dtype=torch.float32, device=k.device)
    call = Call.plan(q, v, q.shape[1], None, log_decay, None, scale, 0)
    final = call.last_states(None, None)
    entered = Totals.of(k, z0, call.block)
    weighted = _weigh(call, q, k, entered, log_decay)
    state = None if state is None else state.contiguous()
    entering = enter(call, weighted.k, v, state, weighted.totals)
    out, _ = walk(
        call, weighted.q, weighted.k, v, entering, call.dtype, final=final, weighted=weighted,
        pairs=True,
    )  # fmt: skip
    return out, final, entered.z


def _weigh(call: Call, q: Tensor, k: Tensor, entered: Totals, log_decay: Tensor) -> Weighted:
    """As `weigh`, from logits; gates are written where a block is steep."""
    made = weighted_rows(call)
    kbar = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    slots = entered.tops.shape[2]
    call.recorder.launch(
        additive_pairs_kernel, made.totals.shape[0] * call.heads,
        q, *q.stride(), k, *k.stride(), entered.tops, entered.sums,
        made.pairs, made.q, made.k, made.totals, made.steep, call.scale, *call.place(), slots,
        D=call.d, BC=min(call.cfg.logits_tile, power(call.d)), C=call.block,
        LEVELS=call.block.bit_length() - 1, REACH=min(REACH[call.dtype], MOST_REACH),
        **call.layout(q, k), num_warps=call.cfg.logits_warps, num_stages=1,
        maxnreg=call.cfg.logits_registers,
    )  # fmt: skip
    blocks = made.totals.shape[0] // call.batch
    entered.write(kbar, log_decay, made.steep, blocks)
    weigh_steep(call, q, kbar, made)
    return made
