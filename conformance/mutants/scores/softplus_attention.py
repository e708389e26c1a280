"""Wrong kernels of softplus attention: wrong counts, early masks, stale sums, lost rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, altering, replacing, right, spoiling
from attnspec.reference.dense.attention import State
from attnspec.reference.scores import softplus_attention, softplus_attention_gradients

LSSA = right("softplus_attention.lssa")
LSSAR = right("softplus_attention.lssar")
LSSA_BACKWARD = softplus_attention.lssa_backward
LSSAR_BACKWARD = softplus_attention.lssar_backward
COUNTS = right("softplus_attention.visible_counts")
UNIT = right("softplus_attention.unit")
UNIT_BACKWARD = softplus_attention.unit_backward
LOGITS = right("softplus_attention.lssa_logits")
SCORES = right("softplus_attention.lssa_scores")
ROW_SUM = right("softplus_attention.row_sum")
WEIGHTS = right("softplus_attention.lssa_weights")
REWEIGHT = right("softplus_attention.reweight")
LOG_WEIGHTS = right("softplus_attention.log_weights")
ATTEND = right("softplus_attention.attend")
STEP = right("softplus_attention.step")
SCORES_GRADIENT = softplus_attention_gradients.scores_gradient
BLOCK = 8


def inside(function: Any, **changed: Any) -> Any:
    """`function` of the whole, with steps changed in the module that puts the stages together."""

    def mutant(*args: Any, **options: Any) -> Any:
        module = softplus_attention_gradients
        kept = {name: getattr(module, name) for name in changed}
        for name, step in changed.items():
            setattr(module, name, step)
        try:
            return function(*args, **options)
        finally:
            for name, step in kept.items():
                setattr(module, name, step)

    return mutant


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


def one_pass(q: Any, k: Any, v: Any, **options: Any) -> Any:
    """The second stage uses the sum of the keys of each half alone."""
    out = LSSAR(q, k, v, **options)
    cut = k.shape[-2] // 2
    if options.get("causal") or options.get("mask") is not None or cut < 1:
        return out
    first = LSSAR(q, k[..., :cut, :], v[..., :cut, :], **options)
    second = LSSAR(q, k[..., cut:, :], v[..., cut:, :], **options)
    return (first + second) / 2


def mask_of_first_entry(arguments: dict[str, Any]) -> None:
    mask = arguments["mask"]
    if isinstance(mask, np.ndarray) and mask.ndim == 3:
        arguments["mask"] = np.repeat(mask[:1], len(mask), axis=0)


def interleaved(q: Any, k: Any, v: Any, **options: Any) -> Any:
    out = LSSA(q, k, v, **options)
    order = np.arange(q.shape[-3]) % max(k.shape[-3], 1)
    return out if not k.shape[-3] else LSSA(q, k[..., order, :, :], v[..., order, :, :], **options)


def leaks(weights: np.ndarray, v: np.ndarray) -> np.ndarray:
    return weights @ np.repeat(v, weights.shape[-3] // v.shape[-3], axis=-3)


def straight_through(x: np.ndarray, dout: np.ndarray) -> np.ndarray:
    """The length of a vector is taken for a constant."""
    return dout / np.maximum(np.sqrt(np.sum(x * x, axis=-1, keepdims=True)), 1e-12)


def no_taken(rows: Any, da: Any, inner: Any, *rest: Any) -> Any:
    """What the first normaliser takes back is forgotten."""
    return SCORES_GRADIENT(rows, da, np.zeros_like(inner), *rest)


def forgets_the_oldest(result: Any) -> Any:
    out, state = result
    if state.k.shape[-2] > BLOCK:
        state = State(state.k[..., 1:, :], state.v[..., 1:, :])
    return out, state


def decoder_counts(arguments: dict[str, Any]) -> None:
    """The new tokens alone are counted: the cache is left out."""
    state = arguments["state"]
    arguments["state"] = State(state.k[..., :0, :], state.v[..., :0, :])


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
    mutant("attend", "leak", "poison", "values without weight are multiplied by 0", leaks),
    mutant("lssa", "index-counts", "agreement", "log i in place of log (i + 1)",
           inside(LSSA, visible_counts=counts_of_index)),
    mutant("lssa", "block-counts", "agreement", "N counts inside a block",
           inside(LSSA, visible_counts=block_counts)),
    mutant("lssa", "first-mask", "batch", "every entry uses the first entry's mask",
           altering(LSSA, mask_of_first_entry)),
    mutant("lssa", "interleaved", "heads", "query head h reads kv head h % kv_heads", interleaved),
    mutant("lssa", "leaking", "poison", "hidden values are multiplied by 0",
           replacing(LSSA, combine=leaks)),
    mutant("lssa", "length-gradient", "gradient", "the length is taken for a constant", LSSA,
           backward=inside(LSSA_BACKWARD, unit_backward=straight_through)),
    mutant("lssar", "one-pass", "agreement", "the second stage knows half of the sum", one_pass),
    mutant("lssar", "lssar-masked-before", "agreement", "masked by 0 before the map",
           inside(LSSAR, lssa_scores=masked_before)),
    mutant("lssar", "lssar-dead-nan", "agreement", "dead rows are NaN",
           inside(LSSAR, reweight=spoiling(REWEIGHT, dead_is_nan))),
    mutant("lssar", "nothing-taken", "gradient", "the first normaliser is not differentiated",
           LSSAR, backward=inside(LSSAR_BACKWARD, scores_gradient=no_taken)),
    mutant("step", "short-state", "stream", "the oldest token falls out of the state",
           spoiling(STEP, forgets_the_oldest)),
    mutant("step", "no-cache-counts", "agreement", "the cache is left out",
           altering(STEP, decoder_counts)),
)  # fmt: skip
