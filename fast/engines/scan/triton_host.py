"""The scan on Triton: forward, backward, the states and outputs of segments, and one step.

16-bit operands are read as whole tiles of aligned rows, see `triton_widths.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnspec.fast.engines.prepared import HANDS_ON_CONSTANTS, launch
from attnspec.fast.engines.scan.configs import REACH
from attnspec.fast.engines.scan.replay import kind, known
from attnspec.fast.engines.scan.triton_gates import (
    carried_gates_kernel,
    scalar_gates_kernel,
    steep_gates_kernel,
    vector_gates_kernel,
)
from attnspec.fast.engines.scan.triton_plan import (
    CONSTANT,
    NONE,
    SCALAR,
    VECTOR,
    Call,
    Weighted,
    chain,
    enter,
    odd_programs,
    prepare,
    sum_segments,
    walk,
)
from attnspec.fast.engines.scan.triton_step import step_kernel
from attnspec.fast.engines.scan.triton_weigh import weigh
from attnspec.fast.engines.scan.triton_widths import (
    narrow,
    padded,
    padded_decay,
    padded_state,
    tiled,
)
from attnspec.fast.engines.sizes import tile_width


def forward(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, log_decay: Tensor | None,
    reads: Tensor | None, writes: Tensor | None, state: Tensor | None, offsets: Tensor | None,
    scale: float, block: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o (batch, heads, tokens, dv) and the last states (sequences, heads, d, dv)."""
    tensors = (q, k, v, slopes, log_decay, reads, writes, state, offsets)
    key = kind(tensors, (scale, block))
    replay = known(key)
    if replay is not None:
        out, final = replay(tensors)
        return out, final
    if narrow(q, v):
        start = None if state is None else padded_state(state)
        out, final = forward(
            padded(q), padded(k), padded(v), slopes, padded_decay(log_decay), reads, writes, start,
            offsets, scale, block,
        )  # fmt: skip
        return _first(out, v.shape[3]), _first(final, q.shape[3], v.shape[3])
    q, k, v = tiled(q, k, v)
    call = Call.plan(
        q,
        v,
        q.shape[1],
        slopes,
        log_decay,
        offsets,
        scale,
        block,
        follows=offsets is None and HANDS_ON_CONSTANTS,
    )
    state = None if state is None else state.contiguous()
    final = call.last_states(state, offsets)
    if call.nothing:
        return call.rows(call.dv, call.dtype), final
    weighted = weigh(call, q, k) if call.decay == VECTOR else None
    totals = None if weighted is None else weighted.totals
    q, k = (q, k) if weighted is None else (weighted.q, weighted.k)
    entering = enter(call, k, v, state, totals, writes)
    out, _ = walk(
        call, q, k, v, entering, call.dtype, final=final, weighted=weighted, pairs=True,
        inner=writes, outer=reads,
    )  # fmt: skip
    if call.recorder.follows:
        call.recorder.keep(key, tensors, (out, final), prepare)
    return out, final


