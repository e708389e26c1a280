"""Wrong kernels of neighborhood attention in two products, of its permutation and of its merge."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import altering, replacing, right, spoiling
from attnspec.conformance.mutants.patterns.neighborhood import of
from attnspec.reference.conventions import check_size
from attnspec.reference.patterns import neighborhood_unfused
from attnspec.reference.patterns.neighborhood_windows import token_order

QK = right("neighborhood.na_qk")
AV = right("neighborhood.na_av")
PERMUTE = right("neighborhood.token_permute")
UNPERMUTE = right("neighborhood.token_unpermute")
MERGE = right("neighborhood.merge_attentions")
SPREAD = neighborhood_unfused._over_tokens


def no_scale(arguments: dict[str, Any]) -> None:
    if arguments["scale"] is None:
        arguments["scale"] = 1.0


def reads_behind_the_end(x: np.ndarray, index: np.ndarray, inside: np.ndarray) -> np.ndarray:
    return SPREAD(x, index, np.ones_like(inside))


def window_backwards(result: np.ndarray) -> np.ndarray:
    return result[..., ::-1]


def zero_behind_the_end(result: np.ndarray) -> np.ndarray:
    return np.where(np.isneginf(result), np.zeros_like(result), result)


def strided_runs(x: np.ndarray, shape: Any, dil: Any) -> Any:
    """The groups in the order of the last axis's residues first."""
    permuted, shapes = PERMUTE(x, shape, dil)
    cuts = np.cumsum(np.prod(shapes, axis=1))[:-1]
    groups = np.split(permuted, cuts, axis=-2)[::-1]
    return np.concatenate(groups, axis=-2), shapes[::-1].copy()


def permuted_again(x: np.ndarray, shape: Any, dil: Any) -> np.ndarray:
    UNPERMUTE(x, shape, dil)
    check_size("x", x.shape[-2], x.shape[-2], "tokens")
    return x[..., token_order(shape, dil)[0], :]


def plain_average(outs: Any, lses: Any) -> Any:
    _, lse = MERGE(outs, lses)
    return sum(outs[1:], outs[0]) / outs[0].dtype.type(len(outs)), lse


def lse_of_largest(outs: Any, lses: Any) -> Any:
    out, _ = MERGE(outs, lses)
    return out, np.max(np.stack(lses), axis=0)


MUTANTS = (
    of("na_qk", "no-scale", "agreement", "scores are not scaled", altering(QK, no_scale)),
    of("na_qk", "window-backwards", "agreement", "window entries come last to first",
       spoiling(QK, window_backwards)),
    of("na_qk", "zero-behind-the-end", "agreement", "scores behind a causal end are 0",
       spoiling(QK, zero_behind_the_end)),
    of("na_av", "reads-behind-the-end", "agreement", "weights behind a causal end are read",
       replacing(AV, _over_tokens=reads_behind_the_end)),
    of("token_permute", "groups-backwards", "agreement", "the dilation groups come last to first",
       strided_runs),
    of("token_unpermute", "permuted-again", "agreement", "the inverse is the permutation itself",
       permuted_again),
    of("merge_attentions", "plain-average", "agreement", "parts count alike, whatever their lse",
       plain_average),
    of("merge_attentions", "lse-of-largest", "agreement", "the merged lse is the largest one",
       lse_of_largest),
)  # fmt: skip
