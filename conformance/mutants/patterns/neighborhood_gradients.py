"""Wrong gradients of neighborhood attention: other windows, other heads, tiles cut short."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import altering, replacing
from attnspec.conformance.mutants.patterns.neighborhood import ATTEND, MASK, TILE, mutant
from attnspec.reference.dense.attention import score
from attnspec.reference.dense.attention_gradient import attend_backward, sum_groups
from attnspec.reference.patterns import neighborhood
from attnspec.reference.primitives.softmax import softmax_lse

BACKWARD = neighborhood.na_backward


def symmetric_inverse(
    q: Any, k: Any, v: Any, shape: Any, kernel: Any, dout: Any, dlse: Any = None, **options: Any
) -> Any:
    """dk and dv gather from the queries in the key's own window."""
    dq, dk, _ = BACKWARD(q, k, v, shape, kernel, dout, dlse, **options)
    extra, scale = options.pop("extra", 0), options.pop("scale", None)
    mask = np.concatenate([MASK(shape, kernel, **options), np.ones((q.shape[-2], extra), bool)], 1)
    own = mask.copy()
    own[:, : q.shape[-2]] &= mask[:, : q.shape[-2]].T
    weights, _ = softmax_lse(score(q, k, scale=scale), mask)
    P = np.where(own, weights, 0).astype(weights.dtype)
    return dq, dk, sum_groups(np.swapaxes(P, -1, -2) @ dout, v.shape[-3])


def partial_tile_unchecked(
    q: Any, k: Any, v: Any, shape: Any, kernel: Any, dout: Any, dlse: Any = None, **options: Any
) -> Any:
    """The last tile of keys, if it is not whole, sums over queries that are not there."""
    dq, dk, dv = BACKWARD(q, k, v, shape, kernel, dout, dlse, **options)
    whole = q.shape[-2] // TILE * TILE
    dv[..., whole : q.shape[-2], :] = np.nan
    return dq, dk, dv


def no_lse_gradient(arguments: dict[str, Any]) -> None:
    arguments["dlse"] = None


def first_of_group(x: np.ndarray, heads: int) -> np.ndarray:
    return x[..., :: x.shape[-3] // heads, :, :]


MUTANTS = (
    mutant("symmetric-inverse", "gradient", "dv gathers from the key's own window", ATTEND,
           backward=symmetric_inverse),
    mutant("partial-tile", "gradient", "dv of a tile that is not whole is NaN", ATTEND,
           backward=partial_tile_unchecked),
    mutant("first-of-group", "gradient", "dk and dv are those of the first head of the group",
           ATTEND, backward=replacing(BACKWARD, dense=type("Dense", (), {
               "attend_backward": staticmethod(
                   replacing(attend_backward, sum_groups=first_of_group))}))),
    mutant("no-dlse", "gradient", "the gradient through lse is dropped", ATTEND,
           backward=altering(BACKWARD, no_lse_gradient)),
)  # fmt: skip
