"""Multi-query associative recall, the task of `dsf`: whole batches at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnspec.fast.backend import check_integer

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
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """inputs and labels, int64 (n_examples, L) on the CPU, of vocabulary V with P pairs.

    The draws are distributed as the reference's, not equal to them: the P largest of random keys
    are a choice without replacement, and with the log of a weight added to a Gumbel number, a
    weighted one.
    """
    check_integer("P", P, least=1)
    check_integer("L", L, least=4 * P)
    if L % 2:
        raise ValueError(f"L: got {L}, expected an even number")
    check_integer("V", V, least=L + 1)
    check_integer("n_examples", n_examples, least=0)
    if not isinstance(rng, np.random.Generator):
        raise TypeError(f"rng: got {type(rng).__name__}, expected numpy.random.Generator")
    space = (L - 2 * P) // 2
    chances = (POWER - 1) * np.log(np.arange(1, space + 1))
    keys = 1 + _chosen(rng.random((n_examples, V // 2 - 1), np.float32), P)
    values = V // 2 + _chosen(rng.random((n_examples, V - V // 2), np.float32), P)
    slots = _chosen(chances + rng.gumbel(size=(n_examples, space)), P)
    fill = torch.from_numpy(rng.integers(0, V, (n_examples, L))) if random_fill else None
    pairs, bound, places = (torch.from_numpy(x) for x in (keys, values, slots))
    return mqar_sequences(pairs, bound, places, L, fill)


def mqar_sequences(
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    L: int,
    fill: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """inputs and labels, int64 (n, L), of keys, values and slots (n, P); fill (n, L) replaces the
    fillers 0. Slots are checked on the CPU only.
    """
    for name, x in (("keys", keys), ("values", values), ("slots", slots)):
        _check_whole(name, x)
        if x.shape != keys.shape or x.ndim != 2:
            raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected (n, P), as keys")
    n, P = keys.shape
    check_integer("L", L, least=4 * P)
    space = (L - 2 * P) // 2
    if not slots.is_cuda and bool(((slots < 0) | (slots >= space)).any()):
        raise ValueError(f"slots: got a slot outside 0..{space - 1}, expected one of these")
    if fill is None:
        inputs = torch.zeros(n, L, dtype=torch.int64, device=keys.device)
    else:
        _check_whole("fill", fill)
        if tuple(fill.shape) != (n, L):
            raise ValueError(f"fill: got shape {tuple(fill.shape)}, expected {(n, L)}")
        inputs = fill.to(torch.int64, copy=True)
    labels = torch.full_like(inputs, IGNORED)
    keys, values, slots = (x.to(torch.int64) for x in (keys, values, slots))
    inputs[:, 0 : 2 * P : 2], inputs[:, 1 : 2 * P : 2] = keys, values
    asked = 2 * P + 2 * slots
    return inputs.scatter_(1, asked, keys), labels.scatter_(1, asked, values)


def mqar_accuracy(logits: Tensor, labels: Tensor, *, backend: str | None = None) -> Tensor:
    """The share of labels (..., L) where the largest logit (..., L, V) is, of no axes."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits: got {type(logits).__name__}, expected torch.Tensor")
    if not logits.is_floating_point():
        raise TypeError(f"logits: got dtype {logits.dtype}, expected a float dtype")
    _check_whole("labels", labels)
    if logits.ndim < 2:
        raise ValueError(f"logits: got shape {tuple(logits.shape)}, expected (..., L, V)")
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels: got shape {tuple(labels.shape)}, expected {tuple(logits.shape[:-1])}"
        )
    if logits.shape[-1] < 1:
        raise ValueError("logits: got 0 tokens in the vocabulary, expected 1 or more")
    asked = labels != IGNORED
    right = asked & (logits.argmax(-1) == labels)
    return (right.sum().double() / asked.sum()).to(logits.dtype)


def _chosen(scores: np.ndarray, P: int) -> np.ndarray:
    """Places (n, P) of the largest scores (n, many), in random order if those are random."""
    many = scores.shape[1]
    if many > 4 * P:
        top = np.argpartition(scores, many - P, axis=1)[:, many - P :]
        order = np.argsort(-np.take_along_axis(scores, top, 1), axis=1)
        return np.take_along_axis(top, order, 1)
    return np.argsort(-scores, axis=1)[:, :P]


def _check_whole(name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, expected torch.Tensor")
    if x.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: got dtype {x.dtype}, expected an integer dtype")
