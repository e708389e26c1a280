"""LightNet over sequences laid end to end: the clause S17 of `lightnet`.

Each sequence starts from a state of its own, so its results and its gradients are those it has
alone.
"""

from __future__ import annotations

import numpy as np

from attnspec.reference.conventions import (
    check_array,
    check_attention_inputs,
    check_offsets,
    check_shaped,
    check_size,
    repeat_heads,
)
from attnspec.reference.linear.lightnet_gradient import (
    State,
    lightnet_causal_backward,
    state_of_shape,
)
from attnspec.reference.linear.lightnet_scan import (
    additive_gates,
    check_scale,
    vector_decay_attend,
    vector_decay_backward,
)


def vector_decay_packed(
    q: np.ndarray,
    kbar: np.ndarray,
    v: np.ndarray,
    log_decay: np.ndarray,
    offsets: np.ndarray,
    S0: np.ndarray | None = None,
    *,
    scale: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """S5, S17: o (heads, total, e) and the last states S (sequences, heads, d, e).

    q, kbar, log_decay (heads, total, d), v (heads, total, e), offsets int (sequences + 1)
    increasing from 0 to total; S0 as S.

    >>> one, half = np.ones((1, 3, 1)), np.full((1, 3, 1), np.log(0.5))
    >>> o, S = vector_decay_packed(one, one, one, half, np.array([0, 1, 3]))
    >>> o.ravel(), S.ravel()
    (array([1. , 1. , 1.5]), array([1. , 1.5]))
    """
    sequences = _sequences(q, kbar, v, offsets, "kbar")
    check_shaped("log_decay", log_decay, q.shape)
    if S0 is not None:
        check_shaped("S0", S0, _state_shape(q, v, offsets))
    o, S = np.zeros_like(v), np.zeros_like(q, shape=_state_shape(q, v, offsets))
    for n, rows in enumerate(sequences):
        Q, K, V, g = (x[:, rows] for x in (q, kbar, v, log_decay))
        first = None if S0 is None else S0[n]
        o[:, rows], S[n] = vector_decay_attend(Q, K, V, g, first, scale=scale)
    return o, S


def vector_decay_packed_backward(
    q: np.ndarray,
    kbar: np.ndarray,
    v: np.ndarray,
    log_decay: np.ndarray,
    offsets: np.ndarray,
    S0: np.ndarray | None,
    do: np.ndarray,
    dS: np.ndarray | None = None,
    *,
    scale: float = 1.0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """S9, S17: dq, dkbar, dv, dlog_decay and dS0 of `vector_decay_packed`.

    >>> x = np.ones((1, 3, 1))
    >>> vector_decay_packed_backward(x, x, x, 0 * x, np.array([0, 1, 3]), None, x)[2].ravel()
    array([1., 2., 1.])
    """
    sequences = _sequences(q, kbar, v, offsets, "kbar")
    check_shaped("log_decay", log_decay, q.shape)
    check_shaped("do", do, v.shape)
    for name, x in (("S0", S0), ("dS", dS)):
        if x is not None:
            check_shaped(name, x, _state_shape(q, v, offsets))
    by_token = [np.zeros_like(x) for x in (q, kbar, v, log_decay)]
    dS0 = np.zeros_like(q, shape=_state_shape(q, v, offsets))
    for n, rows in enumerate(sequences):
        Q, K, V, g, G = (x[:, rows] for x in (q, kbar, v, log_decay, do))
        first, last = (None if x is None else x[n] for x in (S0, dS))
        *own, dS0[n] = vector_decay_backward(Q, K, V, g, first, G, last, scale=scale)
        for whole, part in zip(by_token, own, strict=True):
            whole[:, rows] = part
    return by_token[0], by_token[1], by_token[2], by_token[3], dS0


def lightnet_packed(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    offsets: np.ndarray,
    state: State | None = None,
    *,
    scale: float = 1.0,
) -> tuple[np.ndarray, State]:
    """S3, S11, S17: o (heads, total, e) and the states: S (sequences, heads, d, e) and z
    (sequences, heads, d).

    q (heads, total, d), k (kv_heads, total, d), v (kv_heads, total, e), offsets int (sequences + 1)
    increasing from 0 to total.

    >>> k, v = np.zeros((1, 3, 1)), np.array([[[3.0], [6.0], [0.0]]])
    >>> o, (S, z) = lightnet_packed(np.ones((1, 3, 1)), k, v, np.array([0, 1, 3]))
    >>> o.ravel(), S.ravel(), np.exp(z).ravel()
    (array([3., 6., 3.]), array([3., 3.]), array([1., 2.]))
    """
    sequences = _sequences(q, k, v, offsets)
    S0, z0 = state_of_shape(state, _state_shape(q, v, offsets))
    check_scale(scale)
    k, v = repeat_heads(k, q.shape[-3]), repeat_heads(v, q.shape[-3])
    shape = _state_shape(q, v, offsets)
    o = np.zeros_like(q, shape=(*q.shape[:-1], v.shape[-1]))
    S, z = np.zeros_like(q, shape=shape), np.zeros_like(q, shape=shape[:-1])
    for n, rows in enumerate(sequences):
        Q, K, V = (x[:, rows] for x in (q, k, v))
        first, before = (None if x is None else x[n] for x in (S0, z0))
        kbar, log_decay, z[n] = additive_gates(K, before)
        o[:, rows], S[n] = vector_decay_attend(Q, kbar, V, log_decay, first, scale=scale)
    return o, (S, z)


def lightnet_packed_backward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    offsets: np.ndarray,
    state: State | None,
    do: np.ndarray,
    dS: np.ndarray | None = None,
    dz: np.ndarray | None = None,
    *,
    scale: float = 1.0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, State]:
    """S10, S17: dq, dk, dv of `lightnet_packed` and the gradient (dS0, dz0) of the states before.

    >>> k, v = np.zeros((1, 3, 1)), np.array([[[3.0], [6.0], [0.0]]])
    >>> x, offsets = np.ones((1, 3, 1)), np.array([0, 1, 3])
    >>> [dx.ravel() for dx in lightnet_packed_backward(x, k, v, offsets, None, x)[:2]]
    [array([3., 6., 3.]), array([ 0. ,  1.5, -1.5])]
    """
    sequences = _sequences(q, k, v, offsets)
    shape = _state_shape(q, v, offsets)
    state_of_shape(state, shape)
    check_shaped("do", do, (*q.shape[:-1], v.shape[-1]))
    for name, x, expected in (("dS", dS, shape), ("dz", dz, shape[:-1])):
        if x is not None:
            check_shaped(name, x, expected)
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    dS0, dz0 = np.zeros_like(q, shape=shape), np.zeros_like(q, shape=shape[:-1])
    for n, rows in enumerate(sequences):
        Q, K, V, G = (x[:, rows] for x in (q, k, v, do))
        first = None if state is None else (state[0][n], state[1][n])
        last = (None if x is None else x[n] for x in (dS, dz))
        dq[:, rows], dk[:, rows], dv[:, rows], (dS0[n], dz0[n]) = lightnet_causal_backward(
            Q, K, V, first, G, *last, scale=scale
        )
    return dq, dk, dv, (dS0, dz0)


def _sequences(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, offsets: np.ndarray, name: str = "k"
) -> list[slice]:
    """K14: the rows of each sequence, once the arguments fit one another."""
    check_array(name, k, ("heads", "total", "d"))
    check_attention_inputs(q, k, v)
    check_size(name, k.shape[-2], q.shape[-2], "tokens, as in q")
    return check_offsets("offsets", offsets, q.shape[-2])


def _state_shape(q: np.ndarray, v: np.ndarray, offsets: np.ndarray) -> tuple[int, ...]:
    return (len(offsets) - 1, q.shape[-3], q.shape[-1], v.shape[-1])
