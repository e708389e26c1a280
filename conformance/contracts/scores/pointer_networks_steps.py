"""Masks, targets and log-probabilities of pointer networks that belong together."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.case import Case
from attnspec.conformance.values import make_values
from attnspec.reference.primitives.softmax import log_softmax


def allowed_slots(rng: np.random.Generator, case: Case) -> np.ndarray:
    """bool (batch, slots) or (batch, steps, slots): padding at an end, or slots visited before."""
    batch, steps, slots = case.shape("batch steps slots")
    place, kind = np.arange(slots), rng.integers(0, 3)
    if kind == 2:
        seen = rng.random((batch, steps, slots)) < 0.6
        seen[..., 0] |= ~seen.any(axis=-1)
        return seen
    real = rng.integers(1, slots + 1, (batch, 1))
    return place < real if kind == 0 else place >= slots - real


def some_mask(rng: np.random.Generator, case: Case) -> np.ndarray | None:
    return None if rng.random() < 0.3 else allowed_slots(rng, case)


def real_steps(rng: np.random.Generator, case: Case) -> np.ndarray:
    """bool (batch, steps): at least one real step each, padding behind them or in between."""
    batch, steps = case.shape("batch steps")
    if rng.random() < 0.5:
        return np.arange(steps) < rng.integers(1, steps + 1, (batch, 1))
    real = rng.random((batch, steps)) < 0.6
    real[:, 0] |= ~real.any(axis=-1)
    return real


def some_steps(rng: np.random.Generator, case: Case) -> np.ndarray | None:
    return None if rng.random() < 0.3 else real_steps(rng, case)


def slots_pointed_at(rng: np.random.Generator, case: Case, mask: Any, real: Any) -> np.ndarray:
    """int (batch, steps): allowed slots at real steps, and what is no slot at padding."""
    batch, steps, slots = case.shape("batch steps slots")
    allowed = np.ones((batch, steps, slots), bool)
    if mask is not None:
        allowed &= mask if mask.ndim == 3 else mask[:, None, :]
    targets = np.argmax(np.where(allowed, rng.random(allowed.shape), -1), axis=-1)
    return targets if real is None else np.where(real, targets, rng.choice([-1, slots]))


def loss_targets(rng: np.random.Generator, case: Case) -> np.ndarray:
    real = some_steps(case.generator("target_mask"), case)
    return slots_pointed_at(rng, case, None, real)


def training_targets(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Targets that fit the mask and the real steps of the same case, where it has them."""
    given = case.options
    mask = allowed_slots(case.generator("mask"), case) if "mask" in given else None
    real = real_steps(case.generator("target_mask"), case) if "target_mask" in given else None
    return slots_pointed_at(rng, case, mask, real)


def log_probabilities(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Normalised, with -inf where some mask forbids."""
    scores = make_values(case.values, rng, case.shape("batch steps slots"), "query")
    mask = allowed_slots(rng, case)
    return log_softmax(scores, mask if mask.ndim == 3 else mask[:, None, :])


def logs_for_loss(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Log-probabilities that are -inf at some slots, none of them a target."""
    logp = make_values(case.values, rng, case.shape("batch steps slots"), "query") - 2.0
    targets = loss_targets(case.generator("targets"), case)
    is_target = np.arange(logp.shape[-1]) == targets[..., None]
    return np.where(~is_target & (rng.random(logp.shape) < 0.3), -np.inf, logp)
