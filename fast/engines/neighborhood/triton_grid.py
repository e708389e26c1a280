"""What the neighborhood kernels share: boxes of tokens, who sees whom, and loads through it.

A program owns a box of tokens of one dilation group and walks over boxes that cover the windows of
what it owns, or with REVERSE the queries whose windows hold it. All grids have three axes here,
z, y and x, and everything about them is a run-time number: no grid compiles a kernel of its own.

Visibility is decided on packed coordinates. For a walked coordinate u and an owned range [start,
stop), both relative to the walked region, a field of the guard's width holds G + u - start in one
place and G + stop - 1 - u in another, with G the guard, its top bit: both guards stay set exactly
if start <= u < stop. The fields of all axes lie side by side in a word, so one addition and one
comparison decide a pair, or two of each if the fields need two words.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.fast.engines.neighborhood import grid

IN_USE = tl.constexpr(grid.IN_USE)
GRID = [f"{name}_{axis}" for axis in "zyx" for name in (
    "size", "kernel", "step", "dilation", "causal", "box", "walk", "tiles", "shift", "bits",
)]  # fmt: skip
VARYING = [
    *GRID, "guards", "tokens", "extra", "scale", "splits", "programs",
    *(f"{x}_stride_{axis}" for x in ("q", "k", "v", "dout", "p", "x") for axis in "bh"),
]  # fmt: skip
"""Arguments of the kernels whose values never lead to another compilation."""


@triton.jit
def windows(at, length, kernel, step, causal):
    """Where the windows of entries `at` of a dilation group start and end."""
    leader = at // step * step
    left = kernel // 2
    right = kernel - 1 - left
    last = tl.minimum(leader + step - 1, length - 1)
    centre = tl.minimum(leader + step // 2, length - 1)
    centre = tl.minimum(tl.maximum(centre, left), length - 1 - right)
    start = tl.where(causal != 0, tl.maximum(last - kernel + 1, 0), centre - left)
    stop = tl.where(causal != 0, at + 1, centre + right + 1)
    return start, stop


@triton.jit
def watchers(at, length, kernel, step, causal):
    """Where the queries whose windows hold entries `at` of a dilation group start and end."""
    shift = kernel // 2 - step // 2
    first = tl.maximum(at - kernel + 1 + shift, 0)
    first = tl.where(at < kernel, 0, (first + step - 1) // step * step)
    last = tl.where(at >= length - kernel, length, (at + shift) // step * step + step)
    behind = tl.where(at >= length - kernel, length, (at + kernel - step) // step * step + step)
    start = tl.where(causal != 0, at, first)
    stop = tl.minimum(tl.where(causal != 0, behind, last), length)
    return start, stop


@triton.jit
def ranges(at, length, kernel, step, causal, REVERSE: tl.constexpr):
    """`windows`, or with REVERSE `watchers`."""
    if REVERSE:
        start, stop = watchers(at, length, kernel, step, causal)
    else:
        start, stop = windows(at, length, kernel, step, causal)
    return start, stop


@triton.jit
def box_slots(SLOTS: tl.constexpr, box_z, box_y, box_x):
    """Coordinates of the slots of a box, row-major, and which of them are in use."""
    slot = tl.arange(0, SLOTS)
    rest = slot // box_x
    z = rest // box_y
    return z, rest % box_y, slot % box_x, z < box_z


@triton.jit
def own_axis(
    tile, residue, slot, size, kernel, step, dilation, causal, box, walk, REVERSE: tl.constexpr
):
    """One axis of an owned box: which slots exist, their coordinates, what `own_box` says of it;
    then the walked region: its start, length and number of boxes; then the slots' ranges inside it.
    """
    length = size // dilation + (residue < size % dilation).to(tl.int32)
    first = tile * box
    at = first + slot
    last = tl.minimum(first + box, length) - 1
    low, _ = ranges(tl.minimum(first, length - 1), length, kernel, step, causal, REVERSE)
    _, high = ranges(last, length, kernel, step, causal, REVERSE)
    start, stop = ranges(tl.minimum(at, length - 1), length, kernel, step, causal, REVERSE)
    boxes = tl.where(first < length, (high - low + walk - 1) // walk, 0)
    place = (at < length, at * dilation + residue, (low, start - low, at, length))
    return place, low, high - low, boxes, start - low, stop - low


@triton.jit
def own_fields(start, stop, shift, bits, WORDS: tl.constexpr):
    """The fields of owned ranges: for the lower bound, and for the upper one."""
    guard = 1 << (bits - 1)
    lower = (guard - start) << shift
    upper = (guard + stop - 1) << shift
    if WORDS == 1:
        upper = upper << bits
    return lower, upper


@triton.jit
def walk_fields(at, shift, bits, WORDS: tl.constexpr):
    """What a walked coordinate adds to the fields of `own_fields`."""
    lower = at << shift
    upper = lower
    if WORDS == 1:
        upper = upper << bits
    return lower, -upper


@triton.jit
def visible(own_lower, own_upper, walk_lower, walk_upper, guards, WORDS: tl.constexpr):
    """Who sees whom, from packed fields that broadcast against each other.

    With one word everything is in the lower ones.
    """
    held = own_lower + walk_lower
    if WORDS == 2:
        held &= own_upper + walk_upper
    return (held & guards) == guards


@triton.jit
def packed_words(lower, upper, used, WORDS: tl.constexpr):
    """Fields of all axes as words; unused slots never see nor are seen."""
    if WORDS == 1:
        lower += upper
    return tl.where(used, lower, 0), upper


@triton.jit
def reciprocal(n):
    """2^32 / n rounded up, 0 for n < 2, in 32 bits: the upper word of i times that is i // n as
    long as i * n < 2^32.
    """
    whole = tl.maximum(n, 2).to(tl.uint32)
    return tl.where(n < 2, 0, 4294967295 // whole + 1)


@triton.jit
def divide(i, n, inverse):
    """i // n, given the `reciprocal` of n."""
    return tl.where(n < 2, i, tl.umulhi(tl.cast(i, tl.uint32), inverse).to(tl.int32))


