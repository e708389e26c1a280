"""Triton kernels of a memory of two layers: its pieces one after the other, and what they read.

All but one sum separates over the hidden channels: a program owns a tile of them, with its columns
of the first layer and its rows of the second. The sum is the memory's answer to the keys, of which
every program leaves its part for the next launch; so a launch ends one piece and begins the next.
Widths are multiples of 16. Scratch is float32, and has a slot for each piece of a group: W, S
(slots, memories, numbers), a row for each input of a layer; Z, H, D1 (slots, memories, hidden, C)
and D2 (slots, memories, dv, C): products, inputs and gradients of the layers at the base. W has one
slot more in front, the base of a gradient chunk that began in an earlier group.

Tokens are columns, and so the first operand of a product is a tile as it was loaded, or the
transpose of one, which goes through shared memory: see "What the compiler makes of it" in the
guide to what engines share, and the prefix engine.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.fast.engines.memory.triton_scalars import PLACE, piece_at
from attnspec.fast.engines.memory.triton_walk import rows_tile, store_rows

RUNTIME = [*PLACE, "memories", "first", "i", "many", "hidden"]


@triton.jit
def gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def density(x):
    return tl.exp(-0.5 * x * x) * 0.3989422804014327


@triton.jit
def gelu_slope(x):
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density(x)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def layer_tiles(
    low, D: tl.constexpr, DV: tl.constexpr, HIDDEN: tl.constexpr, BD: tl.constexpr,
    BV: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Offsets and masks of a state's columns (BD, BH) of the first layer and rows (BH, BV) of the
    second, from hidden channel `low`.
    """
    inputs = tl.arange(0, BD)[:, None]
    hidden = low + tl.arange(0, BH)
    outputs = tl.arange(0, BV)[None, :]
    one = inputs * HIDDEN + hidden[None, :]
    two = D * HIDDEN + hidden[:, None] * DV + outputs
    in_one = (inputs < D) & (hidden[None, :] < HIDDEN)
    in_two = (hidden[:, None] < HIDDEN) & (outputs < DV)
    return one, in_one, two, in_two


@triton.jit
def of_tokens(x, here, C: tl.constexpr):
    """Numbers (1, C) of a piece's tokens."""
    return tl.load(x + here * C + tl.arange(0, C))[None, :]


