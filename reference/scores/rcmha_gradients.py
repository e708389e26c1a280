"""The gradients of relative attention with biases, and of a whole segment (S8)."""

from __future__ import annotations

import numpy as np

from attnspec.reference.conventions import check_choice, default_scale
from attnspec.reference.dense.attention import combine
from attnspec.reference.primitives.softmax import softmax_lse, weights_given_lse
from attnspec.reference.scores.rcmha_layer import check_segment
from attnspec.reference.scores.rcmha_scores import (
    check_tables,
    check_tokens,
    content_scores,
    relative_scores,
)
from attnspec.reference.scores.rcmha_steps import (
    check_like,
    depthwise_causal_conv,
    depthwise_causal_conv_backward,
    memory_mask,
    project_heads,
)


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


def attend_segment_backward(
    x: np.ndarray,
    memory: np.ndarray | None,
    W: np.ndarray,
    biases: np.ndarray,
    w: np.ndarray,
    c: np.ndarray,
    R: np.ndarray,
    b: np.ndarray,
    u: np.ndarray,
    dout: np.ndarray,
    q_conv_state: str = "reset",
) -> tuple[np.ndarray | None, ...]:
    """S8: dx, dmemory, dW, dbiases, dw, dc, dR, db and du of `attend_segment`; dmemory is None
    without a memory.

    >>> one, R = np.ones((1, 1)), np.zeros((4, 1, 1))
    >>> W, w, zero = np.ones((4, 1, 1)), np.ones((3, 1, 1)), np.zeros((3, 1))
    >>> found = attend_segment_backward(one, None, W, zero[:2], w, zero, R, R[..., 0], one, one)
    >>> found[0], found[2].ravel()
    (array([[1.]]), array([0., 0., 1., 1.]))
    """
    check_segment(x, memory, W, biases, w, c, u)
    check_choice("q_conv_state", q_conv_state, ("reset", "carry"))
    check_like("dout", dout, x, x.shape)
    heads, (T, D) = u.shape[0], x.shape[-2:]
    kvx = x if memory is None else np.concatenate([memory, x], axis=-2)
    sources = (kvx if q_conv_state == "carry" else x, kvx, kvx)
    rows = [
        project_heads(y, W[n], biases[0] if n == 2 else None, heads) for n, y in enumerate(sources)
    ]
    q, k, v = (depthwise_causal_conv(p, w[n], c[n])[0] for n, p in enumerate(rows))
    queries = q[..., q.shape[-2] - T :, :]

    dW, dbiases, dw, dc = (np.zeros_like(y) for y in (W, biases, w, c))
    do = project_heads(dout, W[3].T, None, heads)
    seen = visible(T, kvx.shape[-2] - T, True)
    s = content_scores(queries, u, k) + relative_scores(queries, R, b, kvx.shape[-2] - T)
    s = s * default_scale(q.shape[-1])
    o = combine(weights_given_lse(s, softmax_lse(s, seen)[1], seen), v)
    dW[3] = _pairs(_joined(o), dout)
    dbiases[1] = np.sum(dout.reshape(-1, D), axis=0)

    dq, dk, dv, dR, db, du = relative_attention_backward(queries, k, v, R, b, u, do)
    # Queries of the memory are filtered with those of the segment, and ask nothing.
    before = np.zeros_like(q[..., : q.shape[-2] - T, :])
    dx, dolder = np.zeros_like(x), np.zeros_like(kvx[..., : kvx.shape[-2] - T, :])
    for n, dy in enumerate((np.concatenate([before, dq], axis=-2), dk, dv)):
        dp, dw[n], dc[n], _ = depthwise_causal_conv_backward(rows[n], w[n], c[n], None, dy)
        flat = _joined(dp)
        dW[n] = _pairs(sources[n], flat)
        if n == 2:
            dbiases[0] = np.sum(flat.reshape(-1, D), axis=0)
        dsource = flat @ W[n].T
        first = dsource.shape[-2] - T
        dx = dx + dsource[..., first:, :]
        if first:
            dolder = dolder + dsource[..., :first, :]
    return dx, None if memory is None else dolder, dW, dbiases, dw, dc, dR, db, du


def _joined(y: np.ndarray) -> np.ndarray:
    """(..., heads, T, dk) as (..., T, heads dk)."""
    y = np.swapaxes(y, -2, -3)
    return y.reshape(*y.shape[:-2], y.shape[-2] * y.shape[-1])


def _pairs(rows: np.ndarray, drows: np.ndarray) -> np.ndarray:
    """The gradient (D, D) of a matrix that all rows (..., T, D) were multiplied by."""
    D = rows.shape[-1]
    return np.asarray(rows.reshape(-1, D).T @ drows.reshape(-1, D))
