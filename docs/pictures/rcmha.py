"""RCMHA: what reaches a query, through the filters and through the memory, and what it costs."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.scores.rcmha import (
    depthwise_causal_conv,
    memory_mask,
    relative_scores,
    relative_shift,
)
from pictures import Ink, grid, panels

CAPTION = (
    "Three tokens of memory before a segment of five. Left: a filter of three taps mixes each row "
    "with the two before; that of k begins at the memory, that of q anew at the segment (orange). "
    "Middle: products of the queries with the table, distances 0 and 3 in orange. Right: shifted, "
    "each distance lies on its diagonal, and all queries see the memory."
)
T, M = 5, 3


def draw(ink: Ink) -> Any:
    S = M + T
    carried, restarted = (reach(tokens) for tokens in (S, T))
    mixed = np.where(carried, 1.0, 0.0)
    mixed[M:, M:] = np.where(restarted, 2.0, mixed[M:, M:])

    row = np.arange(S + T) - S
    marked = np.where(np.isin(row, (0, -3)), 2.0, 1.0)
    products = np.broadcast_to(marked, (T, S + T))
    shifted = relative_shift(products)
    table = np.concatenate([marked[:, None, None], np.ones((S - T, 1, 1))])
    scores = relative_scores(np.ones((1, T, 1)), table, 0 * table[..., 0], M)[0]
    assert np.array_equal(scores, shifted)
    seen = np.where(memory_mask(T, M), shifted, 0.0)

    figure, (left, middle, right) = panels(3, height=2.6)
    shades = ink.palette(ink.first, ink.second)
    grid(left, mixed, shades, ink, "filters", x="token before", y="token after", top=2)
    grid(middle, products, shades, ink, "q R' + b", x="row of the table", y="query", top=2)
    grid(right, seen, shades, ink, "shifted and masked", x="key", y="query", top=2)
    return figure


def reach(tokens: int) -> np.ndarray:
    """bool (tokens, tokens): which rows a filter of three taps mixes."""
    impulses = np.eye(tokens)[None]
    ones, zeros = np.ones((tokens, 3)), np.zeros(tokens)
    mixed: np.ndarray = depthwise_causal_conv(impulses, ones, zeros)[0][0] > 0
    return mixed
