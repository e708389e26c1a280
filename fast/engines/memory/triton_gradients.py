"""Triton kernels for the gradients of queries, keys and coefficients of a linear memory.

They walk nowhere: the states before and the gradients behind every piece are given, so that every
piece, and every tile of its key channels, is a program of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.fast.engines.memory.triton_scalars import PLACE, locate
from attnspec.fast.engines.memory.triton_walk import (
    offset,
    product,
    rows_tile,
    state_at,
    store_rows,
)


@triton.jit(do_not_specialize=[*PLACE, "k_b", "k_h", "v_b", "v_h", "q_b", "q_h"])
def queries_kernel(
    k, k_b, k_h, k_t, q, q_b, q_h, q_t, dy, states, errors, rows, G, dq, dpairs, drows,
    dG, cuts, tokens, b, per, count, size, heads, group,
    D: tl.constexpr, DV: tl.constexpr, C: tl.constexpr, TD: tl.constexpr, TV: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """dq, the gradients of q k^T in dpairs, and those of the read coefficients of a query head.

    drows (query heads, pieces, tiles, C, 2) are a tile's share of dbeta and df.
    """
    tiles: tl.constexpr = (D + TD - 1) // TD
    tile = tl.program_id(0) % tiles
    low = tile * TD
    own, piece, _turn, start, length = locate(
        tl.program_id(0) // tiles, cuts, tokens, b, per, count, size, PACKED
    )
    if PACKED and length == 0:
        return
    memory = own // group
    batch, head = own // (heads * group), own % (heads * group)
    k += offset(batch, k_b, head // group, k_h)
    q += offset(batch, q_b, head, q_h)
    here = memory * count + piece
    in_W = tl.zeros((C, TD), tl.float32)
    in_S = tl.zeros((C, TD), tl.float32)
    dA = tl.zeros((C, C), tl.float32)
    for left in range(0, DV, TV):
        dY = rows_tile(dy + own * tokens * DV, DV, start, length, left, DV, C, TV)
        E = rows_tile(errors + here * C * DV, DV, 0, C, left, DV, C, TV)
        at, inside = state_at(D, DV, TD, TV, low, left)
        W = tl.load(states + here * 2 * D * DV + at, mask=inside, other=0.0)
        S = tl.load(states + (here * 2 + 1) * D * DV + at, mask=inside, other=0.0)
        in_W += product(dY, tl.trans(W))
        in_S += product(dY, tl.trans(S))
        dA -= product(dY, tl.trans(E))
    row = tl.arange(0, C)
    square = row[:, None] * C + row[None, :]
    weights = tl.load(G + here * C * C + square)
    K = rows_tile(k, k_t, start, length, low, D, C, TD)
    Q = rows_tile(q, q_t, start, length, low, D, C, TD)
    beta = tl.load(rows + (here * C + row) * 3)[:, None]
    f = tl.load(rows + (here * C + row) * 3 + 2)[:, None]
    dP = (dA * weights).to(K.dtype)
    dQ = beta * in_W + f * in_S + product(dP, K)
    store_rows(dq + own * tokens * D, D, dQ, start, length, low, D, C, TD)
    wide = Q.to(tl.float32)
    share = drows + (((own * count + piece) * tiles + tile) * C + row) * 2
    tl.store(share, tl.sum(wide * in_W, 1))
    tl.store(share + 1, tl.sum(wide * in_S, 1))
    if tile == 0:
        pairs = tl.zeros((C, C), tl.float32)
        for first in range(0, D, TD):
            Q = rows_tile(q, q_t, start, length, first, D, C, TD)
            K = rows_tile(k, k_t, start, length, first, D, C, TD)
            pairs += product(Q, tl.trans(K))
        tl.store(dpairs + (own * count + piece) * C * C + square, dP)
        tl.store(dG + (own * count + piece) * C * C + square, dA * pairs)


@triton.jit(do_not_specialize=[*PLACE, "k_b", "k_h", "v_b", "v_h", "q_b", "q_h"])
def keys_kernel(
    k, k_b, k_h, k_t, q, q_b, q_h, q_t, dv, states, dstates, errors, end_n, end_G, dpairs,
    dk, dend, dend_n, dend_G, cuts, tokens, b, per, count, size, heads, group,
    D: tl.constexpr, DV: tl.constexpr, C: tl.constexpr, TD: tl.constexpr, TV: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """dk, and a tile's share of the gradients of the last coefficients of a piece:
    dend (memories, pieces, tiles, 3), dend_n and dend_G (memories, pieces, tiles, C).
    """
    tiles: tl.constexpr = (D + TD - 1) // TD
    tile = tl.program_id(0) % tiles
    low = tile * TD
    memory, piece, turn, start, length = locate(
        tl.program_id(0) // tiles, cuts, tokens, b, per, count, size, PACKED
    )
    if PACKED and length == 0:
        return
    batch, head = memory // heads, memory % heads
    k += offset(batch, k_b, head, k_h)
    here = memory * count + piece
    base = here - turn
    dK = tl.zeros((C, TD), tl.float32)
    in_W = tl.zeros((C, TD), tl.float32)
    in_S = tl.zeros((C, TD), tl.float32)
    dbeta = tl.zeros((TD, TV), tl.float32)
    dm = tl.zeros((TD, TV), tl.float32)
    df = tl.zeros((TD, TV), tl.float32)
    for left in range(0, DV, TV):
        at, inside = state_at(D, DV, TD, TV, low, left)
        W = tl.load(states + here * 2 * D * DV + at, mask=inside, other=0.0)
        S = tl.load(states + (here * 2 + 1) * D * DV + at, mask=inside, other=0.0)
        older = tl.load(states + base * 2 * D * DV + at, mask=inside, other=0.0)
        dW = tl.load(dstates + here * 2 * D * DV + at, mask=inside, other=0.0)
        dS = tl.load(dstates + (here * 2 + 1) * D * DV + at, mask=inside, other=0.0)
        E = rows_tile(errors + here * C * DV, DV, 0, C, left, DV, C, TV)
        dV = rows_tile(dv + memory * tokens * DV, DV, start, length, left, DV, C, TV)
        in_W += product(E, tl.trans(dW))
        in_S += product(E, tl.trans(dS))
        dK -= product(dV, tl.trans(older))
        wide_W, wide_S = dW.to(tl.float32), dS.to(tl.float32)
        dbeta += W.to(tl.float32) * wide_W
        df += S.to(tl.float32) * wide_W
        dm += S.to(tl.float32) * wide_S
    row = tl.arange(0, C)
    square = row[:, None] * C + row[None, :]
    G = tl.load(end_G + here * C + row)[:, None]
    other = tl.load(end_n + here * C + row)[:, None]
    dK -= G * in_W + other * in_S
    for g in range(group):
        own = memory * group + g
        dP = tl.load(dpairs + (own * count + piece) * C * C + square)
        queries = q + offset(batch, q_b, head * group + g, q_h)
        Q = rows_tile(queries, q_t, start, length, low, D, C, TD)
        dK += product(tl.trans(dP), Q)
    store_rows(dk + memory * tokens * D, D, dK, start, length, low, D, C, TD)
    K = rows_tile(k, k_t, start, length, low, D, C, TD).to(tl.float32)
    share = (here * tiles + tile) * C + row
    tl.store(dend_G + share, -tl.sum(K * in_W, 1))
    tl.store(dend_n + share, -tl.sum(K * in_S, 1))
    scalar = dend + (here * tiles + tile) * 3
    tl.store(scalar, tl.sum(tl.sum(dbeta, 1), 0))
    tl.store(scalar + 1, tl.sum(tl.sum(dm, 1), 0))
    tl.store(scalar + 2, tl.sum(tl.sum(df, 1), 0))
