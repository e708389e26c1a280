"""The block patterns of sparsely-sharded attention: strides, windows, and what can be said of them.

The clauses are those of `s2_attention`. A pattern is bool (heads, M, N): which of N blocks of keys
each of M blocks of queries reads.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.conventions import check_array, check_bool, check_integer


def stride_mask(N: int, c: int, step: int, o: int, v: int) -> np.ndarray:
    """S2: bool (N,), the blocks of the stride of kv head c.

    >>> stride_mask(6, 1, 1, 0, 4).astype(int)
    array([0, 0, 0, 1, 0, 0])
    """
    for name, value, least in (("N", N, 0), ("c", c, 0), ("step", step, 1), ("o", o, 0)):
        check_integer(name, value, least=least)
    check_integer("v", v, least=1)
    return (np.arange(N) + c * step + o) % v == 0


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
) -> np.ndarray:
    """S2-S5: the ready pattern, bool (H, M, N), or that of the active heads alone.

    `local` is a number of blocks, without `causal` also (left, right); `v` the stride, `step` and
    `offset` the phase of a head. `q_block` and `kv_block` number the first row and column, and
    `active_head_range` cuts query heads [a, z) out of the pattern of all heads.

    >>> block_pattern(4, 4, 2, 2, 1, 2).astype(int)[1]
    array([[1, 0, 0, 0],
           [0, 1, 0, 0],
           [0, 1, 1, 0],
           [0, 1, 0, 1]])
    """
    for name, value in (("M", M), ("N", N), ("q_block", q_block), ("kv_block", kv_block)):
        check_integer(name, value, least=0)
    left, right, step = check_stride(H, Hk, local, v, num_dense_heads, step, offset, homo_head)
    check_bool("causal", causal)
    if causal and not isinstance(local, (int, np.integer)):
        raise TypeError(f"local: got {local!r}, expected an integer, for causal attention")
    first, last = check_active_heads(active_head_range, H)
    row = q_block + np.arange(M)[:, None]
    column = kv_block + np.arange(N)[None, :]
    heads = []
    for h in range(first, last):
        c = h // (H // Hk)
        if c >= Hk - num_dense_heads:
            seen: np.ndarray = np.ones((M, N), bool)
        elif causal:
            strided = stride_mask(kv_block + N, 0 if homo_head else c, step, offset, v)[kv_block:]
            seen = strided | (row - column < local)
        else:
            beyond = np.maximum(row - column - left + 1, 0) + np.maximum(
                column - row - right + 1, 0
            )
            seen = beyond % v == 0
        heads.append(seen & (column <= row) if causal else seen)
    return np.stack(heads)


def token_mask(
    pattern: np.ndarray,
    b: int,
    Tq: int,
    Tk: int,
    causal: bool = True,
    q_start: int = 0,
    kv_start: int = 0,
) -> np.ndarray:
    """S6: bool (heads, Tq, Tk), which of Tk keys each of Tq queries reads.

    `pattern` has ceil(Tq / b) rows and ceil(Tk / b) columns; its first row belongs to query
    `q_start` and its first column to key `kv_start`, both multiples of b.

    >>> token_mask(np.ones((1, 1, 2), bool), 2, 2, 3, q_start=2).astype(int)[0]
    array([[1, 1, 1],
           [1, 1, 1]])
    """
    check_pattern(pattern)
    check_integer("Tq", Tq, least=0)
    check_integer("Tk", Tk, least=0)
    check_starts(b, q_start, kv_start)
    check_bool("causal", causal)
    blocks = (-(-Tq // b), -(-Tk // b))
    if pattern.shape[1:] != blocks:
        raise ValueError(
            f"pattern: got {pattern.shape[1:]} blocks, expected {blocks} for {Tq} queries and "
            f"{Tk} keys"
        )
    t, u = np.arange(Tq), np.arange(Tk)
    mask = pattern[:, t[:, None] // b, u[None, :] // b]
    return mask & (kv_start + u <= q_start + t[:, None]) if causal else mask


def is_kv_efficient(pattern: np.ndarray, bm: int = 1, bn: int = 1) -> bool:
    """S8: whether a block of keys that was dropped is never read again, by any head.

    Rows are blocks of `bm` tokens, columns of `bn`; of unequal ones only their ratio counts.

    >>> seen = np.array([[[1, 0, 0], [0, 1, 0], [1, 0, 1]]], bool)
    >>> is_kv_efficient(seen), is_kv_efficient(seen[:, :2])
    (False, True)
    """
    check_pattern(pattern)
    check_integer("bm", bm, least=1)
    check_integer("bn", bn, least=1)
    _, M, N = pattern.shape
    behind = np.arange(M)[:, None] * bm >= (np.arange(N)[None, :] + 1) * bn
    returns = pattern[:, 1:] & ~pattern[:, :-1] & behind[1:]
    return not bool(np.any(returns))


def live_blocks(
    t: int,
    c: int,
    b: int,
    local: int,
    v: int,
    step: int = 1,
    offset: int = 0,
    dense: bool = False,
) -> np.ndarray:
    """S9: the blocks that the query at position t reads from kv head c, int64, ascending.

    >>> live_blocks(19, 1, 2, 2, 4)
    array([3, 7, 8, 9])
    """
    check_integer("t", t, least=0)
    check_integer("c", c, least=0)
    check_integer("b", b, least=1)
    _check_local(local, v)
    check_bool("dense", dense)
    row = t // b
    column = np.arange(row + 1)
    seen = stride_mask(row + 1, c, step, offset, v) | (row - column < local) | dense
    return column[seen]


def union_coverage(pattern: np.ndarray) -> np.ndarray:
    """S7: bool (M, N), what the heads read together.

    >>> union_coverage(block_pattern(3, 3, 2, 2, 1, 2)).astype(int)
    array([[1, 0, 0],
           [1, 1, 0],
           [1, 1, 1]])
    """
    check_pattern(pattern)
    return np.any(pattern, axis=0)


def check_stride(
    H: Any, Hk: Any, local: Any, v: Any, num_dense_heads: Any, step: Any, offset: Any,
    homo_head: Any,
) -> tuple[int, int, int]:  # fmt: skip
    """K14: the blocks of the window on the left and on the right, and the step of the phase.

    >>> check_stride(2, 2, 4, 8, 0, None, 0, False)
    (4, 4, 4)
    """
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


def check_active_heads(active_head_range: Any, H: int) -> tuple[int, int]:
    """K14: the first active head and the one behind the last; all H of them for None.

    >>> check_active_heads((2, 5), 4)
    Traceback (most recent call last):
    ValueError: active_head_range: got (2, 5), expected one of 4 heads
    """
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
    """K14: the starts of a chunk of queries and of keys are multiples of the block size.

    >>> check_starts(4, 6, 0)
    Traceback (most recent call last):
    ValueError: q_start: got 6, expected a multiple of the block size 4
    """
    check_integer("b", b, least=1)
    for name, value in (("q_start", q_start), ("kv_start", kv_start)):
        check_integer(name, value, least=0)
        if value % b:
            raise ValueError(f"{name}: got {value}, expected a multiple of the block size {b}")


def check_pattern(pattern: Any) -> None:
    """K14: `pattern` is bool (heads, M, N).

    >>> check_pattern(np.ones((2, 2), bool))
    Traceback (most recent call last):
    ValueError: pattern: got shape (2, 2), expected (heads, M, N)
    """
    check_array("pattern", pattern, (), dtype="bool")
    if pattern.ndim != 3:
        raise ValueError(f"pattern: got shape {pattern.shape}, expected (heads, M, N)")
