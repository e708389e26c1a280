"""Wrong kernels of pointer networks: scores, masks and losses that miss their definition."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, altering, replacing, right, spoiling
from attnspec.conformance.mutants.dense.attention import BLOCK, leaks_masked_values
from attnspec.reference.primitives.softmax import log_softmax, softmax
from attnspec.reference.scores import pointer_networks
from attnspec.reference.scores.pointer_networks_glimpse import glimpse_backward
from attnspec.reference.scores.pointer_networks_gradients import (
    pointer_log_probs_backward,
    pointer_loss_backward,
    pointer_scores_backward,
)
from attnspec.reference.scores.pointer_networks_inputs import allowed_slots, real_steps

SCORES = right("pointer_networks.pointer_scores")
LOG_PROBS = right("pointer_networks.pointer_log_probs")
LOSS = right("pointer_networks.pointer_loss")
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
    if isinstance(arguments["v"], np.ndarray) and isinstance(arguments["W1"], np.ndarray):
        arguments["v"] = arguments["v"].reshape(-1)[: arguments["W1"].shape[0]]


def tanh_not_squared(*args: Any, **rest: Any) -> Any:
    """The slope of tanh is 1 - h instead of 1 - h^2: right at v's own gradient only."""
    grads = pointer_scores_backward(*args, **rest)
    zero = pointer_scores_backward(*(np.zeros_like(x) for x in args[:2]), *args[2:], **rest)
    return (*grads[:5], zero[5], zero[6])


def swapped_weights(gradients: Any) -> Any:
    de, dd, dW1, dW2, *rest = gradients
    return (de, dd, dW2, dW1, *rest)


def masked_after(scores: np.ndarray, mask: Any = None) -> np.ndarray:
    """The mask is applied to the probabilities, which are not normalised again."""
    logp = log_softmax(scores)
    return logp if mask is None else np.where(mask, logp, -np.inf).astype(logp.dtype)


def finite_fill(scores: np.ndarray, mask: Any = None) -> np.ndarray:
    if mask is not None:
        scores = np.where(mask, scores, scores.dtype.type(-1e4))
    return log_softmax(scores)


def clipped_log(scores: np.ndarray, mask: Any = None) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(softmax(scores, mask) + scores.dtype.type(1e-8))


def no_maximum(scores: np.ndarray, mask: Any = None) -> np.ndarray:
    hidden = scores if mask is None else np.where(mask, scores, -np.inf)
    with np.errstate(all="ignore"):
        return hidden - np.log(np.sum(np.exp(hidden), axis=-1, keepdims=True))


def added_mask(scores: np.ndarray, mask: Any = None) -> np.ndarray:
    """-inf is added, not written: NaN stays NaN."""
    if mask is not None:
        scores = scores + np.where(mask, 0, -np.inf).astype(scores.dtype)
    return log_softmax(scores)


def mask_of_first_step(arguments: dict[str, Any]) -> None:
    scores, mask = arguments["scores"], arguments["mask"]
    if isinstance(mask, np.ndarray) and mask.dtype == bool and mask.shape == np.shape(scores):
        arguments["mask"] = np.broadcast_to(mask[..., :1, :], mask.shape)


def end_is_padding(scores: np.ndarray, mask: np.ndarray | None) -> Any:
    """Slot 0, the end, may not be pointed at where there is anything else."""
    allowed = allowed_slots(scores, mask)
    if allowed is None:
        return None
    others = allowed & (np.arange(scores.shape[-1]) > 0)
    return np.where(others.any(axis=-1, keepdims=True), others, allowed)


def nowhere_is_uniform(scores: np.ndarray, mask: Any) -> np.ndarray:
    if isinstance(mask, np.ndarray) and mask.dtype == bool and not mask.any():
        mask = None
    return LOG_PROBS(scores, mask)


def forget_normaliser(scores: np.ndarray, mask: Any, dout: np.ndarray) -> np.ndarray:
    gradient = pointer_log_probs_backward(scores, mask, dout)
    allowed = allowed_slots(scores, mask)
    return np.where(True if allowed is None else allowed, gradient * 0 + dout, 0)


def mean_of_means(logp: np.ndarray, targets: np.ndarray, target_mask: Any) -> np.ndarray:
    real, mask = real_steps(logp, targets, target_mask)
    surprise = -np.take_along_axis(logp, real[..., None], axis=-1)[..., 0]
    each = np.where(mask, surprise, 0).sum(axis=-1) / mask.sum(axis=-1).astype(logp.dtype)
    return np.mean(each, dtype=logp.dtype)


