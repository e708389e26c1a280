"""The gradient of relative attention with biases (S8)."""

from __future__ import annotations

import numpy as np

from attnspec.reference.conventions import default_scale
from attnspec.reference.dense.attention import combine
from attnspec.reference.primitives.softmax import softmax_lse, weights_given_lse
from attnspec.reference.scores.rcmha_scores import (
    check_tables,
    check_tokens,
    content_scores,
    relative_scores,
)
from attnspec.reference.scores.rcmha_steps import check_like, memory_mask


def visible(T: int, M: int, causal: bool) -> np.ndarray:
    """S5: the pairs that take part: `memory_mask`, or all of them without an order."""
    return memory_mask(T, M) if causal else np.ones((T, M + T), bool)


def relative_attention_backward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    R: np.ndarray,
    b: np.ndarray,
    u: np.ndarray,
    dout: np.ndarray,
    *,
    scale: float | None = None,
    causal: bool = True,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """S8: gradients dq, dk, dv, dR, db and du of `relative_attention`.

    >>> x, R = np.zeros((1, 2, 1)), np.zeros((4, 1, 1))
    >>> dv = relative_attention_backward(x, x, x, R, R[..., 0], x[:, 0], x + 1)[2]
    >>> dv.ravel()
    array([1.5, 0.5])
    """
    check_tokens(q, k, v)
    check_like("dout", dout, q, (*q.shape[:-1], v.shape[-1]))
    T, S = q.shape[-2], k.shape[-2]
    M, P = S - T, check_tables(q, R, b, S - T)
    scale = default_scale(q.shape[-1]) if scale is None else scale
    seen = visible(T, M, causal)
    s = (content_scores(q, u, k) + relative_scores(q, R, b, M)) * scale
    # Recomputed from the normaliser, as a kernel that kept only this does.
    weights = weights_given_lse(s, softmax_lse(s, seen)[1], seen)
    dweights = np.where(seen, dout @ np.swapaxes(v, -1, -2), np.zeros_like(weights))
    row_term = np.einsum("...d,...d->...", dout, combine(weights, v))[..., None]
    ds = scale * weights * (dweights - row_term)

    # Pair (i, j) read row P + (j - M) - i: a product with one-hot rows moves ds there.
    first = P - S
    index = np.arange(S)[None, :] - M - np.arange(T)[:, None] + P - first
    hit = (index[..., None] == np.arange(S + T)).astype(q.dtype)
    by_row = np.einsum("...ij,ijr->...ir", ds, hit)
    used = np.swapaxes(R[first : first + S + T], 0, 1)
    # Rows that no visible pair reads are not read here either (K11).
    unread = ~np.any(np.where(seen[..., None], hit, 0.0), axis=(0, 1))
    used = np.where(unread[:, None], np.zeros_like(used), used)

    dcontent = ds @ k
    dq = dcontent + by_row @ used
    dk = np.swapaxes(ds, -1, -2) @ (q + u[:, None])
    dv = np.swapaxes(weights, -1, -2) @ dout
    dR, db = np.zeros_like(R), np.zeros_like(b)
    flat = by_row.reshape(-1, *by_row.shape[-3:])
    dR[first : first + S + T] = np.einsum("nhir,nhid->rhd", flat, q.reshape(-1, *q.shape[-3:]))
    db[first : first + S + T] = np.einsum("nhir->rh", flat)
    return dq, dk, dv, dR, db, np.einsum("nhid->hd", dcontent.reshape(-1, *q.shape[-3:]))
