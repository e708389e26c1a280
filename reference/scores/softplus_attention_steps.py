"""The steps of softplus attention (S1-S8): counts, unit vectors, scores and their two stages."""

from __future__ import annotations

import math

import numpy as np

from attnspec.reference.conventions import (
    causal_mask,
    check_array,
    check_bool,
    check_integer,
    repeat_heads,
)
from attnspec.reference.dense.attention import combine
from attnspec.reference.scores.softplus_attention_checks import (
    check_broadcast,
    check_number,
    check_products,
    check_row_numbers,
    check_values,
)

SMALLEST_NORM = 1e-12


def visible_pairs(
    q_tokens: int, k_tokens: int, causal: bool, mask: np.ndarray | None
) -> np.ndarray:
    """S1: bool (..., q_tokens, k_tokens), True where the causal rule (K3) and the mask allow it."""
    seen: np.ndarray = np.ones((q_tokens, k_tokens), bool)
    if causal:
        seen = causal_mask(q_tokens, k_tokens)
    return seen if mask is None else seen & mask


def visible_counts(
    visible: bool | np.ndarray,
    q_tokens: int = 0,
    k_tokens: int = 0,
    offset: int | None = None,
) -> np.ndarray:
    """S1: how many keys each query sees, int (..., q_tokens).

    `visible` is True for the causal order, min(max(offset + i + 1, 0), k_tokens), where `offset`
    is the number of keys before the first query, k_tokens - q_tokens unless given; False for all
    k_tokens; or a bool mask (..., q_tokens, k_tokens), whose Trues are counted.

    >>> visible_counts(True, 2, 5)
    array([4, 5])
    >>> visible_counts(np.array([[True, False], [True, True]]))
    array([1, 2])
    """
    if isinstance(visible, np.ndarray):
        check_array("visible", visible, ("q_tokens", "k_tokens"), dtype="bool")
        return np.asarray(np.sum(visible, axis=-1, dtype=np.int64))
    if not isinstance(visible, (bool, np.bool_)):
        raise TypeError(f"visible: got {visible!r}, expected True, False or a bool array")
    check_integer("q_tokens", q_tokens, least=0)
    check_integer("k_tokens", k_tokens, least=0)
    if not visible:
        return np.full(q_tokens, k_tokens, np.int64)
    if offset is None:
        offset = k_tokens - q_tokens
    else:
        check_integer("offset", offset, least=0)
    return np.clip(offset + np.arange(q_tokens) + 1, 0, k_tokens).astype(np.int64)


def unit(x: np.ndarray) -> np.ndarray:
    """S2: x (..., d) over its length, which counts as at least 1e-12.

    >>> unit(np.array([3.0, 4.0]))
    array([0.6, 0.8])
    """
    check_array("x", x, ("d",))
    return x / _length(x)


def unit_backward(x: np.ndarray, dout: np.ndarray) -> np.ndarray:
    """S9: the gradient of x; a vector shorter than 1e-12 is only multiplied.

    >>> unit_backward(np.array([3.0, 4.0]), np.array([3.0, 4.0])).round(12) + 0.0
    array([0., 0.])
    """
    direction = x / _length(x)
    along = np.sum(direction * dout, axis=-1, keepdims=True)
    long = np.sqrt(np.sum(x * x, axis=-1, keepdims=True)) > SMALLEST_NORM
    along = np.where(long, along, np.zeros_like(along))
    return (dout - direction * along) / _length(x)


def _length(x: np.ndarray) -> np.ndarray:
    norm = np.sqrt(np.sum(x * x, axis=-1, keepdims=True))
    return np.maximum(norm, np.full_like(norm, SMALLEST_NORM))


def lssa_logits(
    q: np.ndarray, k: np.ndarray, n: np.ndarray, *, normalise_qk: bool = True
) -> np.ndarray:
    """S2, S3: logits x (..., heads, q_tokens, k_tokens).

    q (..., heads, q_tokens, d), k (..., kv_heads, k_tokens, d), `n` the counts (..., q_tokens).

    >>> lssa_logits(np.ones((1, 1, 4)), np.ones((1, 1, 4)), np.array([1]))
    array([[[0.]]])
    """
    check_products(q, k)
    check_row_numbers("n", n, (*q.shape[:-3], q.shape[-2]))
    check_bool("normalise_qk", normalise_qk)
    d = q.shape[-1]
    if normalise_qk:
        q, k = unit(q), unit(k)
    factor = length_factor(n, d, normalise_qk).astype(q.dtype)[..., None, :, None]
    return factor * (q @ np.swapaxes(repeat_heads(k, q.shape[-3]), -1, -2))


def length_factor(n: np.ndarray, d: int, normalise_qk: bool) -> np.ndarray:
    """S3: ln d ln N, divided by sqrt(d) without unit vectors; ln 0 counts as 0.

    >>> length_factor(np.array([0, 1, 4]), 2, True).round(3)
    array([0.   , 0.   , 0.961])
    """
    scale = math.log(d) if d else 0.0
    return np.log(np.maximum(n, 1)) * (scale if normalise_qk else scale / math.sqrt(d or 1))