@triton.jit
def own_box(
    program, axes, guards,
    OWNED: tl.constexpr, WALKED: tl.constexpr, WORDS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """What a program owns and walks over; `axes` are those of `grid_axes`.

    Returns the index of its head; its tokens, which of them exist, and their packed words; how many
    boxes it walks over, and the walk that `walk_box` takes; and, axis by axis, the start of the
    walked region, the starts of the slots' ranges in it, the slots' entries in the dilation group
    and its length, then the coordinates of the slots of a walked box.
    """
    (
        size_z, kernel_z, step_z, dilation_z, causal_z,
        box_z, walk_z, tiles_z, shift_z, bits_z,
    ) = axes[0]  # fmt: skip
    (
        size_y, kernel_y, step_y, dilation_y, causal_y,
        box_y, walk_y, tiles_y, shift_y, bits_y,
    ) = axes[1]  # fmt: skip
    (
        size_x, kernel_x, step_x, dilation_x, causal_x,
        box_x, walk_x, tiles_x, shift_x, bits_x,
    ) = axes[2]  # fmt: skip
    tile_x = program % tiles_x
    program = program // tiles_x
    tile_y = program % tiles_y
    program = program // tiles_y
    tile_z = program % tiles_z
    program = program // tiles_z
    residue_x = program % dilation_x
    program = program // dilation_x
    residue_y = program % dilation_y
    program = program // dilation_y
    residue_z = program % dilation_z
    head = program // dilation_z

    slot_z, slot_y, slot_x, used = box_slots(OWNED, box_z, box_y, box_x)
    place_z, low_z, count_z, boxes_z, start_z, stop_z = own_axis(
        tile_z, residue_z, slot_z, size_z, kernel_z, step_z, dilation_z, causal_z, box_z, walk_z,
        REVERSE,
    )  # fmt: skip
    place_y, low_y, count_y, boxes_y, start_y, stop_y = own_axis(
        tile_y, residue_y, slot_y, size_y, kernel_y, step_y, dilation_y, causal_y, box_y, walk_y,
        REVERSE,
    )  # fmt: skip
    place_x, low_x, count_x, boxes_x, start_x, stop_x = own_axis(
        tile_x, residue_x, slot_x, size_x, kernel_x, step_x, dilation_x, causal_x, box_x, walk_x,
        REVERSE,
    )  # fmt: skip
    used = used & place_z[0] & place_y[0] & place_x[0]
    token = (place_z[1] * size_y + place_y[1]) * size_x + place_x[1]
    lower_z, upper_z = own_fields(start_z, stop_z, shift_z, bits_z, WORDS)
    lower_y, upper_y = own_fields(start_y, stop_y, shift_y, bits_y, WORDS)
    lower_x, upper_x = own_fields(start_x, stop_x, shift_x, bits_x, WORDS)
    lower, upper = packed_words(
        lower_z + lower_y + lower_x, upper_z + upper_y + upper_x, used, WORDS
    )

    to_z, to_y, to_x, there = box_slots(WALKED, walk_z, walk_y, walk_x)
    lower_z, upper_z = walk_fields(to_z, shift_z, bits_z, WORDS)
    lower_y, upper_y = walk_fields(to_y, shift_y, bits_y, WORDS)
    lower_x, upper_x = walk_fields(to_x, shift_x, bits_x, WORDS)
    to_lower = lower_z + lower_y + lower_x
    to_upper = upper_z + upper_y + upper_x
    if WORDS == 1:
        to_lower += to_upper
    # The bit of slots in use lies above all fields, and is tested together with the guards.
    to_lower = tl.where(there, to_lower + IN_USE, 0)
    to_upper = tl.where(there, to_upper, 0) + IN_USE
    first = ((low_z * dilation_z + residue_z) * size_y + low_y * dilation_y + residue_y) * size_x
    first += low_x * dilation_x + residue_x
    local = (to_z * dilation_z * size_y + to_y * dilation_y) * size_x + to_x * dilation_x
    # The walked region itself as an owned range: which slots of a walked box lie inside it.
    lower_z, upper_z = own_fields(0, count_z, shift_z, bits_z, WORDS)
    lower_y, upper_y = own_fields(0, count_y, shift_y, bits_y, WORDS)
    lower_x, upper_x = own_fields(0, count_x, shift_x, bits_x, WORDS)
    all_lower = lower_z + lower_y + lower_x
    all_upper = upper_z + upper_y + upper_x
    if WORDS == 1:
        all_lower += all_upper
    pitch_z = walk_z * dilation_z * size_y * size_x
    pitch_y = walk_y * dilation_y * size_x
    pitch_x = walk_x * dilation_x
    field_z, over_z = walk_fields(walk_z, shift_z, bits_z, WORDS)
    field_y, over_y = walk_fields(walk_y, shift_y, bits_y, WORDS)
    field_x, over_x = walk_fields(walk_x, shift_x, bits_x, WORDS)
    if WORDS == 1:
        field_z += over_z
        field_y += over_y
        field_x += over_x
    walk = (
        boxes_y, boxes_x, reciprocal(boxes_y), reciprocal(boxes_x), first,
        pitch_z, pitch_y, pitch_x, field_z, field_y, field_x, over_z, over_y, over_x,
        all_lower, all_upper, to_lower, to_upper, local, guards,
    )  # fmt: skip
    spans = (place_z[2], place_y[2], place_x[2], to_z, to_y, to_x)
    return head, token, used, lower, upper, boxes_z * boxes_y * boxes_x, walk, spans


@triton.jit
def box_place(i, walk):
    """Which of the walked boxes the i-th one is along each axis."""
    boxes_y, boxes_x, inverse_y, inverse_x = walk[0], walk[1], walk[2], walk[3]
    rest = divide(i, boxes_x, inverse_x)
    i_z = divide(rest, boxes_y, inverse_y)
    return i_z, rest - i_z * boxes_y, i - rest * boxes_x


@triton.jit
def walk_box(i, walk, WORDS: tl.constexpr):
    """The i-th walked box: its tokens, their packed words, and which of them to read."""
    (
        _, _, _, _, first,
        pitch_z, pitch_y, pitch_x, field_z, field_y, field_x, over_z, over_y, over_x,
        all_lower, all_upper, to_lower, to_upper, local, guards,
    ) = walk  # fmt: skip
    i_z, i_y, i_x = box_place(i, walk)
    base = first + i_z * pitch_z + i_y * pitch_y + i_x * pitch_x
    lower = to_lower + (i_z * field_z + i_y * field_y + i_x * field_x)
    upper = to_upper
    if WORDS == 2:
        upper += i_z * over_z + i_y * over_y + i_x * over_x
    inside = visible(all_lower, all_upper, lower, upper, guards, WORDS)
    return (base + local).to(tl.int64), lower, upper, inside


@triton.jit
def head_at(source, head, HEADS: tl.constexpr, ACCESS: tl.constexpr):
    """Where the rows of a head are: a pointer and the strides of a row and of a channel.

    `source` is a pointer and the four strides. ACCESS 1 counts strides in units of 16 bytes.
    """
    x, stride_b, stride_h, stride_t, stride_d = source
    unit: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth if ACCESS == 1 else 1
    at = (head // HEADS).to(tl.int64) * stride_b + (head % HEADS).to(tl.int64) * stride_h
    return x + at * unit, stride_t, stride_d


@triton.jit
def load_rows(rows, at, inside, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, ACCESS: tl.constexpr):
    """Rows `at` of a head as a tile (rows, WIDTH), zero where not `inside` and beyond CHANNELS.

    ACCESS 1 says that rows start at multiples of 16 bytes.
    """
    x, stride_t, stride_d = rows
    unit: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth if ACCESS == 1 else 1
    channel = tl.arange(0, WIDTH)
    place = (at * stride_t * unit)[:, None] + channel.to(tl.int64)[None, :] * stride_d
    if WIDTH == CHANNELS:
        tile = tl.load(x + place, mask=inside[:, None], other=0.0)
    else:
        tile = tl.load(x + place, mask=inside[:, None] & (channel < CHANNELS)[None, :], other=0.0)
    return tile
