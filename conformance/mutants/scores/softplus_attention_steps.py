"""Wrong steps of softplus attention: wrong counts and factors, early masks, lost rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, altering, right, spoiling
from attnspec.reference.scores import softplus_attention_steps

COUNTS = right("softplus_attention.visible_counts")
UNIT = right("softplus_attention.unit")
LOGITS = right("softplus_attention.lssa_logits")
SCORES = right("softplus_attention.lssa_scores")
ROW_SUM = right("softplus_attention.row_sum")
WEIGHTS = right("softplus_attention.lssa_weights")
REWEIGHT = right("softplus_attention.reweight")
LOG_WEIGHTS = right("softplus_attention.log_weights")
EXCESS = softplus_attention_steps.excess_of
BLOCK = 8


def counts_of_index(visible: Any, *args: Any, **options: Any) -> Any:
    """The row's own index, so that log 0 hides in row 0: too few by one."""
    return np.maximum(COUNTS(visible, *args, **options) - 1, 0)


def padded_counts(visible: Any, *args: Any, **options: Any) -> Any:
    """Hidden keys are counted as well."""
    n = COUNTS(visible, *args, **options)
    return np.full_like(n, visible.shape[-1]) if isinstance(visible, np.ndarray) else n


def block_counts(visible: Any, *args: Any, **options: Any) -> Any:
    """N counts inside a block of 8 keys."""
    return np.minimum(COUNTS(visible, *args, **options), BLOCK)


def no_offset(arguments: dict[str, Any]) -> None:
    arguments["offset"] = 0


def scaled_twice(q: Any, k: Any, n: Any, *, normalise_qk: bool = True) -> Any:
    """1/sqrt(d) on top of unit vectors."""
    x = LOGITS(q, k, n, normalise_qk=normalise_qk)
    return x / np.sqrt(q.dtype.type(q.shape[-1])) if normalise_qk else x


def raw_products(q: Any, k: Any, n: Any, *, normalise_qk: bool = True) -> Any:
    """Only the keys are made unit vectors."""
    x = LOGITS(q, k, n, normalise_qk=normalise_qk)
    return x * np.sqrt(np.sum(q * q, axis=-1, keepdims=True)) if normalise_qk else x


def width_of_all_heads(q: Any, k: Any, n: Any, *, normalise_qk: bool = True) -> Any:
    """The logarithm is that of the width of all heads together."""
    x = LOGITS(q, k, n, normalise_qk=normalise_qk)
    d = q.shape[-1]
    return x * q.dtype.type(np.log(d * q.shape[-3]) / np.log(d)) if d > 1 else x


def masked_before(logits: Any, mask: Any = None) -> Any:
    """Hidden logits are 0 before the map, and softplus(0) is not 0."""
    SCORES(logits, mask)
    return SCORES(logits if mask is None else np.where(mask, logits, np.zeros_like(logits)))


def overflowing(logits: Any, mask: Any = None) -> Any:
    """log(1 + exp(x)) as it stands."""
    scores = SCORES(logits, mask)
    with np.errstate(over="ignore", invalid="ignore"):
        plain = np.log(1 + np.exp(np.where(scores == 0, 0, logits)))
    return np.where(scores == 0, scores, plain).astype(logits.dtype)


def max_subtracted(logits: Any, mask: Any = None) -> Any:
    """The maximum is subtracted, as if the map were an exponential."""
    SCORES(logits, mask)
    if not logits.shape[-1]:
        return SCORES(logits, mask)
    top = np.max(logits if mask is None else np.where(mask, logits, -np.inf), axis=-1)
    top = np.where(np.isfinite(top), top, 0.0).astype(logits.dtype)[..., None]
    return SCORES(logits - top, mask)


def reads_hidden(logits: Any, mask: Any = None) -> Any:
    scores = SCORES(logits)
    return scores if mask is None else scores * SCORES(logits, mask).dtype.type(1) * mask


def half_the_sum(scores: Any) -> Any:
    """Keys after the first block are left out of the sum."""
    ROW_SUM(scores)
    return np.sum(scores[..., :BLOCK], axis=-1)


def no_eps(arguments: dict[str, Any]) -> None:
    arguments["eps"] = 0.0


def empty_is_nan(scores: Any, row_sum: Any, eps: float = 1e-8) -> Any:
    weights = WEIGHTS(scores, row_sum, eps)
    return np.where((row_sum == 0)[..., None] & (eps == 0), weights.dtype.type(np.nan), weights)


def always_offset(weights: Any, n: Any, p: Any = 15, eps: Any = 1e-8, warm: int = 3) -> Any:
    """The first rows have the offset too."""
    b, dead = REWEIGHT(weights, n, p, eps, warm)
    return (REWEIGHT(weights, n, p, eps, 1)[0], dead) if warm > 1 else (b, dead)


def offset_by_index(weights: Any, n: Any, p: Any = 15, eps: Any = 1e-8, warm: int = 3) -> Any:
    """The offset goes by the row's index, not by its count."""
    result = REWEIGHT(weights, n, p, eps, warm)
    rows = np.broadcast_to(n, (*weights.shape[:-3], weights.shape[-2]))
    index = np.broadcast_to(np.arange(rows.shape[-1]) + 1, rows.shape)
    swapped = np.where(index > warm, np.maximum(rows, warm + 1), np.minimum(rows, warm))
    return REWEIGHT(weights, swapped, p, eps, warm)[0], result[1]


