"""The scan of an additive recurrence in Triton, straight from its logits.

With T_t = sum of e^(k_s) over s <= t, a block that is entered by T_0 and left by T_n needs no gate:
its decays up to row t are T_0 / T_t, its keys weigh e^(k_t) / T_n behind it, and the pair (i, j)
weighs e^(k_j) / T_i, split in two factors by sqrt(T_0 T_n). So gates are never written, except for
blocks that are steep: these go the way of any decay per channel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnspec.fast.backend import interpreting
from attnspec.fast.engines.prepared import HANDS_ON_CONSTANTS
from attnspec.fast.engines.scan.configs import REACH
from attnspec.fast.engines.scan.replay import kind, known
from attnspec.fast.engines.scan.triton_additive import Totals
from attnspec.fast.engines.scan.triton_common import (
    LOG2E,
    load_tile,
    locate_block,
    offset,
    reciprocal,
    store_tile,
)
from attnspec.fast.engines.scan.triton_levels import group_pairs
from attnspec.fast.engines.scan.triton_plan import (
    Call,
    Weighted,
    enter,
    prepare,
    walk,
)
from attnspec.fast.engines.scan.triton_weigh import weigh_steep, weighted_rows
from attnspec.fast.engines.scan.triton_widths import tiled
from attnspec.fast.engines.sizes import tile_width

MOST_REACH = 60.0
"""A sum of e^k keeps what is e^-60 of it with all digits, far from float32's least number."""
BLOCKS = 8
"""Blocks of a program that finds their weights."""


