"""Wrong kernels of pointer networks, continued: masks and losses."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, altering, replacing, right
from attnspec.reference.primitives.softmax import log_softmax, softmax
from attnspec.reference.scores.pointer_networks_gradients import (
    pointer_log_probs_backward,
    pointer_loss_backward,
)
from attnspec.reference.scores.pointer_networks_inputs import allowed_slots, real_steps

LOG_PROBS = right("pointer_networks.pointer_log_probs")
LOSS = right("pointer_networks.pointer_loss")


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


def mutant(operation: str, name: str, law: str, bug: str, call: Any, **rest: Any) -> Mutant:
    full = f"pointer_networks.{operation}"
    return Mutant(f"pointer_networks.{name}", full, law, bug, call, **rest)


def log_probs(name: str, law: str, bug: str, call: Any = LOG_PROBS, **rest: Any) -> Mutant:
    return mutant("pointer_log_probs", name, law, bug, call, **rest)


def loss(name: str, law: str, bug: str, call: Any = LOSS, **rest: Any) -> Mutant:
    return mutant("pointer_loss", name, law, bug, call, **rest)


MUTANTS = (
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
)  # fmt: skip
