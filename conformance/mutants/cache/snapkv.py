"""Wrong kernels of SnapKV: prompts of which the wrong part is kept."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, altering, replacing, right, spoiling
from attnspec.conformance.mutants.dense.attention import (
    eleven_bits,
    read_as_contiguous,
    visible_top_left,
    wrap_32_bits,
)
from attnspec.reference.cache.snapkv import State
from attnspec.reference.cache.snapkv_selection import (
    pool_scores,
    prefix_scores,
    reduce_groups,
    select,
    window_attention,
)
from attnspec.reference.dense.attention import attend

PREFILL = right("snapkv.prefill")


def prefix_only(q: Any, k: Any, w: int = 32, mask: Any = None) -> np.ndarray:
    """The softmax leaves out the window's own keys."""
    A = window_attention(q, k, w, mask).copy()
    total = A[..., : A.shape[-1] - w].sum(axis=-1, keepdims=True)
    return A / np.where(total == 0, 1, total).astype(A.dtype)


def without_padding(q: Any, k: Any, w: int = 32, mask: Any = None) -> np.ndarray:
    return window_attention(q, k, w)


def all_columns(A: np.ndarray, w: int = 32) -> np.ndarray:
    return np.concatenate([prefix_scores(A, w), A[..., -w:].sum(axis=-2)], axis=-1)


def pools_the_window(*args: Any, w: int = 32, **rest: Any) -> Any:
    """The pool reaches into the window, which is cut off afterwards."""

    def cut(s: np.ndarray, p: int = 5, mode: str = "avg") -> np.ndarray:
        return pool_scores(s, p, mode)[..., :-w]

    return replacing(PREFILL, prefix_scores=all_columns, pool_scores=cut)(*args, w=w, **rest)


def reduced_before_pooling(*args: Any, p: int = 5, pool: str = "avg", **rest: Any) -> Any:
    def late(m: np.ndarray, Hk: int, mode: str = "group_mean") -> np.ndarray:
        return pool_scores(reduce_groups(m, Hk, mode), p, pool)

    def not_yet(s: np.ndarray, p: int = 5, mode: str = "avg") -> np.ndarray:
        return s

    change = replacing(PREFILL, pool_scores=not_yet, reduce_groups=late)
    return change(*args, p=p, pool=pool, **rest)


def max_instead_of_mean(m: np.ndarray, Hk: int, mode: str = "group_mean") -> np.ndarray:
    return reduce_groups(m, Hk, "group_max" if mode == "group_mean" else mode)


def padding_competes(m: np.ndarray, n: int, mask: Any = None) -> np.ndarray:
    return select(m, n)


def window_beside_capacity(arguments: dict[str, Any]) -> None:
    if isinstance(arguments["C"], int) and arguments["w"] < arguments["C"]:
        arguments["C"] += arguments["w"]


def short_prompts_too(q: Any, k: Any, v: Any, *, w: int = 32, C: int = 2048, **options: Any) -> Any:
    """A prompt shorter than C is selected from as well, and repeated to the query heads."""
    result = PREFILL(q, k, v, w=w, C=C, **options)
    if w < k.shape[-2] < C:
        result = PREFILL(q, k, v, w=w, C=k.shape[-2], **options)
    return result


def slots_as_tokens(result: Any) -> Any:
    out, state = result
    return out, state._replace(seen=state.k.shape[-2])


def visible_padding(result: Any) -> Any:
    """Padding that fills a slot is given a position, and so is seen by what follows."""
    out, state = result
    return out, state._replace(pos=np.abs(state.pos))


def by_score(result: Any) -> Any:
    """Slots in another order than their positions'."""
    out, state = result
    return out, State(
        state.k[..., ::-1, :], state.v[..., ::-1, :], state.pos[..., ::-1], state.seen
    )


def not_causal(*args: Any, **options: Any) -> Any:
    return attend(*args, **{**options, "causal": False})


def aligned_top_left(q: Any, k: Any, v: Any, *, causal: bool, mask: Any) -> Any:
    return replacing(attend, visible=visible_top_left)(q, k, v, causal=causal, mask=mask)


def cut_prompt(q: Any, k: Any, v: Any, **options: Any) -> Any:
    """The prompt's output sees the compressed cache's rounding: a sum and a difference of C."""
    out, state = PREFILL(q, k, v, **options)
    slots = out.dtype.type(state.k.shape[-2])
    return (out - slots) + slots, state