@triton.jit(do_not_specialize=["k_b", "k_h", "segments", "blocks"])
def blocks_kernel(
    k, k_b, k_h, k_t, k_d, tops, sums, middles, before, first, last, totals, steep, segments,
    heads, blocks,
    D: tl.constexpr, BC: tl.constexpr, C: tl.constexpr, REACH: tl.constexpr, MANY: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """What weighs the rows of MANY blocks of C rows, from the maxima and sums that enter them and
    leave the last: sqrt(T_0 T_n) as a power of 2, and in units of it T_0, that from which the block
    decays, and 1 / T_n; each (batch, heads, segments, D). And the blocks' log decays, and whether
    they are steep, of (batch, blocks, heads).

    What nothing precedes decays from its first key on, as if that had been there before, so that
    its decay is 1. Channels without any key do not decay.
    """
    parts = tl.cdiv(blocks, MANY)
    program = tl.program_id(0)
    row = (program // parts).to(tl.int64)
    batch, head = row // heads, row % heads
    block = (program % parts) * MANY + tl.arange(0, MANY)
    channels = tl.arange(0, BC)[None, :]
    inside = (block < segments)[:, None] & (channels < D)
    here = block.to(tl.int64)[:, None]
    at = (row * (segments + 1) + here) * D + channels
    top = tl.load(tops + at, mask=inside, other=0.0) * LOG2E
    total = tl.load(sums + at, mask=inside, other=1.0)
    later_top = tl.load(tops + at + D, mask=inside, other=0.0) * LOG2E
    later = tl.load(sums + at + D, mask=inside, other=1.0)
    k += offset(batch, k_b, head, k_h, 0, k_t, ALIGNED) + here * C * k_t
    new = tl.load(k + channels.to(tl.int64) * k_d, mask=inside, other=0.0).to(tl.float32) * LOG2E
    fresh, empty = total == 0.0, later == 0.0
    top, total = tl.where(fresh, new, top), tl.where(fresh, 1.0, total)
    middle = tl.where(empty, 0.0, 0.5 * (top + later_top + tl.log2(total * later)))
    begun = total * tl.exp2(top - middle)
    begun = tl.where(empty, 1.0, begun)
    ended = tl.where(empty, 1.0, later * tl.exp2(later_top - middle))
    decay = tl.log(begun / ended)
    out = (row * segments + here) * D + channels
    tl.store(middles + out, middle, mask=inside)
    tl.store(before + out, tl.where(fresh & ~empty, 0.0, begun), mask=inside)
    tl.store(first + out, begun, mask=inside)
    tl.store(last + out, 1.0 / ended, mask=inside)
    flags = (batch * blocks + block) * heads + head
    tl.store(totals + flags[:, None] * D + channels, decay, mask=inside)
    gentle = tl.min((~inside | (decay >= -REACH)).to(tl.int32), 1)
    tl.store(steep + flags, (1 - gentle).to(tl.int8), mask=block < blocks)


@triton.jit(
    do_not_specialize=["segments", "length", "tokens", "q_b", "q_h", "k_b", "k_h"]
)  # fmt: skip
def additive_pairs_kernel(
    q, q_b, q_h, q_t, q_d, k, k_b, k_h, k_t, k_d, middles, before, first, last, pairs, q_weighted,
    k_weighted, scale, segments, length, tokens, heads,
    D: tl.constexpr, BC: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    ALIGNED: tl.constexpr, WIDE: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """The products and weighted rows of `pairs_kernel`, for one block of logits k and what
    `blocks_kernel` tells of it. Running sums are a product of a triangle of ones and e^k in two
    parts of 16 bits.
    """
    ragged: tl.constexpr = D % BC != 0
    dtype: tl.constexpr = q.dtype.element_ty
    program = tl.program_id(0)
    head, _, batch, start, left = locate_block(
        program, q, segments, length, tokens, heads, C, False
    )
    if left <= 0:
        return
    q += offset(batch, q_b, head, q_h, start, q_t, ALIGNED)
    k += offset(batch, k_b, head, k_h, start, k_t, ALIGNED)
    row = (batch * heads + head) * tokens + start
    blocks = ((batch * heads + head) * tl.cdiv(tokens, C) + start // C) * D
    down, across = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    triangle = tl.where(down >= across, 1.0, 0.0).to(dtype)
    P = tl.zeros((C, C), tl.float32)
    for channel in range(0, D, BC):
        width = D - channel
        wide = tl.cast(channel, tl.int64)
        Q = load_tile(q + wide * q_d, q_t, q_d, left, width, C, BC, ragged, WIDE)
        K = load_tile(
            k + wide * k_d, k_t, k_d, left, width, C, BC, ragged, WIDE, OTHER=float("-inf")
        ).to(tl.float32)
        channels = tl.arange(0, BC)
        at, inside = blocks + channel + channels, channels < width
        middle = tl.load(middles + at, mask=inside, other=0.0)
        E = tl.exp2(K * LOG2E - middle[None, :])
        high = E.to(dtype)
        running = tl.load(before + at, mask=inside, other=1.0)[None, :] + tl.zeros_like(E)
        running = tl.dot(triangle, high, running)
        running = tl.dot(triangle, (E - high.to(tl.float32)).to(dtype), running)
        Q_risen = Q * reciprocal(running, NATIVE)
        P = tl.dot(Q_risen.to(dtype), tl.trans(high), P)
        here = row * D + channel
        Q_risen *= (tl.load(first + at, mask=inside, other=0.0) * scale)[None, :]
        store_tile(q_weighted + here, D, Q_risen, left, width, C, BC, ragged)
        E *= tl.load(last + at, mask=inside, other=0.0)[None, :]
        store_tile(k_weighted + here, D, E, left, width, C, BC, ragged)
    P = tl.where(group_pairs(LEVELS, C), P * scale, 0.0)
    store_tile(pairs + row * C, C, P, left, C, C, C, False)


@dataclass
class Logits:
    """One call from logits: its plan, the weighted rows, what weighs the rows of its blocks, and
    where gates of steep blocks are written.
    """

    call: Call
    entered: Totals
    weighted: Weighted
    weights: list[Tensor]
    kbar: Tensor

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, v: Tensor, z0: Tensor | None, scale: float, *,
        gradient: bool = False,
    ) -> Logits:  # fmt: skip
        """Of aligned q, k and v, and whether a `gradient` is computed."""
        log_decay = torch.empty(k.shape, dtype=torch.float32, device=k.device)
        call = Call.plan(
            q, v, q.shape[1], None, log_decay, None, scale, 0, gradient=gradient,
            follows=HANDS_ON_CONSTANTS,
        )  # fmt: skip
        call.recorder.buffer(log_decay)
        entered = Totals.of(k, z0, call.block, call.recorder)
        weighted, weights, kbar = _weigh(call, q, k, entered, log_decay)
        return cls(call, entered, weighted, weights, kbar)


def forward(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, z0: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """o (batch, heads, tokens, dv), the last S (batch, heads, d, dv) and z (batch, heads, d).

    q and k (batch, heads, tokens, d) and v (batch, heads, tokens, dv) of a 16-bit dtype, a token or
    more, widths multiples of 16.
    """
    tensors = (q, k, v, state, z0)
    key = kind(tensors, ("additive", scale))
    replay = known(key)
    if replay is not None:
        out, final, z = replay(tensors)
        return out, final, z
    q, k, v = tiled(q, k, v)
    logits = Logits.of(q, k, v, z0, scale)
    call, weighted, entered = logits.call, logits.weighted, logits.entered
    final = call.last_states(None, None)
    state = None if state is None else state.contiguous()
    entering = enter(call, weighted.k, v, state, weighted.totals)
    out, _ = walk(
        call, weighted.q, weighted.k, v, entering, call.dtype, final=final, weighted=weighted,
        pairs=True,
    )  # fmt: skip
    if call.recorder.follows:
        call.recorder.keep(key, tensors, (out, final, entered.z), prepare)
    return out, final, entered.z


def _weigh(
    call: Call, q: Tensor, k: Tensor, entered: Totals, log_decay: Tensor
) -> tuple[Weighted, list[Tensor], Tensor]:
    """As `weigh`, from logits, what weighs the rows, and kbar; gates are written where a block is
    steep.
    """
    made = weighted_rows(call)
    kbar = call.rows(call.d, call.dtype)
    many, blocks = made.steep.numel(), made.totals.shape[0] // call.batch
    segments = entered.tops.shape[2] - 1
    weights = [call.empty(call.batch, call.heads, segments, call.d) for _ in range(4)]
    layout = call.layout(q, k)
    call.recorder.launch(
        blocks_kernel, call.batch * call.heads * -(-blocks // BLOCKS),
        k, *k.stride(), entered.tops, entered.sums, *weights, made.totals, made.steep, segments,
        call.heads, blocks,
        D=call.d, BC=tile_width(call.d), C=call.block, REACH=min(REACH[call.dtype], MOST_REACH),
        MANY=BLOCKS, ALIGNED=layout["ALIGNED"], num_warps=4,
    )  # fmt: skip
    call.recorder.launch(
        additive_pairs_kernel, many,
        q, *q.stride(), k, *k.stride(), *weights, made.pairs, made.q, made.k, call.scale,
        *call.place(),
        D=call.d, BC=min(call.cfg.logits_tile, tile_width(call.d)), C=call.block,
        LEVELS=call.block.bit_length() - 1, **layout, NATIVE=not interpreting(),
        num_warps=call.cfg.logits_warps, num_stages=1, maxnreg=call.cfg.logits_registers,
    )  # fmt: skip
    entered.write_some(kbar, log_decay, made.steep, blocks, call.span(many))
    weigh_steep(call, q, kbar, made)
    return made, weights, kbar
