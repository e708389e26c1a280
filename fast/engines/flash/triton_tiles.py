"""What the flash kernels share: which tile a program owns, and which tiles it visits.

In a *full* tile every row sees every key, so it is visited without an element predicate; an *edge*
tile needs one. A program makes a pass over its full tiles, then one over its edge tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.fast.engines.flash.triton_visible import lowest_key

VARYING = [
    "q_stride_b", "q_stride_h", "k_stride_b", "k_stride_h", "v_stride_b", "v_stride_h",
    "dout_stride_b", "dout_stride_h",
    "key_mask_stride_b", "mask_stride_b", "mask_stride_h", "mask_stride_q",
    "index_stride_b", "index_stride_h", "index_stride_q", "count_stride_b", "count_stride_h",
    "q_tokens", "k_tokens", "sums_stride", "tiles", "sequences", "section", "lead", "window",
    "sinks", "scale",
]  # fmt: skip
"""Arguments of the kernels whose values never lead to another compilation."""


@triton.jit
def owned_tile(program, tiles, sequences, section, lead):
    """(tile, index of batch and head) of a program: sections of heads whose keys fit in the L2
    cache, one after the other. The first `lead` tiles of all heads come first: they are long.
    """
    early = lead * sequences
    rest = tl.maximum(program - early, 0)
    per_section = tl.maximum((tiles - lead) * section, 1)
    first = rest // per_section * section
    inside = rest % per_section
    width = tl.minimum(section, sequences - first)
    tile = tl.where(program < early, program // sequences, lead + inside // width)
    sequence = tl.where(program < early, program % sequences, first + inside % width)
    return tile, sequence


@triton.jit
def sequence_bounds(offsets, sequence, inside, total):
    """Begin and length of a packed sequence, cut to the `total` tokens there are."""
    begin = tl.load(offsets + sequence, mask=inside, other=0).to(tl.int32)
    end = tl.load(offsets + sequence + 1, mask=inside, other=0).to(tl.int32)
    begin = tl.minimum(tl.maximum(begin, 0), total)
    return begin, tl.maximum(tl.minimum(end, total) - begin, 0)


@triton.jit
def extent(
    tile, table, offsets, walked_offsets, tokens, walked, BLOCK: tl.constexpr, TILE: tl.constexpr
):
    """Where a tile lies: its sequence's begin and length on the tiled and on the walked axis, then
    its first token, its end and its block (listed blocks only), all inside the sequence.
    """
    begin, walked_begin, owned_block = 0, 0, 0
    if table is not None:
        sequence = tl.load(table + 2 * tile)
        tile = tl.load(table + 2 * tile + 1)
        begin, tokens = sequence_bounds(offsets, sequence, True, tokens)
        walked_begin, walked = sequence_bounds(walked_offsets, sequence, True, walked)
    first = tile * TILE
    stop = tl.minimum(first + TILE, tokens)
    if BLOCK:
        tiles_a_block: tl.constexpr = (BLOCK + TILE - 1) // TILE
        owned_block = tile // tiles_a_block
        first = owned_block * BLOCK + tile % tiles_a_block * TILE
        stop = tl.minimum(tl.minimum(first + TILE, (owned_block + 1) * BLOCK), tokens)
    return begin, tokens, walked_begin, walked, first, stop, owned_block


@triton.jit
def load_rows(
    source, first, ROWS: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
    ACCESS: tl.constexpr,
):  # fmt: skip
    """Rows [first, first + ROWS) of a sequence as a tile (ROWS, WIDTH), zero beyond CHANNELS.

    `source` is (x, batch, head, begin and end of the sequence, the four strides of x). ACCESS says
    what x is: 2 a tensor descriptor, 1 a pointer to rows that start at multiples of 16 bytes, with
    strides in units of 16 bytes, 0 any other pointer. Behind a pointer, rows from the sequence's
    end on are zero; behind a descriptor, only those behind the tensor's.
    """
    x, b, h, begin, stop, stride_b, stride_h, stride_t, stride_d = source
    if ACCESS == 2:
        tile = x.load([b, h, begin + first, 0]).reshape(ROWS, WIDTH)
    else:
        unit: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth if ACCESS == 1 else 1
        row = begin + first + tl.arange(0, ROWS)
        channel = tl.arange(0, WIDTH)
        base = x + (b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h) * unit
        at = (row.to(tl.int64) * stride_t * unit)[:, None]
        at += channel.to(tl.int64)[None, :] * stride_d
        inside = (row < stop)[:, None] & (channel < CHANNELS)[None, :]
        tile = tl.load(base + at, mask=inside, other=0.0)
    return tile


@triton.jit
def load_numbers(
    source, first, stop, other, ROWS: tl.constexpr, CUT: tl.constexpr, DESCRIBED: tl.constexpr
):
    """Float32 numbers of rows [first, first + ROWS) of a sequence: `other` from `stop` on, but
    behind a descriptor only if CUT, else anything. `source` is (numbers, head, begin of the
    sequence, stride of heads).
    """
    numbers, head, begin, stride = source
    row = first + tl.arange(0, ROWS)
    if DESCRIBED:
        # One copy for the tile, where pointers cost each thread one for each of its numbers.
        tile = numbers.load([head, begin + first]).reshape(ROWS)
        if CUT:
            tile = tl.where(row < stop, tile, other)
    else:
        at = head.to(tl.int64) * stride + begin + row
        tile = tl.load(numbers + at, mask=row < stop, other=other)
    return tile


@triton.jit
def store_rows(x, tile, at_row, keep, WIDTH: tl.constexpr, CHANNELS: tl.constexpr):
    """Write the rows of a tile (rows, WIDTH) that `keep` names to contiguous rows of CHANNELS."""
    channel = tl.arange(0, WIDTH)
    inside = keep[:, None] & (channel < CHANNELS)[None, :]
    at = at_row[:, None] * CHANNELS + channel[None, :]
    tl.store(x + at, tile.to(x.dtype.element_ty), mask=inside)


@triton.jit
def key_ends(first, stop, begin, shift, k_tokens, row_end, CAUSAL: tl.constexpr):
    """Where the keys visible to some row, and to every row, of [first, stop) end."""
    end, full_end = k_tokens, k_tokens
    if CAUSAL:
        end = tl.maximum(tl.minimum(k_tokens, stop + shift), 0)
        full_end = tl.maximum(tl.minimum(k_tokens, first + shift + 1), 0)
    if row_end is not None:
        any_row = first < stop
        last_end = tl.load(row_end + begin + stop - 1, mask=any_row, other=0).to(tl.int32)
        first_end = tl.load(row_end + begin + first, mask=any_row, other=0).to(tl.int32)
        end = tl.maximum(tl.minimum(end, last_end), 0)
        full_end = tl.maximum(tl.minimum(full_end, first_end), 0)
    return end, full_end


@triton.jit
def key_tiles(
    end, full_end, low_first, low_last, sinks, key_bounds, b,
    TILE: tl.constexpr, RANGED: tl.constexpr, ALL_EDGE: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """The key tiles of a tile of rows: those of the sinks from key 0 on, others from `base` on:
    behind the last of the former, or APART, right behind the sinks, where those end for the kernel.

    `key_bounds` holds for each batch row the first key its key mask keeps, the end of the kept keys
    and whether all between are kept. Returns base, count, full_from, full_to (the full ones among
    count), sink_full, sink_count.
    """
    base, full_base, sink_full, sink_count = 0, 0, 0, 0
    solid = True
    if RANGED:
        base, full_base = low_first, low_last
    if key_bounds is not None:
        kept_from = tl.load(key_bounds + 3 * b)
        kept_to = tl.load(key_bounds + 3 * b + 1)
        solid = tl.load(key_bounds + 3 * b + 2) != 0
        # Descriptors read numbers of keys from multiples of four on.
        base = tl.maximum(base, kept_from // 4 * 4)
        full_base = tl.maximum(full_base, kept_from)
        end, full_end = tl.minimum(end, kept_to), tl.minimum(full_end, kept_to)
        full_end = tl.where(solid, full_end, 0)
        solid &= kept_from == 0
    if RANGED and sinks is not None:
        sink_count = tl.cdiv(tl.minimum(sinks, end), TILE)
        if not ALL_EDGE:
            sink_full = tl.where(solid, tl.minimum(sinks, full_end) // TILE, 0)
        base = tl.maximum(base, tl.minimum(sinks, end) if APART else sink_count * TILE)
    # Tiles start at the first visible key, not at a multiple of TILE: no unseen key before it.
    count, full_from, full_to = split_tiles(base, end, full_base, full_end, TILE, ALL_EDGE)
    return base, count, full_from, full_to, sink_full, sink_count


@triton.jit
def row_tiles(
    first, stop, begin, rows_begin, shift, q_tokens, sinks, window, started, ended,
    TILE: tl.constexpr, CAUSAL: tl.constexpr, ALL_EDGE: tl.constexpr,
):  # fmt: skip
    """The row tiles that see keys [first, stop), as `key_tiles` names them; they start at `base`,
    up to three rows early: descriptors read numbers of rows from multiples of four on.

    `started` and `ended` hold for each key the number of packed rows whose range starts at or
    before it, and ends there or before.
    """
    base, full_base, end, full_end = 0, 0, q_tokens, q_tokens
    if CAUSAL:
        base = tl.maximum(first - shift, 0)
        full_base = tl.maximum(stop - 1 - shift, 0)
    if window is not None:
        end = tl.minimum(end, stop - 1 + window - shift)
        full_end = tl.minimum(full_end, first + window - shift)
    any_key = first < stop
    if started is not None:
        last_end = tl.load(started + begin + stop - 1, mask=any_key, other=0)
        first_end = tl.load(started + begin + first, mask=any_key, other=0)
        end = tl.minimum(end, last_end.to(tl.int32) - rows_begin)
        full_end = tl.minimum(full_end, first_end.to(tl.int32) - rows_begin)
    if ended is not None:
        first_base = tl.load(ended + begin + first, mask=any_key, other=0)
        last_base = tl.load(ended + begin + stop - 1, mask=any_key, other=0)
        base = tl.maximum(base, first_base.to(tl.int32) - rows_begin)
        full_base = tl.maximum(full_base, last_base.to(tl.int32) - rows_begin)
    if sinks is not None:
        end = tl.where(first < sinks, q_tokens, end)
        full_end = tl.where(stop <= sinks, q_tokens, full_end)
    end = tl.where(any_key, end, 0)
    base -= (rows_begin + base) % 4
    count, full_from, full_to = split_tiles(base, end, full_base, full_end, TILE, ALL_EDGE)
    return base, full_base, count, full_from, full_to


@triton.jit
def split_tiles(base, end, full_base, full_end, TILE: tl.constexpr, ALL_EDGE: tl.constexpr):
    """Tiles of [base, end) from base on, and which of them lie inside [full_base, full_end)."""
    count = tl.cdiv(tl.maximum(end - base, 0), TILE)
    full_from = tl.minimum(tl.cdiv(tl.maximum(full_base - base, 0), TILE), count)
    full_to = tl.minimum(tl.maximum(full_end - base, 0) // TILE, count)
    full_to = tl.maximum(full_to, full_from)
    if ALL_EDGE:
        full_to = full_from
    return count, full_from, full_to


@triton.jit
def entries_before(index, count, bound):
    """How many of the `count` ascending entries at `index` are smaller than `bound`."""
    smaller = 0
    for at in range(0, count, 256):
        slot = at + tl.arange(0, 256)
        entry = tl.load(index + slot, mask=slot < count, other=2147483647)
        smaller += tl.sum((entry < bound).to(tl.int32), axis=0)
    return smaller


@triton.jit
def listed_tiles(
    index, listed, end, full_end, BLOCK: tl.constexpr, TILE: tl.constexpr, ALL_EDGE: tl.constexpr
):
    """How many tiles of the `listed` key blocks are full, and how many edge tiles follow them."""
    tiles_a_block: tl.constexpr = (BLOCK + TILE - 1) // TILE
    inside = entries_before(index, listed, (end + BLOCK - 1) // BLOCK)
    full = 0
    if not ALL_EDGE:
        full = entries_before(index, listed, full_end // BLOCK)
    return full * tiles_a_block, (inside - full) * tiles_a_block


@triton.jit
def listed_tile(i, index, tokens, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """First token and end of the i-th tile of the listed blocks at `index`."""
    tiles_a_block: tl.constexpr = (BLOCK + TILE - 1) // TILE
    entry = tl.load(index + i // tiles_a_block)
    first = entry * BLOCK + i % tiles_a_block * TILE
    return first, tl.minimum((entry + 1) * BLOCK, tokens)


@triton.jit
def key_tile(i, PASS: tl.constexpr, walk, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """First key and end of the i-th key tile of a pass: 0 full, 1 edge, 2 both, in that order."""
    base, full_from, full_to, sink_full, sink_count, fulls, index, stop = walk
    if BLOCK:
        if PASS == 1:
            i += fulls
        at, stop = listed_tile(i, index, stop, BLOCK, TILE)
    else:
        full_at = base + (i - sink_full + full_from) * TILE
        full_at = tl.where(i < sink_full, i * TILE, full_at)
        j = i - fulls if PASS == 2 else i
        behind = j - (sink_count - sink_full)
        edge_at = base + tl.where(behind < full_from, behind, behind - full_from + full_to) * TILE
        edge_at = tl.where(behind < 0, (sink_full + j) * TILE, edge_at)
        if PASS == 0:
            at = full_at
        elif PASS == 1:
            at = edge_at
        else:
            at = tl.where(i < fulls, full_at, edge_at)
    return at, stop


@triton.jit
def row_tile(i, PASS: tl.constexpr, walk, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """First row and end of the i-th row tile of a pass: 0 full, 1 edge, 2 both, in that order."""
    base, full_from, full_to, skipped, edges, fulls, index, stop = walk
    j = i - fulls if PASS == 2 else i
    if BLOCK:
        full_at, edge_at = skipped + edges + i, skipped + j
    else:
        full_at = base + (i + full_from) * TILE
        edge_at = base + tl.where(j < full_from, j, j - full_from + full_to) * TILE
    if PASS == 0:
        at = full_at
    elif PASS == 1:
        at = edge_at
    else:
        at = tl.where(i < fulls, full_at, edge_at)
    if BLOCK:
        at, stop = listed_tile(at, index, stop, BLOCK, TILE)
    return at, stop


@triton.jit
def plan_rows(
    program, tiles, sequences, section, lead, table, q_offsets, k_offsets, q_tokens, k_tokens,
    window, sinks, row_start, row_end, key_bounds, block_index, block_count, block_full,
    index_stride_b, index_stride_h, index_stride_q, count_stride_b, count_stride_h,
    HEADS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, CAUSAL: tl.constexpr, ALL_EDGE: tl.constexpr,
    APART: tl.constexpr = False,
):  # fmt: skip
    """The tile of rows that a program owns, and the key tiles it visits: how many in each pass."""
    RANGED: tl.constexpr = window is not None or row_start is not None
    tile, sequence = owned_tile(program, tiles, sequences, section, lead)
    b, h = sequence // HEADS, sequence % HEADS
    if (CAUSAL or row_end is not None) and table is None:
        tile = tiles - 1 - tile
    q_begin, q_tokens, k_begin, k_tokens, first, stop, own_block = extent(
        tile, table, q_offsets, k_offsets, q_tokens, k_tokens, Q_BLOCK, ROWS
    )
    shift = k_tokens - q_tokens
    low_first = lowest_key(first, q_begin, q_tokens, shift, window, row_start)
    low_last = lowest_key(stop - 1, q_begin, q_tokens, shift, window, row_start)
    end, full_end = key_ends(first, stop, q_begin, shift, k_tokens, row_end, CAUSAL)
    base, count, full_from, full_to, sink_full, sink_count = key_tiles(
        end, full_end, low_first, low_last, sinks, key_bounds, b, KEYS, RANGED, ALL_EDGE, APART
    )
    fulls = sink_full + full_to - full_from
    edges = sink_count + count - fulls
    listing = 0
    if K_BLOCK:
        block_index += b.to(tl.int64) * index_stride_b + h.to(tl.int64) * index_stride_h
        block_index += own_block.to(tl.int64) * index_stride_q
        listing = block_index
        at_count = b * count_stride_b + h * count_stride_h + own_block
        listed = tl.load(block_count + at_count)
        if block_full is None:
            fulls, edges = listed_tiles(block_index, listed, end, full_end, K_BLOCK, KEYS, ALL_EDGE)
        else:
            tiles_a_block: tl.constexpr = (K_BLOCK + KEYS - 1) // KEYS
            whole = tl.load(block_full + at_count)
            fulls, edges = whole * tiles_a_block, (listed - whole) * tiles_a_block
    place = (b, h, q_begin, k_begin, k_tokens, first, stop, shift)
    walk = (base, full_from, full_to, sink_full, sink_count, fulls, listing, k_tokens)
    return place, walk, (fulls, edges)


@triton.jit
def plan_columns(
    span, block_index, block_count, block_full, index_stride_b, index_stride_h, index_stride_k,
    count_stride_b, count_stride_h, b, h, own_block, q_tokens,
    BLOCK: tl.constexpr, TILE: tl.constexpr, ALL_EDGE: tl.constexpr,
):  # fmt: skip
    """The row tiles that a tile of keys visits in each pass, for query head `h`.

    Listed row blocks come in edge and then full: only the causal rule has an edge there.
    """
    base, full_base, count, full_from, full_to = span
    fulls, skipped, listing = full_to - full_from, 0, 0
    edges = count - fulls
    if BLOCK:
        tiles_a_block: tl.constexpr = (BLOCK + TILE - 1) // TILE
        block_index += b.to(tl.int64) * index_stride_b + h.to(tl.int64) * index_stride_h
        block_index += own_block.to(tl.int64) * index_stride_k
        listing = block_index
        at_count = b * count_stride_b + h * count_stride_h + own_block
        listed = tl.load(block_count + at_count)
        if block_full is None:
            unseen = entries_before(block_index, listed, base // BLOCK)
            partial = listed
            if not ALL_EDGE:
                partial = entries_before(block_index, listed, (full_base + BLOCK - 1) // BLOCK)
            partial = tl.where(count > 0, partial, unseen)
            listed = tl.where(count > 0, listed, unseen)
            skipped, edges = unseen * tiles_a_block, (partial - unseen) * tiles_a_block
            fulls = (listed - partial) * tiles_a_block
        else:
            whole = tl.load(block_full + at_count)
            fulls, edges = whole * tiles_a_block, (listed - whole) * tiles_a_block
    walk = (base, full_from, full_to, skipped, edges, fulls, listing, q_tokens)
    return walk, (fulls, edges)
