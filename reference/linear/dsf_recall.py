"""Multi-query associative recall, the task of `dsf`. Clause S17 is that of `dsf`."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.conventions import check_array, check_integer, check_size

IGNORED = -100
"""The label of a position that is not asked."""
POWER = 0.01
"""Exponent of the law that draws slots: near ones first."""


def mqar_batch(
    rng: np.random.Generator,
    V: int,
    L: int,
    P: int,
    n_examples: int,
    random_fill: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """S17: inputs and labels, int64 (n_examples, L), of vocabulary V with P pairs; 4 P <= L < V.

    >>> inputs, labels = mqar_batch(np.random.default_rng(0), 64, 16, 2, 3)
    >>> inputs.shape, np.sum(labels != -100, axis=1)
    ((3, 16), array([2, 2, 2]))
    """
    check_recall(V, L, P, n_examples)
    if not isinstance(rng, np.random.Generator):
        raise TypeError(f"rng: got {type(rng).__name__}, expected numpy.random.Generator")
    chances = slot_chances(L, P)
    keys, values, slots = np.empty((3, n_examples, P), np.int64)
    for row in range(n_examples):
        keys[row] = 1 + rng.choice(V // 2 - 1, P, replace=False)
        values[row] = V // 2 + rng.choice(V - V // 2, P, replace=False)
        slots[row] = rng.choice(len(chances), P, replace=False, p=chances)
    fill = rng.integers(0, V, (n_examples, L)) if random_fill else None
    return mqar_sequences(keys, values, slots, L, fill)


def mqar_sequences(
    keys: np.ndarray,
    values: np.ndarray,
    slots: np.ndarray,
    L: int,
    fill: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """S17: inputs and labels, int64 (n, L), of keys, values and slots (n, P); fill (n, L) replaces
    the fillers 0.

    >>> one = np.ones((1, 1), int)
    >>> inputs, labels = mqar_sequences(3 * one, 7 * one, one, 6)
    >>> inputs, labels
    (array([[3, 7, 0, 0, 3, 0]]), array([[-100, -100, -100, -100,    7, -100]]))
    """
    check_array("keys", keys, ("n", "P"), dtype="int")
    for name, x in (("values", values), ("slots", slots)):
        check_array(name, x, ("n", "P"), dtype="int")
        if x.shape != keys.shape:
            raise ValueError(f"{name}: got shape {x.shape}, expected {keys.shape}")
    check_size("keys", keys.ndim, 2, "axes")
    n, P = keys.shape
    check_integer("L", L, least=4 * P)
    space = (L - 2 * P) // 2
    if np.any(slots < 0) or np.any(slots >= space):
        raise ValueError(f"slots: got a slot outside 0..{space - 1}, expected one of these")
    inputs = np.zeros((n, L), np.int64)
    if fill is not None:
        check_array("fill", fill, ("n", "L"), dtype="int")
        if fill.shape != inputs.shape:
            raise ValueError(f"fill: got shape {fill.shape}, expected {inputs.shape}")
        inputs = fill.astype(np.int64)
    labels = np.full((n, L), IGNORED, np.int64)
    inputs[:, 0 : 2 * P : 2], inputs[:, 1 : 2 * P : 2] = keys, values
    asked = 2 * P + 2 * slots
    np.put_along_axis(inputs, asked, keys, axis=1)
    np.put_along_axis(labels, asked, values, axis=1)
    return inputs, labels


def slot_chances(L: int, P: int) -> np.ndarray:
    """S17: the probability of each slot.

    >>> np.round(slot_chances(8, 1), 3)
    array([0.543, 0.274, 0.183])
    """
    weights = np.arange(1, (L - 2 * P) // 2 + 1) ** (POWER - 1)
    return np.asarray(weights / weights.sum())


def mqar_accuracy(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """S17: the share of labels (..., L) where the largest logit (..., L, V) is.

    An array of no axes in the dtype of the logits; NaN if nothing is labelled (ours).

    >>> mqar_accuracy(np.eye(3), np.array([0, 2, -100]))
    array(0.5)
    """
    check_array("logits", logits, ("L", "V"))
    check_array("labels", labels, ("L",), dtype="int")
    if labels.shape != logits.shape[:-1]:
        raise ValueError(f"labels: got shape {labels.shape}, expected {logits.shape[:-1]}")
    if logits.shape[-1] < 1:
        raise ValueError("logits: got 0 tokens in the vocabulary, expected 1 or more")
    asked = labels != IGNORED
    right = asked & (np.argmax(logits, axis=-1) == labels)
    share = np.sum(right) / np.sum(asked) if np.any(asked) else np.nan
    return np.asarray(share, dtype=logits.dtype)


def check_recall(V: Any, L: Any, P: Any, n_examples: Any) -> None:
    """S17, K14: the sizes of a task fit one another.

    >>> check_recall(64, 16, 5, 1)
    Traceback (most recent call last):
    ValueError: L: got 16, expected an integer >= 20
    """
    check_integer("P", P, least=1)
    check_integer("L", L, least=4 * P)
    if L % 2:
        raise ValueError(f"L: got {L}, expected an even number")
    check_integer("V", V, least=L + 1)
    check_integer("n_examples", n_examples, least=0)
