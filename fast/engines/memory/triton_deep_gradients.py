"""Triton kernels for the way back through the stores of a memory of two layers.

As forward, a program owns a tile of hidden channels, all sums over which but one can wait: the
gradient of the second layer's error, of which programs leave their parts for the next launch. What
is not waited for, keys and coefficients, is left to a kernel over all pieces of a group.

dW, dS (slots, memories, numbers) are the gradients of the states, slot i + 1 behind piece i; RW, RS
and the like are the share of the reads in the gradients of a piece.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.fast.engines.memory.triton_deep_walk import (
    RUNTIME,
    density,
    dot,
    gelu_slope,
    layer_tiles,
    of_tokens,
    pass_on,
    store_tokens,
    sum_parts,
    tokens_tile,
)
from attnspec.fast.engines.memory.triton_scalars import piece_at
from attnspec.fast.engines.memory.triton_walk import rows_tile, store_rows


@triton.jit
def begin_back(
    k, W, Z, H, dW, dS, RD1, dD1, dback, parts, end_n, end_G, n, slot, cuts, memories, memory, low,
    tokens, b, per, count, size,
    D: tl.constexpr, DV: tl.constexpr, HIDDEN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BH: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The first layer's error, and a tile's part of the second's, for piece n in a slot."""
    N: tl.constexpr = HIDDEN * (D + DV)
    tiles: tl.constexpr = (HIDDEN + BH - 1) // BH
    turn, start, length = piece_at(n, cuts, tokens, b, per, size, PACKED)
    one, in_one, two, in_two = layer_tiles(low, D, DV, HIDDEN, BD, BV, BH)
    base = W + (tl.maximum(slot + 1 - turn, 0) * memories + memory) * N
    line = tl.cast(slot, tl.int64) * memories + memory
    behind = (line + memories) * N
    here = memory * count + n
    G = of_tokens(end_G, here, C)
    other = of_tokens(end_n, here, C)
    K_T = tl.trans(rows_tile(k + memory * tokens * D, D, start, length, 0, D, C, BD))
    dW1 = tl.load(dW + behind + one, mask=in_one, other=0.0)
    error = tokens_tile(RD1, line, low, HIDDEN, BH, C)
    error -= G * dot(tl.trans(dW1), K_T, PRECISION)
    dS1 = tl.load(dS + behind + one, mask=in_one, other=0.0)
    error -= other * dot(tl.trans(dS1), K_T, PRECISION)
    store_tokens(dD1, line, error, low, HIDDEN, BH, C)
    error *= gelu_slope(tokens_tile(Z, line, low, HIDDEN, BH, C))
    store_tokens(dback, line, error, low, HIDDEN, BH, C)
    base_two = tl.load(base + two, mask=in_two, other=0.0)
    part = dot(tl.trans(base_two), error, PRECISION)
    h = tokens_tile(H, line, low, HIDDEN, BH, C)
    dW2 = tl.load(dW + behind + two, mask=in_two, other=0.0)
    part -= G * dot(tl.trans(dW2), h, PRECISION)
    dS2 = tl.load(dS + behind + two, mask=in_two, other=0.0)
    part -= other * dot(tl.trans(dS2), h, PRECISION)
    own = (slot % 2 * memories + memory) * tiles + low // BH
    store_tokens(parts, own, part, 0, DV, BV, C)