def weighed_by_values(q: Any, k: Any, v: Any, **options: Any) -> Any:
    """Votes count more where the values are large."""

    def votes(A: np.ndarray, w: int = 32) -> np.ndarray:
        size = np.abs(v).sum(axis=-1)[..., : A.shape[-1] - w]
        return prefix_scores(A, w) * np.repeat(size, A.shape[-3] // size.shape[-2], axis=-2)

    return replacing(PREFILL, prefix_scores=votes)(q, k, v, **options)


def saturated(arguments: dict[str, Any]) -> None:
    arguments["v"] = np.clip(arguments["v"], -3, 3)


def leaking(q: Any, k: Any, v: Any, *, mask: Any = None, **options: Any) -> Any:
    """Padding values are multiplied by 0 instead of skipped."""
    out, state = PREFILL(q, k, v, mask=mask, **options)
    if mask is not None and q.ndim == 4:
        out = out + 0 * v.sum(axis=(-3, -2))[:, None, None, :]
    return out, state


def one_token_short(q: Any, k: Any, v: Any, *, mask: Any = None, **options: Any) -> Any:
    """With a mask, real keys are counted, but for the last one."""
    out, state = PREFILL(q, k, v, mask=mask, **options)
    if mask is not None:
        state = state._replace(seen=int(mask.sum(axis=-1).max()) - 1)
    return out, state


def right_padding_taken(q: Any, k: Any, v: Any, *, mask: Any = None, **options: Any) -> Any:
    if isinstance(mask, np.ndarray) and mask.dtype == bool and mask.shape[-1:] == k.shape[-2:-1]:
        mask = np.sort(mask, axis=-1)
    return PREFILL(q, k, v, mask=mask, **options)


def appended(q: Any, k: Any, v: Any, *, state: Any = None, **options: Any) -> Any:
    """A second prompt is appended to what is there."""
    return PREFILL(q, k, v, **options)


def mask_of_first_entry(arguments: dict[str, Any]) -> None:
    mask = arguments["mask"]
    if isinstance(mask, np.ndarray) and mask.dtype == bool and mask.ndim == 2:
        arguments["mask"] = np.repeat(mask[:1], len(mask), axis=0)


def mutant(operation: str, name: str, law: str, bug: str, call: Any) -> Mutant:
    return Mutant(f"snapkv.{name}", f"snapkv.{operation}", law, bug, call)


def prefill(name: str, law: str, bug: str, call: Any) -> Mutant:
    return mutant("prefill", name, law, bug, call)


MUTANTS = (
    prefill("prefix-softmax", "agreement", "the window's keys are not in the normaliser",
            replacing(PREFILL, window_attention=prefix_only)),
    prefill("votes-for-padding", "agreement", "the window's queries see padding",
            replacing(PREFILL, window_attention=without_padding)),
    prefill("pooled-window", "agreement", "the pool reaches into the window", pools_the_window),
    prefill("early-reduction", "lengths", "heads are reduced before a max pool",
            reduced_before_pooling),
    prefill("max-for-mean", "lengths", "group_mean takes the maximum",
            replacing(PREFILL, reduce_groups=max_instead_of_mean)),
    prefill("padding-competes", "agreement", "padding is selected before real keys",
            replacing(PREFILL, select=padding_competes)),
    prefill("window-on-top", "agreement", "C slots are kept beside the window",
            altering(PREFILL, window_beside_capacity)),
    prefill("short-prompts", "lengths", "prompts shorter than C are not left as they are",
            short_prompts_too),
    prefill("slots-as-tokens", "agreement", "the next position is the number of slots",
            spoiling(PREFILL, slots_as_tokens)),
    prefill("visible-padding", "agreement", "padding in a slot is not marked",
            spoiling(PREFILL, visible_padding)),
    prefill("score-order", "agreement", "slots are not in the order of positions",
            spoiling(PREFILL, by_score)),
    prefill("future", "prefix", "the prompt is not causal", replacing(PREFILL, attend=not_causal)),
    prefill("top-left", "lengths", "causal order is aligned at the top left",
            replacing(PREFILL, attend=aligned_top_left)),
    prefill("cut-prompt", "prompt", "the output is rounded differently for every capacity",
            cut_prompt),
    prefill("value-votes", "votes", "large values draw votes", weighed_by_values),
    prefill("saturated", "linearity", "large values are clipped", altering(PREFILL, saturated)),
    prefill("leak", "poison", "padding values are multiplied by 0", leaking),
    prefill("masked-count", "neutral", "with a mask one token too few is counted",
            one_token_short),
    prefill("right-padding", "cells", "padding on the right is taken for padding on the left",
            right_padding_taken),
    prefill("second-prompt", "refusal", "a second prompt is compressed too", appended),
    prefill("first-mask", "batch", "every sequence uses the padding of the first",
            altering(PREFILL, mask_of_first_entry)),
    prefill("contiguous", "layout", "strides are made up from the shape",
            altering(PREFILL, read_as_contiguous)),
    prefill("tf32", "precision", "float32 operands are rounded to TF32",
            replacing(PREFILL, attend=altering(attend, eleven_bits))),
    prefill("wrap-32", "far", "offsets are computed in 32 bits", altering(PREFILL, wrap_32_bits)),
)  # fmt: skip
