"""Dense attention, the gradient: S5 of `attention`, whole and packed, and the steps it is made of,
which other chapters share.
"""

from __future__ import annotations

import numpy as np

from attnspec.reference.conventions import (
    check_attention_inputs,
    check_shaped,
    default_scale,
    repeat_heads,
)
from attnspec.reference.dense.attention_steps import score, sequences, visible
from attnspec.reference.primitives.softmax import softmax_lse, weights_given_lse


def attend_backward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    dout: np.ndarray,
    dlse: np.ndarray | None = None,
    *,
    causal: bool = False,
    mask: np.ndarray | None = None,
    scale: float | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S5: gradients dq, dk, dv, shaped as q, k, v.

    `dout` (..., heads, q_tokens, dv) and `dlse` (..., heads, q_tokens) are the gradients of the two
    outputs of `attend`; no `dlse` means lse is not used.

    >>> one = np.ones((1, 1, 2))
    >>> [gradient.ravel() for gradient in attend_backward(one, one, one, one)]
    [array([0., 0.]), array([0., 0.]), array([1., 1.])]
    """
    check_attention_inputs(q, k, v)
    check_shaped("dout", dout, (*q.shape[:-1], v.shape[-1]))
    if dlse is not None:
        check_shaped("dlse", dlse, q.shape[:-1])
    heads, scale = q.shape[-3], default_scale(q.shape[-1]) if scale is None else scale
    allowed = visible(q.shape[-2], k.shape[-2], causal=causal, mask=mask)
    scores = score(q, k, scale=scale)
    weights = weights_given_lse(scores, softmax_lse(scores, allowed)[1], allowed)
    unread = np.all(weights == 0, axis=-2)[..., None]
    keys = np.where(unread, 0, repeat_heads(k, heads)).astype(k.dtype)
    values = np.where(unread, 0, repeat_heads(v, heads)).astype(v.dtype)

    dscores, _ = score_gradient(weights, values, dout, dlse)
    dq = scale * (dscores @ keys)
    dk = scale * (np.swapaxes(dscores, -1, -2) @ q)
    dv = np.swapaxes(weights, -1, -2) @ dout
    return dq, sum_groups(dk, k.shape[-3]), sum_groups(dv, v.shape[-3])


def attend_packed_backward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    q_offsets: np.ndarray,
    k_offsets: np.ndarray,
    dout: np.ndarray,
    dlse: np.ndarray | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S5, S6: gradients dq, dk, dv, shaped as q, k, v.

    `dout` (heads, q_total, dv) and `dlse` (heads, q_total) are the gradients of the two outputs of
    `attend_packed`; no `dlse` means lse is not used.

    >>> x, ends = np.eye(2)[None], np.array([0, 1, 2])
    >>> attend_packed_backward(x, x, x, ends, ends, dout=x)[2]
    array([[[1., 0.],
            [0., 1.]]])
    """
    pieces = sequences(q, k, v, q_offsets, k_offsets)
    check_shaped("dout", dout, (*q.shape[:-1], v.shape[-1]))
    if dlse is not None:
        check_shaped("dlse", dlse, q.shape[:-1])
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for rows, keys in pieces:
        dq[..., rows, :], dk[..., keys, :], dv[..., keys, :] = attend_backward(
            q[..., rows, :],
            k[..., keys, :],
            v[..., keys, :],
            dout[..., rows, :],
            None if dlse is None else dlse[..., rows],
            causal=causal,
            scale=scale,
        )
    return dq, dk, dv


def score_gradient(
    weights: np.ndarray, values: np.ndarray, dout: np.ndarray, dlse: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """S5: ds (..., heads, q_tokens, k_tokens) and its row term do . o (..., heads, q_tokens).

    `values` (..., heads, k_tokens, dv) are one for each query head. Weights that sum to less than
    one, because a sink takes the rest, follow the same formula.

    >>> score_gradient(np.array([[0.5, 0.5]]), np.eye(2), np.array([[1.0, 0.0]]))[0]
    array([[ 0.25, -0.25]])
    """
    row_term = np.einsum("...d,...d->...", dout, weights @ values)
    lse_term = 0 if dlse is None else dlse[..., None]
    return weights * (dout @ np.swapaxes(values, -1, -2) - row_term[..., None] + lse_term), row_term


def sum_groups(x: np.ndarray, kv_heads: int) -> np.ndarray:
    """S5: (..., heads, tokens, d) to (..., kv_heads, tokens, d), summed over each group (K7).

    >>> sum_groups(np.array([[[1.0]], [[2.0]], [[3.0]], [[4.0]]]), 2).ravel()
    array([3., 7.])
    """
    *leading, heads, tokens, d = x.shape
    grouped = x.reshape(*leading, kv_heads, heads // kv_heads, tokens, d)
    return np.einsum("...kgtd->...ktd", grouped)
