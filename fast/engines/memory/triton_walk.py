"""Triton kernels that walk through the pieces of a linear memory, forward and from the end.

The columns of weights and momentum are independent of one another, so a program owns a tile of
value channels of one memory and keeps both states in registers for the whole sequence.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.fast.engines.memory.triton_scalars import PLACE, locate, piece_at


@triton.jit
def offset(batch, stride_b, head, stride_h):
    """Numbers before the rows of a head, a multiple of 16: the host sees to it."""
    return tl.multiple_of(batch * stride_b + head * stride_h, 16)


@triton.jit
def rows_tile(base, stride_t, start, length, first, width, C: tl.constexpr, W: tl.constexpr):
    """Tile (C, W) of `length` rows from `start` and channels from `first` to `width`, else 0."""
    row, channel = tl.arange(0, C)[:, None], first + tl.arange(0, W)[None, :]
    at = (start + row).to(tl.int64) * stride_t + channel
    return tl.load(base + at, mask=(row < length) & (channel < width), other=0.0)


@triton.jit
def store_rows(base, stride_t, x, start, length, first, width, C: tl.constexpr, W: tl.constexpr):
    row, channel = tl.arange(0, C)[:, None], first + tl.arange(0, W)[None, :]
    at = (start + row).to(tl.int64) * stride_t + channel
    mask = (row < length) & (channel < width)
    tl.store(base + at, x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def state_at(D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, low, left):
    """Offsets and mask of a tile (BD, BV) of a state (D, DV), from row `low` and column `left`."""
    down, across = low + tl.arange(0, BD)[:, None], left + tl.arange(0, BV)[None, :]
    return down * DV + across, (down < D) & (across < DV)


@triton.jit
def product(a, b):
    """a @ b in the dtype of a, accumulated in float32; float32 is IEEE."""
    return tl.dot(a, b.to(a.dtype), input_precision="ieee")


@triton.jit(do_not_specialize=[*PLACE, "k_b", "k_h", "v_b", "v_h", "q_b", "q_h"])
def scores_kernel(
    k, k_b, k_h, k_t, q, q_b, q_h, q_t, G, scores, cuts, tokens, b, per, count, size, heads,
    group, D: tl.constexpr, C: tl.constexpr, TD: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """scores (query heads, pieces, C, C) = q k^T times the coefficients of every pair."""
    program = tl.program_id(0)
    head, piece, _turn, start, length = locate(program, cuts, tokens, b, per, count, size, PACKED)
    batch, own = head // (heads * group), head % (heads * group)
    k += offset(batch, k_b, own // group, k_h)
    q += offset(batch, q_b, own, q_h)
    acc = tl.zeros((C, C), tl.float32)
    for low in range(0, D, TD):
        Q = rows_tile(q, q_t, start, length, low, D, C, TD)
        K = rows_tile(k, k_t, start, length, low, D, C, TD)
        acc += product(Q, tl.trans(K))
    square = tl.arange(0, C)[:, None] * C + tl.arange(0, C)[None, :]
    memory = (head // group) * count + piece
    acc *= tl.load(G + memory * C * C + square)
    where = program.to(tl.int64) * C * C
    tl.store(scores + where + square, acc.to(scores.dtype.element_ty))


@triton.jit
def sequence(n, offsets, bounds):
    """The first token of a packed sequence and how many it has, its first piece and their number.

    Counts have 32 bits, and a walk adds the first token to its pointers, so that what is in its
    loop is what it would be for one sequence alone.
    """
    origin, first = tl.load(offsets + n), tl.load(bounds + n)
    tokens = (tl.load(offsets + n + 1) - origin).to(tl.int32)
    pieces = (tl.load(bounds + n + 1) - first).to(tl.int32)
    return origin, tokens, first, pieces


@triton.jit(do_not_specialize=[*PLACE, "k_b", "k_h", "v_b", "v_h", "q_b", "q_h"])
def walk_kernel(
    k, k_b, k_h, k_t, v, v_b, v_h, v_t, q, q_b, q_h, q_t, first_W, first_S, rows,
    end, end_n, end_G, scores, y, last_W, last_S, states, errors, offsets, bounds, tokens, b, per,
    count, size, heads, group, loss_scale,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    LONG: tl.constexpr, KEEP: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """y, and the last W and S; states and errors are kept for the gradient if KEEP.

    A program is a memory, one for each sequence and head, and a tile of its value channels. LONG if
    a gradient chunk has more than one piece, whose gradients are taken at older weights.
    """
    tiles: tl.constexpr = (DV + BV - 1) // BV
    program = tl.program_id(0)
    left = program % tiles * BV
    state = (program // tiles).to(tl.int64)
    batch, head = state // heads, state % heads
    memory, behind, pieces, first = state, tokens, count, 0
    if PACKED:
        # As if every token began an entry of a batch.
        batch, behind, first, pieces = sequence(batch, offsets, bounds)
        memory, k_b, v_b, q_b = head, k_t, v_t, q_t
        y += batch * DV
    k += offset(batch, k_b, head, k_h)
    v += offset(batch, v_b, head, v_h)
    at, inside = state_at(D, DV, BD, BV, 0, left)
    W = tl.load(first_W + state * D * DV + at, mask=inside, other=0.0)
    S = tl.load(first_S + state * D * DV + at, mask=inside, other=0.0)
    base = W
    row = tl.arange(0, C)
    square = row[:, None] * C + row[None, :]
    for n in range(pieces):
        turn, start, length = piece_at(n, offsets, behind, b, per, size, False)
        here = memory * count + first + n
        if LONG:
            base = tl.where(turn == 0, W, base)
        else:
            base = W
        K = rows_tile(k, k_t, start, length, 0, D, C, BD)
        V = rows_tile(v, v_t, start, length, left, DV, C, BV)
        E = loss_scale * (product(K, base) - V.to(tl.float32))
        if KEEP:
            kept = states + here * 2 * D * DV + at
            tl.store(kept, W.to(states.dtype.element_ty), mask=inside)
            tl.store(kept + D * DV, S.to(states.dtype.element_ty), mask=inside)
            store_rows(errors + here * C * DV, DV, E, 0, C, left, DV, C, BV)
        beta = tl.load(rows + (here * C + row) * 3)[:, None]
        f = tl.load(rows + (here * C + row) * 3 + 2)[:, None]
        for g in range(group):
            queries = q + offset(batch, q_b, head * group + g, q_h)
            Q = rows_tile(queries, q_t, start, length, 0, D, C, BD)
            own = memory * group + g
            A = tl.load(scores + (own * count + first + n) * C * C + square)
            Y = beta * product(Q, W) + f * product(Q, S) - product(A, E)
            store_rows(y + own * tokens * DV, DV, Y, start, length, left, DV, C, BV)
        G = tl.load(end_G + here * C + row)[:, None]
        other = tl.load(end_n + here * C + row)[:, None]
        K_T = tl.trans(K)
        W = tl.load(end + here * 3) * W + tl.load(end + here * 3 + 2) * S - product(K_T, G * E)
        S = tl.load(end + here * 3 + 1) * S - product(K_T, other * E)
    tl.store(last_W + state * D * DV + at, W, mask=inside)
    tl.store(last_S + state * D * DV + at, S, mask=inside)


@triton.jit(do_not_specialize=[*PLACE, "k_b", "k_h", "v_b", "v_h", "q_b", "q_h"])
def walk_back_kernel(
    k, k_b, k_h, k_t, q, q_b, q_h, q_t, dy, rows, end, end_n, end_G, scores, last_dW,
    last_dS, first_dW, first_dS, dstates, dv, offsets, bounds, tokens, b, per, count, size, heads,
    group, loss_scale,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    LONG: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """dv, the gradients of the first states, and those of the states behind every piece."""
    tiles: tl.constexpr = (DV + BV - 1) // BV
    program = tl.program_id(0)
    left = program % tiles * BV
    state = (program // tiles).to(tl.int64)
    batch, head = state // heads, state % heads
    memory, behind, pieces, first = state, tokens, count, 0
    if PACKED:
        batch, behind, first, pieces = sequence(batch, offsets, bounds)
        memory, k_b, q_b = head, k_t, q_t
        dy += batch * DV
        dv += batch * DV
    k += offset(batch, k_b, head, k_h)
    at, inside = state_at(D, DV, BD, BV, 0, left)
    dW = tl.load(last_dW + state * D * DV + at, mask=inside, other=0.0)
    dS = tl.load(last_dS + state * D * DV + at, mask=inside, other=0.0)
    dbase = tl.zeros((BD, BV), tl.float32)
    row = tl.arange(0, C)
    square = row[:, None] * C + row[None, :]
    for step in range(pieces):
        n = pieces - 1 - step
        turn, start, length = piece_at(n, offsets, behind, b, per, size, False)
        here = memory * count + first + n
        kept = dstates + here * 2 * D * DV + at
        tl.store(kept, dW.to(dstates.dtype.element_ty), mask=inside)
        tl.store(kept + D * DV, dS.to(dstates.dtype.element_ty), mask=inside)
        K = rows_tile(k, k_t, start, length, 0, D, C, BD)
        G = tl.load(end_G + here * C + row)[:, None]
        other = tl.load(end_n + here * C + row)[:, None]
        dE = -(G * product(K, dW) + other * product(K, dS))
        beta = tl.load(rows + (here * C + row) * 3)[:, None]
        f = tl.load(rows + (here * C + row) * 3 + 2)[:, None]
        dS = tl.load(end + here * 3 + 2) * dW + tl.load(end + here * 3 + 1) * dS
        dW = tl.load(end + here * 3) * dW
        for g in range(group):
            own = memory * group + g
            dY = rows_tile(dy + own * tokens * DV, DV, start, length, left, DV, C, BV)
            queries = q + offset(batch, q_b, head * group + g, q_h)
            Q_T = tl.trans(rows_tile(queries, q_t, start, length, 0, D, C, BD))
            A = tl.load(scores + (own * count + first + n) * C * C + square)
            dE -= product(tl.trans(A), dY)
            wide = dY.to(tl.float32)
            dW += product(Q_T, beta * wide)
            dS += product(Q_T, f * wide)
        dE *= loss_scale
        store_rows(dv + memory * tokens * DV, DV, -dE, start, length, left, DV, C, BV)
        more = product(tl.trans(K), dE)
        if LONG:
            dbase += more
            dW = tl.where(turn == 0, dW + dbase, dW)
            dbase = tl.where(turn == 0, 0.0, dbase)
        else:
            dW += more
    tl.store(first_dW + state * D * DV + at, dW, mask=inside)
    tl.store(first_dS + state * D * DV + at, dS, mask=inside)
