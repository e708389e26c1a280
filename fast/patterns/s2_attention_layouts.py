"""Compressed forms of a block pattern: by row, by column, by query tile, on the pattern's device.

How long a list is depends on the data: these calls wait for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnspec.fast.backend import check_bool, check_integer
from attnspec.fast.patterns.s2_attention_patterns import check_pattern


def to_csr(pattern: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """crow int64 (heads, M + 1) and col int64 (heads, most): the columns of each row.

    Row I of head h lists ``col[h, crow[h, I] : crow[h, I + 1]]``; -1 is behind the last one.
    """
    check_pattern(pattern)
    crow, col, _ = _compressed(pattern, torch.zeros_like(pattern, dtype=torch.int64))
    return crow, col


def to_csc(pattern: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """ccol int64 (heads, N + 1) and row int64 (heads, most): the rows of each column."""
    check_pattern(pattern)
    return to_csr(pattern.transpose(1, 2))


def merge_q(
    pattern: Tensor, b: int, bm: int, bn: int, causal: bool = True, *, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """crow (heads, ceil(M b / bm) + 1), col and micro (heads, most), for tiles of bm queries.

    `bm` is a multiple or a divisor of b, `bn` a divisor. col counts tiles of bn keys, ascending;
    the first `micro` queries of the tile read them, if the causal order lets them. Tiles that come
    after all queries are dropped with `causal`; -1 in col and 0 in micro fill up.
    """
    check_pattern(pattern)
    for name, value in (("b", b), ("bm", bm), ("bn", bn)):
        check_integer(name, value, least=1)
    if bm % b and b % bm:
        raise ValueError(f"bm: got {bm}, expected a multiple or a divisor of the block size {b}")
    if b % bn:
        raise ValueError(f"bn: got {bn}, expected a divisor of the block size {b}")
    check_bool("causal", causal)
    if not causal and bm > b:
        raise ValueError(f"bm: got {bm}, expected at most {b}, the block size, without causal")
    heads, M, N = pattern.shape
    if bm >= b:
        m = bm // b
        rows = -(-M // m) * m
        padded = torch.nn.functional.pad(pattern, (0, 0, 0, rows - M))
        padded = padded.reshape(heads, rows // m, m, N)
        last = torch.arange(1, m + 1, device=pattern.device)[:, None]
        micro = b * (padded * last).amax(dim=2) if rows else padded.new_zeros((heads, 0, N)).long()
    else:
        micro = bm * pattern.repeat_interleave(b // bm, 1).long()
    micro = micro.repeat_interleave(b // bn, 2)
    if causal:
        tile = torch.arange(micro.shape[1], device=pattern.device)[:, None]
        behind = torch.arange(micro.shape[2], device=pattern.device) * bn >= (tile + 1) * bm
        micro = micro.masked_fill(behind, 0)
    return _compressed(micro > 0, micro)


def _compressed(pattern: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row ends, columns and `values` of the True entries, filled up with -1 and 0."""
    heads, rows, columns = pattern.shape
    counts = torch.nn.functional.pad(pattern.sum(dim=2), (1, 0))
    ends = counts.cumsum(dim=1)
    most = int(ends[:, -1].max()) if heads else 0
    flat = pattern.reshape(heads, rows * columns)
    # Listed entries first, in their order; most of them at most.
    order = torch.argsort((~flat).to(torch.uint8), dim=1, stable=True)[:, :most]
    real = torch.arange(most, device=pattern.device) < ends[:, -1:]
    col = torch.where(real, order % max(columns, 1), -1)
    kept = values.reshape(heads, rows * columns).gather(1, order)
    return ends, col, torch.where(real, kept, 0)
