"""Small kernels beside those of flash attention: bounds of masks and rows, sums over heads, and
sums that become gradients.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.fast.engines.flash.triton_tiles import sequence_bounds


@triton.jit(do_not_specialize=["stride_b", "tokens"])
def key_bounds_kernel(key_mask, bounds, stride_b, stride_k, tokens, KEYS: tl.constexpr):
    """Of one batch row: its first kept key, the end of its kept keys, whether they are all kept."""
    b = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, KEYS)
    firsts = tl.full([KEYS], 2147483647, tl.int32)
    ends = tl.zeros([KEYS], tl.int32)
    counts = tl.zeros([KEYS], tl.int32)
    for first in range(0, tokens, KEYS):
        key = first + place
        at = key_mask + b * stride_b + key.to(tl.int64) * stride_k
        kept = tl.load(at, mask=key < tokens, other=0) != 0
        firsts = tl.minimum(firsts, tl.where(kept, key, 2147483647))
        ends = tl.maximum(ends, tl.where(kept, key + 1, 0))
        counts += kept.to(tl.int32)
    end = tl.max(ends, axis=0)
    begin = tl.minimum(tl.min(firsts, axis=0), end)
    tl.store(bounds + 3 * b, begin)
    tl.store(bounds + 3 * b + 1, end)
    tl.store(bounds + 3 * b + 2, (tl.sum(counts, axis=0) == end - begin).to(tl.int32))


@triton.jit
def entries_up_to(values, begin, end, bound, steps):
    """How many of the ascending values at [begin, end) are at most `bound`, by bisection."""
    low, high = begin, end
    for _ in range(steps):
        middle = (low + high) // 2
        inside = low < high
        value = tl.load(values + middle, mask=inside, other=0)
        after = inside & (value <= bound)
        low = tl.where(after, middle + 1, low)
        high = tl.where(inside & (value > bound), middle, high)
    return low


@triton.jit(do_not_specialize=["q_tokens", "k_tokens", "sequences", "steps"])
def rows_before_kernel(
    row_start, row_end, q_offsets, k_offsets, started, ended, q_tokens, k_tokens, sequences, steps,
    KEYS: tl.constexpr,
):  # fmt: skip
    """For each key, how many rows of all sequences start at or before it, and end there or before.

    Packed rows count from the first key of their own sequence.
    """
    key = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    begin, end, bound = key * 0, key * 0 + q_tokens, key
    if k_offsets is not None:
        sequence = entries_up_to(k_offsets, key * 0, key * 0 + sequences, key, steps) - 1
        sequence = tl.maximum(sequence, 0)
        begin, rows = sequence_bounds(q_offsets, sequence, True, q_tokens)
        end = begin + rows
        k_begin, _ = sequence_bounds(k_offsets, sequence, True, k_tokens)
        bound = key - k_begin
    if row_start is not None:
        count = entries_up_to(row_start, begin, end, bound, steps)
        tl.store(started + key, count, mask=key < k_tokens)
    if row_end is not None:
        count = entries_up_to(row_end, begin, end, bound, steps)
        tl.store(ended + key, count, mask=key < k_tokens)


@triton.jit(do_not_specialize=["numbers", "blocks"])
def head_sums_kernel(parts, sums, numbers, blocks, GROUP: tl.constexpr, SIZE: tl.constexpr):
    """Sums over the GROUP query heads of each kv head: parts (owners * GROUP, numbers) float32 to
    sums (owners, numbers), in `blocks` programs an owner.
    """
    owner = (tl.program_id(0) // blocks).to(tl.int64)
    number = tl.program_id(0) % blocks * SIZE + tl.arange(0, SIZE)
    inside = number < numbers
    total = tl.zeros([SIZE], tl.float32)
    for member in range(GROUP):
        at = parts + (owner * GROUP + member) * numbers + number
        total += tl.load(at, mask=inside, other=0.0)
    tl.store(sums + owner * numbers + number, total.to(sums.dtype.element_ty), mask=inside)


@triton.jit
def round_sums_kernel(sums, out, marks, numbers, scale, SIZE: tl.constexpr):
    """`out` = scale * `sums`, rounded; the first of `marks` becomes 1 if there is a NaN."""
    number = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = number < numbers
    total = tl.load(sums + number, mask=inside, other=0.0) * scale
    tl.store(out + number, total.to(out.dtype.element_ty), mask=inside)
    tl.store(marks + tl.zeros([SIZE], tl.int32), 1, mask=total != total)
