"""MoA: how long each head's window is, and which pairs of tokens that leaves.

The clauses are those of `moa`. A head's sizes are plain numbers, known before the model runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from attnspec.reference.conventions import check_integer, check_size

Sizes = Sequence[int] | np.ndarray
"""One integer a kv head."""


def span(alpha: float | np.ndarray, beta: float | np.ndarray, N: int) -> np.ndarray:
    """S1: int (...), the span of the rules `alpha`, `beta` (...) at length `N`, cut towards 0.

    >>> span(np.array([-1024.0, 100.5]), np.array([0.5, 0.0]), 4096)
    array([1024,  100])
    """
    check_integer("N", N, least=0)
    check_rules(alpha, beta)
    return np.trunc(np.asarray(alpha) + np.multiply(beta, float(N))).astype(np.int64)


def cache_sizes(
    alpha: float | np.ndarray,
    beta: float | np.ndarray,
    prompt: int,
    max_new: int,
    sink: int = 64,
    minimum: int = 128,
    split: int = 64,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S1, S2: C, s and c, int (...): the slots of each head, static and circular among them.

    `alpha` and `beta` (...) are rules, `prompt` and `max_new` tokens. ValueError if a cache of
    `minimum` slots would have no room beside `sink` static ones.

    >>> cache_sizes(np.array([0.0, 300.0]), np.array([1.0, 0.0]), 1000, 24)
    (array([1024,  320]), array([64, 64]), array([960, 256]))
    """
    for name, value, least in (
        ("prompt", prompt, 0),
        ("max_new", max_new, 0),
        ("sink", sink, 0),
        ("minimum", minimum, 1),
        ("split", split, 1),
    ):
        check_integer(name, value, least)
    least = -(-minimum // split) * split
    if sink >= least:
        raise ValueError(f"sink: got {sink}, expected less than the smallest cache, {least}")
    N = prompt + max_new
    wanted = np.maximum(np.minimum(span(alpha, beta, N), N), minimum)
    C = -(-wanted // split) * split
    s = np.minimum(C, sink)
    return C, s, C - s


def moa_token_mask(T: int, s: Sizes, c: Sizes) -> np.ndarray:
    """S3: bool (heads, T, T), True where token t sees token u.

    >>> moa_token_mask(5, [1], [2])[0].astype(int)
    array([[1, 0, 0, 0, 0],
           [1, 1, 0, 0, 0],
           [1, 1, 1, 0, 0],
           [1, 0, 1, 1, 0],
           [1, 0, 0, 1, 1]])
    """
    check_integer("T", T, least=0)
    static, local = (np.array(x)[:, None, None] for x in check_plan(s, c))
    t, u = np.arange(T)[:, None], np.arange(T)
    return (u <= t) & ((u < static) | (t - u < local))


def moa_block_mask(T: int, s: Sizes, c: Sizes, block: int = 64) -> np.ndarray:
    """S4: bool (heads, T, T), in blocks; `s` and `c` are multiples of `block`.

    >>> moa_block_mask(6, [2], [2], block=2)[0].astype(int)
    array([[1, 0, 0, 0, 0, 0],
           [1, 1, 0, 0, 0, 0],
           [1, 1, 1, 0, 0, 0],
           [1, 1, 1, 1, 0, 0],
           [1, 1, 0, 0, 1, 0],
           [1, 1, 0, 0, 1, 1]])
    """
    check_integer("T", T, least=0)
    plan = check_plan(s, c, block=block)
    static, local = (np.array(x)[:, None, None] // block for x in plan)
    t, u = np.arange(T)[:, None], np.arange(T)
    row, column = t // block, u // block
    return (u <= t) & ((column < static) | (column > row - local))


def check_rules(alpha: Any, beta: Any) -> None:
    """K14: `alpha` and `beta` are finite numbers, or arrays of the same shape."""
    for name, x in (("alpha", alpha), ("beta", beta)):
        if isinstance(x, bool) or np.asarray(x).dtype.kind not in "fiu":
            raise TypeError(f"{name}: got {x!r}, expected numbers")
        if not np.all(np.isfinite(x)):
            raise ValueError(f"{name}: got {x!r}, expected finite numbers")
    if np.shape(alpha) != np.shape(beta):
        raise ValueError(f"beta: got shape {np.shape(beta)}, expected {np.shape(alpha)}, as alpha")


def check_plan(
    s: Any, c: Any, heads: int | None = None, block: int = 1
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """K14: `s` >= 0 and `c` >= 1 as integers, one for each of the `heads`, in whole blocks."""
    check_integer("block", block, least=1)
    plan = []
    for name, x, least in (("s", s, 0), ("c", c, 1)):
        if not isinstance(x, (tuple, list, np.ndarray)) or np.ndim(x) != 1:
            raise TypeError(f"{name}: got {x!r}, expected one integer a kv head")
        for value in x:
            check_integer(name, value, least)
            if value % block:
                raise ValueError(f"{name}: got {value}, expected multiples of {block} (block)")
        plan.append(tuple(int(value) for value in x))
    check_size("c", len(plan[1]), len(plan[0]), "heads, as in s")
    if heads is not None:
        check_size("s", len(plan[0]), heads, "kv_heads, as in k")
    return plan[0], plan[1]
