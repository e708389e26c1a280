"""The gradient of the memory that is read before it is written: that of queries in a walk from the
beginning, those of values and of keys and gates in one each from the end.

A program holds a whole state or its whole gradient, and sums over the query heads that read it in
registers. Gradients that are there already are added to in the same pass. What segments add to the
gradient of the state before them is summed beside the first walk. Wider states, and float32 that no
matrix unit multiplies, go through the scan instead: `triton_hebbian_parts.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnspec.fast.engines.flash.triton_launch import readable
from attnspec.fast.engines.scan import triton_hebbian_parts
from attnspec.fast.engines.scan.triton_common import exchanged
from attnspec.fast.engines.scan.triton_hebbian_tiles import (
    VARYING,
    Cut,
    counts,
    load_gates,
    load_rows,
    made_places,
    opened,
    place_of,
    read_powers,
    row_norms,
    stacked,
    state_places,
)
from attnspec.fast.engines.scan.triton_trace_rows import FLOOR, floored


@triton.jit
def unit_gradient(G, X, inverse):
    """The gradient of rows X from that of X times `inverse`, which is 1 / max(norm, FLOOR), and
    what of that lies along X.
    """
    radial = tl.sum(G * X, 1) * inverse
    # Below the floor the norm is a constant.
    inward = tl.where(inverse < 1.0 / FLOOR, radial * inverse, 0.0)
    return (G - X * inward[:, None]) * inverse[:, None], radial


@triton.jit
def differentiate_state(
    q_source, dy_source, place, valid, valid_t, inverses, states, decays, tokens, bits, scale,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, VALID: tl.constexpr, ACCESS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """What a segment adds to the gradient of the state before it, with its log decay; and the
    inverse norms of queries.
    """
    batch, head, start, stop, state = place
    heads = q_source[5]
    R = tl.zeros((BD, BV), tl.float32)
    seen = tl.full((), 0.0, tl.float32)
    # One loop over blocks and heads: tiles ahead are loaded without a pause between blocks.
    for n in range(tl.cdiv(stop - start, C) * GROUP):
        first, member = start + n // GROUP * C, n % GROUP
        _real, _upto, before, total = counts(valid, valid_t, first, stop, C, VALID)
        t = first + tl.arange(0, C)
        reader = head * GROUP + member
        Q = load_rows(q_source, batch, reader, first, stop, 0, 1, C, BD, D, ACCESS)
        dY = load_rows(dy_source, batch, reader, first, stop, 0, 1, C, BV, DV, ACCESS)
        wide = Q.to(tl.float32)
        inverse = 1.0 / floored(row_norms(wide))
        tl.store(inverses + (batch * heads + reader) * tokens + t, inverse, mask=t < stop)
        factor = scale * tl.exp2(bits * (seen + before))
        if UNIT:
            Q = (wide * inverse[:, None]).to(Q.dtype)
        else:
            factor *= inverse
        dY = (dY * factor[:, None]).to(dY.dtype)
        R = tl.dot(tl.trans(Q), dY, R, input_precision="ieee")
        seen += tl.where(member == GROUP - 1, total, 0.0)
    places, inside = state_places(0, D, DV, BD, BV)
    tl.store(states + state * D * DV + places, R, mask=inside)
    tl.store(decays + state, bits * seen)


@triton.jit
def differentiate_reads(
    q_source, dy_source, dq, batch, reader, first, tokens, stop, S, H, X, powers, before, bits,
    scale,
    MANY: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, ADDED: tl.constexpr, ACCESS: tl.constexpr,
):  # fmt: skip
    """dq of C tokens of MANY query heads, see `read_state`."""
    dY = load_rows(dy_source, batch, reader, first, stop, 0, MANY, C, BV, DV, ACCESS)
    P = tl.dot(dY, tl.trans(X), input_precision="ieee") * powers
    aged = tl.exp2(bits * stacked(before, MANY, C))
    G = tl.dot(dY, tl.trans(S), input_precision="ieee") * aged[:, None]
    G = tl.dot(P.to(H.dtype), H, G, input_precision="ieee") * scale
    Q = load_rows(q_source, batch, reader, first, stop, 0, MANY, C, BD, D, ACCESS)
    line = batch * q_source[5] + reader
    wide = Q.to(tl.float32)
    G, _ = unit_gradient(G, wide, 1.0 / floored(row_norms(wide)))
    at, inside = made_places(line, first, tokens, stop, 0, MANY, C, BD, D)
    if ADDED:
        G += tl.load(dq + at, mask=inside, other=0.0)
    tl.store(dq + at, G.to(dq.dtype.element_ty), mask=inside)


@triton.jit
def differentiate_queries(
    q_source, k_source, v_source, dy_source, place, valid, valid_t, rho, entering, dq, tokens, eta,
    bits, scale,
    GROUP: tl.constexpr, MANY: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, VALID: tl.constexpr, ENTERING: tl.constexpr,
    ADDED: tl.constexpr, ACCESS: tl.constexpr,
):  # fmt: skip
    """dq of a segment, from the state `entering` it; added to what is there if ADDED."""
    batch, head, start, stop, state = place
    line = batch * k_source[5] + head
    S = tl.zeros((BD, BV), tl.float32)
    if ENTERING:
        places, inside = state_places(0, D, DV, BD, BV)
        S = tl.load(entering + state * D * DV + places, mask=inside, other=0.0)
    for first in range(start, stop, C):
        real, upto, before, total = counts(valid, valid_t, first, stop, C, VALID)
        weights = exchanged(load_gates(rho, line, first, tokens, real, eta, C), C)
        K = load_rows(k_source, batch, head, first, stop, 0, 1, C, BD, D, ACCESS)
        X = load_rows(v_source, batch, head, first, stop, 0, 1, C, BV, DV, ACCESS)
        wide = K.to(tl.float32)
        H = (wide / floored(row_norms(wide))[:, None]).to(K.dtype)
        powers = read_powers(before, upto, bits, MANY, C) * weights[None, :]
        held = S.to(K.dtype)
        if GROUP == MANY:
            differentiate_reads(
                q_source, dy_source, dq, batch, head * GROUP, first, tokens, stop, held, H, X,
                powers, before, bits, scale, MANY, D, DV, BD, BV, C, ADDED, ACCESS,
            )  # fmt: skip
        else:
            for member in range(0, GROUP, MANY):
                differentiate_reads(
                    q_source, dy_source, dq, batch, head * GROUP + member, first, tokens, stop,
                    held, H, X, powers, before, bits, scale, MANY, D, DV, BD, BV, C, ADDED, ACCESS,
                )  # fmt: skip
        X = (X * (weights * tl.exp2(bits * (total - upto)))[:, None]).to(X.dtype)
        S = tl.dot(tl.trans(H), X, S * tl.exp2(bits * total), input_precision="ieee")


@triton.jit(do_not_specialize=VARYING)
def reads_kernel(
    q, q_b, q_h, q_t, q_d, k, k_b, k_h, k_t, k_d, v, v_b, v_h, v_t, v_d, dy, dy_b, dy_h, dy_t, dy_d,
    one, one_b, one_h, one_t, one_d, up, up_b, up_h, up_t, up_d,
    valid, valid_b, valid_t, rho, entering, dq, inverses, states, decays,
    table, tokens, length, segments, kv_heads, eta, bits, scale,
    GROUP: tl.constexpr, MANY: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, VALID: tl.constexpr,
    ENTERING: tl.constexpr, ADDED: tl.constexpr, ACCESS: tl.constexpr, PACKED: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """dq, and what the other gradients need of queries, by two programs for a segment: side by
    side, they read the same queries at the same time. `one` and `up` are q and dy, ROWS tokens of
    one head at a time.
    """
    batch, head, which, span, states_of, valid = place_of(
        table, segments, length, tokens, kv_heads, valid, valid_b, 2, 1, PACKED
    )
    start, stop = span
    state, _own, _starts, _ends = states_of
    place, heads = (batch, head, start, stop, state), kv_heads * GROUP
    if which == 0:
        q_source = opened((q, q_b, q_h, q_t, q_d, heads), batch, stop, MANY, C, BD, D, ACCESS)
        k_source = opened((k, k_b, k_h, k_t, k_d, kv_heads), batch, stop, 1, C, BD, D, ACCESS)
        v_source = opened((v, v_b, v_h, v_t, v_d, kv_heads), batch, stop, 1, C, BV, DV, ACCESS)
        dy_source = opened(
            (dy, dy_b, dy_h, dy_t, dy_d, heads), batch, stop, MANY, C, BV, DV, ACCESS
        )
        differentiate_queries(
            q_source, k_source, v_source, dy_source, place, valid, valid_t, rho, entering, dq,
            tokens, eta, bits, scale,
            GROUP, MANY, D, DV, BD, BV, C, VALID, ENTERING, ADDED, ACCESS,
        )  # fmt: skip
    else:
        one_source = opened(
            (one, one_b, one_h, one_t, one_d, heads), batch, stop, 1, ROWS, BD, D, ACCESS
        )
        up_source = opened(
            (up, up_b, up_h, up_t, up_d, heads), batch, stop, 1, ROWS, BV, DV, ACCESS
        )
        differentiate_state(
            one_source, up_source, place, valid, valid_t, inverses, states, decays, tokens, bits,
            scale, GROUP, D, DV, BD, BV, ROWS, VALID, ACCESS, UNIT,
        )  # fmt: skip


@triton.jit
def differentiate_writes(
    q_source, k_source, v_source, dy_source, place, valid, valid_t, rho, inverses, leaving, dx,
    drho, tokens, eta, bits, scale,
    GROUP: tl.constexpr, PART: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, VALID: tl.constexpr, ADDED: tl.constexpr,
    ACCESS: tl.constexpr, UNIT: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dx of a segment, added to what is there if ADDED, from the gradient of the state `leaving`
    it; returns that of the state before it. The gradient of values is what their unit keys read of
    it; with KEYS that of unit keys is what their values read of it transposed, and dk and drho are
    made of that. Queries are read PART at a time.
    """
    batch, head, start, stop, state = place
    kv_heads = k_source[5]
    line, heads = batch * kv_heads + head, kv_heads * GROUP
    places, inside = state_places(0, D, DV, BD, BV)
    if KEYS:
        places, inside = tl.trans(places), tl.trans(inside)
    R = tl.load(leaving + state * D * DV + places, mask=inside, other=0.0)
    blocks = tl.cdiv(stop - start, C)
    for n in range(blocks):
        first = start + (blocks - 1 - n) * C
        real, upto, _before, total = counts(valid, valid_t, first, stop, C, VALID)
        if KEYS:
            A = load_rows(v_source, batch, head, first, stop, 0, 1, C, BV, DV, ACCESS)
        else:
            A = load_rows(k_source, batch, head, first, stop, 0, 1, C, BD, D, ACCESS)
            wide = A.to(tl.float32)
            A = (wide / floored(row_norms(wide))[:, None]).to(A.dtype)
        Y = tl.dot(A, R.to(A.dtype), input_precision="ieee")
        Y *= tl.exp2(bits * (total - upto))[:, None]
        R *= tl.exp2(bits * total)
        passed = tl.full((), 0.0, tl.float32)
        for m in range(C // PART * GROUP):
            part, member = m // GROUP, m % GROUP
            begin, reader = first + part * PART, head * GROUP + member
            _real, _upto, before, some = counts(valid, valid_t, begin, stop, PART, VALID)
            before += passed
            passed += tl.where(member == GROUP - 1, some, 0.0)
            Q = load_rows(q_source, batch, reader, begin, stop, 0, 1, PART, BD, D, ACCESS)
            dY = load_rows(dy_source, batch, reader, begin, stop, 0, 1, PART, BV, DV, ACCESS)
            t = begin + tl.arange(0, PART)
            at = inverses + (batch * heads + reader) * tokens + t
            inverse = exchanged(tl.load(at, mask=t < stop, other=0.0), PART)
            factor = scale * inverse
            if UNIT:
                Q = (Q * inverse[:, None]).to(Q.dtype)
                factor = tl.full((PART,), 1.0, tl.float32) * scale
            B, X = (dY, Q) if KEYS else (Q, dY)
            down, across = tl.arange(0, C)[:, None], part * PART + tl.arange(0, PART)[None, :]
            aged = bits * (before[None, :] - upto[:, None])
            powers = tl.exp2(tl.where(across > down, aged, float("-inf"))) * factor[None, :]
            P = tl.dot(A, tl.trans(B), input_precision="ieee") * powers
            Y = tl.dot(P.to(X.dtype), X, Y, input_precision="ieee")
            X = (X * (factor * tl.exp2(bits * before))[:, None]).to(X.dtype)
            R = tl.dot(tl.trans(B), X, R, input_precision="ieee")
        gates = load_gates(rho, line, first, tokens, real, eta, C)
        if KEYS:
            K = load_rows(k_source, batch, head, first, stop, 0, 1, C, BD, D, ACCESS)
            K = K.to(tl.float32)
            Y, along = unit_gradient(Y, K, 1.0 / floored(row_norms(K)))
            t = first + tl.arange(0, C)
            tl.store(drho + line * tokens + t, tl.where(real, eta * along, 0.0), mask=t < stop)
            at, mine = made_places(line, first, tokens, stop, 0, 1, C, BD, D)
        else:
            at, mine = made_places(line, first, tokens, stop, 0, 1, C, BV, DV)
        Y *= gates[:, None]
        if ADDED:
            Y += tl.load(dx + at, mask=mine, other=0.0)
        tl.store(dx + at, Y.to(dx.dtype.element_ty), mask=mine)
    return R


@triton.jit(do_not_specialize=VARYING)
def writes_kernel(
    q, q_b, q_h, q_t, q_d, k, k_b, k_h, k_t, k_d, v, v_b, v_h, v_t, v_d, dy, dy_b, dy_h, dy_t, dy_d,
    valid, valid_b, valid_t, rho, inverses, leaving, dk, dv, drho, dinitial,
    table, tokens, length, segments, kv_heads, eta, bits, scale,
    GROUP: tl.constexpr, PART: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, VALID: tl.constexpr, ADDED: tl.constexpr,
    ACCESS: tl.constexpr, PACKED: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """dk, drho, dv and the gradient of the initial state by two programs for a segment, one for dv
    and one for dk: side by side, they read the same queries at the same time.
    """
    # Two "columns" that are a program each.
    batch, head, which, span, states_of, valid = place_of(
        table, segments, length, tokens, kv_heads, valid, valid_b, 2, 1, PACKED
    )
    start, stop = span
    state, own, starts, _ends = states_of
    place, heads = (batch, head, start, stop, state), kv_heads * GROUP
    q_source = opened((q, q_b, q_h, q_t, q_d, heads), batch, stop, 1, PART, BD, D, ACCESS)
    k_source = opened((k, k_b, k_h, k_t, k_d, kv_heads), batch, stop, 1, C, BD, D, ACCESS)
    v_source = opened((v, v_b, v_h, v_t, v_d, kv_heads), batch, stop, 1, C, BV, DV, ACCESS)
    dy_source = opened((dy, dy_b, dy_h, dy_t, dy_d, heads), batch, stop, 1, PART, BV, DV, ACCESS)
    if which == 0:
        R = differentiate_writes(
            q_source, k_source, v_source, dy_source, place, valid, valid_t, rho, inverses, leaving,
            dv, drho, tokens, eta, bits, scale,
            GROUP, PART, D, DV, BD, BV, C, VALID, ADDED, ACCESS, UNIT, False,
        )  # fmt: skip
        if starts:
            places, inside = state_places(0, D, DV, BD, BV)
            tl.store(dinitial + own * D * DV + places, R, mask=inside)
    else:
        differentiate_writes(
            q_source, k_source, v_source, dy_source, place, valid, valid_t, rho, inverses, leaving,
            dk, drho, tokens, eta, bits, scale,
            GROUP, PART, D, DV, BD, BV, C, VALID, ADDED, ACCESS, UNIT, True,
        )  # fmt: skip


Gradients = tuple[Tensor, Tensor, Tensor]


def backward(
    dy: Tensor, dlast: Tensor, q: Tensor, k: Tensor, v: Tensor, rho: Tensor, S0: Tensor | None,
    valid: Tensor | None, eta: float, lam: float, scale: float, block: int,
    added: Gradients | None = None, offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k, v, rho and the initial states; those of q, k and v are added to what
    is given, contiguous, in place. `offsets` pack sequences in a batch of one.
    """
    batch, heads, tokens, _ = q.shape
    dlast, rho = dlast.contiguous(), rho.contiguous()
    S0 = None if S0 is None else S0.contiguous()
    made = added or tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    dq, dk, dv = made
    if not batch * tokens:
        return dq, dk, dv, torch.zeros_like(rho), dlast.clone()
    q, k, v, dy = readable(q, k, v, dy)
    cut = Cut((q, k, v, dy), rho, valid, offsets, eta, lam, block)
    if max(cut.d, cut.dv) > cut.cfg.whole:
        if offsets is None:
            found = triton_hebbian_parts.backward(
                dy, dlast, q, k, v, rho, S0, valid, eta, lam, scale, block
            )
        else:
            found = triton_hebbian_parts.packed_backward(
                dy, dlast, q, k, v, rho, S0, offsets, eta, lam, scale, block
            )
        if added is None:
            return found
        for whole, part in zip(added, found[:3], strict=True):
            whole += part
        return dq, dk, dv, *found[3:]
    entering = cut.enter(k, v, S0)
    states, decays = cut.states()
    inverses = torch.empty(batch, heads, tokens, device=q.device)
    drho, dS0 = torch.empty_like(rho), cut.last(dlast)
    options = {"scale": scale, "GROUP": heads // k.shape[1], "inverses": inverses}
    added_to, unit = {"ADDED": added is not None}, {"UNIT": q.dtype == torch.float16}
    stacks, rows = cut.operands(cut.stack, q=q, dy=dy), cut.rows
    pairs, many = cut.operands(k=k, v=v), cut.stack
    cut.block(cut.cfg.most)
    pairs |= cut.operands(one=q, up=dy)
    cut.block(rows)
    cut.launch(
        reads_kernel, cut.width(cut.dv), 2, **stacks, **pairs, dq=dq, states=states, decays=decays,
        entering=dlast if entering is None else entering, MANY=many, ROWS=cut.cfg.most,
        ENTERING=entering is not None, **options, **added_to, **unit,
    )  # fmt: skip
    cut.chain(states, decays, dlast, True)
    cut.block(cut.cfg.queries)
    readers = cut.operands(q=q, dy=dy)
    cut.block(cut.cfg.keys)
    cut.launch(
        writes_kernel, cut.width(cut.dv), 2, **readers, **cut.operands(k=k, v=v), leaving=states,
        dk=dk, dv=dv, drho=drho, dinitial=dS0, PART=cut.cfg.queries, **options, **added_to, **unit,
    )  # fmt: skip
    return dq, dk, dv, drho, dS0
