"""What the flash engine's specialised kernel is made of: the order of tiles and of keys, who sees
whom, the softmax, and the second look at a tile with a NaN.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mma_v2

from attnspec.fast.engines.flash.triton_tiles import key_tile, plan_rows
from attnspec.fast.engines.flash.triton_visible import end_key, lowest_key

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
PIECE = gl.constexpr(32)
"""Keys at a time where a tile is done again with care."""


@gluon.jit
def rounds(grid):
    """How many tiles this program owns."""
    tiles, sequences, _section = grid
    total = tiles * sequences
    programs = gl.num_programs(0)
    whole = total // programs
    return whole + (turned(whole) < total % programs).to(gl.int32)


@gluon.jit
def turned(turn):
    """This program's place in a round: every other one goes backwards, since tiles get shorter."""
    place = gl.program_id(0)
    return gl.where(turn % 2 == 0, place, gl.num_programs(0) - 1 - place)


@gluon.jit
def plan(
    turn, grid, rules, HEADS: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr,
    Q_BLOCK: gl.constexpr, K_BLOCK: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """This program's tile in a round: `plan_rows` of twice `ROWS`."""
    tiles, sequences, section = grid
    q_tokens, k_tokens, window, sinks, packed, ranges, lists = rules
    table, q_offsets, k_offsets = packed
    row_start, row_end = ranges
    index, count, full, at_b, at_h, at_q, count_at_b, count_at_h = lists
    program = turn * gl.num_programs(0) + turned(turn)
    return plan_rows(
        program, tiles, sequences, section, 0, table, q_offsets, k_offsets, q_tokens, k_tokens,
        window, sinks, row_start, row_end, None, index, count, full, at_b, at_h, at_q, count_at_b,
        count_at_h, HEADS, 2 * ROWS, KEYS, Q_BLOCK, K_BLOCK, CAUSAL, False, True,
    )  # fmt: skip


@gluon.jit
def key_at(i, walk, lengths, KEYS: gl.constexpr, K_BLOCK: gl.constexpr):
    """First key of the i-th tile, edges before full ones."""
    fulls, edges = lengths
    i = gl.where(i < edges, fulls + i, i - edges)
    at, _stop = key_tile(i, 2, walk, K_BLOCK, KEYS)
    return at


@gluon.jit
def bounds(row, place, rules, CAUSAL: gl.constexpr):
    """The lowest key that each of `row` sees but for the sinks, and where its keys end."""
    _q_tokens, _k_tokens, window, _sinks, _packed, ranges, _lists = rules
    _b, _h, q_begin, _k_begin, k_tokens, _first, stop, shift = place
    low = lowest_key(row, q_begin, stop, shift, window, ranges[0])
    return low, end_key(row, q_begin, stop, shift, k_tokens, ranges[1], CAUSAL)


@gluon.jit
def tile_bounds(low, high, at, edge, rules):
    """The bounds of the rows in the tile of keys from `at` on.

    A listed tile that is no edge is seen whole; tiles of sinks show no more than those, and all
    others begin behind them.
    """
    _q_tokens, k_tokens, _window, sinks, _packed, _ranges, lists = rules
    if lists[0] is not None:
        low, high = gl.where(edge, low, 0), gl.where(edge, high, k_tokens)
    elif sinks is not None:
        high = gl.where(at < sinks, gl.minimum(high, sinks), high)
        low = gl.where(at < sinks, 0, low)
    return low, high


@gluon.jit
def hide(scores, low, high, at, rules):
    """`scores` (rows, keys from `at` on) with -inf for keys that a row does not see; who sees whom.

    Columns are compared by eights, of which each thread knows its own when it is compiled. Compared
    one by one they are as many numbers, which the compiler keeps in registers for the whole loop.
    """
    _q_tokens, _k_tokens, window, sinks, _packed, ranges, lists = rules
    column = gl.arange(0, scores.shape[1], gl.SliceLayout(0, scores.type.layout))
    eights, within = (column >> 3)[None, :], (column & 7)[None, :]
    # A column is below a bound if its eight is below the bound less its place, in eights.
    seen = eights < ((high - at)[:, None] - within + 7) >> 3
    if window is not None or ranges[0] is not None:
        late = eights >= ((low - at)[:, None] - within + 7) >> 3
        if sinks is not None and lists[0] is not None:
            late = late | (eights < (sinks - at - within + 7) >> 3)
        seen = seen & late
    return gl.where(seen, scores, -float("inf")), seen


@gluon.jit
def soften(scores, top, factor):
    """Weights of one more tile, the new maximum, the rescale and the weights' sum."""
    new_top = gl.maximum(top, gl.max(scores, 1) * factor)
    # A row that has seen nothing keeps -inf; subtracting 0 there gives weights 0, not NaN.
    safe = gl.where(new_top == -float("inf"), 0.0, new_top)
    weights = gl.exp2(scores * factor - safe[:, None])
    return weights, new_top, gl.exp2(top - safe), gl.sum(weights, 1)


@gluon.jit
def finish(sums, sink_logit, h):
    """lse and output of the rows from their maxima, denominators and values."""
    top, total, mixed = sums
    if sink_logit is not None:
        sink = gl.load(sink_logit + h).to(gl.float32) * LOG2E
        new_top = gl.maximum(top, sink)
        safe = gl.where(new_top == -float("inf"), 0.0, new_top)
        rescale = gl.exp2(top - safe)
        total = total * rescale + gl.exp2(sink - safe)
        mixed = mixed * gl.convert_layout(rescale, gl.SliceLayout(1, mixed.type.layout))[:, None]
        top = new_top
    empty = total == 0.0
    filled = gl.where(empty, 1.0, total)
    log_total = gl.where(empty, -float("inf"), (top + gl.log2(filled)) * LN2)
    filled = gl.convert_layout(filled, gl.SliceLayout(1, mixed.type.layout))
    return log_total, mixed / filled[:, None]


@gluon.jit
def load_rows(
    x,
    first,
    stop,
    stride_t,
    CHANNELS: gl.constexpr,
    layout: gl.constexpr,
    ROWS: gl.constexpr,
    WIDTH: gl.constexpr,
):
    """Rows from `first` on as a tile (ROWS, WIDTH), zeros from `stop` and CHANNELS on."""
    row = first + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    channel = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    inside = (row < stop)[:, None] & (channel < CHANNELS)[None, :]
    at = row.to(gl.int64)[:, None] * stride_t + channel[None, :]
    return gl.load(x + at, mask=inside, other=0.0)


@gluon.jit
def store_rows(out, tile, at, row, q_tokens, DV: gl.constexpr):
    """Write the rows before `q_tokens` of a tile to contiguous rows of DV."""
    layout: gl.constexpr = tile.type.layout
    channel = gl.arange(0, tile.shape[1], gl.SliceLayout(0, layout))
    inside = (row < q_tokens)[:, None] & (channel < DV)[None, :]
    gl.store(out + (at + row)[:, None] * DV + channel[None, :], tile, mask=inside)


@gluon.jit
def attend_with_care(
    q, k, v, out, at_row, first, place, walk, lengths, rules, factor, sink_logit, strides,
    D: gl.constexpr, DV: gl.constexpr, WIDTH: gl.constexpr, WIDTH_V: gl.constexpr,
    ROWS: gl.constexpr, KEYS: gl.constexpr, K_BLOCK: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """Write the rows that see no value that is not finite again: the product has spread 0 * NaN to
    rows that do not see the NaN's key.
    """
    _b, h, q_begin, k_begin, k_tokens, _first, stop, _shift = place
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [4, 1], instr_shape=[16, 8])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, SUMS, 2)
    READ: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = first + gl.arange(0, ROWS, gl.SliceLayout(1, SUMS))
    low, high = bounds(row, place, rules, CAUSAL)
    q_tile = load_rows(q + q_begin * strides[0], first, stop, strides[0], D, READ, ROWS, WIDTH)
    q_tile = gl.convert_layout(q_tile, LEFT)
    top = gl.full([ROWS], -float("inf"), gl.float32, gl.SliceLayout(1, SUMS))
    total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, SUMS))
    tainted = gl.zeros([ROWS], gl.int32, gl.SliceLayout(1, SUMS))
    mixed = gl.zeros([ROWS, WIDTH_V], gl.float32, SUMS)
    k += k_begin * strides[1]
    v += k_begin * strides[2]
    for i in range((lengths[0] + lengths[1]) * (KEYS // PIECE)):
        tile = i // (KEYS // PIECE)
        at = key_at(tile, walk, lengths, KEYS, K_BLOCK)
        lowest, end = tile_bounds(low, high, at, tile < lengths[1], rules)
        at += i % (KEYS // PIECE) * PIECE
        keys = load_rows(k, at, k_tokens, strides[1], D, READ, PIECE, WIDTH)
        nothing = gl.zeros([ROWS, PIECE], gl.float32, SUMS)
        product = mma_v2(q_tile, gl.convert_layout(keys.permute((1, 0)), RIGHT), nothing)
        scores, seen = hide(product, lowest, end, at, rules)
        weights, top, rescale, more = soften(scores, top, factor)
        total = total * rescale + more
        values = load_rows(v, at, k_tokens, strides[2], DV, READ, PIECE, WIDTH_V)
        finite = gl.abs(values.to(gl.float32)) < float("inf")
        values = gl.where(finite, values, 0.0)
        broken = gl.max((~finite).to(gl.int32), 1)
        broken = gl.convert_layout(broken, gl.SliceLayout(0, SUMS))
        tainted |= gl.max(seen.to(gl.int32) * broken[None, :], 1)
        weights = gl.convert_layout(weights.to(q_tile.dtype), LEFT)
        mixed = mma_v2(weights, gl.convert_layout(values, RIGHT), mixed * rescale[:, None])
    _log_total, redone = finish((top, total, mixed), sink_logit, h)
    kept = gl.where(tainted > 0, stop, row)
    store_rows(out, redone.to(q_tile.dtype), at_row, kept, stop, DV)


@gluon.jit
def repair(
    q, k, v, inputs, strides, HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr,
    DV: gl.constexpr, WIDTH: gl.constexpr, WIDTH_V: gl.constexpr, ROWS: gl.constexpr,
    KEYS: gl.constexpr, Q_BLOCK: gl.constexpr, K_BLOCK: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """Look at this program's tiles again, and do those that hold a NaN with care."""
    out, _lse, sink_logit, grid, rules, scale = inputs
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t = strides
    READ: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    for i in range(2 * rounds(grid)):
        place, walk, lengths = plan(
            i // 2, grid, rules, HEADS, ROWS, KEYS, Q_BLOCK, K_BLOCK, CAUSAL
        )  # fmt: skip
        b, h, q_begin, _k_begin, _k_tokens, first, stop, _shift = place
        first += i % 2 * ROWS
        b, kv = b.to(gl.int64), (h // GROUP).to(gl.int64)
        at_row = (b * HEADS + h) * rules[0] + q_begin
        written = load_rows(out + at_row * DV, first, stop, DV, DV, READ, ROWS, WIDTH_V)
        if gl.max(gl.max((written != written).to(gl.int32), 1), 0) > 0:
            attend_with_care(
                q + b * q_b + h.to(gl.int64) * q_h, k + b * k_b + kv * k_h, v + b * v_b + kv * v_h,
                out, at_row, first, place, walk, lengths, rules, scale * LOG2E, sink_logit,
                (q_t, k_t, v_t), D, DV, WIDTH, WIDTH_V, ROWS, KEYS, K_BLOCK, CAUSAL,
            )  # fmt: skip
