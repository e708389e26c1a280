"""Pooling along the token axis: by blocks, and with a sliding kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from attnspec.reference.conventions import check_choice, check_integer

REDUCTIONS: dict[str, Callable[..., Any]] = {"max": np.max, "min": np.min, "avg": np.mean}


def pool_blocks(x: np.ndarray, block: int, kinds: Sequence[str]) -> np.ndarray:
    """Pool `x` (..., tokens, d) over blocks of tokens: (..., ceil(tokens/block), len(kinds) * d).

    `kinds` names reductions ("max", "min", "avg"), concatenated along channels in the order
    given. A ragged last block pools over the tokens it has.

    >>> pool_blocks(np.array([[1.0], [5.0], [4.0]]), 2, ["avg", "max"])
    array([[3., 5.],
           [4., 4.]])
    """
    check_integer("block", block, least=1)
    for kind in kinds:
        check_choice("kinds", kind, tuple(REDUCTIONS))
    tokens, d = x.shape[-2:]
    pooled = [
        np.concatenate(
            [REDUCTIONS[kind](x[..., start : start + block, :], axis=-2) for kind in kinds], axis=-1
        )
        for start in range(0, tokens, block)
    ]
    if not pooled:
        return np.zeros_like(x, shape=(*x.shape[:-2], 0, len(kinds) * d))
    return np.stack(pooled, axis=-2)


def pool_1d(x: np.ndarray, width: int, kind: str) -> np.ndarray:
    """Sliding pool of `x` (..., n) with stride 1 and odd `width`, same length.

    "avg" divides by `width` everywhere (zeros beyond the ends are counted); "max" looks at the
    entries that exist.

    >>> pool_1d(np.array([3.0, 0.0, 0.0]), 3, "avg")
    array([1., 1., 0.])
    >>> pool_1d(np.array([3.0, 0.0, 0.0]), 3, "max")
    array([3., 3., 0.])
    """
    check_integer("width", width, least=1)
    if width % 2 == 0:
        raise ValueError(f"width: got {width}, expected an odd number")
    check_choice("kind", kind, ("avg", "max"))
    n, half = x.shape[-1], width // 2
    pooled = np.empty_like(x)
    for j in range(n):
        seen = x[..., max(0, j - half) : j + half + 1]
        pooled[..., j] = np.sum(seen, axis=-1) / width if kind == "avg" else np.max(seen, axis=-1)
    return pooled
