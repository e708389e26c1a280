"""StreamingLLM, the rows of the cache: which stay, and where attention sees them.

Nothing here reads a query or a value. The clauses S1 to S11 are those of `streaming_llm`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from attnspec.reference.conventions import (
    check_array,
    check_attention_inputs,
    check_integer,
    check_size,
)
from attnspec.reference.primitives.rope import rope_angles, rotate


def evict_rows(T: int, S: int = 4, R: int = 512) -> np.ndarray:
    """S1: int (kept), the rows that stay of `T`, ascending.

    >>> evict_rows(9, S=2, R=3)
    array([0, 1, 6, 7, 8])
    """
    return evict_rows_for_space(T, 0, S, R)


def evict_rows_for_space(T: int, m: int, S: int = 4, R: int = 512) -> np.ndarray:
    """S2: int (kept), the rows that stay of `T` before `m` tokens come, ascending.

    >>> evict_rows_for_space(9, 1, S=2, R=3)
    array([0, 1, 7, 8])
    """
    for name, value in (("T", T), ("m", m), ("S", S), ("R", R)):
        check_integer(name, value, least=0)
    rows = np.arange(T)
    if T + m <= S + R:
        return rows
    return np.concatenate([rows[:S], rows[T - R + m :]])


def evict_rows_range(T: int, a: int, b: int) -> np.ndarray:
    """S3: int (kept), the rows of `T` outside [a, b), ascending. ValueError unless a <= b <= T.

    >>> evict_rows_range(6, 1, 4)
    array([0, 4, 5])
    """
    for name, value in (("T", T), ("a", a), ("b", b)):
        check_integer(name, value, least=0)
    if not a <= b <= T:
        raise ValueError(f"b: got {b}, expected a <= b <= T with a = {a} and T = {T}")
    rows = np.arange(T)
    return np.concatenate([rows[:a], rows[b:]])


def cache_positions(n: int, w: int) -> tuple[np.ndarray, np.ndarray]:
    """S6: cache-relative positions, int (w) of the new queries and int (n + w) of all rows.

    >>> cache_positions(3, 2)
    (array([3, 4]), array([0, 1, 2, 3, 4]))
    """
    check_integer("n", n, least=0)
    check_integer("w", w, least=0)
    return np.arange(n, n + w), np.arange(n + w)


def rope(
    x: np.ndarray, pos: np.ndarray, base: float = 10000.0, rotary_dims: int | None = None
) -> np.ndarray:
    """S7: `x` (..., T, d) rotated to the positions `pos` int (T).

    `rotary_dims` channels turn, the first ones, an even number; all d if None.

    >>> rope(np.array([[1.0, 0.0, 3.0]]), np.array([1]), rotary_dims=2).round(4)
    array([[0.5403, 0.8415, 3.    ]])
    """
    check_array("x", x, ("T", "d"))
    check_array("pos", pos, ("T",), dtype="int")
    check_size("pos", pos.shape[-1], x.shape[-2], "T, as in x")
    check_rotary("x", x, "base", base, rotary_dims)
    turning = x.shape[-1] if rotary_dims is None else rotary_dims
    turned = rotate(x[..., :turning], rope_angles(pos, turning, base))
    return np.concatenate([turned, x[..., turning:]], axis=-1)


def alibi_bias(alibi_slopes: np.ndarray, p_q: np.ndarray, p_k: np.ndarray) -> np.ndarray:
    """S7: the bias (heads, queries, rows) added to scores, for slopes (heads) above 0.

    >>> alibi_bias(np.array([0.5]), np.array([2]), np.array([0, 1, 2]))
    array([[[-1. , -0.5,  0. ]]])
    """
    check_array("alibi_slopes", alibi_slopes, ("heads",))
    check_array("p_q", p_q, ("queries",), dtype="int")
    check_array("p_k", p_k, ("rows",), dtype="int")
    if not np.all(alibi_slopes > 0):
        raise ValueError("alibi_slopes: got a slope that is not positive, expected all > 0")
    offset = (p_k[None, :] - p_q[:, None]).astype(alibi_slopes.dtype)
    return alibi_slopes[:, None, None] * offset


def sink_window_mask(T: int, S: int = 4, R: int = 512) -> np.ndarray:
    """S10: bool (T, T), True where token t sees token j when a stream comes token by token.

    >>> sink_window_mask(5, S=1, R=1).astype(int)
    array([[1, 0, 0, 0, 0],
           [1, 1, 0, 0, 0],
           [1, 1, 1, 0, 0],
           [1, 0, 1, 1, 0],
           [1, 0, 0, 1, 1]])
    """
    for name, value in (("T", T), ("S", S), ("R", R)):
        check_integer(name, value, least=0)
    t, j = np.arange(T)[:, None], np.arange(T)[None, :]
    return (j <= t) & ((j < S) | (t - j <= R))


def sink_window_distances(T: int, S: int = 4, R: int = 512) -> np.ndarray:
    """S10: int (T, T), the distance at which token t sees token j, -1 where it does not.

    >>> sink_window_distances(5, S=1, R=1)
    array([[ 0, -1, -1, -1, -1],
           [ 1,  0, -1, -1, -1],
           [ 2,  1,  0, -1, -1],
           [ 2, -1,  1,  0, -1],
           [ 2, -1, -1,  1,  0]])
    """
    mask = sink_window_mask(T, S, R)
    t, j = np.arange(T)[:, None], np.arange(T)[None, :]
    row = np.where(j < S, j, j - np.maximum(0, t - (S + R)))
    return np.where(mask, np.minimum(t, S + R) - row, -1)


def call_sizes(T: int, chunk: int | Sequence[int]) -> list[int]:
    """S11: how many of `T` tokens come in each call: `chunk` at a time, or as the list says.

    >>> call_sizes(7, 3), call_sizes(5, [3, 1, 1])
    ([3, 3, 1], [3, 1, 1])
    """
    check_integer("T", T, least=0)
    if not isinstance(chunk, Sequence):
        check_integer("chunk", chunk, least=1)
        return [min(chunk, T - start) for start in range(0, T, chunk)]
    for size in chunk:
        check_integer("chunk", size, least=1)
    check_size("chunk", sum(chunk), T, "the sum of the sizes is the number of tokens")
    return list(chunk)


def check_rotary(
    name: str, x: np.ndarray, base_name: str, base: Any, rotary_dims: Any = None
) -> None:
    """S7, K14: `x` has an even number of channels to rotate and `base` is a positive number.

    >>> check_rotary("q", np.zeros((1, 3)), "base", 10000.0)
    Traceback (most recent call last):
    ValueError: q: got d = 3, expected an even d for rotary positions
    """
    if isinstance(base, bool) or not isinstance(base, (int, float, np.number)):
        raise TypeError(f"{base_name}: got {base!r}, expected a number > 0")
    if not base > 0:
        raise ValueError(f"{base_name}: got {base!r}, expected a number > 0")
    d = x.shape[-1]
    if rotary_dims is None:
        if d % 2:
            raise ValueError(f"{name}: got d = {d}, expected an even d for rotary positions")
        return
    check_integer("rotary_dims", rotary_dims, least=2)
    if rotary_dims % 2 or rotary_dims > d:
        raise ValueError(
            f"rotary_dims: got {rotary_dims}, expected an even integer of at most d = {d}"
        )


def check_call(
    q: Any,
    k: Any,
    v: Any,
    S: Any,
    R: Any,
    rope_base: Any = None,
    alibi_slopes: Any = None,
    rotary_dims: Any = None,
) -> None:
    """K14: what every call takes fits together; one kind of positions at most.

    >>> x = np.ones((1, 1, 2))
    >>> check_call(x, x, x, S=-1, R=2)
    Traceback (most recent call last):
    ValueError: S: got -1, expected an integer >= 0
    """
    check_attention_inputs(q, k, v)
    check_size("k", k.shape[-2], q.shape[-2], "tokens, as in q")
    check_integer("S", S, least=0)
    check_integer("R", R, least=0)
    if rope_base is not None:
        check_rotary("q", q, "rope_base", rope_base, rotary_dims)
    elif rotary_dims is not None:
        raise ValueError(f"rotary_dims: got {rotary_dims!r} without a rope_base, expected both")
    if alibi_slopes is not None:
        check_array("alibi_slopes", alibi_slopes, ("heads",))
        check_size("alibi_slopes", alibi_slopes.ndim, 1, "axes")
        check_size("alibi_slopes", alibi_slopes.shape[-1], q.shape[-3], "heads, as in q")
        if rope_base is not None:
            raise ValueError("alibi_slopes: got slopes and a rope_base, expected one of the two")
