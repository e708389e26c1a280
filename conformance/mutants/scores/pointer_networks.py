"""Wrong kernels of pointer networks: scores, training and glimpses that miss their definition."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, altering, replacing, right, spoiling
from attnspec.conformance.mutants.dense.attention import BLOCK, leaks_masked_values
from attnspec.conformance.mutants.scores.pointer_networks_losses import padding_times_zero
from attnspec.reference.scores import pointer_networks
from attnspec.reference.scores.pointer_networks_glimpse import glimpse_backward
from attnspec.reference.scores.pointer_networks_gradients import (
    pointer_scores_backward,
)

SCORES = right("pointer_networks.pointer_scores")
TRAIN = right("pointer_networks.pointer_cross_entropy")
TRAIN_BACKWARD = pointer_networks.pointer_cross_entropy_backward
GLIMPSE = right("pointer_networks.glimpse")


def sum_of_tanh(
    e: Any, d: Any, W1: Any, W2: Any, v: Any, *, b1: Any = None, b2: Any = None
) -> np.ndarray:
    """v . (tanh(W1 e) + tanh(W2 d)): two terms that never meet."""
    SCORES(e, d, W1, W2, v, b1=b1, b2=b2)
    zero_e, zero_d = np.zeros_like(e), np.zeros_like(d)
    keys = SCORES(e, zero_d, W1, W2, v, b1=b1)
    return keys + SCORES(zero_e, d, W1, W2, v, b2=b2)


def scaled(scores: np.ndarray) -> np.ndarray:
    return scores / np.float32(np.sqrt(scores.shape[-1]))


def one_bias(arguments: dict[str, Any]) -> None:
    if arguments["b1"] is not None:
        arguments["b2"] = None


def low_precision(arguments: dict[str, Any]) -> None:
    """Operands of the projections are rounded to TF32."""
    for name in ("e", "d", "W1", "W2"):
        bits = np.ascontiguousarray(arguments[name]).view(np.uint32)
        rounded = (bits + 0x1000) & np.uint32(0xFFFFE000)
        arguments[name] = rounded.view(np.float32).reshape(np.shape(arguments[name]))


def rational_tanh(*args: Any, **biases: Any) -> np.ndarray:
    """An approximation of tanh that is right for small arguments only."""

    class Numbers:
        def __getattr__(self, name: str) -> Any:
            return getattr(np, name)

        @staticmethod
        def tanh(x: np.ndarray) -> np.ndarray:
            return x * (27 + x * x) / (27 + 9 * x * x)

    return replacing(SCORES, np=Numbers())(*args, **biases)


def last_slots_lost(scores: np.ndarray) -> np.ndarray:
    whole = scores.shape[-1] // BLOCK * BLOCK or scores.shape[-1]
    written = np.empty_like(scores)
    written[..., :whole] = scores[..., :whole]
    return written


def read_as_contiguous(arguments: dict[str, Any]) -> None:
    for name in ("e", "d"):
        x = arguments[name]
        strides = np.cumprod([x.itemsize, *x.shape[:0:-1]])[::-1]
        arguments[name] = np.lib.stride_tricks.as_strided(x, x.shape, strides)


def first_decoder(arguments: dict[str, Any]) -> None:
    d = arguments["d"]
    if isinstance(d, np.ndarray) and d.ndim == 3 and d.shape[:1] == arguments["e"].shape[:1]:
        arguments["d"] = np.repeat(d[:1], len(d), axis=0)


def clipped_v(arguments: dict[str, Any]) -> None:
    arguments["v"] = np.clip(arguments["v"], -1, 1)


def wide_v_taken(arguments: dict[str, Any]) -> None:
    v, W1 = arguments["v"], arguments["W1"]
    if isinstance(v, np.ndarray) and v.ndim and isinstance(W1, np.ndarray) and W1.ndim:
        arguments["v"] = v[: W1.shape[0]]


def bias_without_states(
    e: Any, d: Any, W1: Any, W2: Any, v: Any, dout: Any, **biases: Any
) -> tuple[np.ndarray, ...]:
    """The biases' gradients are taken at states of 0."""
    right_ones = pointer_scores_backward(e, d, W1, W2, v, dout, **biases)
    at_zero = pointer_scores_backward(0 * e, 0 * d, W1, W2, v, dout, **biases)
    return (*right_ones[:5], *at_zero[5:])


def swapped_weights(gradients: Any) -> Any:
    de, dd, dW1, dW2, *rest = gradients
    return (de, dd, dW2, dW1, *rest)


