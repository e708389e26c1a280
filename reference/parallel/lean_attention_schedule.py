"""Lean attention's work schedule: the clauses S3 to S9 and S11 of `lean_attention`.

Integers only: how many tiles each output has, where they lie on the line, which stretch of it each
worker owns, and who waits for whom.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from attnspec.reference.conventions import (
    check_array,
    check_choice,
    check_integer,
    check_size,
)

RULES = ("authors", "port")
ORDERS = ("natural", "paired")


class Segment(NamedTuple):
    """S8: the tiles [lo_tile, hi_tile) of output u, counted from its first, that worker g owns."""

    g: int
    u: int
    lo_tile: int
    hi_tile: int
    host: bool
    finishing: bool


def tile_size(d: int, rule: str = "authors") -> int:
    """S3: keys a tile for heads of width d.

    >>> tile_size(64), tile_size(128), tile_size(192), tile_size(64, "port")
    (256, 128, 64, 64)
    """
    check_integer("d", d, least=1)
    check_choice("rule", rule, RULES)
    if rule == "port" or d > 128:
        return 64
    return 256 if d <= 64 else 128


def line_order(
    Hkv: int, batch: int, blocks: int, order: str = "natural"
) -> list[tuple[int, int, int]]:
    """S5, S11: (kv head, sequence, query block) of each output, in the order of the line.

    >>> line_order(1, 1, 4, order="paired")
    [(0, 0, 0), (0, 0, 3), (0, 0, 1), (0, 0, 2)]
    """
    check_integer("Hkv", Hkv, least=1)
    check_integer("batch", batch, least=0)
    check_integer("blocks", blocks, least=0)
    check_choice("order", order, ORDERS)
    sequence = list(range(blocks))
    if order == "paired":
        sequence = [n // 2 if n % 2 == 0 else blocks - 1 - n // 2 for n in range(blocks)]
    return [(head, entry, i) for head in range(Hkv) for entry in range(batch) for i in sequence]


def tiles_per_output(
    lengths: np.ndarray,
    N: int,
    Hkv: int = 1,
    Tq: int = 1,
    M: int | None = None,
    causal: bool = False,
    order: str = "natural",
) -> np.ndarray:
    """S4: n (U,) int, the tiles of each output in the order of the line.

    `lengths` int (batch,); N keys a tile; M queries a block, all Tq if it is None.

    >>> tiles_per_output(np.array([5, 0, 8]), 4)
    array([2, 0, 2])
    >>> tiles_per_output(np.array([8]), 2, Tq=8, M=2, causal=True)
    array([1, 2, 3, 4])
    """
    check_array("lengths", lengths, ("batch",), dtype="int")
    check_integer("N", N, least=1)
    check_integer("Tq", Tq, least=0)
    M = block_rows(M, Tq)
    if np.any(lengths < 0):
        raise ValueError(f"lengths: got {lengths.tolist()}, expected lengths >= 0")
    line = line_order(Hkv, len(lengths), -(-Tq // M), order)
    keys = [_keys_seen(int(lengths[entry]), Tq, M, i, causal) for _, entry, i in line]
    return np.array([-(-c // N) for c in keys], dtype=np.int64)


def grid_size(n: np.ndarray, slots: int, rule: str = "authors") -> int:
    """S6: how many of `slots` workers are launched for outputs of n (U,) tiles.

    >>> grid_size(np.array([6, 6]), 8), grid_size(np.array([100, 100]), 8)
    (6, 8)
    """
    _check_tiles(n)
    check_integer("slots", slots, least=1)
    check_choice("rule", rule, RULES)
    W = int(np.sum(n))
    if W == 0:
        return 0
    if (2 * slots if rule == "authors" else slots) >= W:
        return max(1, min(-(-W // 2), -(-32 * W // int(np.max(n))), slots))
    return min(slots, 32 * len(n)) if rule == "authors" else slots


def lean_schedule(n: np.ndarray, G: int) -> tuple[np.ndarray, np.ndarray]:
    """S7: start and end int (min(G, W),), the stretch of the line that each worker owns.

    >>> lean_schedule(np.array([4, 3]), 3)
    (array([0, 3, 5]), array([3, 5, 7]))
    """
    _check_tiles(n)
    check_integer("G", G, least=1)
    W = int(np.sum(n))
    if W == 0:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    G = min(G, W)
    T = -(-W // G)
    hi = W - (T - 1) * G
    g = np.arange(G + 1, dtype=np.int64)
    edges = np.where(g < hi, g * T, hi * T + (g - hi) * (T - 1))
    return edges[:-1], edges[1:]


def split_bound(n: np.ndarray, G: int) -> int:
    """S9: no output of n (U,) tiles is split among more workers than this.

    >>> split_bound(np.array([4, 3]), 3)
    3
    """
    start, end = lean_schedule(n, G)
    if len(start) == 0:
        return 0
    longest, T = int(np.max(n)), int(end[0] - start[0])
    if int(np.sum(n)) % len(start) == 0:
        return 1 + (longest + T - 2) // T
    return 1 + (longest + T - 3) // (T - 1)


def segments(n: np.ndarray, start: np.ndarray, end: np.ndarray) -> list[Segment]:
    """S8: what each worker computes, worker by worker.

    >>> for segment in segments(np.array([2, 1]), np.array([0, 1]), np.array([1, 3])):
    ...     print(tuple(segment))
    (0, 0, 0, 1, True, False)
    (1, 0, 1, 2, False, True)
    (1, 1, 0, 1, True, True)
    """
    _check_schedule(n, start, end)
    base = np.cumsum(n) - n
    found = []
    for g in range(len(start)):
        for u in range(len(n)):
            lo, hi = max(start[g], base[u]) - base[u], min(end[g], base[u] + n[u]) - base[u]
            if lo < hi:
                found.append(Segment(g, u, int(lo), int(hi), bool(lo == 0), bool(hi == n[u])))
    return found


def helpers(n: np.ndarray, start: np.ndarray, end: np.ndarray, u: int) -> range:
    """S8: the workers whose triples the host of output u waits for; empty without tiles.

    >>> helpers(np.array([5]), np.array([0, 2, 4]), np.array([2, 4, 5]), 0)
    range(1, 3)
    """
    _check_schedule(n, start, end)
    check_integer("u", u, least=0)
    if u >= len(n):
        raise ValueError(f"u: got {u}, expected an integer below {len(n)} (outputs)")
    if n[u] == 0:
        return range(0)
    base = int(np.sum(n[:u]))
    host, last = np.searchsorted(start, [base, base + int(n[u]) - 1], side="right") - 1
    return range(int(host) + 1, int(last) + 1)


def block_rows(M: int | None, Tq: int) -> int:
    """S4: queries a block, all Tq if M is None.

    >>> block_rows(None, 7), block_rows(2, 7)
    (7, 2)
    """
    if M is None:
        return max(Tq, 1)
    check_integer("M", M, least=1)
    return M


def _keys_seen(length: int, Tq: int, M: int, i: int, causal: bool) -> int:
    """S4: how many keys query block i sees, from the first."""
    if not causal:
        return length
    return min(max(min((i + 1) * M, Tq) + length - Tq, 0), length)


def _check_tiles(n: np.ndarray) -> None:
    check_array("n", n, ("outputs",), dtype="int")
    if np.any(n < 0):
        raise ValueError(f"n: got {n.tolist()}, expected numbers of tiles >= 0")


def _check_schedule(n: np.ndarray, start: np.ndarray, end: np.ndarray) -> None:
    _check_tiles(n)
    check_array("start", start, ("workers",), dtype="int")
    check_array("end", end, ("workers",), dtype="int")
    check_size("end", len(end), len(start), "workers, as in start")
    W = int(np.sum(n))
    if not np.array_equal(np.append(start, W), np.insert(end, 0, 0)):
        raise ValueError(
            f"end: got {end.tolist()} for starts {start.tolist()}, "
            f"expected stretches that join and share out the {W} tiles of n"
        )
