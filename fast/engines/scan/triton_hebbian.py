"""The memory that is read before it is written: one walk reads q, k, v and what it is added to, and
writes the sum.

Keys are brought to length 1 in registers, once for all query heads that read them; what a query
reads is linear in it, so it is divided by the query's norm instead. States of segments are those of
kv heads: their sums and the chain over them come first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnspec.fast.engines.flash.triton_launch import readable
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
from attnspec.fast.engines.scan.triton_trace_rows import floored


@triton.jit
def read_state(
    q_source, onto_source, out, batch, head, first, tokens, stop, column, S, K, X, powers, before,
    real, bits, scale, member,
    MANY: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, VALID: tl.constexpr, ADDED: tl.constexpr,
    ACCESS: tl.constexpr,
):  # fmt: skip
    """What C tokens of MANY query heads, from `member` of the group on, read: of the state S before
    them, in the type of X, and of what is written between them, keys K and values X, `powers`
    apart, in which the keys' lengths are.
    """
    reader = head * GROUP + member
    Q = load_rows(q_source, batch, reader, first, stop, 0, MANY, C, BD, D, ACCESS)
    inverse = 1.0 / floored(row_norms(Q.to(tl.float32)))
    P = tl.dot(Q, tl.trans(K), input_precision="ieee") * powers * inverse[:, None]
    aged = tl.exp2(bits * stacked(before, MANY, C)) * inverse
    Y = tl.dot(Q, S, input_precision="ieee") * aged[:, None]
    Y = tl.dot(P.to(X.dtype), X, Y, input_precision="ieee") * scale
    if ADDED:
        Y += load_rows(onto_source, batch, reader, first, stop, column, MANY, C, BV, DV, ACCESS)
    if VALID:
        kept = stacked(tl.where(real, 1.0, 0.0), MANY, C) > 0.0
        Y = tl.where(kept[:, None], Y, 0.0)
    line = batch * q_source[5] + reader
    at, inside = made_places(line, first, tokens, stop, column, MANY, C, BV, DV)
    tl.store(out + at, Y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=VARYING)
def hebbian_kernel(
    q, q_b, q_h, q_t, q_d, k, k_b, k_h, k_t, k_d, v, v_b, v_h, v_t, v_d,
    onto, onto_b, onto_h, onto_t, onto_d, valid, valid_b, valid_t, rho, entering, out, last,
    table, tokens, length, segments, kv_heads, eta, bits, scale,
    GROUP: tl.constexpr, MANY: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, VALID: tl.constexpr, ENTERING: tl.constexpr,
    ADDED: tl.constexpr, ACCESS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """out (batch, heads, tokens, DV) of a segment and its kv head's queries, for BV channels, from
    the state `entering` it; and the last state (sequences, kv_heads, D, DV).
    """
    batch, head, column, span, states_of, valid = place_of(
        table, segments, length, tokens, kv_heads, valid, valid_b, DV, BV, PACKED
    )
    start, stop = span
    state, own, _starts, ends = states_of
    line, heads = batch * kv_heads + head, kv_heads * GROUP
    q_source = opened((q, q_b, q_h, q_t, q_d, heads), batch, stop, MANY, C, BD, D, ACCESS)
    k_source = opened((k, k_b, k_h, k_t, k_d, kv_heads), batch, stop, 1, C, BD, D, ACCESS)
    v_source = opened((v, v_b, v_h, v_t, v_d, kv_heads), batch, stop, 1, C, BV, DV, ACCESS)
    onto_source = (onto, onto_b, onto_h, onto_t, onto_d, heads)
    if ADDED:
        onto_source = opened(onto_source, batch, stop, MANY, C, BV, DV, ACCESS)
    places, inside = state_places(column, D, DV, BD, BV)
    S = tl.zeros((BD, BV), tl.float32)
    if ENTERING:
        S = tl.load(entering + state * D * DV + places, mask=inside, other=0.0)
    for first in range(start, stop, C):
        real, upto, before, total = counts(valid, valid_t, first, stop, C, VALID)
        weights = exchanged(load_gates(rho, line, first, tokens, real, eta, C), C)
        K = load_rows(k_source, batch, head, first, stop, 0, 1, C, BD, D, ACCESS)
        X = load_rows(v_source, batch, head, first, stop, column, 1, C, BV, DV, ACCESS)
        shrunk = weights / floored(row_norms(K.to(tl.float32)))
        powers = read_powers(before, upto, bits, MANY, C) * shrunk[None, :]
        if GROUP == MANY:
            read_state(
                q_source, onto_source, out, batch, head, first, tokens, stop, column,
                S.to(K.dtype), K, X, powers, before, real, bits, scale, 0,
                MANY, GROUP, D, DV, BD, BV, C, VALID, ADDED, ACCESS,
            )  # fmt: skip
        else:
            for member in range(0, GROUP, MANY):
                read_state(
                    q_source, onto_source, out, batch, head, first, tokens, stop, column,
                    S.to(K.dtype), K, X, powers, before, real, bits, scale, member,
                    MANY, GROUP, D, DV, BD, BV, C, VALID, ADDED, ACCESS,
                )  # fmt: skip
        # The only rounding of what is stored: keys of unit length are none of the dtype's.
        H = (K * (shrunk * tl.exp2(bits * (total - upto)))[:, None]).to(K.dtype)
        S = tl.dot(tl.trans(H), X, S * tl.exp2(bits * total), input_precision="ieee")
    if ends:
        tl.store(last + own * D * DV + places, S, mask=inside)


def forward(
    q: Tensor, k: Tensor, v: Tensor, rho: Tensor, S0: Tensor | None, valid: Tensor | None,
    onto: Tensor | None, eta: float, lam: float, scale: float, block: int,
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """m, added to `onto`, and the last states, one for each of the sequences that `offsets`
    (sequences + 1) pack in a batch of one.
    """
    batch, heads, tokens, _ = q.shape
    out = torch.empty(batch, heads, tokens, v.shape[3], dtype=q.dtype, device=q.device)
    many = batch if offsets is None else offsets.shape[0] - 1
    shape = (many, k.shape[1], k.shape[3], v.shape[3])
    S0 = None if S0 is None else S0.contiguous()
    if not batch * tokens:
        return out, torch.zeros(shape, device=q.device) if S0 is None else S0.clone()
    q, k, v, added = readable(q, k, v, out if onto is None else onto)
    cut = Cut((q, k, v, added), rho, valid, offsets, eta, lam, block)
    entering = cut.enter(k, v, S0)
    last = cut.last(S0)
    cut.launch(
        hebbian_kernel, cut.columns, cut.tiles, **cut.operands(cut.stack, q=q), **cut.operands(k=k),
        **cut.operands(cut.stack, cut.columns, onto=added),
        **cut.operands(1, cut.columns, v=v), entering=last if entering is None else entering,
        out=out, last=last, scale=scale, GROUP=heads // k.shape[1], MANY=cut.stack,
        ENTERING=entering is not None, ADDED=onto is not None,
    )  # fmt: skip
    return out, last
