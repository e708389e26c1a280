r"""Lightning Attention-2, token by token: clauses S1, S2, S5 and S11 of `lightning_attention_2`.

The definition itself, twice: as one masked product over all pairs, and as a state that takes in a
token and answers a query. Neither needs blocks, and the blocks must agree with both.
"""

from __future__ import annotations

import numpy as np

from attnspec.reference.conventions import (
    check_attention_inputs,
    check_integer,
    check_shaped,
    check_size,
    repeat_heads,
)
from attnspec.reference.dense.attention_gradient import sum_groups
from attnspec.reference.linear.lightning_attention_2_chunks import check_slopes, first_state


def decay_mask(T: int, s: np.ndarray) -> np.ndarray:
    """S1: M (heads, T, T) of slopes s (heads,), in the dtype of s.

    >>> decay_mask(2, np.array([np.log(2.0)]))
    array([[[1. , 0. ],
            [0.5, 1. ]]])
    """
    check_integer("T", T, least=0)
    check_slopes(s)
    distance = np.arange(T)[:, None] - np.arange(T)
    decay = np.exp(-s[:, None, None] * np.maximum(distance, 0).astype(s.dtype))
    return np.where(distance >= 0, decay, 0.0)


def attend_left(q: np.ndarray, k: np.ndarray, v: np.ndarray, s: np.ndarray) -> np.ndarray:
    """S1: o (..., heads, T, e) by the quadratic product; T rows in each of q, k and v.

    q (..., heads, T, d), k (..., kv_heads, T, d), v (..., kv_heads, T, e), s (heads,). The dtype of
    s may differ from that of q: a decay is formed in the former and applied in the latter.

    >>> x = np.ones((1, 2, 1))
    >>> attend_left(x, x, x, np.array([np.log(2.0)])).ravel()
    array([1. , 1.5])
    """
    _check_self(q, k, v, s)
    heads, T = q.shape[-3:-1]
    scores = q @ np.swapaxes(repeat_heads(k, heads), -1, -2)
    return (scores * decay_mask(T, s).astype(q.dtype)) @ repeat_heads(v, heads)


def backward_left(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, s: np.ndarray, do: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S5: dq, dk, dv of `attend_left` by quadratic products; do (..., heads, T, e).

    >>> x = np.ones((1, 2, 1))
    >>> [gradient.ravel() for gradient in backward_left(x, x, x, np.zeros(1), x)]
    [array([1., 2.]), array([2., 1.]), array([2., 1.])]
    """
    _check_self(q, k, v, s)
    check_shaped("do", do, (*q.shape[:-1], v.shape[-1]))
    heads, T = q.shape[-3:-1]
    keys, values = repeat_heads(k, heads), repeat_heads(v, heads)
    decay = decay_mask(T, s).astype(q.dtype)
    weights = (q @ np.swapaxes(keys, -1, -2)) * decay
    dscores = (do @ np.swapaxes(values, -1, -2)) * decay
    dk, dv = np.swapaxes(dscores, -1, -2) @ q, np.swapaxes(weights, -1, -2) @ do
    return dscores @ keys, sum_groups(dk, k.shape[-3]), sum_groups(dv, k.shape[-3])


def attend_recurrent(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, s: np.ndarray, S0: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """S2: o (..., heads, T, e) and the last state S (..., heads, d, e), token by token.

    Arguments as in `attend_left`; S0 (..., heads, d, e) is the state before the first token.

    >>> x = np.ones((1, 2, 1))
    >>> attend_recurrent(x, x, x, np.array([np.log(2.0)]))[1].ravel()
    array([1.5])
    """
    _check_self(q, k, v, s)
    S = first_state(S0, (*q.shape[:-2], q.shape[-1], v.shape[-1]), k)
    rows = []
    for t in range(q.shape[-2]):
        now = slice(t, t + 1)
        o, S = decode_step(S, q[..., now, :], k[..., now, :], v[..., now, :], s)
        rows.append(o)
    nothing = np.zeros_like(v, shape=(*q.shape[:-2], 0, v.shape[-1]))
    return np.concatenate([nothing, *rows], axis=-2), S


def decode_step(
    S: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray, s: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """S11: o (..., heads, 1, e) of one new token, and the state (..., heads, d, e) with it.

    S (..., heads, d, e), q (..., heads, 1, d), k (..., kv_heads, 1, d), v (..., kv_heads, 1, e).

    >>> x = np.ones((1, 1, 1))
    >>> decode_step(np.full((1, 1, 1), 4.0), x, x, x, np.array([np.log(2.0)]))[0].ravel()
    array([3.])
    """
    _check_self(q, k, v, s)
    check_size("q", q.shape[-2], 1, "one token")
    check_shaped("S", S, (*q.shape[:-2], q.shape[-1], v.shape[-1]))
    heads = q.shape[-3]
    keys, values = repeat_heads(k, heads), repeat_heads(v, heads)
    kept = np.exp(-s).astype(q.dtype)[:, None, None]
    S = kept * S + np.swapaxes(keys, -1, -2) * values
    return q @ S, S


def _check_self(q: np.ndarray, k: np.ndarray, v: np.ndarray, s: np.ndarray) -> None:
    check_attention_inputs(q, k, v)
    check_size("q", q.shape[-2], k.shape[-2], "tokens, as in k")
    check_slopes(s, q.shape[-3])