def one_hot_product(logp: np.ndarray, targets: np.ndarray, target_mask: Any) -> np.ndarray:
    """Multiplies by a one-hot target: 0 times -inf."""
    real, mask = real_steps(logp, targets, target_mask)
    one_hot = (np.arange(logp.shape[-1]) == real[..., None]) & mask[..., None]
    with np.errstate(invalid="ignore"):
        return -np.sum(logp * one_hot, dtype=logp.dtype) / logp.dtype.type(np.count_nonzero(mask))


def padding_times_zero(logp: np.ndarray, targets: np.ndarray, target_mask: Any) -> np.ndarray:
    """Padding steps are read and weighed by 0."""
    real, mask = real_steps(logp, targets, target_mask)
    surprise = -np.take_along_axis(logp, real[..., None], axis=-1)[..., 0]
    with np.errstate(invalid="ignore"):
        return np.sum(surprise * mask, dtype=logp.dtype) / logp.dtype.type(mask.sum())


def padding_counts(logp: np.ndarray, targets: np.ndarray, target_mask: Any) -> np.ndarray:
    loss = LOSS(logp, targets, target_mask)
    if target_mask is None:
        return loss
    return loss * logp.dtype.type(target_mask.mean())


def ends_left_out(logp: np.ndarray, targets: np.ndarray, target_mask: Any) -> np.ndarray:
    """Steps whose target is the end are not counted."""
    real, mask = real_steps(logp, targets, target_mask)
    points = mask & (real > 0)
    return LOSS(logp, targets, points if points.any() else mask)


def targets_of_points(arguments: dict[str, Any]) -> None:
    """A target is read as a point's index, one below its slot."""
    targets = arguments["targets"]
    if isinstance(targets, np.ndarray) and targets.dtype.kind == "i":
        arguments["targets"] = np.where(targets > 0, targets - 1, targets)


def wrapped_targets(arguments: dict[str, Any]) -> None:
    targets, logp = arguments["targets"], arguments["logp"]
    if isinstance(targets, np.ndarray) and targets.dtype.kind == "i" and logp.shape[-1]:
        arguments["targets"] = targets % logp.shape[-1]


def sum_gradient(logp: Any, targets: Any, target_mask: Any, dout: Any) -> np.ndarray:
    _, mask = real_steps(logp, targets, target_mask)
    return pointer_loss_backward(logp, targets, target_mask, dout * np.count_nonzero(mask))


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


def log_probs(name: str, law: str, bug: str, call: Any = LOG_PROBS, **rest: Any) -> Mutant:
    return mutant("pointer_log_probs", name, law, bug, call, **rest)


def loss(name: str, law: str, bug: str, call: Any = LOSS, **rest: Any) -> Mutant:
    return mutant("pointer_loss", name, law, bug, call, **rest)


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
           backward=tanh_not_squared),
    scores("swapped-weights", "gradient", "the gradients of W1 and W2 are exchanged",
           backward=spoiling(pointer_scores_backward, swapped_weights)),
    log_probs("masked-after", "agreement", "the mask comes after the softmax",
              replacing(LOG_PROBS, log_softmax=masked_after)),
    log_probs("finite-fill", "agreement", "masked slots get a small probability",
              replacing(LOG_PROBS, log_softmax=finite_fill)),
    log_probs("clipped-log", "agreement", "1e-8 is added before the logarithm",
              replacing(LOG_PROBS, log_softmax=clipped_log)),
    log_probs("no-maximum", "magnitude", "exp without its maximum overflows",
              replacing(LOG_PROBS, log_softmax=no_maximum)),
    log_probs("added-mask", "poison", "a masked NaN spreads",
              replacing(LOG_PROBS, log_softmax=added_mask)),
    log_probs("first-mask", "lengths", "every step uses the mask of the first",
              altering(LOG_PROBS, mask_of_first_step)),
    log_probs("end-is-padding", "agreement", "the end is masked like padding",
              replacing(LOG_PROBS, allowed_slots=end_is_padding)),
    log_probs("nowhere", "refusal", "a step that may point nowhere points anywhere",
              nowhere_is_uniform),
    log_probs("no-normaliser", "gradient", "the gradient leaves out the normaliser",
              backward=forget_normaliser),
    loss("mean-of-means", "agreement", "each example counts the same, however long",
         mean_of_means),
    loss("one-hot", "agreement", "0 times -inf beside the target is NaN", one_hot_product),
    loss("padding-times-zero", "poison", "padding steps are weighed by 0", padding_times_zero),
    loss("padding-counts", "agreement", "the sum is divided by all steps", padding_counts),
    loss("no-ends", "agreement", "end steps are left out", ends_left_out),
    loss("point-indices", "agreement", "targets are off by the end's slot",
         altering(LOSS, targets_of_points)),
    loss("wrapped-targets", "refusal", "a target that is no slot wraps around",
         altering(LOSS, wrapped_targets)),
    loss("sum-gradient", "gradient", "the gradient is that of the sum", backward=sum_gradient),
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
