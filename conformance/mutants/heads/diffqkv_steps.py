"""Wrong steps of DiffQKV attention: maps that are not looked at, hidden scores and values read."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import altering, right, spoiling
from attnspec.conformance.mutants.heads.diffqkv import BLOCK, leaks, of, padded_width

ATTEND = right("diffqkv.attend")
ROWS = right("diffqkv.softmax_rows")
SCORES = right("diffqkv.scores")


def contiguous(name: str, source: str) -> Any:
    """The map that follows from the counts, whichever was given."""

    def change(arguments: dict[str, Any]) -> None:
        given, sources = arguments[name], arguments[source].shape[-3]
        arguments[name] = np.arange(len(given)) * sources // len(given)

    return change


def default_scale_only(arguments: dict[str, Any]) -> None:
    arguments["scale"] = None


def without_top(s: np.ndarray, mask: np.ndarray | None = None) -> Any:
    """The largest score is not subtracted first."""
    _, lse = ROWS(s, mask)
    seen = np.ones_like(s, dtype=bool) if mask is None else np.broadcast_to(mask, s.shape)
    powers = np.where(seen, np.exp(np.where(seen, s, np.zeros_like(s))), np.zeros_like(s))
    total = np.sum(powers, axis=-1, keepdims=True)
    return powers / np.where(total == 0, np.ones_like(total), total), lse


def multiplied_by_mask(s: np.ndarray, mask: np.ndarray | None = None) -> Any:
    """Hidden scores are exponentiated and multiplied by 0."""
    P, lse = ROWS(s, mask)
    return P if mask is None else P + 0 * s, lse


def uniform_where_blind(s: np.ndarray, mask: np.ndarray | None = None) -> Any:
    """A row that sees nothing averages all keys, as after a finite fill."""
    P, lse = ROWS(s, mask)
    share = s.dtype.type(1 / max(s.shape[-1], 1))
    return np.where(np.isneginf(lse)[..., None], share, P), lse


def first_mask(arguments: dict[str, Any]) -> None:
    mask = arguments["mask"]
    if mask is not None and mask.ndim == 4:
        arguments["mask"] = np.repeat(mask[:1], len(mask), axis=0)


def base_two(result: Any) -> Any:
    P, lse = result
    return P, lse * lse.dtype.type(1 / np.log(2))


def whole_tiles(P: np.ndarray, v: np.ndarray, hv: np.ndarray) -> np.ndarray:
    """Keys after the last whole tile are skipped, where there is one."""
    out = ATTEND(P, v, hv)
    whole = P.shape[-1] // BLOCK * BLOCK
    return ATTEND(P[..., :whole], v[..., :whole, :], hv) if whole else out


def renormalised(P: np.ndarray, v: np.ndarray, hv: np.ndarray) -> np.ndarray:
    """Weights are divided by their sum, which is 1 of a softmax only."""
    mass = np.sum(P, axis=-1, keepdims=True)
    return ATTEND(P / np.where(mass == 0, np.ones_like(mass), mass), v, hv)


MUTANTS = (
    of("scores", "scores-by-counts", "agreement", "the key map is derived, not read",
       altering(SCORES, contiguous("hk", "k"))),
    of("scores", "scores-of-padding", "agreement", "the scale is that of the padded width",
       altering(SCORES, padded_width)),
    of("scores", "scores-default-scale", "agreement", "the scale is always 1/sqrt(d)",
       altering(SCORES, default_scale_only)),
    of("softmax_rows", "rows-without-top", "magnitude", "exponentials overflow", without_top),
    of("softmax_rows", "rows-leak", "poison", "hidden scores are multiplied by 0",
       multiplied_by_mask),
    of("softmax_rows", "rows-uniform", "agreement", "a row that sees nothing averages all keys",
       uniform_where_blind),
    of("softmax_rows", "rows-first-mask", "agreement", "every entry of the batch uses one mask",
       altering(ROWS, first_mask)),
    of("softmax_rows", "rows-base-two", "agreement", "lse is in base 2",
       spoiling(ROWS, base_two)),
    of("attend", "attend-by-counts", "agreement", "the value map is derived, not read",
       altering(ATTEND, contiguous("hv", "v"))),
    of("attend", "attend-leak", "poison", "values of weight 0 are multiplied by 0", leaks),
    of("attend", "attend-whole-tiles", "ragged", "keys after the last whole tile are skipped",
       whole_tiles),
    of("attend", "attend-renormalised", "linearity", "weights are renormalised",
       renormalised),
)  # fmt: skip
