"""Wrong kernels of softplus attention: stale sums, early masks, hidden keys, lost gradients."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import altering, replacing, right, spoiling
from attnspec.conformance.mutants.scores.softplus_attention_steps import (
    BLOCK,
    REWEIGHT,
    SCORES,
    block_counts,
    counts_of_index,
    dead_is_nan,
    leaks,
    masked_before,
    mutant,
    offset_by_index,
    straight_through,
)
from attnspec.reference.dense.attention import State
from attnspec.reference.scores import softplus_attention, softplus_attention_gradients

LSSA = right("softplus_attention.lssa")
LSSAR = right("softplus_attention.lssar")
LSSA_BACKWARD = softplus_attention.lssa_backward
LSSAR_BACKWARD = softplus_attention.lssar_backward
STEP = right("softplus_attention.step")
SCORES_GRADIENT = softplus_attention_gradients.scores_gradient


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


def hidden_in_sum(q: Any, k: Any, v: Any, **options: Any) -> Any:
    """The scores of hidden keys stay in the row's sum."""
    out = LSSA(q, k, v, **options)
    causal, mask = options.get("causal", False), options.get("mask")
    eps, normalise_qk = options.get("eps", 1e-8), options.get("normalise_qk", True)
    rows = softplus_attention_gradients.first_stage(q, k, v, causal, mask, eps, normalise_qk)
    seen = np.sum(rows.scores, axis=-1, keepdims=True) + eps
    every = np.sum(SCORES(rows.logits), axis=-1, keepdims=True) + eps
    return (out * seen / np.where(every > 0, every, 1)).astype(out.dtype)


def no_taken(rows: Any, da: Any, inner: Any, *rest: Any) -> Any:
    """What the first normaliser takes back is forgotten."""
    return SCORES_GRADIENT(rows, da, np.zeros_like(inner), *rest)


def nan_where_clipped(
    q: Any, k: Any, v: Any, dout: Any, *, p: Any = 15, causal: bool = False, mask: Any = None,
    eps: Any = 1e-8, warm: int = 3, normalise_qk: bool = True, eps_mode: str = "additive",
    dead_tol: Any = 1e-6,
) -> Any:  # fmt: skip
    """The gradient of p log r, which is 0 / 0 where r is clipped to 0."""
    second = {"p": p, "warm": warm, "eps_mode": eps_mode, "dead_tol": dead_tol}
    first = {"causal": causal, "mask": mask, "eps": eps, "normalise_qk": normalise_qk}
    dq, dk, dv = LSSAR_BACKWARD(q, k, v, dout, **first, **second)
    rows = softplus_attention_gradients.first_stage(q, k, v, **first)
    sharpened = softplus_attention_gradients.second_stage(rows, eps=eps, **second)
    clipped = np.any(rows.seen & (sharpened == 0), axis=-1)
    return np.where(clipped[..., None], dq.dtype.type(np.nan), dq), dk, dv


def forgets_the_oldest(result: Any) -> Any:
    out, state = result
    if state.k.shape[-2] > BLOCK:
        state = State(state.k[..., 1:, :], state.v[..., 1:, :])
    return out, state


def decoder_counts(arguments: dict[str, Any]) -> None:
    """The new tokens alone are counted: the cache is left out."""
    state = arguments["state"]
    arguments["state"] = State(state.k[..., :0, :], state.v[..., :0, :])


MUTANTS = (
    mutant("lssa", "index-counts", "agreement", "log i in place of log (i + 1)",
           inside(LSSA, visible_counts=counts_of_index)),
    mutant("lssa", "block-counts", "agreement", "N counts inside a block",
           inside(LSSA, visible_counts=block_counts)),
    mutant("lssa", "first-mask", "batch", "every entry uses the first entry's mask",
           altering(LSSA, mask_of_first_entry)),
    mutant("lssa", "interleaved", "heads", "query head h reads kv head h % kv_heads", interleaved),
    mutant("lssa", "hidden-in-sum", "agreement", "hidden keys stay in the sum", hidden_in_sum),
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
    mutant("lssar", "clipped-nan", "gradient", "clipped keys have the gradient of a logarithm",
           LSSAR, backward=nan_where_clipped),
    mutant("step", "short-state", "stream", "the oldest token falls out of the state",
           spoiling(STEP, forgets_the_oldest)),
    mutant("step", "no-cache-counts", "agreement", "the cache is left out",
           altering(STEP, decoder_counts)),
    mutant("step", "offset-of-row", "agreement", "a new token's offset goes by its row",
           inside(STEP, reweight=offset_by_index)),
)  # fmt: skip