def segment_states(
    k: Tensor, v: Tensor, slopes: Tensor | None, log_decay: Tensor | None, state: Tensor | None,
    heads: int, segment: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The states (batch, heads, segments, d, dv) entering segments, and the last."""
    if narrow(k, v):
        start = None if state is None else padded_state(state)
        made = segment_states(
            padded(k), padded(v), slopes, padded_decay(log_decay), start, heads, segment
        )
        return _first(made[0], k.shape[3], v.shape[3]), _first(made[1], k.shape[3], v.shape[3])
    k, v = tiled(k, v)
    call = Call.plan(k, v, heads, slopes, log_decay, None, 1.0, 0, segment=segment)
    state = None if state is None else state.contiguous()
    final = call.last_states(state, None)
    shape = (call.batch, call.segments.each, heads, call.d, call.dv)
    if call.nothing:
        return call.empty(*shape).transpose(1, 2).contiguous(), final
    totals = None
    if call.decay == VECTOR:
        weighted = weigh(call, k, k)
        k, totals = weighted.k, weighted.totals
    states, decays = sum_segments(call, k, v, totals, backward=False, every=True)
    chain(call, states, decays, state, backward=False, final=final)
    return states.view(shape).transpose(1, 2).contiguous(), final


def segment_outputs(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, log_decay: Tensor | None,
    entering: Tensor, scale: float, segment: int,
) -> Tensor:  # fmt: skip
    """o (batch, heads, tokens, dv) from the states entering segments."""
    if narrow(q, v):
        out = segment_outputs(
            padded(q), padded(k), padded(v), slopes, padded_decay(log_decay),
            padded_state(entering), scale, segment,
        )  # fmt: skip
        return _first(out, v.shape[3])
    q, k, v = tiled(q, k, v)
    call = Call.plan(q, v, q.shape[1], slopes, log_decay, None, scale, 0, segment=segment)
    if call.nothing:
        return call.rows(call.dv, call.dtype)
    weighted = weigh(call, q, k) if call.decay == VECTOR else None
    q, k = (q, k) if weighted is None else (weighted.q, weighted.k)
    entering = entering.transpose(1, 2).contiguous()
    return walk(call, q, k, v, entering, call.dtype, weighted=weighted, pairs=True)[0]


def backward(
    do: Tensor, dfinal: Tensor, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None,
    log_decay: Tensor | None, reads: Tensor | None, writes: Tensor | None, state: Tensor | None,
    offsets: Tensor | None, final: Tensor, scale: float, block: int, decay_gradient: bool,
    bits: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, the gradients of the decay (empty unless wanted), of reads and writes (empty
    where there are none) and of the initial state. `bits` says that log decays are to base 2.

    Where these are kernels alone, without sums by torch, the call is kept as the forward one is.
    """
    tensors = (do, dfinal, q, k, v, slopes, log_decay, reads, writes, state, offsets, final)
    key = kind(tensors, (scale, block, decay_gradient, bits))
    replay = known(key)
    if replay is not None:
        dq, dk, dv, ddecay, dreads, dwrites, dstate = replay(tensors)
        return dq, dk, dv, ddecay, dreads, dwrites, dstate
    if narrow(q, v):
        d, dv_width = q.shape[3], v.shape[3]
        start = None if state is None else padded_state(state)
        dq, dk, dv, ddecay, dreads, dwrites, dstate = backward(
            padded(do), padded_state(dfinal), padded(q), padded(k), padded(v), slopes,
            padded_decay(log_decay), reads, writes, start, offsets, padded_state(final), scale,
            block, decay_gradient, bits,
        )  # fmt: skip
        ddecay = _first(ddecay, d) if ddecay.dim() == 4 else ddecay
        return (
            _first(dq, d), _first(dk, d), _first(dv, dv_width), ddecay, dreads, dwrites,
            _first(dstate, d, dv_width),
        )  # fmt: skip
    do, q, k, v = tiled(do, q, k, v)
    call = Call.plan(
        q, v, q.shape[1], slopes, log_decay, offsets, scale, block, gradient=decay_gradient,
        bits=bits, follows=HANDS_ON_CONSTANTS and offsets is None,
    )  # fmt: skip
    dfinal = dfinal.contiguous()
    dstate = call.last_states(dfinal, offsets)
    given = slopes if slopes is not None else log_decay
    if call.nothing:
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        ddecay, dreads, dwrites = (
            q.new_empty(0) if x is None else torch.zeros_like(x)
            for x in (given if decay_gradient else None, reads, writes)
        )
        return dq, dk, dv, ddecay, dreads, dwrites, dstate
    state = None if state is None else state.contiguous()
    weighted = weigh(call, q, k) if call.decay == VECTOR else None
    totals = None if weighted is None else weighted.totals
    Q, K = (q, k) if weighted is None else (weighted.q, weighted.k)
    entering, leaving = enter(call, K, v, state, totals, writes), dfinal
    if call.segments.chained:
        leaving, decays = sum_segments(call, Q, do, totals, backward=True, inner=reads)
        chain(call, leaving, decays, dfinal, backward=True)

    inner = call.dtype if call.decay != VECTOR else torch.float32
    grouped = torch.float32 if k.shape[1] != call.heads else call.dtype
    dq, q_products = walk(
        call, do, v, K, entering, inner, weighted=weighted, transposed=True,
        product=Q if decay_gradient or reads is not None else None, inner=writes, outer=reads,
    )  # fmt: skip
    dk, k_products = walk(
        call, v, do, Q, leaving, grouped if call.decay != VECTOR else inner, weighted=weighted,
        backward=True, transposed=True,
        product=K if decay_gradient or writes is not None else None, inner=reads, outer=writes,
    )  # fmt: skip
    dv, _ = walk(
        call, K, Q, do, leaving, grouped, final=dstate, weighted=weighted, pairs=True,
        backward=True, inner=reads, outer=writes,
    )  # fmt: skip
    ddecay, dreads, dwrites = (call.empty(0, dtype=call.dtype) for _ in range(3))
    states = (final if entering is None else entering, final, leaving)
    if weighted is not None:
        carried = None
        if decay_gradient:
            carried = _carried_gates(call, q_products, k_products, states)
        dq, dk, dg = _vector_gates(call, q, k, v, do, weighted, dq, dk, carried, grouped)
        if decay_gradient and given is not None:
            ddecay = dg.to(given.dtype)
    else:
        # The products are those of rows without their own weight: where the output is linear in a
        # weight, they are its gradient.
        if reads is not None:
            dreads, q_products = _weights_gradient(q_products, reads)
        if writes is not None:
            dwrites, k_products = _weights_gradient(k_products, writes)
        if decay_gradient and given is not None:
            dg = _scalar_gates(call, q_products.sum(0) - k_products.sum(0), states)
            ddecay = (-dg.sum((0, 2)) if call.decay == CONSTANT else dg).to(given.dtype)
    gradients = dq, _sum_groups(dk, k), _sum_groups(dv, v), ddecay, dreads, dwrites, dstate
    if call.recorder.follows:
        call.recorder.keep(key, tensors, gradients, prepare)
    return gradients


def _first(x: Tensor, *sizes: int) -> Tensor:
    """The first entries along the last axes of x, contiguous."""
    for axis, size in enumerate(sizes, -len(sizes)):
        x = x.narrow(axis, 0, size)
    return x.contiguous()


def _sum_groups(x: Tensor, like: Tensor) -> Tensor:
    """x (batch, heads, tokens, width) summed over the query heads of each head of `like`."""
    if x.shape[1] != like.shape[1]:
        x = x.unflatten(1, (like.shape[1], -1)).sum(2)
    return x.to(like.dtype)


def _weights_gradient(products: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of weights from the products (tiles, batch, heads, tokens) of the rows that they
    multiply, and the products of the weighted rows.
    """
    sums = products.sum(0).unflatten(1, (weights.shape[1], -1))
    weighted = (sums * weights[:, :, None]).flatten(1, 2)
    return sums.sum(2).to(weights.dtype), weighted[None]


def _scalar_gates(call: Call, products: Tensor, states: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """dg (batch, heads, tokens) from q . dq - k . dk."""
    dg = call.empty(call.batch, call.heads, call.tokens)
    call.recorder.launch(
        scalar_gates_kernel, call.segments.total * call.heads,
        products, *states, dg, call.table(products), *call.place(),
        D=call.d, DV=call.dv, BD=tile_width(call.d), ROWS=256,
        PACKED=call.segments.table is not None, num_warps=4,
    )  # fmt: skip
    return dg


def _carried_gates(
    call: Call, q_sums: Tensor, k_sums: Tensor, states: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """What the decays of a block and channel (blocks, heads, d) get from all rows behind it."""
    carried = call.empty(*q_sums.shape)
    channels = min(32, tile_width(call.d))
    call.recorder.launch(
        carried_gates_kernel, call.segments.total * call.heads * -(-call.d // channels),
        q_sums, k_sums, *states, carried, call.table(q_sums), *call.place(),
        D=call.d, DV=call.dv, BC=channels, C=call.block,
        PACKED=call.segments.table is not None, num_warps=4,
    )  # fmt: skip
    return carried


def _vector_gates(
    call: Call, q: Tensor, k: Tensor, v: Tensor, do: Tensor, weighted: Weighted,
    dq_weighted: Tensor, dk_weighted: Tensor, carried: Tensor | None, dk_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk of every query head and, from what is `carried`, dg (batch, heads, tokens, d)."""
    gates = call.gates
    assert gates is not None
    dq, dk = call.rows(call.d, call.dtype), call.rows(call.d, dk_dtype)
    dg = call.empty(0) if carried is None else call.rows(call.d, torch.float32)
    inputs = (
        q, *q.stride(), k, *k.stride(), v, *v.stride(), do, *do.stride(), gates, *gates.stride(),
    )  # fmt: skip
    where = (
        call.table(q), call.scale, *call.place(), call.heads // k.shape[1], call.heads // v.shape[1]
    )  # fmt: skip
    options: dict[str, Any] = {
        "D": call.d, "DV": call.dv, "BV": min(64, tile_width(call.dv)), "C": call.block,
        "LEVELS": call.block.bit_length() - 1, "REACH": REACH.get(call.dtype, 0.0),
        "PACKED": call.segments.table is not None, **call.layout(q, k, v, do, gates),
    }  # fmt: skip
    many = weighted.totals.shape[0] * call.heads
    span = call.span(many)
    call.recorder.launch(
        steep_gates_kernel, odd_programs(many, span),
        *inputs, dq_weighted, dk_weighted, weighted.steep, many, span, *where,
        BC=min(call.cfg.mend_tile, tile_width(call.d)), **options, num_warps=call.cfg.mend_warps,
        num_stages=1,
    )  # fmt: skip
    call.recorder.launch(
        vector_gates_kernel, many,
        *inputs, dq_weighted, dk_weighted, weighted.steep, dg if carried is None else carried,
        dq, dk, dg, *where,
        BC=min(call.cfg.gates_tile, tile_width(call.d)), **options, DGATES=carried is not None,
        num_warps=call.cfg.gates_warps, num_stages=call.cfg.gates_stages,
    )  # fmt: skip
    return dq, dk, dg


def step(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None,
    log_decay: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o (batch, heads, 1, dv) of one token and the state with it."""
    batch, heads, d, dv = state.shape
    out = torch.empty(batch, heads, 1, dv, dtype=q.dtype, device=q.device)
    new = torch.empty(batch, heads, d, dv, dtype=state.dtype, device=q.device)
    gates, strides, decay = q, (0, 0, 0), NONE
    if slopes is not None:
        gates, decay = slopes.to(torch.float32).contiguous(), CONSTANT
    elif log_decay is not None:
        decay = SCALAR if log_decay.dim() == 3 else VECTOR
        gates = log_decay.unsqueeze(-1) if decay == SCALAR else log_decay
        strides = (gates.stride(0), gates.stride(1), gates.stride(3))
    tile = min(32, tile_width(dv))
    programs = batch * heads * -(-dv // tile)
    if programs:
        launch(
            step_kernel, programs,
            state, *state.stride(), *_token(q), *_token(k), *_token(v), gates, *strides, out, new,
            scale, heads, heads // k.shape[1],
            D=d, DV=dv, BD=tile_width(d), BV=tile, DECAY=decay, num_warps=4,
        )  # fmt: skip
    return out, new


def _token(x: Tensor) -> tuple[Any, ...]:
    """A (batch, heads, 1, width) tensor and its strides without the token's."""
    return x, x.stride(0), x.stride(1), x.stride(3)
