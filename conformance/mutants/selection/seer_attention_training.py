"""Wrong kernels of SeerAttention's self-distillation."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, replacing, right, spoiling
from attnspec.reference.dense.attention import score
from attnspec.reference.primitives.softmax import softmax
from attnspec.reference.selection import seer_attention_training as training

FUSED = right("seer_attention.attend_with_block_max")
NORMALISE = right("seer_attention.normalise_gt")
LOSS = right("seer_attention.distill_loss")
TARGET = right("seer_attention.decode_target")
BACKWARD = training.distill_loss_backward


def averaged(q: np.ndarray, k: np.ndarray, v: np.ndarray, b: int, **options: Any) -> Any:
    """The mean weight of a pair of blocks, not the largest."""
    out, A = FUSED(q, k, v, b, **options)
    _, P = FUSED(q, k, v, 1, **options)
    nb, T = A.shape[-1], P.shape[-1]
    mean = np.zeros_like(A)
    for R in range(nb):
        for C in range(R + 1):
            pair = P[..., R * b : min((R + 1) * b, T), C * b : min((C + 1) * b, T)]
            mean[..., R, C] = pair.mean(axis=(-1, -2))
    return out, mean


def last_row_wins(q: np.ndarray, k: np.ndarray, v: np.ndarray, b: int, **options: Any) -> Any:
    """The weights of a block's last query alone."""
    out, A = FUSED(q, k, v, b, **options)
    _, P = FUSED(q, k, v, 1, **options)
    T = P.shape[-1]
    for R in range(A.shape[-1]):
        row = P[..., min((R + 1) * b, T) - 1, :]
        for C in range(R + 1):
            A[..., R, C] = row[..., C * b : (C + 1) * b].max(axis=-1)
    return out, A


def running_normaliser(q: np.ndarray, k: np.ndarray, v: np.ndarray, b: int,
                       **options: Any) -> Any:  # fmt: skip
    """Each weight is divided by the sum over the blocks so far, not by that of the whole row."""
    out, A = FUSED(q, k, v, b, **options)
    _, P = FUSED(q, k, v, 1, **options)
    for C in range(A.shape[-1]):
        so_far = P[..., : (C + 1) * b].sum(axis=-1, keepdims=True)
        column = P[..., C * b : (C + 1) * b] / np.maximum(so_far, np.finfo(P.dtype).tiny)
        for R in range(C, A.shape[-1]):
            A[..., R, C] = column[..., R * b : (R + 1) * b, :].max(axis=(-1, -2))
    return out, A


def largest_logit(q: np.ndarray, k: np.ndarray, v: np.ndarray, b: int, **options: Any) -> Any:
    """The weight of the pair with the largest logit: rows are compared before they are divided."""
    out, A = FUSED(q, k, v, b, **options)
    _, P = FUSED(q, k, v, 1, **options)
    T = P.shape[-1]
    logits = np.where(np.tri(T, dtype=bool), score(q, k, **options), -np.inf)
    for R in range(A.shape[-1]):
        for C in range(R + 1):
            place = (..., slice(R * b, (R + 1) * b), slice(C * b, (C + 1) * b))
            z, p = (x[place].reshape(*x.shape[:-2], -1) for x in (logits, P))
            best = np.argmax(z, axis=-1)[..., None]
            A[..., R, C] = np.take_along_axis(p, best, axis=-1)[..., 0]
    return out, A


def sees_one_ahead(q_tokens: int, k_tokens: int, *, causal: bool) -> np.ndarray:
    return np.tri(q_tokens, k_tokens, 1, dtype=bool)


def sixteen_bits(result: Any) -> Any:
    out, A = result
    return out, A.astype(np.float16).astype(A.dtype)


def nan_rows(A: np.ndarray) -> np.ndarray:
    NORMALISE(A)
    with np.errstate(invalid="ignore"):
        return A / A.sum(axis=-1, keepdims=True)


def by_the_largest(A: np.ndarray) -> np.ndarray:
    NORMALISE(A)
    largest = A.max(axis=-1, keepdims=True, initial=0)
    return A / np.where(largest == 0, 1, largest).astype(A.dtype)


def a_row_mean(G: np.ndarray, GT: np.ndarray) -> Any:
    """The mean over rows of the sum of each."""
    return LOSS(G, GT) * G.dtype.type(G.shape[-1])


