"""The gradient of the memory that is read before it is written: that of queries in a walk from the
beginning, those of keys, values and gates in one from the end.

A program holds a whole state or its whole gradient, and sums over the query heads that read it in
registers. Gradients that are there already are added to in the same pass. Wider states, and float32
that no matrix unit multiplies, go through the scan instead: `triton_hebbian_parts.py`.
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
    place_of,
    read_powers,
    row_norms,
    stacked,
    state_places,
)
from attnspec.fast.engines.scan.triton_plan import power
from attnspec.fast.engines.scan.triton_trace import FLOOR, floored


@triton.jit
def unit_gradient(G, X, norm):
    """The gradient of rows X from that of X / max(norm, FLOOR), and what of that lies along X."""
    inverse = 1.0 / floored(norm)
    radial = tl.sum(G * X, 1) * inverse
    # Below the floor the norm is a constant.
    inward = tl.where(norm > FLOOR, radial * inverse, 0.0)
    return (G - X * inward[:, None]) * inverse[:, None], radial


@triton.jit
def differentiate_reads(
    q_source, dy_source, dq, inverses, batch, head, first, tokens, S, H, X, R, powers, before, seen,
    bits, scale, member,
    MANY: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, ADDED: tl.constexpr, ACCESS: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """dq and the inverse norms of C tokens of MANY query heads, see `read_state`; and R with what
    they add to the gradient of the state before the segment.
    """
    reader = head * GROUP + member
    line = batch * q_source[5] + reader
    dY = load_rows(dy_source, batch, reader, first, tokens, 0, MANY, C, BV, DV, ACCESS)
    P = tl.dot(dY, tl.trans(X), input_precision="ieee") * powers
    aged = tl.exp2(bits * stacked(before, MANY, C))
    G = tl.dot(dY, tl.trans(S), input_precision="ieee") * aged[:, None]
    G = tl.dot(P.to(H.dtype), H, G, input_precision="ieee") * scale
    Q = load_rows(q_source, batch, reader, first, tokens, 0, MANY, C, BD, D, ACCESS)
    wide = Q.to(tl.float32)
    norm = row_norms(wide)
    G, _ = unit_gradient(G, wide, norm)
    at, inside = made_places(line, GROUP - member, first, tokens, 0, MANY, C, BD, D)
    if ADDED:
        G += tl.load(dq + at, mask=inside, other=0.0)
    tl.store(dq + at, G.to(dq.dtype.element_ty), mask=inside)
    row = tl.arange(0, MANY * C)
    t, mine = first + row % C, row // C < GROUP - member
    inverse = 1.0 / floored(norm)
    tl.store(inverses + (line + row // C) * tokens + t, inverse, mask=mine & (t < tokens))
    factor = tl.where(mine, scale * tl.exp2(bits * seen) * aged, 0.0)
    if UNIT:
        Q = (wide * inverse[:, None]).to(Q.dtype)
    else:
        factor *= inverse
    return tl.dot(tl.trans(Q), (dY * factor[:, None]).to(dY.dtype), R, input_precision="ieee")


@triton.jit(do_not_specialize=VARYING)
def queries_kernel(
    q, q_b, q_h, q_t, q_d, k, k_b, k_h, k_t, k_d, v, v_b, v_h, v_t, v_d, dy, dy_b, dy_h, dy_t, dy_d,
    valid, valid_b, valid_t, rho, entering, dq, inverses, states, decays,
    tokens, length, segments, kv_heads, eta, bits, scale,
    GROUP: tl.constexpr, MANY: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, VALID: tl.constexpr, ENTERING: tl.constexpr,
    ADDED: tl.constexpr, ACCESS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """dq of a segment, added to what is there if ADDED; the inverse norms of queries; and what the
    segment adds to the gradient of the state before it, with its log decay.
    """
    batch, head, segment, column, state, valid = place_of(
        segments, kv_heads, valid, valid_b, DV, BV
    )
    line, heads = batch * kv_heads + head, kv_heads * GROUP
    q_source, k_source = (q, q_b, q_h, q_t, q_d, heads), (k, k_b, k_h, k_t, k_d, kv_heads)
    v_source = (v, v_b, v_h, v_t, v_d, kv_heads)
    dy_source = (dy, dy_b, dy_h, dy_t, dy_d, heads)
    places, inside = state_places(column, D, DV, BD, BV)
    S = tl.zeros((BD, BV), tl.float32)
    if ENTERING:
        S = tl.load(entering + state * D * DV + places, mask=inside, other=0.0)
    R = tl.zeros((BD, BV), tl.float32)
    seen = tl.full((), 0.0, tl.float32)
    start = segment * length
    for first in range(start, tl.minimum(start + length, tokens), C):
        real, upto, before, total = counts(valid, valid_t, first, tokens, C, VALID)
        weights = exchanged(load_gates(rho, line, first, tokens, real, eta, C), C)
        K = load_rows(k_source, batch, head, first, tokens, 0, 1, C, BD, D, ACCESS)
        X = load_rows(v_source, batch, head, first, tokens, column, 1, C, BV, DV, ACCESS)
        wide = K.to(tl.float32)
        H = (wide / floored(row_norms(wide))[:, None]).to(K.dtype)
        powers = read_powers(before, upto, bits, MANY, C) * weights[None, :]
        if GROUP <= MANY:
            R = differentiate_reads(
                q_source, dy_source, dq, inverses, batch, head, first, tokens, S.to(K.dtype), H, X,
                R, powers, before, seen, bits, scale, 0,
                MANY, GROUP, D, DV, BD, BV, C, ADDED, ACCESS, UNIT,
            )  # fmt: skip
        else:
            for member in range(0, GROUP, MANY):
                R = differentiate_reads(
                    q_source, dy_source, dq, inverses, batch, head, first, tokens, S.to(K.dtype),
                    H, X, R, powers, before, seen, bits, scale, member,
                    MANY, GROUP, D, DV, BD, BV, C, ADDED, ACCESS, UNIT,
                )  # fmt: skip
        X = (X * (weights * tl.exp2(bits * (total - upto)))[:, None]).to(X.dtype)
        S = tl.dot(tl.trans(H), X, S * tl.exp2(bits * total), input_precision="ieee")
        seen += total
    tl.store(states + state * D * DV + places, R, mask=inside)
    # The chain takes natural logarithms.
    tl.store(decays + state, bits * seen * 0.6931471805599453)


@triton.jit(do_not_specialize=VARYING)
def keys_kernel(
    q, q_b, q_h, q_t, q_d, k, k_b, k_h, k_t, k_d, v, v_b, v_h, v_t, v_d, dy, dy_b, dy_h, dy_t, dy_d,
    valid, valid_b, valid_t, rho, inverses, leaving, dk, dv, drho, dinitial,
    tokens, length, segments, kv_heads, eta, bits, scale,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, VALID: tl.constexpr, ADDED: tl.constexpr, ACCESS: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """dk and dv of a segment, added to what is there if ADDED, and drho, from the gradient of the
    state `leaving` it; and the gradient of the initial state.
    """
    batch, head, segment, column, state, valid = place_of(
        segments, kv_heads, valid, valid_b, DV, BV
    )
    line, heads = batch * kv_heads + head, kv_heads * GROUP
    q_source, k_source = (q, q_b, q_h, q_t, q_d, heads), (k, k_b, k_h, k_t, k_d, kv_heads)
    v_source = (v, v_b, v_h, v_t, v_d, kv_heads)
    dy_source = (dy, dy_b, dy_h, dy_t, dy_d, heads)
    places, inside = state_places(column, D, DV, BD, BV)
    R = tl.load(leaving + state * D * DV + places, mask=inside, other=0.0)
    start = segment * length
    blocks = tl.cdiv(tl.minimum(length, tokens - start), C)
    for n in range(blocks):
        first = start + (blocks - 1 - n) * C
        real, upto, before, total = counts(valid, valid_t, first, tokens, C, VALID)
        K = load_rows(k_source, batch, head, first, tokens, 0, 1, C, BD, D, ACCESS)
        X = load_rows(v_source, batch, head, first, tokens, column, 1, C, BV, DV, ACCESS)
        wide = K.to(tl.float32)
        norm = row_norms(wide)
        H = (wide / floored(norm)[:, None]).to(K.dtype)
        kept = tl.exp2(bits * (total - upto))[:, None]
        held = R.to(K.dtype)
        dX = tl.dot(H, held, input_precision="ieee") * kept
        dH = tl.dot(X, tl.trans(held), input_precision="ieee") * kept
        R *= tl.exp2(bits * total)
        # Written down, read across.
        down, across = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
        aged = bits * (before[None, :] - upto[:, None])
        powers = tl.exp2(tl.where(across > down, aged, float("-inf"))) * scale
        for member in range(GROUP):
            reader = head * GROUP + member
            Q = load_rows(q_source, batch, reader, first, tokens, 0, 1, C, BD, D, ACCESS)
            dY = load_rows(dy_source, batch, reader, first, tokens, 0, 1, C, BV, DV, ACCESS)
            t = first + tl.arange(0, C)
            at = (batch * heads + reader) * tokens + t
            inverse = tl.load(inverses + at, mask=t < tokens, other=0.0)
            inverse = exchanged(inverse, C)
            factor = scale * tl.exp2(bits * before)
            read = powers
            if UNIT:
                Q = (Q * inverse[:, None]).to(Q.dtype)
            else:
                factor *= inverse
                read *= inverse[None, :]
            P = tl.dot(H, tl.trans(Q), input_precision="ieee") * read
            dX = tl.dot(P.to(dY.dtype), dY, dX, input_precision="ieee")
            P = tl.dot(X, tl.trans(dY), input_precision="ieee") * read
            dH = tl.dot(P.to(Q.dtype), Q, dH, input_precision="ieee")
            dY = (dY * factor[:, None]).to(dY.dtype)
            R = tl.dot(tl.trans(Q), dY, R, input_precision="ieee")
        weights = exchanged(load_gates(rho, line, first, tokens, real, eta, C), C)[:, None]
        dK, along = unit_gradient(dH, K.to(tl.float32), norm)
        dK *= weights
        dX *= weights
        at, mine = made_places(line, 1, first, tokens, 0, 1, C, BD, D)
        if ADDED:
            dK += tl.load(dk + at, mask=mine, other=0.0)
        tl.store(dk + at, dK.to(dk.dtype.element_ty), mask=mine)
        at, mine = made_places(line, 1, first, tokens, 0, 1, C, BV, DV)
        if ADDED:
            dX += tl.load(dv + at, mask=mine, other=0.0)
        tl.store(dv + at, dX.to(dv.dtype.element_ty), mask=mine)
        t = first + tl.arange(0, C)
        tl.store(drho + line * tokens + t, tl.where(real, eta * along, 0.0), mask=t < tokens)
    if segment == 0:
        tl.store(dinitial + line * D * DV + places, R, mask=inside)


Gradients = tuple[Tensor, Tensor, Tensor]


def backward(
    dy: Tensor, dlast: Tensor, q: Tensor, k: Tensor, v: Tensor, rho: Tensor, S0: Tensor | None,
    valid: Tensor | None, eta: float, lam: float, scale: float, block: int,
    added: Gradients | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k, v, rho and the initial state; those of q, k and v are added to what is
    given, contiguous, in place.
    """
    batch, heads, tokens, _ = q.shape
    dlast, rho = dlast.contiguous(), rho.contiguous()
    S0 = None if S0 is None else S0.contiguous()
    made = added or tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    dq, dk, dv = made
    if not batch * tokens:
        return dq, dk, dv, torch.zeros_like(rho), dlast.clone()
    q, k, v, dy = readable(q, k, v, dy)
    cut = Cut((q, k, v, dy), rho, valid, eta, lam, block)
    if max(cut.d, cut.dv) > cut.cfg.whole:
        found = triton_hebbian_parts.backward(
            dy, dlast, q, k, v, rho, S0, valid, eta, lam, scale, block
        )
        if added is None:
            return found
        for whole, part in zip(added, found[:3], strict=True):
            whole += part
        return dq, dk, dv, *found[3:]
    entering = cut.enter(k, v, S0)
    states, decays = cut.states()
    inverses = torch.empty(batch, heads, tokens, device=q.device)
    drho, dS0 = torch.empty_like(rho), torch.empty_like(dlast)
    options = {
        "scale": scale, "GROUP": heads // k.shape[1], "ADDED": added is not None,
        "UNIT": q.dtype == torch.float16, "inverses": inverses,
    }  # fmt: skip
    cut.launch(
        queries_kernel, power(cut.dv), 1, **cut.operands(cut.stack, q=q, dy=dy),
        **cut.operands(k=k, v=v), entering=dlast if entering is None else entering, dq=dq,
        states=states, decays=decays, MANY=cut.stack, ENTERING=entering is not None, **options,
    )  # fmt: skip
    cut.chain(states, decays, dlast, True)
    cut.block(cut.cfg.most)
    cut.launch(
        keys_kernel, power(cut.dv), 1, **cut.operands(q=q, dy=dy, k=k, v=v), leaving=states, dk=dk,
        dv=dv, drho=drho, dinitial=dS0, **options,
    )  # fmt: skip
    return dq, dk, dv, drho, dS0
