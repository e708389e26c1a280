"""Block patterns as bool tensors on the CPU, and what can be said of a pattern on any device.

A pattern is bool (heads, M, N): which of N blocks of keys each of M blocks of queries reads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import check_bool, check_integer, check_tensor


def stride_mask(N: int, c: int, step: int, o: int, v: int, *, backend: str | None = None) -> Tensor:
    """bool (N,), the blocks of the stride of kv head c."""
    for name, value, least in (("N", N, 0), ("c", c, 0), ("step", step, 1), ("o", o, 0)):
        check_integer(name, value, least=least)
    check_integer("v", v, least=1)
    return (torch.arange(N) + c * step + o) % v == 0


def block_pattern(
    M: int,
    N: int,
    H: int,
    Hk: int,
    local: int | tuple[int, int],
    v: int,
    num_dense_heads: int = 0,
    step: int | None = None,
    offset: int = 0,
    homo_head: bool = False,
    causal: bool = True,
    q_block: int = 0,
    kv_block: int = 0,
    active_head_range: tuple[int, int] | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """The ready pattern, bool (H, M, N), or that of the active heads alone.

    `local` is a number of blocks, without `causal` also (left, right); `v` the stride, `step` and
    `offset` the phase of a head. `q_block` and `kv_block` number the first row and column, and
    `active_head_range` cuts query heads [a, z) out of the pattern of all heads.
    """
    for name, value in (("M", M), ("N", N), ("q_block", q_block), ("kv_block", kv_block)):
        check_integer(name, value, least=0)
    left, right, step = check_stride(H, Hk, local, v, num_dense_heads, step, offset, homo_head)
    check_window(local, causal)
    first, last = check_active_heads(active_head_range, H)
    row = q_block + torch.arange(M)[:, None]
    column = kv_block + torch.arange(N)
    c = torch.arange(first, last)[:, None, None] // (H // Hk)
    if causal:
        phase = 0 if homo_head else c * step
        seen = ((column + phase + offset) % v == 0) | (row - column < left)
    else:
        beyond = (row - column - left + 1).clamp(min=0) + (column - row - right + 1).clamp(min=0)
        seen = (beyond % v == 0).expand(last - first, M, N)
    seen = seen | (c >= Hk - num_dense_heads)
    return seen & (column <= row) if causal else seen


def token_mask(
    pattern: Tensor,
    b: int,
    Tq: int,
    Tk: int,
    causal: bool = True,
    q_start: int = 0,
    kv_start: int = 0,
    *,
    backend: str | None = None,
) -> Tensor:
    """bool (heads, Tq, Tk), which of Tk keys each of Tq queries reads, on the pattern's device.

    `pattern` has ceil(Tq / b) rows and ceil(Tk / b) columns; its first row belongs to query
    `q_start` and its first column to key `kv_start`, both multiples of b.
    """
    check_blocks(pattern, b, Tq, Tk, q_start, kv_start)
    check_bool("causal", causal)
    t = torch.arange(Tq, device=pattern.device)
    u = torch.arange(Tk, device=pattern.device)
    mask = pattern[:, t // b][:, :, u // b]
    return mask & (kv_start + u <= q_start + t[:, None]) if causal else mask


def is_kv_efficient(
    pattern: Tensor, bm: int = 1, bn: int = 1, *, backend: str | None = None
) -> bool:
    """Whether a block of keys that was dropped is never read again, by any head.

    Rows are blocks of `bm` tokens, columns of `bn`. The answer is a Python value: the call waits
    for the device.
    """
    check_pattern(pattern)
    check_integer("bm", bm, least=1)
    check_integer("bn", bn, least=1)
    _, M, N = pattern.shape
    row = torch.arange(M, device=pattern.device)[:, None]
    behind = row * bm >= (torch.arange(N, device=pattern.device) + 1) * bn
    return not bool((pattern[:, 1:] & ~pattern[:, :-1] & behind[1:]).any())


def live_blocks(
    t: int,
    c: int,
    b: int,
    local: int,
    v: int,
    step: int = 1,
    offset: int = 0,
    dense: bool = False,
    *,
    backend: str | None = None,
) -> Tensor:
    """The blocks that the query at position t reads from kv head c, int64, ascending."""
    check_integer("t", t, least=0)
    check_integer("c", c, least=0)
    check_integer("b", b, least=1)
    _check_local(local, v)
    check_bool("dense", dense)
    row = t // b
    column = torch.arange(row + 1)
    return column[stride_mask(row + 1, c, step, offset, v) | (row - column < local) | dense]


def union_coverage(pattern: Tensor, *, backend: str | None = None) -> Tensor:
    """bool (M, N), what the heads read together."""
    check_pattern(pattern)
    return pattern.any(dim=0)


def check_stride(
    H: Any,
    Hk: Any,
    local: Any,
    v: Any,
    num_dense_heads: Any,
    step: Any,
    offset: Any,
    homo_head: Any,
) -> tuple[int, int, int]:
    """The blocks of the window on the left and on the right, and the step of the phase."""
    check_integer("H", H, least=1)
    check_integer("Hk", Hk, least=1)
    if H % Hk:
        raise ValueError(f"Hk: got {Hk}, expected a divisor of the {H} query heads")
    left, right = local if isinstance(local, tuple) and len(local) == 2 else (local, local)
    for blocks in (left, right):
        _check_local(blocks, v)
    check_bool("homo_head", homo_head)
    check_integer("num_dense_heads", num_dense_heads, least=0)
    if num_dense_heads > Hk:
        raise ValueError(f"num_dense_heads: got {num_dense_heads}, expected at most {Hk} kv heads")
    if homo_head and num_dense_heads:
        raise ValueError(f"num_dense_heads: got {num_dense_heads}, expected 0 with homo_head")
    if step is None:
        step = max(1, v // (1 if homo_head else H))
    check_integer("step", step, least=1)
    check_integer("offset", offset, least=0)
    return left, right, step


def check_window(local: Any, causal: Any) -> None:
    """A window with a left and a right is for noncausal patterns only."""
    check_bool("causal", causal)
    if causal and isinstance(local, tuple):
        raise TypeError(f"local: got {local!r}, expected an integer, for causal attention")


def check_active_heads(active_head_range: Any, H: int) -> tuple[int, int]:
    """The first active head and the one behind the last; all H of them for None."""
    if active_head_range is None:
        return 0, H
    if not isinstance(active_head_range, (tuple, list)) or len(active_head_range) != 2:
        raise TypeError(f"active_head_range: got {active_head_range!r}, expected (first, last)")
    first, last = active_head_range
    check_integer("active_head_range", first, least=0)
    check_integer("active_head_range", last, least=1)
    if not first < last <= H:
        raise ValueError(f"active_head_range: got {active_head_range}, expected one of {H} heads")
    return first, last


def _check_local(local: Any, v: Any) -> None:
    check_integer("v", v, least=1)
    check_integer("local", local, least=0 if v == 1 else 1)


def check_starts(b: Any, q_start: Any, kv_start: Any) -> None:
    """The starts of a chunk of queries and of keys are multiples of the block size."""
    check_integer("b", b, least=1)
    for name, value in (("q_start", q_start), ("kv_start", kv_start)):
        check_integer(name, value, least=0)
        if value % b:
            raise ValueError(f"{name}: got {value}, expected a multiple of the block size {b}")


def check_pattern(pattern: Any) -> None:
    """`pattern` is bool (heads, M, N)."""
    check_tensor("pattern", pattern, ("heads", "M", "N"), (torch.bool,))


def check_blocks(pattern: Any, b: Any, Tq: Any, Tk: Any, q_start: Any, kv_start: Any) -> None:
    """`pattern` has a row for every block of queries and a column for every block of keys."""
    check_pattern(pattern)
    check_integer("Tq", Tq, least=0)
    check_integer("Tk", Tk, least=0)
    check_starts(b, q_start, kv_start)
    blocks = (-(-Tq // b), -(-Tk // b))
    if tuple(pattern.shape[1:]) != blocks:
        raise ValueError(
            f"pattern: got {tuple(pattern.shape[1:])} blocks, expected {blocks} for {Tq} queries "
            f"and {Tk} keys"
        )
