"""Wrong kernels of StreamingLLM, continued: sinks that are lost, doubled or scaled."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, altering, replacing, right, spoiling
from attnspec.conformance.mutants.dense.attention import leaks_masked_values
from attnspec.reference.cache.streaming_llm_sinks import (
    attend_with_sink_logit_backward,
    softmax1_backward,
    softmax_with_sink,
)
from attnspec.reference.primitives.softmax import softmax_lse

SOFTMAX1 = right("streaming_llm.softmax1")
ATTEND = right("streaming_llm.attend_with_sink_logit")
BACKWARD = attend_with_sink_logit_backward


def plain_one(x: np.ndarray, *, axis: int = -1) -> np.ndarray:
    """Adds 1, and not exp(-m), to the sum of exp(x - m)."""
    SOFTMAX1(x, axis=axis)
    top = np.max(x, axis=axis, keepdims=True, initial=0.0)
    weights = np.exp(x - top)
    return weights / (1 + np.sum(weights, axis=axis, keepdims=True))


def maximum_without_sink(x: np.ndarray, *, axis: int = -1) -> np.ndarray:
    SOFTMAX1(x, axis=axis)
    top = np.max(x, axis=axis, keepdims=True, initial=-np.inf)
    with np.errstate(all="ignore"):
        weights = np.exp(x - top)
        return weights / (np.exp(-top) + np.sum(weights, axis=axis, keepdims=True))


def no_maximum(x: np.ndarray, *, axis: int = -1) -> np.ndarray:
    SOFTMAX1(x, axis=axis)
    with np.errstate(all="ignore"):
        weights = np.exp(x)
        return weights / (1 + np.sum(weights, axis=axis, keepdims=True))


def last_axis(arguments: dict[str, Any]) -> None:
    if isinstance(arguments["axis"], int) and abs(arguments["axis"]) < 3:
        arguments["axis"] = -1


def zero_sink(arguments: dict[str, Any]) -> None:
    arguments["s_h"] = np.zeros_like(arguments["s_h"])


def scaled_sink(arguments: dict[str, Any]) -> None:
    d = arguments["q"].shape[-1]
    arguments["s_h"] = (arguments["s_h"] / np.sqrt(d)).astype(arguments["s_h"].dtype)


def one_sink_a_group(arguments: dict[str, Any]) -> None:
    s_h, kv_heads = arguments["s_h"], arguments["k"].shape[-3]
    arguments["s_h"] = np.repeat(s_h[:: len(s_h) // kv_heads], len(s_h) // kv_heads)


def lse_without_sink(scores: Any, s_h: Any, mask: Any = None) -> Any:
    weights, sink, _ = softmax_with_sink(scores, s_h, mask)
    return weights, sink, softmax_lse(scores, mask)[1]


def empty_row_forgets_sink(scores: Any, s_h: Any, mask: Any = None) -> Any:
    """A row that sees no key has lse -inf, as without a sink."""
    weights, sink, lse = softmax_with_sink(scores, s_h, mask)
    empty = np.isneginf(softmax_lse(scores, mask)[1])
    return weights, sink, np.where(empty, -np.inf, lse).astype(lse.dtype)


def sink_sets_the_maximum(scores: Any, s_h: Any, mask: Any = None) -> Any:
    """The running maximum starts at the sink: -inf - (-inf) where there is none."""
    weights, sink, lse = softmax_with_sink(scores, s_h, mask)
    with np.errstate(invalid="ignore"):
        nothing = (s_h - s_h)[:, None]
    return weights + nothing[..., None], sink, lse


def sink_is_first_key(scores: Any, s_h: Any, mask: Any = None) -> Any:
    """The sink's weight goes to key 0, which has a value."""
    weights, sink, lse = softmax_with_sink(scores, s_h, mask)
    weights = weights.copy()
    weights[..., :1] += sink[..., None]
    return weights, sink, lse


