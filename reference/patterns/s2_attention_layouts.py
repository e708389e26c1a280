"""Compressed forms of a block pattern, as kernels read them: by row, by column, by query tile.

The clauses are those of `s2_attention`. Heads differ in how many blocks they list; the shorter
lists are filled up with -1, which is no block.
"""

from __future__ import annotations

import numpy as np

from attnspec.reference.conventions import check_bool, check_integer
from attnspec.reference.patterns.s2_attention_patterns import check_pattern


def to_csr(pattern: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """S10: crow int64 (heads, M + 1) and col int64 (heads, most): the columns of each row.

    Row I of head h lists ``col[h, crow[h, I] : crow[h, I + 1]]``.

    >>> crow, col = to_csr(np.array([[[1, 0], [1, 1]], [[1, 0], [0, 1]]], bool))
    >>> crow, col
    (array([[0, 1, 3],
           [0, 1, 2]]), array([[ 0,  0,  1],
           [ 0,  1, -1]]))
    """
    check_pattern(pattern)
    heads, _, N = pattern.shape
    ends = np.cumsum(pattern.sum(axis=2), axis=1)
    crow = np.concatenate([np.zeros((heads, 1), np.int64), ends], axis=1)
    column = np.broadcast_to(np.arange(N), pattern.shape)
    col = np.full((heads, int(crow[:, -1].max(initial=0))), -1)
    for h in range(heads):
        col[h, : crow[h, -1]] = column[h][pattern[h]]
    return crow, col


def to_csc(pattern: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """S10: ccol int64 (heads, N + 1) and row int64 (heads, most): the rows of each column.

    >>> to_csc(np.array([[[1, 0], [1, 1]]], bool))
    (array([[0, 2, 3]]), array([[0, 1, 1]]))
    """
    check_pattern(pattern)
    return to_csr(np.swapaxes(pattern, 1, 2))


def merge_q(
    pattern: np.ndarray, b: int, bm: int, bn: int, causal: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S10: crow (heads, ceil(M b / bm) + 1), col and micro (heads, most), for tiles of bm queries.

    `bm` is a multiple or a divisor of b, `bn` a divisor. col counts tiles of bn keys, ascending;
    the first `micro` queries of the tile read them, if the causal order lets them. Tiles that come
    after all queries are dropped with `causal`; what is filled up is -1 in col and 0 in micro. The
    authors' kernels have bm = max(b, 64) and bn = b.

    >>> crow, col, micro = merge_q(np.array([[[1, 0], [0, 1]]], bool), 2, 4, 2)
    >>> crow, col, micro
    (array([[0, 2]]), array([[0, 1]]), array([[2, 4]]))
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
    heads, M, _ = pattern.shape
    tiles = -(-M * b // bm)
    listed: list[list[list[tuple[int, int]]]] = []
    for h in range(heads):
        rows = []
        for tile in range(tiles):
            first = tile * bm // b
            used = pattern[h, first : max(first + bm // b, first + 1)]
            entries = []
            for J in np.flatnonzero(used.any(axis=0)):
                last = int(np.flatnonzero(used[:, J])[-1])
                micro = bm if bm <= b else b * (1 + last)
                for part in range(b // bn):
                    key_tile = int(J) * (b // bn) + part
                    if not causal or key_tile * bn < (tile + 1) * bm:
                        entries.append((key_tile, micro))
            rows.append(entries)
        listed.append(rows)
    counts = np.array([[len(row) for row in rows] for rows in listed], np.int64)
    crow = np.concatenate([np.zeros((heads, 1), np.int64), counts.reshape(heads, tiles)], axis=1)
    crow = np.cumsum(crow, axis=1)
    col = np.full((heads, int(crow[:, -1].max(initial=0))), -1)
    micro_of = np.zeros_like(col)
    for h, rows in enumerate(listed):
        flat = np.array([entry for row in rows for entry in row], np.int64).reshape(-1, 2)
        col[h, : len(flat)], micro_of[h, : len(flat)] = flat[:, 0], flat[:, 1]
    return crow, col, micro_of
