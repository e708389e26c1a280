"""The order of the flash engine's specialised backward kernel: which tiles of keys a program owns,
how it walks over the rows, when it is its turn to add to their gradients, and who sees whom.

The gradient of a row is a sum over the keys that it sees, which several programs hold. Each adds
its share when those of all keys before have been added, which a counter in memory says. Programs
draw their tiles in that order, so that nobody waits for one that has not begun, and sums are the
same in every run.
"""

from __future__ import annotations

from typing import Any

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from attnspec.fast.engines.flash.triton_tiles import owned_tile

OWN = gl.constexpr(64)
"""Keys, or rows, that a warpgroup multiplies at once."""
KEYS = gl.constexpr(128)
"""Keys of a program."""
DOUBT, DRAWN, ADDED = (gl.constexpr(n) for n in range(3))
"""Places among the marks in memory: whether a NaN was seen; how many tiles of keys are taken; and
from there on, for each tile of rows, how many have been added to it.
"""


@builtin
def add_to_global(descriptor: Any, at: Any, tile: Any, _semantic: Any = None) -> None:
    """Start to add a tile in shared memory to one in memory."""
    at = _semantic._convert_to_ir_values(at, require_i64=False)
    kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, descriptor.handle, at, tile.handle)


@gluon.jit
def on_counter(counter, TEXT: gl.constexpr):
    """What assembly makes, $0, of the address of a counter in memory, $1."""
    return gl.inline_asm_elementwise(
        TEXT, "=r,l", [counter.to(gl.int64)], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def draw(counter):
    """The next number of a counter in memory, for a warp."""
    return on_counter(
        counter,
        "{.reg .pred first; .reg .b32 lane, n; mov.u32 lane, %laneid; mov.b32 n, 0;"
        " setp.eq.u32 first, lane, 0; @first atom.relaxed.gpu.global.add.u32 n, [$1], 1;"
        " shfl.sync.idx.b32 $0, n, 0, 31, -1;}",
    )


@gluon.jit
def read(counter):
    """A counter in memory, with all that was written before it reached its number."""
    return on_counter(counter, "ld.acquire.gpu.global.b32 $0, [$1];")


@gluon.jit
def count_up(counter):
    """Add 1 to a counter in memory once everything that this warp has copied there is there."""
    return on_counter(
        counter,
        "{.reg .pred first; .reg .b32 lane; mov.u32 lane, %laneid; mov.b32 $0, 0;"
        " setp.eq.u32 first, lane, 0; cp.async.bulk.wait_group 0; bar.warp.sync 0xffffffff;"
        " @first red.release.gpu.global.add.u32 [$1], 1;}",
    )


@gluon.jit
def walk_of(n, grid, rules, CAUSAL: gl.constexpr):
    """The n-th tile of keys: the index of its batch entry and heads, its number, its first key, the
    first tile of rows that sees it, and how many do.

    Tiles of sinks come first, all others from the first key up.
    """
    tiles, sequences, section, lead = grid
    q_tokens, k_tokens, window, sinks = rules
    tile, sequence = owned_tile(n, tiles, sequences, section, lead)
    first = tile * KEYS
    shift = k_tokens - q_tokens
    low, high = 0, q_tokens
    if CAUSAL:
        low = gl.maximum(first - shift, 0)
    if window is not None:
        high = gl.minimum(q_tokens, first + KEYS - 1 + window - shift)
        if sinks is not None:
            high = gl.where(first < sinks, q_tokens, high)
    begin = low // OWN
    count = gl.maximum((high + OWN - 1) // OWN - begin, 0)
    return sequence, tile, first, begin, count


@gluon.jit
def step_at(i, tile, begin, count, lead, SHARE: gl.constexpr):
    """Which query head of the walk the i-th step is of, and its tile of rows. Rows are seen from
    the last one back, so that the next program, which begins when this one does, is behind it.
    Tiles of sinks see all rows, of which others ask for the first ones first.
    """
    member, step = i % SHARE, i // SHARE
    return member, begin + gl.where(tile < lead, step, count - 1 - step)


@gluon.jit
def place_in_order(tile, step, grid, rules):
    """How many tiles of keys add to a tile of rows before this one."""
    _tiles, _sequences, _section, lead = grid
    q_tokens, k_tokens, window, _sinks = rules
    lowest = 0
    if window is not None:
        lowest = gl.maximum(step * OWN + k_tokens - q_tokens - window + 1, 0) // KEYS
    return gl.where(tile < lead, tile, lead + tile - gl.maximum(lowest, lead))


@gluon.jit
def is_edge(first, row, rules, CAUSAL: gl.constexpr):
    """Whether a pair of the keys from `first` on and the rows from `row` on may be hidden."""
    q_tokens, k_tokens, window, sinks = rules
    position = row + k_tokens - q_tokens
    edge = first + KEYS > k_tokens
    if CAUSAL:
        edge |= position < first + KEYS - 1
    if window is not None:
        late = position + OWN - 1 - first >= window
        if sinks is not None:
            late &= first + KEYS > sinks
        edge |= late
    return edge


@gluon.jit
def hide(weights, key, row, rules, CAUSAL: gl.constexpr):
    """`weights` (keys, rows from `row` on) with 0 for pairs that do not see each other. Columns are
    compared by eights, as in the forward kernel.
    """
    q_tokens, k_tokens, window, sinks = rules
    column = gl.arange(0, OWN, gl.SliceLayout(0, weights.type.layout))
    eights, within = (column >> 3)[None, :], (column & 7)[None, :]
    start = key * 0
    if CAUSAL:
        start = key - (row + k_tokens - q_tokens)
    start = gl.where(key < k_tokens, start, OWN)
    seen = eights >= (start[:, None] - within + 7) >> 3
    if window is not None:
        end = key + window - (row + k_tokens - q_tokens)
        if sinks is not None:
            end = gl.where(key < sinks, OWN, end)
        seen &= eights < (end[:, None] - within + 7) >> 3
    return gl.where(seen, weights, 0.0)


@gluon.jit
def follow(tickets, turn):
    """The number of this program's next tile."""
    room, full, empty = tickets
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    mbarrier.wait(full.index(turn & 1), turn >> 1 & 1)
    n = gl.max(room.index(turn & 1).load(ONE), 0)
    mbarrier.arrive(empty.index(turn & 1), count=1)
    return n


@gluon.jit
def announce(tickets, turn, n):
    room, full, empty = tickets
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    mbarrier.wait(empty.index(turn & 1), (turn >> 1 & 1) ^ 1)
    room.index(turn & 1).store(gl.full([1], 0, gl.int32, ONE) + n)
    mbarrier.arrive(full.index(turn & 1), count=1)
