"""The gradients of relative attention (S8)."""

from __future__ import annotations

import numpy as np

from attnspec.reference.conventions import causal_mask, check_shaped, default_scale, repeat_heads
from attnspec.reference.dense.attention import combine
from attnspec.reference.dense.attention_gradient import sum_groups
from attnspec.reference.primitives.softmax import softmax_lse, weights_given_lse
from attnspec.reference.scores.music_transformer_checks import (
    check_self,
    check_values_table,
)
from attnspec.reference.scores.music_transformer_steps import (
    global_logits,
    local_logits,
    local_visibility,
    relative_table_slice,
    skew,
    skew_full,
    table_gradient,
)


def by_distance(x: np.ndarray, rows: int, causal: bool) -> np.ndarray:
    """S7, S8: x (..., L, L) moved to the table rows of its pairs, (..., L, rows)."""
    L = x.shape[-1]
    zero = rows - 1 if causal else rows // 2
    index = zero + np.arange(L)[None, :] - np.arange(L)[:, None]
    hit = (index[..., None] == np.arange(rows)).astype(x.dtype)
    return np.einsum("...ij,ijr->...ir", x, hit)


def global_attention_backward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    E: np.ndarray,
    dout: np.ndarray,
    *,
    Ev: np.ndarray | None = None,
    scale: float | None = None,
    causal: bool = True,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """S8: gradients dq, dk, dv, dE of `global_attention`, shaped as q, k, v, E.

    >>> x, E = np.zeros((1, 2, 1)), np.ones((2, 1))
    >>> global_attention_backward(x, x, np.eye(2)[None], E, np.ones((1, 2, 2)))[2]
    array([[[1.5, 1.5],
            [0.5, 0.5]]])
    """
    logits = global_logits(q, k, E, scale, causal)
    seen = causal_mask(*logits.shape[-2:]) if causal else np.ones(logits.shape[-2:], bool)
    return _gradients(q, k, v, E, dout, logits, seen, Ev, scale, causal)


def local_attention_backward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    E: np.ndarray,
    b: int,
    dout: np.ndarray,
    *,
    Ev: np.ndarray | None = None,
    scale: float | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """S8: gradients dq, dk, dv, dE of `local_attention`, shaped as q, k, v, E.

    >>> x, E = np.zeros((1, 2, 1)), np.ones((2, 1))
    >>> local_attention_backward(x, x, np.eye(2)[None], E, 1, np.ones((1, 2, 2)))[2]
    array([[[1.5, 1.5],
            [0.5, 0.5]]])
    """
    seen = local_visibility(q.shape[-2], b)
    return _gradients(q, k, v, E, dout, local_logits(q, k, E, b, scale), seen, Ev, scale, True)


def _gradients(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    E: np.ndarray,
    dout: np.ndarray,
    logits: np.ndarray,
    seen: np.ndarray,
    Ev: np.ndarray | None,
    scale: float | None,
    causal: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    check_self("v", q, v)
    check_shaped("dout", dout, (*q.shape[:-1], v.shape[-1]))
    check_values_table(Ev, q, v, causal)
    # Recomputed from the normaliser, as a kernel that kept only this does.
    P = weights_given_lse(logits, softmax_lse(logits, seen)[1], seen)
    heads, L = q.shape[-3], q.shape[-2]
    dP, out = dout @ np.swapaxes(repeat_heads(v, heads), -1, -2), combine(P, v)
    if Ev is not None and L:
        used = relative_table_slice(Ev, L, causal)
        R = dout @ np.swapaxes(used, -1, -2)
        dP = dP + (skew(R) if causal else skew_full(R))
        out = out + by_distance(P, used.shape[-2], causal) @ used
    # The sum of P dP over keys, as kernels take it: from the output.
    row_term = np.einsum("...d,...d->...", dout, out)[..., None]
    dS = np.where(seen, P * (np.where(seen, dP, np.zeros_like(dP)) - row_term), 0.0)
    dS = dS.astype(q.dtype)
    factor = default_scale(q.shape[-1]) if scale is None else scale
    M = E.shape[-2] if causal else (E.shape[-2] + 1) // 2
    per_row = by_distance(dS, E.shape[-2], causal)
    # Rows for distances that do not occur are not read (K11).
    unread = np.abs(np.arange(E.shape[-2]) - (M - 1)) >= L
    table = np.where(unread[:, None], np.zeros_like(E), E)
    dq = dS @ repeat_heads(k, heads) + per_row @ table
    dk = sum_groups(np.swapaxes(dS, -1, -2) @ q, k.shape[-3])
    dv = sum_groups(np.swapaxes(P, -1, -2) @ dout, v.shape[-3])
    dE = factor * table_gradient(dS, q, M, causal)
    return factor * dq, factor * dk, dv, np.sum(dE, axis=0) if E.ndim == 2 else dE
