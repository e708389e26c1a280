"""The gradient of the scan of an additive recurrence in Triton, straight from its logits.

With T_t the sum of e^(k_s) over s <= t, o_t reads the sum of v_s e^(k_s) / T_t: linear attention
without a decay, with keys e^k and queries q / T, all of which k enters. A channel's own sums make
its gradient: with dy_s the gradient of e^(k_s) as a key,

    dk_s = e^(k_s) (dy_s - sum over t >= s of q_t dq_t / T_t).

A block takes the part of that sum of its own rows, and tells H, T_0 times the part, from which
`chain_kernel` forms what is carried to each block from all rows behind it: a block that is entered
by T_0 and left by T_n hands on its own H and T_0 / T_n of what it is handed. Behind the last block
that is the product of the state and its gradient, less the gradient of z, and before the first one
the gradient of z0 follows from it likewise. No gate is written or read but in steep blocks.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnspec.fast.backend import interpreting
from attnspec.fast.engines.scan.configs import REACH
from attnspec.fast.engines.scan.replay import kind, known
from attnspec.fast.engines.scan.triton_additive_scan import Logits
from attnspec.fast.engines.scan.triton_common import (
    LOG2E,
    load_tile,
    locate_block,
    offset,
    reciprocal,
    store_tile,
)
from attnspec.fast.engines.scan.triton_gates import pair_gradients, steep_gates_kernel
from attnspec.fast.engines.scan.triton_levels import group_pairs, load_gates
from attnspec.fast.engines.scan.triton_plan import (
    chain,
    enter,
    odd_programs,
    prepare,
    sum_segments,
    walk,
)
from attnspec.fast.engines.scan.triton_widths import tiled
from attnspec.fast.engines.sizes import tile_width

MANY = 64
"""Blocks that a program of the chain scans at a time."""


@triton.jit
def follow(later_decay, later, decay, own):
    """What two runs of rows hand on, the later one first: a decay and a sum."""
    return later_decay * decay, own + decay * later


@triton.jit(
    do_not_specialize=[
        "segments", "length", "tokens", "q_b", "q_h", "k_b", "k_h", "v_b", "v_h", "o_b", "o_h",
    ]
)  # fmt: skip
def logits_gradient_kernel(
    q, q_b, q_h, q_t, q_d, k, k_b, k_h, k_t, k_d, v, v_b, v_h, v_t, v_d, do, o_b, o_h, o_t, o_d,
    kbar, gates, dq_weighted, dk_weighted, middles, before, first, last, steep, dq, dk, sums,
    begins, scale, segments, length, tokens, heads,
    D: tl.constexpr, DV: tl.constexpr, BC: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    LEVELS: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr, NATIVE: tl.constexpr,
    STARTED: tl.constexpr,
):  # fmt: skip
    """Of one block dq, its part of dk, and H as `sums` (blocks, heads, D), from the gradients of
    the weighted q and k and what `blocks_kernel` tells. Of a steep block these are the gradients of
    q and of kbar, as `steep_gates_kernel` has left them.
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
    part = tl.zeros((C, C), dtype)
    gentle = tl.load(steep + program) == 0
    if gentle:
        v += offset(batch, v_b, head, v_h, start, v_t, ALIGNED)
        do += offset(batch, o_b, head, o_h, start, o_t, ALIGNED)
        dP = pair_gradients(do, o_t, o_d, v, v_t, v_d, left, DV, BV, C, WIDE)
        part = tl.where(group_pairs(LEVELS, C), dP * scale, 0.0).to(dtype)
    for channel in range(0, D, BC):
        width = D - channel
        wide = tl.cast(channel, tl.int64)
        here = row * D + channel
        channels = tl.arange(0, BC)
        inside = channels < width
        Q = load_tile(q + wide * q_d, q_t, q_d, left, width, C, BC, ragged, WIDE)
        dQ = load_tile(dq_weighted + here, D, 1, left, width, C, BC, ragged).to(tl.float32)
        dK = load_tile(dk_weighted + here, D, 1, left, width, C, BC, ragged).to(tl.float32)
        if gentle:
            K = load_tile(
                k + wide * k_d, k_t, k_d, left, width, C, BC, ragged, WIDE, OTHER=float("-inf")
            ).to(tl.float32)
            at = blocks + channel + channels
            middle = tl.load(middles + at, mask=inside, other=0.0)
            begun = tl.load(first + at, mask=inside, other=0.0)
            ended = tl.load(last + at, mask=inside, other=0.0)
            E = tl.exp2(K * LOG2E - middle[None, :])
            high = E.to(dtype)
            entered = tl.load(before + at, mask=inside, other=1.0)
            running = entered[None, :] + tl.zeros_like(E)
            running = tl.dot(triangle, high, running)
            running = tl.dot(triangle, (E - high.to(tl.float32)).to(dtype), running)
            share = reciprocal(running, NATIVE)
            Q_risen = Q * share
            dQ = share * tl.dot(part, high, dQ * (begun * scale)[None, :])
            dK = tl.dot(tl.trans(part), Q_risen.to(dtype), dK * ended[None, :])
            W = Q_risen * dQ
            H = tl.cumsum(W, 0, reverse=True)
            own = begun * tl.sum(W, 0)
            if STARTED:
                fresh = (down == 0) & (entered == 0.0)[None, :]
                H = tl.where(fresh, 0.0, H)
            dK = E * (dK - H)
        else:
            kept = load_tile(kbar + here, D, 1, left, width, C, BC, ragged)
            # From a row to the one before it, a sum decays by the row's own gate.
            g = load_gates(gates + here + D, D, 1, left - 1, width, C, BC, ragged, False)
            enters = load_gates(gates + here, D, 1, left, width, C, BC, ragged, False)
            W = Q * dQ
            _decays, H = tl.associative_scan((tl.exp(g), W), 0, follow, reverse=True)
            own = tl.sum(tl.where(down == 0, tl.exp(enters) * H, 0.0), 0)
            if STARTED:
                fresh = (enters == 0.0) & (kept > 0.5)
                H = tl.where(fresh, 0.0, H)
            dK = kept * (dK - H)
        store_tile(dq + here, D, dQ, left, width, C, BC, ragged)
        store_tile(dk + here, D, dK, left, width, C, BC, ragged)
        here = program.to(tl.int64) * D + channel + channels
        tl.store(sums + here, own, mask=inside)
        if STARTED:
            # A first key hands nothing on: what it is handed, z0 would have been.
            tl.store(begins + here, tl.min(tl.where(fresh, down, C), 0), mask=inside)


