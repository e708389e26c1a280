"""SeerAttention's self-distillation: the clauses S9, S10 and S16 of `seer_attention`.

Full attention tells, beside its output, the largest weight inside each pair of blocks; the gate
learns to predict these, row by row, and nothing else of the model is trained. The authors do so for
Llama 3.1 8B on half a billion tokens in texts of 64k, with a learning rate of 0.001 that warms up
in 20 steps and falls as a cosine.
"""

from __future__ import annotations

import numpy as np

from attnspec.reference.conventions import (
    check_array,
    check_attention_inputs,
    check_integer,
    check_size,
)
from attnspec.reference.dense.attention import combine, score, visible
from attnspec.reference.primitives.softmax import log_softmax, softmax


def attend_with_block_max(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, b: int, *, scale: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """S9: the causal attention output (..., heads, T, dv) and A (..., heads, nb, nb), its largest
    weight in each pair of blocks of b tokens.

    q (..., heads, T, d), k (..., kv_heads, T, d), v (..., kv_heads, T, dv), q and k rotated.

    >>> x = np.zeros((1, 4, 2))
    >>> attend_with_block_max(x, x, x, 2)[1].round(3)
    array([[[1.   , 0.   ],
            [0.333, 0.333]]])
    """
    check_attention_inputs(q, k, v)
    check_size("q", q.shape[-2], k.shape[-2], "tokens, as in k")
    check_integer("b", b, least=1)
    T = q.shape[-2]
    P = softmax(score(q, k, scale=scale), visible(T, T, causal=True))
    nb = -(-T // b)
    A = np.zeros_like(P, shape=(*P.shape[:-2], nb, nb))
    for R in range(nb):
        for C in range(R + 1):
            pair = P[..., R * b : (R + 1) * b, C * b : (C + 1) * b]
            A[..., R, C] = np.max(pair, axis=(-1, -2))
    return combine(P, v), A


def normalise_gt(A: np.ndarray) -> np.ndarray:
    """S9: GT, shaped as A (..., nb, nb): each row divided by its sum.

    >>> normalise_gt(np.array([[1.0, 0.0], [0.5, 1.5]]))
    array([[1.  , 0.  ],
           [0.25, 0.75]])
    """
    check_array("A", A, ("nb", "nb"))
    total = np.sum(A, axis=-1, keepdims=True)
    return A / np.where(total == 0, 1.0, total)


def distill_loss(G: np.ndarray, GT: np.ndarray) -> np.floating:
    """S10: the loss of one layer, a scalar, for scores G and target GT, both (..., nb, nb).

    >>> G = np.log(np.array([[1.0, 1e-9], [0.25, 0.75]]))
    >>> float(distill_loss(G, np.array([[1.0, 0.0], [0.25, 0.75]])).round(6))
    0.0
    """
    first = _first_row(G, GT)
    target = GT[..., first:, :]
    positive = target > 0
    log_gate = np.where(positive, log_softmax(G[..., first:, :]), 0.0)
    return np.mean(target * (np.log(np.where(positive, target, 1.0)) - log_gate))


def distill_loss_backward(
    G: np.ndarray, GT: np.ndarray, dloss: float | np.floating | np.ndarray
) -> np.ndarray:
    """S10: dG, shaped as G; GT is a constant.

    >>> distill_loss_backward(np.zeros((2, 2)), np.array([[1.0, 0.0], [0.0, 1.0]]), 4.0)
    array([[-0.5,  0.5],
           [ 0.5, -0.5]])
    """
    first = _first_row(G, GT)
    target = GT[..., first:, :]
    mass = np.sum(target, axis=-1, keepdims=True)
    dG = np.zeros_like(G)
    dG[..., first:, :] = dloss * (softmax(G[..., first:, :]) * mass - target) / target.size
    return dG


def decode_target(
    q: np.ndarray, k: np.ndarray, b: int, *, scale: float | None = None
) -> np.ndarray:
    """S16: training target (..., kv_heads, T, nb) of the decode gate, from the rotated q (...,
    heads, T, d) and k (..., kv_heads, T, d).

    >>> x = np.zeros((1, 3, 2))
    >>> decode_target(x, x, 2).round(3)
    array([[[1. , 0. ],
            [1. , 0. ],
            [0.5, 0.5]]])
    """
    check_attention_inputs(q, k, k)
    check_size("q", q.shape[-2], k.shape[-2], "tokens, as in k")
    check_integer("b", b, least=1)
    T, kv_heads = q.shape[-2], k.shape[-3]
    P = softmax(score(q, k, scale=scale), visible(T, T, causal=True))
    group = q.shape[-3] // kv_heads
    grouped = np.max(P.reshape(*P.shape[:-3], kv_heads, group, T, T), axis=-3)
    if T == 0:
        return grouped
    best = [np.max(grouped[..., start : start + b], axis=-1) for start in range(0, T, b)]
    A = np.stack(best, axis=-1)
    return A / (np.sum(A, axis=-1, keepdims=True) + 1e-9)


def _first_row(G: np.ndarray, GT: np.ndarray) -> int:
    """S10: the first block row that counts, after a check of the arguments."""
    check_array("G", G, ("nb", "nb"))
    check_array("GT", GT, ("nb", "nb"))
    if G.shape != GT.shape or G.size == 0:
        raise ValueError(f"GT: got shape {GT.shape}, expected {G.shape}, as G, and not empty")
    return G.shape[-2] // 4