@triton.jit
def tokens_tile(x, line, low, width: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    """Tile (B, C) of scratch (slots and memories, `width`, C) from channel `low`, else 0."""
    return rows_tile(x + line * width * C, C, low, width - low, 0, C, B, C)


@triton.jit
def store_tokens(x, line, tile, low, width: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    store_rows(x + line * width * C, C, tile, low, width - low, 0, C, B, C)


@triton.jit
def pass_on(
    x, there, at, inside, kept, leaves, given, enters, memory, memories, N: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """Store a tile x of a state `there`. The PACKED sequence that a walk `leaves` keeps x, and the
    one that it `enters` gives what takes the place of x; both may be none, -1.
    """
    if PACKED:
        own = (leaves * memories + memory) * N + at
        tl.store(kept + own, x, mask=inside & (at * 0 + leaves >= 0))
        own = (enters * memories + memory) * N + at
        some = at * 0 + enters >= 0
        x = tl.where(some, tl.load(given + own, mask=inside & some, other=0.0), x)
    tl.store(there + at, x, mask=inside)


@triton.jit
def begin_piece(
    k, W, Z, H, parts, n, slot, cuts, memories, memory, low, tokens, b, per, count, size,
    D: tl.constexpr, DV: tl.constexpr, HIDDEN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BH: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """z and h of a tile of hidden channels, and its part of the second layer's products, for piece
    n in a slot.
    """
    N: tl.constexpr = HIDDEN * (D + DV)
    tiles: tl.constexpr = (HIDDEN + BH - 1) // BH
    turn, start, length = piece_at(n, cuts, tokens, b, per, size, PACKED)
    one, in_one, two, in_two = layer_tiles(low, D, DV, HIDDEN, BD, BV, BH)
    base = W + (tl.maximum(slot + 1 - turn, 0) * memories + memory) * N
    base_one = tl.load(base + one, mask=in_one, other=0.0)
    base_two = tl.load(base + two, mask=in_two, other=0.0)
    K = rows_tile(k + memory * tokens * D, D, start, length, 0, D, C, BD)
    z = dot(tl.trans(base_one), tl.trans(K), PRECISION)
    h = gelu(z)
    line = slot * memories + memory
    store_tokens(Z, line, z, low, HIDDEN, BH, C)
    store_tokens(H, line, h, low, HIDDEN, BH, C)
    part = dot(tl.trans(base_two), h, PRECISION)
    own = (slot % 2 * memories + memory) * tiles + low // BH
    store_tokens(parts, own, part, 0, DV, BV, C)


@triton.jit(do_not_specialize=RUNTIME)
def begin_kernel(
    k, W, Z, H, parts, first, cuts, tokens, b, per, count, size, memories,
    D: tl.constexpr, DV: tl.constexpr, HIDDEN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BH: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The keys of a group's first piece, number `first`, at its base."""
    tiles: tl.constexpr = (HIDDEN + BH - 1) // BH
    memory = (tl.program_id(0) // tiles).to(tl.int64)
    low = tl.program_id(0) % tiles * BH
    begin_piece(
        k, W, Z, H, parts, first, 0, cuts, memories, memory, low, tokens, b, per, count, size,
        D, DV, HIDDEN, BD, BV, BH, C, PRECISION, PACKED,
    )  # fmt: skip


@triton.jit
def sum_parts(
    parts, slot, memories, memory, DV: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    tiles: tl.constexpr,
):  # fmt: skip
    """The sum (BV, C) of what the tiles of a memory left for a slot."""
    total = tl.zeros((BV, C), tl.float32)
    parts += (slot % 2 * memories + memory) * tiles * DV * C
    for first in range(0, tiles, 4):
        # Unrolled, so that the next part is asked for before the last one has come.
        for tile in tl.static_range(4):
            there = tl.where(first + tile < tiles, DV, 0)
            total += rows_tile(parts + (first + tile) * DV * C, C, 0, there, 0, C, BV, C)
    return total


@triton.jit(do_not_specialize=RUNTIME)
def step_kernel(
    i, k, v, W, S, Z, H, D1, D2, parts, end, end_n, end_G, given_W, given_S, kept_W, kept_S, first,
    many, cuts, tokens, b, per, count, size, memories, loss_scale,
    D: tl.constexpr, DV: tl.constexpr, HIDDEN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BH: tl.constexpr, C: tl.constexpr, LONG: tl.constexpr, PRECISION: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """Piece `i` of `many` of a group is stored, and the next one's keys are begun.

    Slot i of the states is read and slot i + 1 written. Programs of a memory share `parts`, of
    which one half is read and the other one written. given_W and the like are those of PACKED
    sequences, see `pass_on`.
    """
    N: tl.constexpr = HIDDEN * (D + DV)
    tiles: tl.constexpr = (HIDDEN + BH - 1) // BH
    memory = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    low = tile * BH
    one, in_one, two, in_two = layer_tiles(low, D, DV, HIDDEN, BD, BV, BH)
    n = first + i
    here = memory * count + n
    turn, start, length = piece_at(n, cuts, tokens, b, per, size, PACKED)
    leaves, enters = turn, turn
    if PACKED:
        row = cuts + tl.cast(n, tl.int64) * 5
        leaves, enters = tl.load(row + 4), tl.load(row + 8)
    weights = W + ((i + 1) * memories + memory) * N
    momentum = S + (tl.cast(i, tl.int64) * memories + memory) * N
    W2 = tl.load(weights + two, mask=in_two, other=0.0)
    base = W2
    if LONG:
        older = W + (tl.maximum(i + 1 - turn, 0) * memories + memory) * N
        base = tl.load(older + two, mask=in_two, other=0.0)
    V = rows_tile(v + memory * tokens * DV, DV, start, length, 0, DV, C, BV)
    line = tl.cast(i, tl.int64) * memories + memory
    E = loss_scale * (sum_parts(parts, i, memories, memory, DV, BV, C, tiles) - tl.trans(V))
    if tile == 0:
        store_tokens(D2, line, E, 0, DV, BV, C)
    delta = dot(base, E, PRECISION) * gelu_slope(tokens_tile(Z, line, low, HIDDEN, BH, C))
    store_tokens(D1, line, delta, low, HIDDEN, BH, C)
    G = of_tokens(end_G, here, C)
    other = of_tokens(end_n, here, C)
    beta = tl.load(end + here * 3)
    m = tl.load(end + here * 3 + 1)
    f = tl.load(end + here * 3 + 2)
    h = tokens_tile(H, line, low, HIDDEN, BH, C)
    S2 = tl.load(momentum + two, mask=in_two, other=0.0)
    W2 = beta * W2 + f * S2 - dot(h, tl.trans(G * E), PRECISION)
    S2 = m * S2 - dot(h, tl.trans(other * E), PRECISION)
    next_W = weights + memories.to(tl.int64) * N
    next_S = momentum + memories.to(tl.int64) * N
    pass_on(W2, next_W, two, in_two, kept_W, leaves, given_W, enters, memory, memories, N, PACKED)
    pass_on(S2, next_S, two, in_two, kept_S, leaves, given_S, enters, memory, memories, N, PACKED)
    K_T = tl.trans(rows_tile(k + memory * tokens * D, D, start, length, 0, D, C, BD))
    W1 = tl.load(weights + one, mask=in_one, other=0.0)
    S1 = tl.load(momentum + one, mask=in_one, other=0.0)
    W1 = beta * W1 + f * S1 - dot(K_T, tl.trans(G * delta), PRECISION)
    S1 = m * S1 - dot(K_T, tl.trans(other * delta), PRECISION)
    pass_on(W1, next_W, one, in_one, kept_W, leaves, given_W, enters, memory, memories, N, PACKED)
    pass_on(S1, next_S, one, in_one, kept_S, leaves, given_S, enters, memory, memories, N, PACKED)
    if i + 1 < many:
        # The base may be what other threads of the program have just stored.
        tl.debug_barrier()
        begin_piece(
            k, W, Z, H, parts, n + 1, i + 1, cuts, memories, memory, low, tokens, b, per, count,
            size, D, DV, HIDDEN, BD, BV, BH, C, PRECISION, PACKED,
        )  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME)
def read_kernel(
    k, q, W, S, H, D1, D2, rows, G, y, first, many, cuts, tokens, b, per, count, size, memories,
    group, hidden,
    D: tl.constexpr, DV: tl.constexpr, HIDDEN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BH: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """What the queries of a group's pieces read: a program is a query head and a piece."""
    N: tl.constexpr = HIDDEN * (D + DV)
    own = (tl.program_id(0) // many).to(tl.int64)
    i = tl.program_id(0) % many
    memory = own // group
    here = memory * count + first + i
    line = i * memories + memory
    _turn, start, length = piece_at(first + i, cuts, tokens, b, per, size, PACKED)
    # A row a key, a column a query.
    row = tl.arange(0, C)
    weight = tl.load(G + here * C * C + row[None, :] * C + row[:, None])
    beta = tl.load(rows + (here * C + row) * 3)[None, :]
    f = tl.load(rows + (here * C + row) * 3 + 2)[None, :]
    Q_T = tl.trans(rows_tile(q + own * tokens * D, D, start, length, 0, D, C, BD))
    K = rows_tile(k + memory * tokens * D, D, start, length, 0, D, C, BD)
    pairs = dot(K, Q_T, PRECISION) * weight
    scores = tl.zeros((C, C), tl.float32)
    Y = tl.zeros((BV, C), tl.float32)
    weights = W + (line + memories) * N
    momentum = S + line * N
    for low in range(0, hidden, BH):
        one, in_one, two, in_two = layer_tiles(low, D, DV, HIDDEN, BD, BV, BH)
        W1 = tl.load(weights + one, mask=in_one, other=0.0)
        S1 = tl.load(momentum + one, mask=in_one, other=0.0)
        A = beta * dot(tl.trans(W1), Q_T, PRECISION) + f * dot(tl.trans(S1), Q_T, PRECISION)
        A -= dot(tokens_tile(D1, line, low, HIDDEN, BH, C), pairs, PRECISION)
        h = gelu(A)
        scores += dot(tl.trans(tokens_tile(H, line, low, HIDDEN, BH, C)), h, PRECISION)
        W2 = tl.load(weights + two, mask=in_two, other=0.0)
        S2 = tl.load(momentum + two, mask=in_two, other=0.0)
        Y += dot(tl.trans(W2), beta * h, PRECISION)
        Y += dot(tl.trans(S2), f * h, PRECISION)
    Y -= dot(tokens_tile(D2, line, 0, DV, BV, C), scores * weight, PRECISION)
    store_rows(y + own * tokens * DV, DV, tl.trans(Y), start, length, 0, DV, C, BV)