def all_rows(G: np.ndarray, GT: np.ndarray) -> int:
    """The first quarter counts as well."""
    first_row(G, GT)
    return 0


def rounded_up(G: np.ndarray, GT: np.ndarray) -> int:
    first_row(G, GT)
    return -(-G.shape[-2] // 4) if G.shape[-2] > 1 else 0


def zero_log_zero(G: np.ndarray, GT: np.ndarray) -> Any:
    """0 log 0 is NaN."""
    loss = LOSS(G, GT)
    used = GT[..., first_row(G, GT) :, :]
    return loss + loss.dtype.type(np.nan if np.any(used == 0) else 0)


def without_mass(G: np.ndarray, GT: np.ndarray, dloss: Any) -> np.ndarray:
    """Every row of the target is taken to sum to one."""
    dG = BACKWARD(G, GT, dloss)
    first = first_row(G, GT)
    empty = GT[..., first:, :].sum(axis=-1, keepdims=True) == 0
    full = dloss * softmax(G[..., first:, :]) / GT[..., first:, :].size
    dG[..., first:, :] = np.where(empty, full, dG[..., first:, :])
    return dG


def unit_upstream(G: np.ndarray, GT: np.ndarray, dloss: Any) -> np.ndarray:
    return BACKWARD(G, GT, np.ones_like(dloss))


def summed_group(q: np.ndarray, k: np.ndarray, b: int, **options: Any) -> np.ndarray:
    """Only the first head of a group speaks for it."""
    TARGET(q, k, b, **options)
    return TARGET(q[..., :: q.shape[-3] // k.shape[-3], :, :], k, b, **options)


def pairs_of_blocks(q: np.ndarray, k: np.ndarray, b: int, **options: Any) -> np.ndarray:
    """The largest weight of all queries up to this one."""
    return np.maximum.accumulate(TARGET(q, k, b, **options), axis=-2)


# A name that mutants replace while they run is kept here as it is.
first_row = training._first_row


def mutant(name: str, operation: str, law: str, bug: str, call: Any, **rest: Any) -> Mutant:
    return Mutant(f"seer_attention.{name}", f"seer_attention.{operation}", law, bug, call, **rest)


MUTANTS = (
    mutant("mean-weight", "attend_with_block_max", "agreement", "the mean, not the largest",
           averaged),
    mutant("last-query", "attend_with_block_max", "agreement", "a block's last query alone",
           last_row_wins),
    mutant("running-normaliser", "attend_with_block_max", "agreement",
           "weights are divided by a running sum", running_normaliser),
    mutant("largest-logit", "attend_with_block_max", "agreement",
           "logits are compared across rows, not weights", largest_logit),
    mutant("one-token-ahead", "attend_with_block_max", "prefix", "a query sees the next token",
           replacing(FUSED, visible=sees_one_ahead)),
    mutant("16-bit-maxima", "attend_with_block_max", "agreement", "maxima are kept in 16 bits",
           spoiling(FUSED, sixteen_bits)),
    mutant("nan-target", "normalise_gt", "agreement", "a row of zeros is NaN", nan_rows),
    mutant("by-the-largest", "normalise_gt", "agreement", "rows are divided by their largest",
           by_the_largest),
    mutant("row-mean", "distill_loss", "agreement", "the mean is over rows, not elements",
           a_row_mean),
    mutant("all-rows", "distill_loss", "agreement", "the first quarter of rows counts",
           replacing(LOSS, _first_row=all_rows)),
    mutant("quarter-rounded-up", "distill_loss", "agreement", "a quarter is rounded up",
           replacing(LOSS, _first_row=rounded_up)),
    mutant("0-log-0", "distill_loss", "agreement", "0 log 0 is NaN", zero_log_zero),
    mutant("without-mass", "distill_loss", "gradient", "rows of the target sum to one", LOSS,
           backward=without_mass),
    mutant("unit-upstream", "distill_loss", "gradient", "the upstream gradient is taken to be 1",
           LOSS, backward=unit_upstream),
    mutant("gradient-of-all-rows", "distill_loss", "gradient", "the first quarter is trained",
           LOSS, backward=replacing(BACKWARD, _first_row=all_rows)),
    mutant("first-speaks", "decode_target", "heads", "the first head of a group speaks for it",
           summed_group),
    mutant("running-maximum", "decode_target", "agreement", "maxima run on from query to query",
           pairs_of_blocks),
)  # fmt: skip