def lssa_scores(logits: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """S4: softplus of logits (..., heads, q_tokens, k_tokens), 0 where `mask` is False.

    `mask` is bool and broadcasts to the logits; a hidden logit is not read (K11).

    >>> lssa_scores(np.array([[[0.0, 9.0]]]), np.array([True, False])).round(3)
    array([[[0.693, 0.   ]]])
    """
    check_array("logits", logits, ("heads", "q_tokens", "k_tokens"))
    if mask is not None:
        check_array("mask", mask, ("k_tokens",), dtype="bool")
        check_broadcast("mask", mask, logits.shape)
        logits = np.where(mask, logits, np.zeros_like(logits))
    softened = np.maximum(logits, np.zeros_like(logits)) + np.log1p(np.exp(-np.abs(logits)))
    return softened if mask is None else np.where(mask, softened, np.zeros_like(softened))


def row_sum(scores: np.ndarray) -> np.ndarray:
    """S5: sums (..., heads, q_tokens) of scores (..., heads, q_tokens, k_tokens).

    >>> row_sum(np.ones((1, 1, 3)))
    array([[3.]])
    """
    check_array("scores", scores, ("heads", "q_tokens", "k_tokens"))
    return np.sum(scores, axis=-1)


def lssa_weights(scores: np.ndarray, row_sum: np.ndarray, eps: float = 1e-8) -> np.ndarray:
    """S5: the weights a (..., heads, q_tokens, k_tokens); rows without any mass are 0.

    >>> lssa_weights(np.array([[[1.0, 3.0]]]), np.array([[4.0]]), 0)
    array([[[0.25, 0.75]]])
    """
    check_array("scores", scores, ("heads", "q_tokens", "k_tokens"))
    check_array("row_sum", row_sum, ("heads", "q_tokens"))
    if row_sum.shape != scores.shape[:-1]:
        raise ValueError(f"row_sum: got shape {row_sum.shape}, expected {scores.shape[:-1]}")
    check_number("eps", eps, least=0)
    return scores / _divisor(row_sum + float(eps))[..., None]


def _divisor(total: np.ndarray) -> np.ndarray:
    return np.where(total > 0, total, np.ones_like(total))


def excess_of(weights: np.ndarray, n: np.ndarray, warm: int) -> np.ndarray:
    """S6: N a - O, which is above 0 for no hidden key, as its weight is 0."""
    check_array("weights", weights, ("heads", "q_tokens", "k_tokens"))
    check_integer("warm", warm, least=1)
    check_row_numbers("n", n, (*weights.shape[:-3], weights.shape[-2]))
    n = n[..., None, :]
    counts = n.astype(weights.dtype)[..., None]
    return counts * weights - (counts > warm).astype(weights.dtype)


def reweight(
    weights: np.ndarray, n: np.ndarray, p: float = 15, eps: float = 1e-8, warm: int = 3
) -> tuple[np.ndarray, np.ndarray]:
    """S6: sharpened weights b, shaped as a, and which rows (..., heads, q_tokens) are dead.

    `n` are the counts (..., q_tokens). A row is dead if none of its excesses is above 0, not if its
    mass is small. The powers are taken of the excess over the largest one, and eps follows.

    >>> reweight(np.array([[[0.5, 0.25, 0.125, 0.125]]]), np.array([4]), p=2)[0]
    array([[[0.99999999, 0.        , 0.        , 0.        ]]])
    """
    check_number("p", p, least=1)
    check_number("eps", eps, least=0)
    excess, most, dead = _excess(weights, n, warm, 0.0)
    excess = np.maximum(excess, np.zeros_like(excess))
    powers = np.where(excess > 0, (excess / most) ** float(p), np.zeros_like(excess))
    # eps over most**p may be infinite: then the row's weights are 0.
    with np.errstate(over="ignore"):
        added = np.exp(np.log(_divisor(most * 0 + float(eps))) - float(p) * np.log(most))
    added = np.where((most > 0) & (eps > 0), added, np.zeros_like(added))
    total = np.sum(powers, axis=-1, keepdims=True) + added
    return powers / _divisor(total), dead


def log_weights(
    weights: np.ndarray, n: np.ndarray, p: float = 15, warm: int = 3, dead_tol: float = 1e-6
) -> tuple[np.ndarray, np.ndarray]:
    """S7: ln b, -inf where clipped or dead, and which rows (..., heads, q_tokens) are dead.

    >>> log_weights(np.array([[[0.5, 0.25, 0.125, 0.125]]]), np.array([4]))[0]
    array([[[  0., -inf, -inf, -inf]]])
    """
    check_number("p", p, least=1)
    check_number("dead_tol", dead_tol, least=0)
    excess, most, dead = _excess(weights, n, warm, float(dead_tol))
    live = (excess > 0) & ~dead[..., None]
    ratio = np.where(live, excess / most, np.ones_like(excess))
    logs = float(p) * np.log(ratio)
    total = np.sum(np.where(live, np.exp(logs), np.zeros_like(logs)), axis=-1, keepdims=True)
    return np.where(live, logs - np.log(_divisor(total)), -np.inf).astype(weights.dtype), dead


def _excess(
    weights: np.ndarray, n: np.ndarray, warm: int, dead_tol: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Excesses, each row's largest (1 where there is none) and which rows are dead."""
    excess = excess_of(weights, n, warm)
    if excess.shape[-1] == 0:
        most = np.zeros_like(excess, shape=(*excess.shape[:-1], 1))
    else:
        most = np.max(excess, axis=-1, keepdims=True)
    dead = ~(most > dead_tol)[..., 0]
    return excess, _divisor(most), np.asarray(dead)


def attend(weights: np.ndarray, v: np.ndarray) -> np.ndarray:
    """S8: outputs (..., heads, q_tokens, dv) of weights (..., heads, q_tokens, k_tokens).

    v (..., kv_heads, k_tokens, dv); a value that no query weighs is not read (K11).

    >>> attend(np.array([[[0.5, 0.25]]]), np.array([[[2.0], [4.0]]]))
    array([[[2.]]])
    """
    check_values(weights, v)
    return combine(weights, v)
