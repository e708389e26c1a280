"""The stages of softplus attention put together, and its gradients (S9)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from attnspec.reference.conventions import check_shaped, repeat_heads
from attnspec.reference.dense.attention_gradient import sum_groups
from attnspec.reference.scores.softplus_attention_checks import (
    check_first,
    check_second,
)
from attnspec.reference.scores.softplus_attention_steps import (
    excess_of,
    length_factor,
    log_weights,
    lssa_logits,
    lssa_scores,
    lssa_weights,
    reweight,
    row_sum,
    unit,
    unit_backward,
    visible_counts,
    visible_pairs,
)


class Rows(NamedTuple):
    """What the two forms share: who is seen, N (..., 1, q_tokens, 1), logits, scores, weights."""

    seen: np.ndarray
    n: np.ndarray
    logits: np.ndarray
    scores: np.ndarray
    weights: np.ndarray


def first_stage(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    causal: bool,
    mask: np.ndarray | None,
    eps: float,
    normalise_qk: bool,
) -> Rows:
    """S1-S5: the weights of LSSA and all that leads to them."""
    check_first(q, k, v, causal, mask, eps, normalise_qk)
    seen = visible_pairs(q.shape[-2], k.shape[-2], causal, mask)
    counts = visible_counts(seen)
    logits = lssa_logits(q, k, counts, normalise_qk=normalise_qk)
    heads_seen = seen[..., None, :, :]
    scores = lssa_scores(logits, heads_seen)
    weights = lssa_weights(scores, row_sum(scores), eps)
    n = counts[..., None, :, None].astype(q.dtype)
    return Rows(heads_seen, n, logits, scores, weights)


def second_stage(
    rows: Rows, p: float, eps: float, warm: int, eps_mode: str, dead_tol: float
) -> np.ndarray:
    """S6 or S7: the sharpened weights."""
    if eps_mode == "additive":
        return reweight(rows.weights, rows.n[..., 0, :, 0], p, eps, warm)[0]
    return np.exp(log_weights(rows.weights, rows.n[..., 0, :, 0], p, warm, dead_tol)[0])


def lssa_backward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    dout: np.ndarray,
    *,
    causal: bool = False,
    mask: np.ndarray | None = None,
    eps: float = 1e-8,
    normalise_qk: bool = True,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S9: gradients dq, dk, dv of `lssa`, shaped as q, k, v.

    >>> one = np.ones((1, 1, 2))
    >>> [x.ravel().round(6) for x in lssa_backward(one, one, one, one)]
    [array([0., 0.]), array([0., 0.]), array([1., 1.])]
    """
    rows = first_stage(q, k, v, causal, mask, eps, normalise_qk)
    check_shaped("dout", dout, (*q.shape[:-1], v.shape[-1]))
    da, dv, inner = weights_gradient(rows.weights, v, dout)
    return *scores_gradient(rows, da, inner, q, k, eps, normalise_qk), dv


def lssar_backward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    dout: np.ndarray,
    *,
    p: float = 15,
    causal: bool = False,
    mask: np.ndarray | None = None,
    eps: float = 1e-8,
    warm: int = 3,
    normalise_qk: bool = True,
    eps_mode: str = "additive",
    dead_tol: float = 1e-6,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S9: gradients dq, dk, dv of `lssar`, shaped as q, k, v.

    >>> one = np.ones((1, 1, 2))
    >>> [x.ravel().round(6) for x in lssar_backward(one, one, one, one)]
    [array([0., 0.]), array([0., 0.]), array([1., 1.])]
    """
    check_second(p, warm, eps_mode, dead_tol)
    rows = first_stage(q, k, v, causal, mask, eps, normalise_qk)
    check_shaped("dout", dout, (*q.shape[:-1], v.shape[-1]))
    sharpened = second_stage(rows, p, eps, warm, eps_mode, dead_tol)
    db, dv, inner = weights_gradient(sharpened, v, dout)
    # b du/u: as p b (db - inner) / u, whose b / u stays finite where u is small.
    excess = excess_of(rows.weights, rows.n[..., 0, :, 0], warm)
    live = (excess > 0) & (sharpened > 0)
    over = np.where(live, excess, np.ones_like(excess))
    da = np.where(live, rows.n * p * (sharpened / over) * (db - inner), np.zeros_like(db))
    taken = np.sum(rows.weights * da, axis=-1, keepdims=True)
    return *scores_gradient(rows, da, taken, q, k, eps, normalise_qk), dv


def weights_gradient(
    weights: np.ndarray, v: np.ndarray, dout: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S9: the gradients of weights, g, and of v, and the rows' do . o (..., heads, q_tokens, 1).

    Values without any weight are not read (K11).
    """
    heads = weights.shape[-3]
    unread = np.all(weights == 0, axis=-2)[..., None]
    values = repeat_heads(v, heads)
    values = np.where(unread, np.zeros_like(values), values)
    dv = sum_groups(np.swapaxes(weights, -1, -2) @ dout, v.shape[-3])
    inner = np.einsum("...d,...d->...", dout, weights @ values)[..., None]
    return dout @ np.swapaxes(values, -1, -2), dv, inner


def scores_gradient(
    rows: Rows,
    da: np.ndarray,
    inner: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    eps: float,
    normalise_qk: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """S9: from the gradient of the weights of LSSA, less `inner` a row, to those of q and k."""
    total = np.sum(rows.scores, axis=-1, keepdims=True) + eps
    total = np.where(total > 0, total, np.ones_like(total))
    seen = np.broadcast_to(rows.seen, rows.logits.shape)
    x = np.where(seen, rows.logits, np.zeros_like(rows.logits))
    bent = np.exp(-np.logaddexp(np.zeros_like(x), -x))
    dx = np.where(seen, (da - inner) / total * bent, np.zeros_like(x))
    heads = q.shape[-3]
    factor = length_factor(rows.n, q.shape[-1], normalise_qk).astype(q.dtype)
    unread = np.all(dx == 0, axis=-2)[..., None]
    keys = repeat_heads(k, heads)
    keys = np.where(unread, np.zeros_like(keys), keys)
    queries = q
    if normalise_qk:
        queries, keys = unit(q), unit(keys)
    scaled = factor * dx
    dq = scaled @ keys
    dk = sum_groups(np.swapaxes(scaled, -1, -2) @ queries, k.shape[-3])
    if normalise_qk:
        touched = np.any(dk != 0, axis=-1, keepdims=True)
        dq = unit_backward(q, dq)
        dk = unit_backward(np.where(touched, k, np.zeros_like(k)), dk)
    return dq, dk
