"""The Triton kernel for the way back through what queries read from a memory of two layers."""

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
from attnspec.fast.engines.memory.triton_scalars import locate
from attnspec.fast.engines.memory.triton_walk import rows_tile, store_rows


@triton.jit(do_not_specialize=RUNTIME)
def read_back_kernel(
    k, q, dy, W, S, H, D1, D2, rows, G, pairs, dq, drows, dG, dW, dS, dH, dD1, dD2, dK, first, many,
    tokens, b, per, count, size, memories, group,
    D: tl.constexpr, DV: tl.constexpr, HIDDEN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BH: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, the gradients of the read coefficients, drows (heads, pieces, C, 2) and dG (heads,
    pieces, C, C), and the share of the read in the gradients of a group's states, inputs and
    gradients of layers: dW to dK, each (slots, heads, ...).

    A program is a query head and a piece. `pairs` (slots, heads, 2, C, C) takes scores, and
    gradients of the second layer's, so that they are first operands as loaded.
    """
    KP: tl.constexpr = (D + 15) // 16 * 16
    VP: tl.constexpr = (DV + 15) // 16 * 16
    N: tl.constexpr = D * ((HIDDEN + 15) // 16 * 16) + HIDDEN * VP
    own = (tl.program_id(0) // many).to(tl.int64)
    i = tl.program_id(0) % many
    memory = own // group
    here = memory * count + first + i
    line = i * memories + memory
    place = i * memories * group + own
    _, _piece, start, length = locate(first + i, tokens, b, per, count, size)
    # A row a key, a column a query.
    row = tl.arange(0, C)
    square = row[:, None] * C + row[None, :]
    turned = here * C * C + row[None, :] * C + row[:, None]
    beta = tl.load(rows + (here * C + row) * 3)[None, :]
    f = tl.load(rows + (here * C + row) * 3 + 2)[None, :]
    Q_T = tl.trans(rows_tile(q + own * tokens * KP, KP, start, length, 0, D, C, BD))
    K = rows_tile(k + memory * tokens * KP, KP, start, length, 0, D, C, BD)
    dY = tl.trans(rows_tile(dy + own * tokens * VP, VP, start, length, 0, DV, C, BV))
    E = tokens_tile(D2, line, 0, DV, BV, C)
    weight = tl.load(G + turned)
    pairs += place * 2 * C * C
    tl.store(pairs + square, dot(K, Q_T, PRECISION) * weight)
    tl.store(pairs + C * C + square, -dot(tl.trans(E), dY, PRECISION) * weight)
    # Other threads of the program read them.
    tl.debug_barrier()
    scores = tl.zeros((C, C), tl.float32)
    dscores = tl.zeros((C, C), tl.float32)
    in_W = tl.zeros((BD, C), tl.float32)
    in_S = tl.zeros((BD, C), tl.float32)
    dbeta = tl.zeros((C,), tl.float32)
    df = tl.zeros((C,), tl.float32)
    weights = W + (line + memories) * N
    momentum = S + line * N
    for low in range(0, HIDDEN, BH):
        one, in_one, two, in_two = layer_tiles(low, D, DV, HIDDEN, BD, BV, BH)
        W1 = tl.load(weights + one, mask=in_one, other=0.0)
        S1 = tl.load(momentum + one, mask=in_one, other=0.0)
        delta = tokens_tile(D1, line, low, HIDDEN, BH, C)
        P = tl.load(pairs + square)
        A = dot(tl.trans(W1), beta * Q_T, PRECISION) + dot(tl.trans(S1), f * Q_T, PRECISION)
        A -= dot(delta, P, PRECISION)
        h = gelu(A)
        stored = tokens_tile(H, line, low, HIDDEN, BH, C)
        scores += dot(tl.trans(stored), h, PRECISION)
        dP = tl.load(pairs + C * C + square)
        dA = dot(stored, dP, PRECISION)
        store_tokens(dH, place, tl.trans(dot(dP, tl.trans(h), PRECISION)), low, HIDDEN, BH, C)
        U = dot(tl.load(weights + two, mask=in_two, other=0.0), dY, PRECISION)
        dbeta += tl.sum(h * U, 0)
        dA += beta * U
        U = dot(tl.load(momentum + two, mask=in_two, other=0.0), dY, PRECISION)
        df += tl.sum(h * U, 0)
        dA = (dA + f * U) * gelu_slope(A)
        share = tl.trans(dot(dY, tl.trans(beta * h), PRECISION))
        tl.store(dW + place * N + two, share, mask=in_two)
        share = tl.trans(dot(dY, tl.trans(f * h), PRECISION))
        tl.store(dS + place * N + two, share, mask=in_two)
        share = dot(Q_T, tl.trans(beta * dA), PRECISION)
        tl.store(dW + place * N + one, share, mask=in_one)
        share = dot(Q_T, tl.trans(f * dA), PRECISION)
        tl.store(dS + place * N + one, share, mask=in_one)
        store_tokens(dD1, place, -tl.trans(dot(P, tl.trans(dA), PRECISION)), low, HIDDEN, BH, C)
        dscores -= dot(tl.trans(delta), dA, PRECISION)
        in_W += dot(W1, dA, PRECISION)
        in_S += dot(S1, dA, PRECISION)
    weight = tl.load(G + turned)
    share = (own * count + first + i) * C
    tl.store(drows + (share + row) * 2, dbeta + tl.sum(Q_T * in_W, 0))
    tl.store(drows + (share + row) * 2 + 1, df + tl.sum(Q_T * in_S, 0))
    of_weight = dscores * dot(K, Q_T, PRECISION) - scores * dot(tl.trans(E), dY, PRECISION)
    tl.store(dG + share * C + row[None, :] * C + row[:, None], of_weight)
    dscores *= weight
    dQ = beta * in_W + f * in_S + dot(tl.trans(K), dscores, PRECISION)
    store_rows(dq + own * tokens * D, D, tl.trans(dQ), start, length, 0, D, C, BD)
    store_tokens(dK, place, dot(Q_T, tl.trans(dscores), PRECISION), 0, D, BD, C)
    store_tokens(dD2, place, -dot(dY, tl.trans(scores * weight), PRECISION), 0, DV, BV, C)