def masked_without_sink(scores: Any, s_h: Any, mask: Any = None) -> Any:
    if mask is not None and mask.ndim > 2:
        s_h = np.full_like(s_h, -np.inf)
    return softmax_with_sink(scores, s_h, mask)


def forget_row_term(weights: np.ndarray, dweights: np.ndarray) -> np.ndarray:
    return weights * dweights


def negated_sink(gradients: Any) -> Any:
    *others, ds = gradients
    return (*others, -ds)


def sink_of_last_entry(arguments: dict[str, Any]) -> None:
    """The sum over the batch keeps its last term only; q, k and v are left alone."""
    arguments["dout"] = np.concatenate([0 * arguments["dout"][:-1], arguments["dout"][-1:]], axis=0)


def sink_gradient_unsummed(*args: Any, **rest: Any) -> Any:
    dq, dk, dv, _ = BACKWARD(*args, **rest)
    return dq, dk, dv, altering(BACKWARD, sink_of_last_entry)(*args, **rest)[3]


def no_lse_gradient(arguments: dict[str, Any]) -> None:
    arguments["dlse"] = None


def mutant(operation: str, name: str, law: str, bug: str, call: Any, **rest: Any) -> Mutant:
    return Mutant(f"streaming_llm.{name}", f"streaming_llm.{operation}", law, bug, call, **rest)


def attend(name: str, law: str, bug: str, call: Any = ATTEND, **rest: Any) -> Mutant:
    return mutant("attend_with_sink_logit", name, law, bug, call, **rest)


MUTANTS = (
    mutant("softmax1", "plain-one", "agreement", "1 is not rescaled by the maximum", plain_one),
    mutant("softmax1", "maximum-without-sink", "agreement",
           "the maximum leaves out the sink: NaN where all is hidden", maximum_without_sink),
    mutant("softmax1", "no-maximum", "magnitude", "exp without its maximum overflows", no_maximum),
    mutant("softmax1", "last-axis", "agreement", "the axis is always the last",
           altering(SOFTMAX1, last_axis)),
    mutant("softmax1", "no-row-term", "gradient", "the gradient lacks its row term", SOFTMAX1,
           backward=replacing(softmax1_backward, softmax_backward=forget_row_term)),
    attend("zero-sink", "agreement", "the sink's logit is taken to be 0",
           altering(ATTEND, zero_sink)),
    attend("scaled-sink", "agreement", "the sink's logit is scaled like a score",
           altering(ATTEND, scaled_sink)),
    attend("sink-a-group", "heads", "the query heads of a group share a sink",
           altering(ATTEND, one_sink_a_group)),
    attend("lse-without-sink", "agreement", "lse leaves out the sink",
           replacing(ATTEND, softmax_with_sink=lse_without_sink)),
    attend("empty-row", "lengths", "lse is -inf in a row that sees the sink only",
           replacing(ATTEND, softmax_with_sink=empty_row_forgets_sink)),
    attend("sink-as-maximum", "split", "a sink of -inf makes the row NaN",
           replacing(ATTEND, softmax_with_sink=sink_sets_the_maximum)),
    attend("sink-as-key", "permutation", "the sink's weight goes to the first key",
           replacing(ATTEND, softmax_with_sink=sink_is_first_key)),
    attend("mask-drops-sink", "neutral", "with a mask the sink is forgotten",
           replacing(ATTEND, softmax_with_sink=masked_without_sink)),
    attend("leak", "poison", "hidden values are multiplied by 0 instead of skipped",
           replacing(ATTEND, combine=leaks_masked_values)),
    attend("sink-sign", "gradient", "the sink's gradient has the wrong sign",
           backward=spoiling(BACKWARD, negated_sink)),
    attend("sink-of-one-entry", "gradient", "the sink's gradient is not summed over the batch",
           backward=sink_gradient_unsummed),
    attend("no-dlse", "gradient", "the gradient through lse is dropped",
           backward=altering(BACKWARD, no_lse_gradient)),
)  # fmt: skip
