"""The judge of selections: by the scores they achieve, not by their indices."""

from __future__ import annotations

import numpy as np

from attnspec.conformance.contract import Ranking
from attnspec.conformance.violation import Violation
from attnspec.reference.primitives.top_k import top_k_mask


def judge_selection(
    name: str, got: np.ndarray, ranking: Ranking, tau: np.ndarray | float, strict: bool
) -> Violation | None:
    """Whether `got` selects what `ranking` asks for; the violation if not.

    `got` holds indices (..., k), sorted ascending, or a bool mask (..., n). `tau` is the score
    stage's budget: scores closer than that are interchangeable unless `strict` asks for rule K6.
    """
    scores = ranking.scores
    allowed, forced, extra = _masks(ranking)
    if got.dtype != bool:
        problem = _check_indices(name, got, scores.shape)
        if problem:
            return problem
        chosen = np.zeros(scores.shape, bool)
        np.put_along_axis(chosen, got.astype(np.int64), True, axis=-1)
    elif got.shape != scores.shape:
        return Violation(name, f"shape {got.shape}, expected {scores.shape}")
    else:
        chosen = got
    if np.any(chosen & ~allowed):
        return _at(name, "chose a forbidden entry", chosen & ~allowed)
    if np.any((forced | extra) & ~chosen):
        return _at(name, "left out a forced entry", (forced | extra) & ~chosen)
    if ranking.threshold is not None:
        return _judge_threshold(name, chosen, ranking, tau, ranking.threshold)
    among = chosen & ~extra
    missing = _wanted(ranking) - among.sum(axis=-1)
    wrong = (missing < 0) | (missing > extra.sum(axis=-1))
    if np.any(wrong):
        return _at(name, "wrong number chosen", wrong)
    if strict:
        best = best_selection(ranking) | extra
        if np.any(best != chosen):
            return _at(name, "ties not broken by the lower index (K6)", best != chosen)
        return None
    for row in np.ndindex(scores.shape[:-1]):
        spare = np.where(extra[row], scores[row], -np.inf)
        among[row] |= top_k_mask(spare, int(missing[row])) & extra[row]
    free = allowed & ~forced
    low = np.where(among & free, scores + tau, np.inf).min(axis=-1, initial=np.inf)
    high = np.where(free & ~among, scores - tau, -np.inf).max(axis=-1, initial=-np.inf)
    if np.any(high > low):
        return _at(name, "an unchosen entry beats a chosen one", high > low)
    return None if scores.shape[-1] or not got.size else Violation(name, "chose from nothing")


def best_selection(ranking: Ranking) -> np.ndarray:
    """bool, shaped as the scores: the forced entries and the best others, without the extra."""
    allowed, forced, _ = _masks(ranking)
    free = allowed & ~forced
    preferred = np.where(free, ranking.scores, -np.inf)
    best, wanted = forced.copy(), _wanted(ranking)
    for row in np.ndindex(best.shape[:-1]):
        count = int(wanted[row] - forced[row].sum())
        best[row] |= top_k_mask(preferred[row], count) & free[row]
    return best


def close_calls(ranking: Ranking, tau: np.ndarray | float) -> np.ndarray:
    """bool (...): rows on which scores within the budget `tau` allow another selection."""
    allowed, forced, _ = _masks(ranking)
    scores, free = ranking.scores, allowed & ~forced
    if ranking.threshold is not None:
        low, high = between(ranking, tau)
        open_entries = free & (low <= ranking.threshold) & (ranking.threshold <= high)
        return np.any(open_entries, axis=-1)
    best = best_selection(ranking)
    low = np.where(best & free, scores - tau, np.inf).min(axis=-1, initial=np.inf)
    high = np.where(free & ~best, scores + tau, -np.inf).max(axis=-1, initial=-np.inf)
    return high >= low


def _judge_threshold(
    name: str, chosen: np.ndarray, ranking: Ranking, tau: np.ndarray | float, threshold: float
) -> Violation | None:
    allowed, forced, extra = _masks(ranking)
    free = allowed & ~forced & ~extra
    low, high = between(ranking, tau)
    above, below = free & (low > threshold), free & (high <= threshold)
    if np.any(above & ~chosen):
        return _at(name, "left out an entry above the threshold", above & ~chosen)
    if np.any(below & chosen):
        return _at(name, "chose an entry not above the threshold", below & chosen)
    return None


def between(ranking: Ranking, tau: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
    """The least and the largest that each score, or its softmax, can be within the budget.

    A weight is a logistic function of how far its logit is above the logsumexp of the others. That
    distance is off by the errors of both, which are independent.
    """
    scores = ranking.scores
    if not ranking.softmax:
        return scores - tau, scores + tau
    own = np.eye(scores.shape[-1], dtype=bool)
    others = np.where(own, -np.inf, scores[..., None, :])
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        lse = np.logaddexp.reduce(others, axis=-1, initial=-np.inf)
        shares = np.exp(others - np.where(np.isfinite(lse), lse, 0.0)[..., None])
        off = np.broadcast_to(tau, scores.shape)
        error = np.sqrt(off**2 + np.sum((shares * off[..., None, :]) ** 2, axis=-1))
        above = scores - lse
        return 1.0 / (1.0 + np.exp(error - above)), 1.0 / (1.0 + np.exp(-error - above))


def _masks(ranking: Ranking) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which entries are allowed, forced and extra."""
    shape = ranking.scores.shape
    allowed = np.ones(shape, bool) if ranking.allowed is None else ranking.allowed
    forced = np.zeros(shape, bool) if ranking.forced is None else ranking.forced
    extra = np.zeros(shape, bool) if ranking.extra is None else ranking.extra
    return allowed, forced, extra


def _wanted(ranking: Ranking) -> np.ndarray:
    """How many entries of each row are chosen, the forced ones included."""
    allowed, forced, _ = _masks(ranking)
    return np.maximum(np.minimum(ranking.k, allowed.sum(axis=-1)), forced.sum(axis=-1))


def _check_indices(name: str, got: np.ndarray, shape: tuple[int, ...]) -> Violation | None:
    if got.shape[:-1] != shape[:-1] or got.dtype.kind not in "iu":
        return Violation(name, f"{got.dtype} of shape {got.shape} for scores of shape {shape}")
    if np.any((got < 0) | (got >= shape[-1])):
        return _at(name, "index out of range", (got < 0) | (got >= shape[-1]))
    steps = np.diff(got.astype(np.int64), axis=-1)
    if np.any(steps == 0):
        return _at(name, "the same entry chosen twice", steps == 0)
    if np.any(steps < 0):
        return _at(name, "not sorted ascending (K6)", steps < 0)
    return None


def _at(name: str, message: str, wrong: np.ndarray) -> Violation:
    return Violation(name, message, tuple(int(i) for i in np.argwhere(wrong)[0]))