def unmasked(arguments: dict[str, Any]) -> None:
    if arguments["mask"] is not None:
        arguments["mask"] = np.ones_like(arguments["mask"])


def no_cross(arguments: dict[str, Any]) -> None:
    if arguments["e"].shape[-2] > arguments["d"].shape[-2]:
        raise ValueError("e: got more slots than steps, expected as many")


def unit_upstream(arguments: dict[str, Any]) -> None:
    arguments["dout"] = np.ones_like(arguments["dout"])


def states_averaged(e: Any, logp: Any, W1: Any, *, b1: Any = None) -> np.ndarray:
    """Averages W1 e without its bias."""
    GLIMPSE(e, logp, W1, b1=b1)
    return GLIMPSE(e, logp, W1)


def logs_as_weights(arguments: dict[str, Any]) -> None:
    with np.errstate(divide="ignore"):
        arguments["logp"] = arguments["logp"] * arguments["logp"].dtype.type(0.5)


def by_position(arguments: dict[str, Any]) -> None:
    """Later slots count for less."""
    logp = arguments["logp"]
    if isinstance(logp, np.ndarray) and logp.dtype.kind == "f":
        arguments["logp"] = (logp - 0.01 * np.arange(logp.shape[-1])).astype(logp.dtype)


def mutant(operation: str, name: str, law: str, bug: str, call: Any, **rest: Any) -> Mutant:
    full = f"pointer_networks.{operation}"
    return Mutant(f"pointer_networks.{name}", full, law, bug, call, **rest)


def scores(name: str, law: str, bug: str, call: Any = SCORES, **rest: Any) -> Mutant:
    return mutant("pointer_scores", name, law, bug, call, **rest)


def training(name: str, law: str, bug: str, call: Any = TRAIN, **rest: Any) -> Mutant:
    return mutant("pointer_cross_entropy", name, law, bug, call, **rest)


def glimpse(name: str, law: str, bug: str, call: Any = GLIMPSE, **rest: Any) -> Mutant:
    return mutant("glimpse", name, law, bug, call, **rest)


MUTANTS = (
    scores("sum-of-tanh", "agreement", "tanh is taken of each term, not of their sum", sum_of_tanh),
    scores("scaled", "agreement", "scores are scaled", spoiling(SCORES, scaled)),
    scores("one-bias", "agreement", "of two biases only the first is added",
           altering(SCORES, one_bias)),
    scores("tf32", "precision", "projections run in TF32", altering(SCORES, low_precision)),
    scores("rational-tanh", "magnitude", "tanh is approximated near 0 only", rational_tanh),
    scores("ragged-slots", "ragged", "the last slots are never written",
           spoiling(SCORES, last_slots_lost)),
    scores("contiguous", "layout", "strides are made up from the shape",
           altering(SCORES, read_as_contiguous)),
    scores("first-decoder", "batch", "every example is decoded with the first one's states",
           altering(SCORES, first_decoder)),
    scores("clipped-v", "linearity", "large entries of v are clipped",
           altering(SCORES, clipped_v)),
    scores("wide-v", "refusal", "a v of another width is cropped", altering(SCORES, wide_v_taken)),
    scores("bias-slope", "gradient", "the biases' gradients ignore the states",
           backward=bias_without_states),
    scores("swapped-weights", "gradient", "the gradients of W1 and W2 are exchanged",
           backward=spoiling(pointer_scores_backward, swapped_weights)),
    training("unmasked", "agreement", "the loss forgets the mask", altering(TRAIN, unmasked)),
    training("self-only", "cells", "more slots than steps are refused",
             altering(TRAIN, no_cross)),
    training("padding-steps", "poison", "padding steps are weighed by 0",
             replacing(TRAIN, pointer_loss=padding_times_zero)),
    training("unit-upstream", "gradient", "the loss is taken to be the last one",
             backward=altering(TRAIN_BACKWARD, unit_upstream)),
    glimpse("no-bias", "agreement", "the values leave out the bias", states_averaged),
    glimpse("half-logs", "agreement", "probabilities are not exp(logp)",
            altering(GLIMPSE, logs_as_weights)),
    glimpse("by-position", "permutation", "later slots weigh less",
            altering(GLIMPSE, by_position)),
    glimpse("leak", "poison", "states without weight are multiplied by 0",
            replacing(GLIMPSE, combine=leaks_masked_values)),
    glimpse("no-logp-gradient", "gradient", "the weights are taken to be constant",
            backward=spoiling(glimpse_backward, lambda g: (g[0], 0 * g[1], *g[2:]))),
)  # fmt: skip