@triton.jit
def products(S, dS, row, channels, inside, D: tl.constexpr, DV: tl.constexpr, BC: tl.constexpr):
    """sum_j S_cj dS_cj (BC,) of a state (rows, D, DV) and its gradient."""
    total = tl.zeros((BC,), tl.float32)
    for column in range(0, DV, 32):
        columns = column + tl.arange(0, 32)
        at = (row * D + channels)[:, None] * DV + columns[None, :]
        mask = inside[:, None] & (columns < DV)[None, :]
        X = tl.load(S + at, mask=mask, other=0.0) * tl.load(dS + at, mask=mask, other=0.0)
        total += tl.sum(X, 1)
    return total


@triton.jit(do_not_specialize=["blocks", "most"])
def chain_logits_kernel(
    sums, totals, S, dS, dz, S0, dS0, carried, dz0, blocks, most, heads,
    D: tl.constexpr, DV: tl.constexpr, BC: tl.constexpr, MANY: tl.constexpr, STARTED: tl.constexpr,
):  # fmt: skip
    """What is carried to each block (batch, most, heads, D) from the rows behind it, and dz0."""
    parts: tl.constexpr = (D + BC - 1) // BC
    program = tl.program_id(0)
    channels = (program % parts) * BC + tl.arange(0, BC)
    inside = channels < D
    row = (program // parts).to(tl.int64)
    batch, head = row // heads, row % heads
    behind = products(S, dS, row, channels, inside, D, DV, BC)
    behind -= tl.load(dz + row * D + channels, mask=inside, other=0.0)
    places = tl.arange(0, MANY)
    tiles = tl.cdiv(blocks, MANY)
    for n in range(tiles):
        block = (tiles - 1 - n) * MANY + places
        at = ((batch * most + block.to(tl.int64)) * heads + head)[:, None] * D + channels[None, :]
        mask = (block < blocks)[:, None] & inside[None, :]
        others = (block + 1 < blocks)[:, None] & inside[None, :]
        later = at + tl.cast(heads, tl.int64) * D
        decay = tl.exp(tl.load(totals + later, mask=others, other=0.0))
        own = tl.load(sums + later, mask=others, other=0.0)
        decay, own = tl.associative_scan((decay, own), 0, follow, reverse=True)
        own += decay * behind[None, :]
        tl.store(carried + at, own, mask=mask)
        behind = tl.sum(tl.where((places == 0)[:, None], own, 0.0), 0)
    at = (batch * most * heads + head) * D + channels
    decay = tl.exp(tl.load(totals + at, mask=inside, other=0.0))
    behind = tl.load(sums + at, mask=inside, other=0.0) + decay * behind
    start = tl.zeros((BC,), tl.float32)
    if STARTED:
        start = products(S0, dS0, row, channels, inside, D, DV, BC)
    tl.store(dz0 + row * D + channels, start - behind, mask=inside)


@triton.jit(do_not_specialize=["segments", "length", "tokens"])
def carry_logits_kernel(
    dk, k_weighted, carried, begins, dz0, segments, length, tokens, heads,
    D: tl.constexpr, BC: tl.constexpr, C: tl.constexpr, STARTED: tl.constexpr,
):  # fmt: skip
    """dk of one block, in place: its keys weigh e^k / T_n for the rows behind it. A channel's first
    key stands in for z0 if STARTED without a sum.
    """
    ragged: tl.constexpr = D % BC != 0
    program = tl.program_id(0)
    head, _, batch, start, left = locate_block(
        program, dk, segments, length, tokens, heads, C, False
    )
    if left <= 0:
        return
    row = (batch * heads + head) * tokens + start
    for channel in range(0, D, BC):
        here = row * D + channel
        channels = channel + tl.arange(0, BC)
        behind = tl.load(carried + program.to(tl.int64) * D + channels, mask=channels < D, other=0)
        own = load_tile(dk + here, D, 1, left, D - channel, C, BC, ragged)
        weighted = load_tile(k_weighted + here, D, 1, left, D - channel, C, BC, ragged)
        x = -weighted.to(tl.float32) * behind[None, :]
        if STARTED:
            at = program.to(tl.int64) * D + channels
            begin = tl.load(begins + at, mask=channels < D, other=C)
            more = tl.load(dz0 + (batch * heads + head) * D + channels, mask=channels < D, other=0)
            x = tl.where(tl.arange(0, C)[:, None] == begin[None, :], more[None, :], x)
        x += own
        store_tile(dk + here, D, x, left, D - channel, C, BC, ragged)


def backward(
    do: Tensor, dS: Tensor, dz: Tensor, q: Tensor, k: Tensor, v: Tensor, S0: Tensor | None,
    z0: Tensor | None, S: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, and the gradients of S0 and, if it was finite, of z0, of `forward`."""
    dS, dz = dS.contiguous(), dz.contiguous()
    tensors = (do, dS, dz, q, k, v, S0, z0, S)
    key = kind(tensors, ("additive gradient", scale))
    replay = known(key)
    if replay is not None:
        return replay(tensors)  # type: ignore[return-value]
    do, q, k, v = tiled(do, q, k, v)
    state = None if S0 is None else S0.contiguous()
    logits = Logits.of(q, k, v, z0, scale, gradient=True)
    call, weighted = logits.call, logits.weighted
    dS0 = call.last_states(None, None)
    entering, leaving = enter(call, weighted.k, v, state, weighted.totals), dS
    if call.segments.chained:
        leaving, decays = sum_segments(call, weighted.q, do, weighted.totals, backward=True)
        chain(call, leaving, decays, dS, backward=True)
    back: dict[str, Any] = {"weighted": weighted, "backward": True}
    dq_weighted, _ = walk(
        call, do, v, weighted.k, entering, call.dtype, weighted=weighted, transposed=True
    )
    dk_weighted, _ = walk(call, v, do, weighted.q, leaving, call.dtype, transposed=True, **back)
    dv, _ = walk(
        call, weighted.k, weighted.q, do, leaving, call.dtype, final=dS0, pairs=True, **back
    )
    dq, dk, dz0 = _logits(logits, q, k, v, do, dq_weighted, dk_weighted, state, dS0, S, dS, dz)
    made = (dq, dk, dv, dS0, dz0)
    if call.recorder.follows:
        call.recorder.keep(key, tensors, made, prepare)
    return made


def _logits(
    logits: Logits, q: Tensor, k: Tensor, v: Tensor, do: Tensor, dq_weighted: Tensor,
    dk_weighted: Tensor, S0: Tensor | None, dS0: Tensor, S: Tensor, dS: Tensor, dz: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk and dz0 from the gradients of the weighted rows."""
    call, weighted, kbar = logits.call, logits.weighted, logits.kbar
    gates, cfg = call.gates, call.cfg
    assert gates is not None
    layout = call.layout(q, k, v, do)
    sizes = {"D": call.d, "DV": call.dv}
    tiles = {**sizes, "BV": min(64, tile_width(call.dv)), "C": call.block}
    tiles["LEVELS"] = call.block.bit_length() - 1
    many = weighted.steep.numel()
    span = call.span(many)
    launch = call.recorder.launch
    launch(
        steep_gates_kernel, odd_programs(many, span),
        q, *q.stride(), kbar, *kbar.stride(), v, *v.stride(), do, *do.stride(), gates,
        *gates.stride(), dq_weighted, dk_weighted, weighted.steep, many, span, q, call.scale,
        *call.place(), 1, 1,
        BC=min(cfg.mend_tile, tile_width(call.d)), **tiles, REACH=REACH[call.dtype], PACKED=False,
        **call.layout(q, kbar, v, do, gates), num_warps=cfg.mend_warps, num_stages=1,
    )  # fmt: skip
    dq, dk = call.rows(call.d, call.dtype), call.rows(call.d, call.dtype)
    sums, carried = (call.empty(*weighted.totals.shape) for _ in range(2))
    begins = sums if S0 is None else call.empty(*sums.shape, dtype=torch.int32)
    launch(
        logits_gradient_kernel, many,
        q, *q.stride(), k, *k.stride(), v, *v.stride(), do, *do.stride(), kbar, gates,
        dq_weighted, dk_weighted, *logits.weights, weighted.steep,
        dq, dk, sums, begins, call.scale, *call.place(),
        BC=min(cfg.gates_tile, tile_width(call.d)), **tiles, **layout, NATIVE=not interpreting(),
        STARTED=S0 is not None,
        num_warps=cfg.gates_warps, num_stages=1,
    )  # fmt: skip
    channels = min(16, tile_width(call.d))
    dz0 = call.empty(*dz.shape)
    launch(
        chain_logits_kernel, call.batch * call.heads * -(-call.d // channels),
        sums, weighted.totals, S, dS, dz, dS if S0 is None else S0, dS0, carried, dz0,
        -(-call.tokens // call.block), weighted.totals.shape[0] // call.batch, call.heads,
        BC=channels, MANY=4 if interpreting() else MANY, STARTED=S0 is not None, **sizes,
        num_warps=4,
    )  # fmt: skip
    launch(
        carry_logits_kernel, many, dk, weighted.k, carried, begins, dz0, *call.place(),
        D=call.d, BC=min(128, tile_width(call.d)), C=call.block, STARTED=S0 is not None,
        num_warps=4,
    )  # fmt: skip
    return dq, dk, dz0
