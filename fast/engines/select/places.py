"""Where tokens stand by their positions: one op of one launch, without a wait for the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attnspec.fast.backend import choose_backend, load
from attnspec.fast.engines.operation import operation
from attnspec.fast.engines.select.rows import inverse
from attnspec.fast.kept import counting


class Places(NamedTuple):
    """The order of tokens and that of the rows, which some of them have; all are int64.

    `order` (tokens): the tokens in the order of positions, whose inverse is `place`; `position`
    their positions in that order. `row_order` (rows), `row_place` and `row_position` are the same
    for rows. `ends` (rows), ascending: how many tokens stand at or before a row, in this order.
    """

    order: Tensor
    place: Tensor
    position: Tensor
    row_order: Tensor
    row_place: Tensor
    ends: Tensor
    row_position: Tensor


def places(
    flags: Tensor | None,
    first: Tensor | None,
    second: Tensor | None = None,
    *,
    rows: int,
    ahead: bool = False,
    backend: str | None = None,
) -> Places:
    """The places of tokens, `flags` bool (tokens,), at positions `first` (tokens,), else counted.

    Without flags tokens are those of `first` and then those of `second`, and the former are
    flagged. The last `rows` tokens that are not flagged have rows, in the order in which they are
    stored; if there are fewer, so do the last of the others. With `ahead`, flagged tokens stand
    before all others. A mechanism has checked the arguments.
    """
    known = next(x for x in (flags, first) if x is not None)
    tokens = known.shape[0] + (0 if second is None else second.shape[0])
    table, row_table = places_op(
        flags, first, second, rows, ahead, tokens, choose_backend(backend, known)
    )
    return Places(*(x[:tokens] for x in table.unbind()), *(x[:rows] for x in row_table.unbind()))


def _even(count: int) -> int:
    """So many int64 that lines of them begin at multiples of 16 bytes."""
    return count + count % 2


@operation("attnspec::places")
def places_op(
    flags: Tensor | None,
    first: Tensor | None,
    second: Tensor | None,
    rows: int,
    ahead: bool,
    tokens: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The fields of `Places` in two tables, three lines for tokens and four for rows."""
    split = 0 if first is None else first.shape[0]
    known = first if flags is None else flags
    assert known is not None
    if backend == "triton":
        table = known.new_empty(3, _even(tokens), dtype=torch.int64)
        row_table = known.new_empty(4, _even(rows), dtype=torch.int64)
        kernels = load("attnspec.fast.engines.select.triton_places")
        if tokens <= kernels.MOST:
            with torch.cuda.device_of(known):
                kernels.fill(flags, first, second, split, ahead, tokens, rows, table, row_table)
            return table, row_table
    numbers = counting(known.device, tokens)
    position = numbers if first is None else first.to(torch.int64)
    if second is not None:
        position = torch.cat([position, second.to(torch.int64)])
    flags = numbers < split if flags is None else flags
    # A stable sort puts the flagged first and leaves the others in their order.
    kinds = torch.argsort(flags.logical_not().to(torch.uint8), stable=True)
    order = kinds if first is None else torch.argsort(position, stable=True)
    if first is None and not ahead:
        order = numbers
    elif ahead and first is not None:
        others = flags[order].logical_not().to(torch.uint8)
        order = order[torch.argsort(others, stable=True)]
    place = inverse(order)
    row_kinds = kinds[tokens - rows :]
    row_ends, row_order = torch.sort(place[row_kinds])
    pad, row_pad = tokens % 2, rows % 2
    lines = order, place, position[order]
    row_lines = row_order, inverse(row_order), row_ends + 1, position[row_kinds][row_order]
    return (
        torch.nn.functional.pad(torch.stack(lines), (0, pad)),
        torch.nn.functional.pad(torch.stack(row_lines), (0, row_pad)),
    )


@places_op.register_fake
def _(
    flags: Tensor | None,
    first: Tensor | None,
    second: Tensor | None,
    rows: int,
    ahead: bool,
    tokens: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    known = first if flags is None else flags
    assert known is not None
    return (
        known.new_empty(3, _even(tokens), dtype=torch.int64),
        known.new_empty(4, _even(rows), dtype=torch.int64),
    )