@triton.jit(do_not_specialize=RUNTIME)
def begin_back_kernel(
    i, k, W, Z, H, dW, dS, RD1, dD1, dback, parts, end_n, end_G, first, cuts, tokens, b, per, count,
    size, memories,
    D: tl.constexpr, DV: tl.constexpr, HIDDEN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BH: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The errors of a group's last piece, in slot i."""
    tiles: tl.constexpr = (HIDDEN + BH - 1) // BH
    memory = (tl.program_id(0) // tiles).to(tl.int64)
    low = tl.program_id(0) % tiles * BH
    begin_back(
        k, W, Z, H, dW, dS, RD1, dD1, dback, parts, end_n, end_G, first + i, i, cuts, memories,
        memory, low, tokens, b, per, count, size, D, DV, HIDDEN, BD, BV, BH, C, PRECISION, PACKED,
    )  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME)
def step_back_kernel(
    i, k, W, Z, H, D2, dW, dS, dbase, RW, RS, RH, RD1, RD2, dD1, dback, dz, dv, parts, end, end_n,
    end_G, given_W, given_S, kept_W, kept_S, first, cuts, tokens, b, per, count, size, memories,
    loss_scale,
    D: tl.constexpr, DV: tl.constexpr, HIDDEN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BH: tl.constexpr, C: tl.constexpr, LONG: tl.constexpr, PRECISION: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """Back through the piece in slot `i`, and the errors of the one before it begun."""
    N: tl.constexpr = HIDDEN * (D + DV)
    tiles: tl.constexpr = (HIDDEN + BH - 1) // BH
    memory = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    low = tile * BH
    one, in_one, two, in_two = layer_tiles(low, D, DV, HIDDEN, BD, BV, BH)
    n = first + i
    here = memory * count + n
    line = tl.cast(i, tl.int64) * memories + memory
    behind = (line + memories) * N
    turn, start, length = piece_at(n, cuts, tokens, b, per, size, PACKED)
    leaves, enters = turn, turn
    if PACKED:
        leaves = tl.load(cuts + tl.cast(n, tl.int64) * 5 + 3)
        # What enters before piece 0 is not used.
        enters = tl.load(cuts + tl.cast(tl.maximum(n - 1, 0), tl.int64) * 5 + 4)
    older = W + (tl.maximum(i + 1 - turn, 0) * memories + memory) * N
    base = tl.load(older + two, mask=in_two, other=0.0)
    G = of_tokens(end_G, here, C)
    other = of_tokens(end_n, here, C)
    beta = tl.load(end + here * 3)
    m = tl.load(end + here * 3 + 1)
    f = tl.load(end + here * 3 + 2)
    dE = sum_parts(parts, i, memories, memory, DV, BV, C, tiles)
    dE = loss_scale * (dE + tokens_tile(RD2, line, 0, DV, BV, C))
    if tile == 0:
        store_rows(dv + memory * tokens * DV, DV, -tl.trans(dE), start, length, 0, DV, C, BV)
    E = tokens_tile(D2, line, 0, DV, BV, C)
    dh = tokens_tile(RH, line, low, HIDDEN, BH, C) + dot(base, dE, PRECISION)
    dh -= dot(tl.load(dW + behind + two, mask=in_two, other=0.0), G * E, PRECISION)
    dh -= dot(tl.load(dS + behind + two, mask=in_two, other=0.0), other * E, PRECISION)
    z = tokens_tile(Z, line, low, HIDDEN, BH, C)
    through = dot(base, E, PRECISION) * tokens_tile(dD1, line, low, HIDDEN, BH, C)
    through = through * ((2.0 - z * z) * density(z)) + dh * gelu_slope(z)
    store_tokens(dz, line, through, low, HIDDEN, BH, C)
    more = dot(tokens_tile(H, line, low, HIDDEN, BH, C), tl.trans(dE), PRECISION)
    more += dot(tokens_tile(dback, line, low, HIDDEN, BH, C), tl.trans(E), PRECISION)
    if LONG:
        kept = dbase + memory * N + two
        more += tl.load(kept, mask=in_two, other=0.0)
        begun = turn == 0
        tl.store(kept, tl.where(begun, 0.0, more), mask=in_two)
        more = tl.where(begun, more, 0.0)
    # They are read a second time rather than kept: registers are short.
    dW2 = tl.load(dW + behind + two, mask=in_two, other=0.0)
    dS2 = tl.load(dS + behind + two, mask=in_two, other=0.0)
    more += beta * dW2 + tl.load(RW + line * N + two, mask=in_two, other=0.0)
    pass_on(
        more, dW + line * N, two, in_two, kept_W, leaves, given_W, enters, memory, memories, N,
        PACKED,
    )  # fmt: skip
    more = f * dW2 + m * dS2 + tl.load(RS + line * N + two, mask=in_two, other=0.0)
    pass_on(
        more, dS + line * N, two, in_two, kept_S, leaves, given_S, enters, memory, memories, N,
        PACKED,
    )  # fmt: skip
    K_T = tl.trans(rows_tile(k + memory * tokens * D, D, start, length, 0, D, C, BD))
    more = dot(K_T, tl.trans(through), PRECISION)
    if LONG:
        kept = dbase + memory * N + one
        more += tl.load(kept, mask=in_one, other=0.0)
        begun = turn == 0
        tl.store(kept, tl.where(begun, 0.0, more), mask=in_one)
        more = tl.where(begun, more, 0.0)
    dW1 = tl.load(dW + behind + one, mask=in_one, other=0.0)
    dS1 = tl.load(dS + behind + one, mask=in_one, other=0.0)
    more += beta * dW1 + tl.load(RW + line * N + one, mask=in_one, other=0.0)
    pass_on(
        more, dW + line * N, one, in_one, kept_W, leaves, given_W, enters, memory, memories, N,
        PACKED,
    )  # fmt: skip
    more = f * dW1 + m * dS1 + tl.load(RS + line * N + one, mask=in_one, other=0.0)
    pass_on(
        more, dS + line * N, one, in_one, kept_S, leaves, given_S, enters, memory, memories, N,
        PACKED,
    )  # fmt: skip
    if i > 0:
        # What follows reads what other threads of the program have just stored.
        tl.debug_barrier()
        begin_back(
            k, W, Z, H, dW, dS, RD1, dD1, dback, parts, end_n, end_G, n - 1, i - 1, cuts, memories,
            memory, low, tokens, b, per, count, size, D, DV, HIDDEN, BD, BV, BH, C, PRECISION,
            PACKED,
        )  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME)
def keys_back_kernel(
    k, W, S, H, D1, D2, dW, dS, RK, dz, dk, dend, dend_n, dend_G, end_n, end_G, first, many, cuts,
    tokens, b, per, count, size, memories, hidden,
    D: tl.constexpr, DV: tl.constexpr, HIDDEN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BH: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """dk, and the gradients of the coefficients a piece ends with: a program is a piece."""
    N: tl.constexpr = HIDDEN * (D + DV)
    memory = (tl.program_id(0) // many).to(tl.int64)
    i = tl.program_id(0) % many
    n = first + i
    here = memory * count + n
    line = i * memories + memory
    behind = (line + memories) * N
    turn, start, length = piece_at(n, cuts, tokens, b, per, size, PACKED)
    older = W + (tl.maximum(i + 1 - turn, 0) * memories + memory) * N
    E = tokens_tile(D2, line, 0, DV, BV, C)
    dK = tokens_tile(RK, line, 0, D, BD, C)
    in_W = tl.zeros((BD, C), tl.float32)
    in_S = tl.zeros((BD, C), tl.float32)
    of_G = tl.zeros((C,), tl.float32)
    of_n = tl.zeros((C,), tl.float32)
    dbeta = tl.zeros((), tl.float32)
    dm = tl.zeros((), tl.float32)
    df = tl.zeros((), tl.float32)
    for low in range(0, hidden, BH):
        one, in_one, two, in_two = layer_tiles(low, D, DV, HIDDEN, BD, BV, BH)
        delta = tokens_tile(D1, line, low, HIDDEN, BH, C)
        x = tl.load(dW + behind + one, mask=in_one, other=0.0)
        u = tl.load(dS + behind + one, mask=in_one, other=0.0)
        in_W += dot(x, delta, PRECISION)
        in_S += dot(u, delta, PRECISION)
        momentum = tl.load(S + line * N + one, mask=in_one, other=0.0)
        weights = tl.load(W + behind + one, mask=in_one, other=0.0)
        dbeta += tl.sum(tl.sum(weights * x, 1), 0)
        dm += tl.sum(tl.sum(momentum * u, 1), 0)
        df += tl.sum(tl.sum(momentum * x, 1), 0)
        base = tl.load(older + one, mask=in_one, other=0.0)
        dK += dot(base, tokens_tile(dz, line, low, HIDDEN, BH, C), PRECISION)
        h = tokens_tile(H, line, low, HIDDEN, BH, C)
        x = tl.load(dW + behind + two, mask=in_two, other=0.0)
        u = tl.load(dS + behind + two, mask=in_two, other=0.0)
        of_G -= tl.sum(h * dot(x, E, PRECISION), 0)
        of_n -= tl.sum(h * dot(u, E, PRECISION), 0)
        momentum = tl.load(S + line * N + two, mask=in_two, other=0.0)
        weights = tl.load(W + behind + two, mask=in_two, other=0.0)
        dbeta += tl.sum(tl.sum(weights * x, 1), 0)
        dm += tl.sum(tl.sum(momentum * u, 1), 0)
        df += tl.sum(tl.sum(momentum * x, 1), 0)
    dK -= of_tokens(end_G, here, C) * in_W + of_tokens(end_n, here, C) * in_S
    store_rows(dk + memory * tokens * D, D, tl.trans(dK), start, length, 0, D, C, BD)
    K_T = tl.trans(rows_tile(k + memory * tokens * D, D, start, length, 0, D, C, BD))
    row = tl.arange(0, C)
    tl.store(dend_G + here * C + row, of_G - tl.sum(K_T * in_W, 0))
    tl.store(dend_n + here * C + row, of_n - tl.sum(K_T * in_S, 0))
    tl.store(dend + here * 3, dbeta)
    tl.store(dend + here * 3 + 1, dm)
    tl.store(dend + here * 3 + 2, df)