def underflowing(weights: Any, n: Any, p: Any = 15, eps: Any = 1e-8, warm: int = 3) -> Any:
    """The eps is left as it is beside powers of excesses over the largest."""
    result = REWEIGHT(weights, n, p, eps, warm)
    return REWEIGHT(weights, n, p, 0.0, warm)[0], result[1]


def dead_is_nan(result: Any) -> Any:
    b, dead = result
    return np.where(dead[..., None], b.dtype.type(np.nan), b), dead


def light_is_dead(result: Any) -> Any:
    """A row whose weights sum to less than a half is called dead."""
    b, dead = result
    return b, dead | (np.sum(b, axis=-1) < 0.5)


def one_power_less(arguments: dict[str, Any]) -> None:
    if arguments["p"] == 15:
        arguments["p"] = 14


def tolerance_unused(arguments: dict[str, Any]) -> None:
    arguments["dead_tol"] = 0.0


def half_powers(weights: Any, n: Any, p: Any = 15, warm: int = 3, dead_tol: Any = 1e-6) -> Any:
    """Powers in 16 bits, where 0.3 to the power 15 is 0."""
    logs, dead = LOG_WEIGHTS(weights, n, p, warm, dead_tol)
    excess = np.maximum(EXCESS(weights, n, warm), 0).astype(np.float16)
    with np.errstate(over="ignore"):
        lost = excess ** np.float16(p) == 0
    return np.where(lost, -np.inf, logs).astype(logs.dtype), dead


def leaks(weights: np.ndarray, v: np.ndarray) -> np.ndarray:
    return weights @ np.repeat(v, weights.shape[-3] // v.shape[-3], axis=-3)


def straight_through(x: np.ndarray, dout: np.ndarray) -> np.ndarray:
    """The length of a vector is taken for a constant."""
    return dout / np.maximum(np.sqrt(np.sum(x * x, axis=-1, keepdims=True)), 1e-12)


def mutant(operation: str, name: str, law: str, bug: str, call: Any, **rest: Any) -> Mutant:
    return Mutant(
        f"softplus_attention.{name}", f"softplus_attention.{operation}", law, bug, call, **rest
    )


MUTANTS = (
    mutant("visible_counts", "index", "agreement", "the row's index in place of its count",
           counts_of_index),
    mutant("visible_counts", "padding-counts", "agreement", "hidden keys are counted",
           padded_counts),
    mutant("visible_counts", "no-cache", "agreement", "keys before the first query are left out",
           altering(COUNTS, no_offset)),
    mutant("unit", "not-square", "agreement", "divided by the sum of absolute values",
           lambda x: UNIT(x) * (np.sqrt(np.sum(x * x, -1, keepdims=True)) / np.maximum(
               np.sum(np.abs(x), -1, keepdims=True), x.dtype.type(1e-12)))),
    mutant("unit", "straight-through", "gradient", "the length is taken for a constant", UNIT,
           backward=straight_through),
    mutant("lssa_logits", "scaled-twice", "agreement", "1/sqrt(d) on top of unit vectors",
           scaled_twice),
    mutant("lssa_logits", "raw-queries", "agreement", "queries are not made unit vectors",
           raw_products),
    mutant("lssa_logits", "all-heads", "agreement", "the width is that of all heads together",
           width_of_all_heads),
    mutant("lssa_scores", "masked-before", "agreement", "masked by 0 before the map",
           masked_before),
    mutant("lssa_scores", "overflow", "magnitude", "exp overflows", overflowing),
    mutant("lssa_scores", "max-subtracted", "agreement", "the maximum is subtracted",
           max_subtracted),
    mutant("lssa_scores", "reads-hidden", "poison", "hidden scores are multiplied by 0",
           reads_hidden),
    mutant("row_sum", "first-block", "agreement", "only the first block is summed", half_the_sum),
    mutant("lssa_weights", "no-eps", "agreement", "eps is left out", altering(WEIGHTS, no_eps)),
    mutant("lssa_weights", "empty-nan", "agreement", "0 / 0 in a row without mass", empty_is_nan),
    mutant("reweight", "always-offset", "agreement", "warm rows have an offset", always_offset),
    mutant("reweight", "offset-by-index", "agreement", "the offset goes by the row's index",
           offset_by_index),
    mutant("reweight", "eps-lost", "agreement", "eps vanishes beside rescaled powers",
           underflowing),
    mutant("reweight", "dead-nan", "agreement", "dead rows are 0 / 0",
           spoiling(REWEIGHT, dead_is_nan)),
    mutant("reweight", "light-dead", "agreement", "rows of little mass are called dead",
           spoiling(REWEIGHT, light_is_dead)),
    mutant("log_weights", "one-power-less", "agreement", "the power is p - 1",
           altering(LOG_WEIGHTS, one_power_less)),
    mutant("log_weights", "no-tolerance", "agreement", "dead_tol is not used",
           altering(LOG_WEIGHTS, tolerance_unused)),
    mutant("log_weights", "half-powers", "agreement", "powers underflow in 16 bits", half_powers),
    mutant("attend", "leak", "poison", "values without weight are multiplied by 0", leaks),
)  # fmt: skip
