"""Triton kernels for the way back through what queries read from a memory of two layers.

One goes through the read again, and leaves for the other two what the queries were at the second
layer, h, and the gradient of the first layer's products, dA (slots, heads, hidden, C); these give
the shares of states, inputs and gradients of layers, a program a tile of hidden channels, and the
gradients of queries and keys, a program a piece.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.fast.engines.memory.triton_deep_walk import (
    RUNTIME,
    dot,
    gelu,
    gelu_slope,
    layer_tiles,
    store_tokens,
    tokens_tile,
)
from attnspec.fast.engines.memory.triton_scalars import piece_at
from attnspec.fast.engines.memory.triton_walk import rows_tile, store_rows


@triton.jit(do_not_specialize=RUNTIME)
def read_back_kernel(
    k, q, dy, W, S, H, D1, D2, rows, G, pairs, h, dA, drows, dG, dD2, first, many, cuts, tokens,
    b, per, count, size, memories, group, hidden,
    D: tl.constexpr, DV: tl.constexpr, HIDDEN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BH: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """h and dA, the share of the reads in dD2 (slots, heads, dv, C), and the second layer's in the
    gradients of the read coefficients, drows (heads, pieces, layers, C, 2) and dG (heads, pieces,
    C, C).

    A program is a query head and a piece. `pairs` (slots, heads, 2, C, C) takes scores, and
    gradients of the second layer's, a row a key.
    """
    N: tl.constexpr = HIDDEN * (D + DV)
    own = (tl.program_id(0) // many).to(tl.int64)
    i = tl.program_id(0) % many
    memory = own // group
    here = memory * count + first + i
    line = i * memories + memory
    place = i * memories * group + own
    _turn, start, length = piece_at(first + i, cuts, tokens, b, per, size, PACKED)
    row = tl.arange(0, C)
    square = row[:, None] * C + row[None, :]
    turned = row[None, :] * C + row[:, None]
    beta = tl.load(rows + (here * C + row) * 3)[None, :]
    f = tl.load(rows + (here * C + row) * 3 + 2)[None, :]
    Q_T = tl.trans(rows_tile(q + own * tokens * D, D, start, length, 0, D, C, BD))
    K = rows_tile(k + memory * tokens * D, D, start, length, 0, D, C, BD)
    dY = tl.trans(rows_tile(dy + own * tokens * DV, DV, start, length, 0, DV, C, BV))
    E = tl.trans(tokens_tile(D2, line, 0, DV, BV, C))
    weight = tl.load(G + here * C * C + turned)
    P = dot(K, Q_T, PRECISION) * weight
    tl.store(pairs + place * 2 * C * C + square, P)
    dP = -dot(E, dY, PRECISION) * weight
    tl.store(pairs + (place * 2 + 1) * C * C + square, dP)
    scores = tl.zeros((C, C), tl.float32)
    dbeta = tl.zeros((C,), tl.float32)
    df = tl.zeros((C,), tl.float32)
    weights = W + (line + memories) * N
    momentum = S + line * N
    for low in range(0, hidden, BH):
        one, in_one, two, in_two = layer_tiles(low, D, DV, HIDDEN, BD, BV, BH)
        W1 = tl.load(weights + one, mask=in_one, other=0.0)
        S1 = tl.load(momentum + one, mask=in_one, other=0.0)
        A = beta * dot(tl.trans(W1), Q_T, PRECISION) + f * dot(tl.trans(S1), Q_T, PRECISION)
        A -= dot(tokens_tile(D1, line, low, HIDDEN, BH, C), P, PRECISION)
        x = gelu(A)
        store_tokens(h, place, x, low, HIDDEN, BH, C)
        stored = tokens_tile(H, line, low, HIDDEN, BH, C)
        scores += dot(tl.trans(stored), x, PRECISION)
        dx = dot(stored, dP, PRECISION)
        U = dot(tl.load(weights + two, mask=in_two, other=0.0), dY, PRECISION)
        dbeta += tl.sum(x * U, 0)
        dx += beta * U
        U = dot(tl.load(momentum + two, mask=in_two, other=0.0), dY, PRECISION)
        df += tl.sum(x * U, 0)
        dx += f * U
        store_tokens(dA, place, dx * gelu_slope(A), low, HIDDEN, BH, C)
    share = (own * count + first + i) * C
    tl.store(drows + (share * 2 + row) * 2, dbeta)
    tl.store(drows + (share * 2 + row) * 2 + 1, df)
    # Read again: held through the loop they would take shared memory that others need.
    dY = tl.trans(rows_tile(dy + own * tokens * DV, DV, start, length, 0, DV, C, BV))
    E = tl.trans(tokens_tile(D2, line, 0, DV, BV, C))
    tl.store(dG + share * C + turned, -scores * dot(E, dY, PRECISION))
    scores *= tl.load(G + here * C * C + turned)
    store_tokens(dD2, place, -dot(dY, tl.trans(scores), PRECISION), 0, DV, BV, C)


@triton.jit(do_not_specialize=RUNTIME)
def shares_kernel(
    q, dy, rows, pairs, h, dA, dW, dS, dH, dD1, first, many, cuts, tokens, b, per, count, size,
    memories, group,
    D: tl.constexpr, DV: tl.constexpr, HIDDEN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BH: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The share of the reads in dW, dS (slots, heads, numbers), dH, dD1 (slots, heads, hidden, C):
    a program is a query head, a piece and a tile of hidden channels.
    """
    N: tl.constexpr = HIDDEN * (D + DV)
    tiles: tl.constexpr = (HIDDEN + BH - 1) // BH
    low = tl.program_id(0) % tiles * BH
    program = tl.program_id(0) // tiles
    own = (program // many).to(tl.int64)
    i = program % many
    here = own // group * count + first + i
    place = i * memories * group + own
    _turn, start, length = piece_at(first + i, cuts, tokens, b, per, size, PACKED)
    row = tl.arange(0, C)
    square = row[:, None] * C + row[None, :]
    beta = tl.load(rows + (here * C + row) * 3)
    f = tl.load(rows + (here * C + row) * 3 + 2)
    one, in_one, two, in_two = layer_tiles(low, D, DV, HIDDEN, BD, BV, BH)
    x = tokens_tile(h, place, low, HIDDEN, BH, C)
    dP = tl.load(pairs + (place * 2 + 1) * C * C + square)
    store_tokens(dH, place, dot(x, tl.trans(dP), PRECISION), low, HIDDEN, BH, C)
    dY = rows_tile(dy + own * tokens * DV, DV, start, length, 0, DV, C, BV)
    share = dot(x, beta[:, None] * dY, PRECISION)
    tl.store(dW + place * N + two, share, mask=in_two)
    share = dot(x, f[:, None] * dY, PRECISION)
    tl.store(dS + place * N + two, share, mask=in_two)
    x = tokens_tile(dA, place, low, HIDDEN, BH, C)
    P = tl.load(pairs + place * 2 * C * C + square)
    store_tokens(dD1, place, -dot(x, tl.trans(P), PRECISION), low, HIDDEN, BH, C)
    Q_T = tl.trans(rows_tile(q + own * tokens * D, D, start, length, 0, D, C, BD))
    share = dot(Q_T, tl.trans(beta[None, :] * x), PRECISION)
    tl.store(dW + place * N + one, share, mask=in_one)
    share = dot(Q_T, tl.trans(f[None, :] * x), PRECISION)
    tl.store(dS + place * N + one, share, mask=in_one)


@triton.jit(do_not_specialize=RUNTIME)
def queries_back_kernel(
    k, q, W, S, D1, rows, G, dA, dq, drows, dG, dK, first, many, cuts, tokens, b, per, count,
    size, memories, group, hidden,
    D: tl.constexpr, DV: tl.constexpr, HIDDEN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BH: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """dq, the share of the reads in dK (slots, heads, d, C), and the first layer's in drows and,
    added to what is there, in dG: a program is a query head and a piece.
    """
    N: tl.constexpr = HIDDEN * (D + DV)
    own = (tl.program_id(0) // many).to(tl.int64)
    i = tl.program_id(0) % many
    memory = own // group
    here = memory * count + first + i
    line = i * memories + memory
    place = i * memories * group + own
    _turn, start, length = piece_at(first + i, cuts, tokens, b, per, size, PACKED)
    dscores = tl.zeros((C, C), tl.float32)
    in_W = tl.zeros((BD, C), tl.float32)
    in_S = tl.zeros((BD, C), tl.float32)
    for low in range(0, hidden, BH):
        one, in_one, _two, _in_two = layer_tiles(low, D, DV, HIDDEN, BD, BV, BH)
        x = tokens_tile(dA, place, low, HIDDEN, BH, C)
        dscores -= dot(tl.trans(tokens_tile(D1, line, low, HIDDEN, BH, C)), x, PRECISION)
        W1 = tl.load(W + (line + memories) * N + one, mask=in_one, other=0.0)
        in_W += dot(W1, x, PRECISION)
        S1 = tl.load(S + line * N + one, mask=in_one, other=0.0)
        in_S += dot(S1, x, PRECISION)
    row = tl.arange(0, C)
    turned = row[None, :] * C + row[:, None]
    beta = tl.load(rows + (here * C + row) * 3)[None, :]
    f = tl.load(rows + (here * C + row) * 3 + 2)[None, :]
    Q_T = tl.trans(rows_tile(q + own * tokens * D, D, start, length, 0, D, C, BD))
    K = rows_tile(k + memory * tokens * D, D, start, length, 0, D, C, BD)
    share = (own * count + first + i) * C
    tl.store(drows + (share * 2 + C + row) * 2, tl.sum(Q_T * in_W, 0))
    tl.store(drows + (share * 2 + C + row) * 2 + 1, tl.sum(Q_T * in_S, 0))
    of_weight = tl.load(dG + share * C + turned) + dscores * dot(K, Q_T, PRECISION)
    tl.store(dG + share * C + turned, of_weight)
    dscores *= tl.load(G + here * C * C + turned)
    dQ = beta * in_W + f * in_S + dot(tl.trans(K), dscores, PRECISION)
    store_rows(dq + own * tokens * D, D, tl.trans(dQ), start, length, 0, D, C, BD)
    store_tokens(dK, place, dot(Q_T, tl.trans(dscores), PRECISION), 0, D, BD, C)
