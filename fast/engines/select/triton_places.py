"""Where tokens stand, in Triton: a token's place is the number of those before it, counted.

A sort would take several launches. Every program compares its tokens with all, which costs less
than one of them as long as there are not very many.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnspec.fast.engines.prepared import Prepared
from attnspec.fast.engines.sizes import cdiv

MOST = 1 << 14
"""Tokens at most: two counts share 32 bits, and for more a sort is faster."""
OWN = 16
EACH = 256

NUMBERS = [
    "tokens", "split", "rows", "flag_stride", "first_stride", "second_stride", "table_stride",
    "row_stride",
]  # fmt: skip


@triton.jit
def tokens_at(
    at, flags, first, second, tokens, split, flag_stride, first_stride, second_stride
):  # fmt: skip
    """Whether tokens are flagged, 1 or 0, and their positions."""
    inside = at < tokens
    if flags is not None:
        flag = tl.load(flags + at.to(tl.int64) * flag_stride, mask=inside, other=0)
        flag = (flag != 0).to(tl.int32)
    else:
        flag = (at < split).to(tl.int32)
    if first is None:
        position = at.to(tl.int64)
    elif second is None:
        position = tl.load(first + at.to(tl.int64) * first_stride, mask=inside, other=0)
    else:
        before = at < split
        position = tl.load(first + at.to(tl.int64) * first_stride, mask=before, other=0)
        position = position.to(tl.int64)
        behind = (at - split).to(tl.int64) * second_stride
        position += tl.load(second + behind, mask=inside & (at >= split), other=0).to(tl.int64)
    return flag, position.to(tl.int64)


@triton.jit(do_not_specialize=NUMBERS)
def places_kernel(
    flags, first, second, table, row_table, tokens, split, rows, flag_stride, first_stride,
    second_stride, table_stride, row_stride, AHEAD: tl.constexpr, OWN: tl.constexpr,
    EACH: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0) * OWN
    own = start + tl.arange(0, OWN)
    own_flag, own_position = tokens_at(
        own, flags, first, second, tokens, split, flag_stride, first_stride, second_stride
    )  # fmt: skip
    # Flagged tokens, all and those before the program's own.
    flagged = split
    behind = own
    if flags is not None:
        all_flags = tl.zeros([EACH], tl.int32)
        head_flags = tl.zeros([EACH], tl.int32)
        for begin in range(0, tokens, EACH):
            at = begin + tl.arange(0, EACH)
            flag = tl.load(flags + at.to(tl.int64) * flag_stride, mask=at < tokens, other=0)
            flag = (flag != 0).to(tl.int32)
            all_flags += flag
            head_flags += tl.where(at < start, flag, 0)
        flagged = tl.sum(all_flags, 0)
        before = tl.sum(head_flags, 0) + tl.cumsum(own_flag, 0) - own_flag
        behind = tl.where(own_flag != 0, before, flagged + own - before)
    # The place of a token in the lower half, that among rows in the upper half.
    counts = tl.zeros([OWN, EACH], tl.int32)
    seen = 0
    for begin in range(0, tokens, EACH):
        at = begin + tl.arange(0, EACH)
        flag, position = tokens_at(
            at, flags, first, second, tokens, split, flag_stride, first_stride, second_stride
        )  # fmt: skip
        kind = at
        if flags is not None:
            earlier_flags = seen + tl.cumsum(flag, 0) - flag
            kind = tl.where(flag != 0, earlier_flags, flagged + at - earlier_flags)
            seen += tl.sum(flag, 0)
        weight = tl.where(kind >= tokens - rows, 65537, 1)
        weight = tl.where(at < tokens, weight, 0)
        # Equal positions, which nobody should give, still have places of their own.
        less = tl.where(
            at[None, :] < own[:, None],
            position[None, :] <= own_position[:, None],
            position[None, :] < own_position[:, None],
        )
        if AHEAD:
            same = flag[None, :] == own_flag[:, None]
            less = (flag[None, :] > own_flag[:, None]) | (same & less)
        counts += tl.where(less, weight[None, :], 0)
    count = tl.sum(counts, 1)
    place, row_place = count & 65535, count >> 16
    real = own < tokens
    tl.store(table + place, own.to(tl.int64), mask=real)
    tl.store(table + table_stride + own, place.to(tl.int64), mask=real)
    tl.store(table + 2 * table_stride + place, own_position, mask=real)
    row = behind - (tokens - rows)
    real = real & (row >= 0)
    tl.store(row_table + row_place, row.to(tl.int64), mask=real)
    tl.store(row_table + row_stride + row, row_place.to(tl.int64), mask=real)
    tl.store(row_table + 2 * row_stride + row_place, (place + 1).to(tl.int64), mask=real)
    tl.store(row_table + 3 * row_stride + row_place, own_position, mask=real)


@functools.lru_cache(maxsize=64)
def _launch(
    tokens: int, split: int, rows: int, strides: tuple[int, int, int],
    dtypes: tuple[torch.dtype | None, ...], widths: tuple[int, int], ahead: bool,
    device: torch.device,
) -> Prepared:  # fmt: skip
    def some(dtype: torch.dtype | None) -> Tensor | None:
        return None if dtype is None else torch.empty(0, dtype=dtype)

    flags, first, second = map(some, dtypes)
    arguments = {
        "flags": flags, "first": first, "second": second, "table": some(torch.int64),
        "row_table": some(torch.int64), "tokens": tokens, "split": split, "rows": rows,
        "flag_stride": strides[0], "first_stride": strides[1], "second_stride": strides[2],
        "table_stride": widths[0], "row_stride": widths[1], "AHEAD": ahead, "OWN": OWN,
        "EACH": EACH,
    }  # fmt: skip
    return Prepared(places_kernel, cdiv(tokens, OWN), arguments, device, num_warps=4)


def fill(
    flags: Tensor | None, first: Tensor | None, second: Tensor | None, split: int, ahead: bool,
    tokens: int, rows: int, table: Tensor, row_table: Tensor,
) -> None:  # fmt: skip
    """Fill the tables of `places`, for `MOST` tokens at most."""
    flags = None if flags is None else flags.view(torch.uint8)
    given = flags, first, second
    launch = _launch(
        tokens, split, rows, tuple(0 if x is None else x.stride(0) for x in given),
        tuple(None if x is None else x.dtype for x in given),
        (table.stride(0), row_table.stride(0)), ahead, table.device,
    )  # fmt: skip
    launch(flags=flags, first=first, second=second, table=table, row_table=row_table)
