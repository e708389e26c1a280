"""How the flash kernels read lists of blocks: which tiles they name, and in which order.

A `walk` is what `plan_rows` and `plan_columns` return; its last three numbers are how many of its
tiles are full, the list, and where the tokens end.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
def listed_tile(i, entry, tokens, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """First token and end of the i-th tile of listed blocks, which is one of block `entry`."""
    tiles_a_block: tl.constexpr = (BLOCK + TILE - 1) // TILE
    return entry * BLOCK + i % tiles_a_block * TILE, tl.minimum((entry + 1) * BLOCK, tokens)


@triton.jit
def key_entry(i, count, PASS: tl.constexpr, walk, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """The listed block of the i-th key tile of a pass of `count`, 0 behind the last and without
    lists. Read one tile ahead, it does not hold up the tile's own loads.
    """
    entry = 0
    if BLOCK:
        tiles_a_block: tl.constexpr = (BLOCK + TILE - 1) // TILE
        slot = (i + walk[5] if PASS == 1 else i) // tiles_a_block
        entry = tl.load(walk[6] + slot, mask=i < count, other=0)
    return entry


@triton.jit
def row_place(i, PASS: tl.constexpr, walk):
    """Where the i-th row tile of a pass lies in the lists, which have edges before full tiles."""
    _base, _from, _to, skipped, edges, fulls, _index, _stop = walk
    if PASS == 0:
        place = skipped + edges + i
    elif PASS == 1:
        place = skipped + i
    else:
        place = skipped + tl.where(i < fulls, edges + i, i - fulls)
    return place


@triton.jit
def row_entry(i, count, PASS: tl.constexpr, walk, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """As `key_entry`, for row tiles."""
    entry = 0
    if BLOCK:
        tiles_a_block: tl.constexpr = (BLOCK + TILE - 1) // TILE
        slot = row_place(i, PASS, walk) // tiles_a_block
        entry = tl.load(walk[6] + slot, mask=i < count, other=0)
    return entry
