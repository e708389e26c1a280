"""Based as a recurrence: the clauses S6 to S9 of `based`, with a state between any two tokens.

The state is S (..., kv_heads, D, dv), the sum of features times values, and zk (..., kv_heads, D),
the sum of features, so zk[0] counts the tokens. It belongs to a kv head and serves its whole group.
"""

from __future__ import annotations

import numpy as np

from attnspec.reference.conventions import (
    check_array,
    check_attention_inputs,
    check_integer,
    check_shaped,
    check_size,
    repeat_heads,
)
from attnspec.reference.dense.attention_gradient import sum_groups
from attnspec.reference.linear.based_features import (
    check_eps,
    chosen_scale,
    feature_count,
    taylor_features,
    taylor_features_backward,
    taylor_weights,
    taylor_weights_backward,
)


def based_state_update(
    S: np.ndarray, zk: np.ndarray, k: np.ndarray, v: np.ndarray, *, scale: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """S6, S7: the state with more tokens: S + phi(k)^T v and zk + the sum of phi(k).

    S (..., kv_heads, D, dv), zk (..., kv_heads, D), k (..., kv_heads, tokens, d), v (..., kv_heads,
    tokens, dv).

    >>> S, zk = np.zeros((1, 3, 1)), np.zeros((1, 3))
    >>> [x.ravel() for x in based_state_update(S, zk, np.ones((1, 2, 1)), np.ones((1, 2, 1)))]
    [array([2.        , 2.        , 1.41421356]), array([2.        , 2.        , 1.41421356])]
    """
    check_array("k", k, ("kv_heads", "tokens", "d"))
    check_attention_inputs(k, k, v)
    check_state(S, zk, k, v)
    features = taylor_features(k, scale=scale)
    return S + np.swapaxes(features, -1, -2) @ v, zk + np.sum(features, axis=-2)


def based_read(
    q: np.ndarray, S: np.ndarray, zk: np.ndarray, *, eps: float = 1e-12, scale: float | None = None
) -> np.ndarray:
    """S8: o (..., heads, q_tokens, dv), every query reading the same state.

    q (..., heads, q_tokens, d), S (..., kv_heads, D, dv), zk (..., kv_heads, D).

    >>> based_read(np.zeros((1, 1, 1)), np.full((1, 3, 1), 6.0), np.full((1, 3), 2.0))
    array([[[3.]]])
    """
    check_array("q", q, ("heads", "q_tokens", "d"))
    check_eps(eps)
    check_array("S", S, ("kv_heads", "D", "dv"))
    D = feature_count(q.shape[-1])
    if S.shape[-3] < 1 or q.shape[-3] % S.shape[-3]:
        raise ValueError(
            f"S: got {S.shape[-3]} kv heads for {q.shape[-3]} query heads, expected a divisor"
        )
    check_shaped("S", S, (*q.shape[:-3], S.shape[-3], D, S.shape[-1]))
    check_shaped("zk", zk, S.shape[:-1])
    for name, x in (("S", S), ("zk", zk)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: got dtype {x.dtype}, expected {q.dtype}, as q")
    features = taylor_features(q, scale=scale)
    num, den = read(features, S, zk)
    return divide(num, den, eps)


def based_decode_step(
    S: np.ndarray,
    zk: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    eps: float = 1e-12,
    scale: float | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S6: o (..., heads, 1, dv) of one token, and the state (S, zk) with it.

    S (..., kv_heads, D, dv), zk (..., kv_heads, D), q (..., heads, 1, d), k and v with kv_heads.

    >>> S, zk, x = np.zeros((1, 3, 1)), np.zeros((1, 3)), np.ones((1, 1, 1))
    >>> based_decode_step(S, zk, x, x, 5 * x)[0]
    array([[[5.]]])
    """
    check_attention_inputs(q, k, v)
    check_size("q", q.shape[-2], 1, "one token")
    check_size("k", k.shape[-2], 1, "one token")
    S, zk = based_state_update(S, zk, k, v, scale=scale)
    return based_read(q, S, zk, eps=eps, scale=scale), S, zk


def based_chunk(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    chunk: int,
    S0: np.ndarray | None = None,
    zk0: np.ndarray | None = None,
    *,
    eps: float = 1e-12,
    scale: float | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S7: causal o (..., heads, tokens, dv), and the state (S, zk) behind the last token.

    q (..., heads, tokens, d), k (..., kv_heads, tokens, d), v (..., kv_heads, tokens, dv); S0 and
    zk0 are the state before the first token, each zero if None. No result depends on `chunk`.

    >>> x = np.ones((1, 2, 1))
    >>> o, S, zk = based_chunk(x, x, np.array([[[1.0], [3.0]]]), 1)
    >>> o.ravel(), zk[0, 0]
    (array([1., 2.]), np.float64(2.0))
    """
    check_attention_inputs(q, k, v)
    check_size("q", q.shape[-2], k.shape[-2], "tokens, as in k")
    check_integer("chunk", chunk, least=1)
    check_eps(eps)
    S, zk = first_state(S0, zk0, k, v)
    outputs = [np.zeros_like(v, shape=(*q.shape[:-2], 0, v.shape[-1]))]
    for rows in _chunks(q.shape[-2], chunk):
        Q, K, V = (x[..., rows, :] for x in (q, k, v))
        num, den = read(taylor_features(Q, scale=scale), S, zk)
        W = np.tril(taylor_weights(Q, K, scale=scale))
        num = num + W @ repeat_heads(V, q.shape[-3])
        outputs.append(divide(num, den + np.sum(W, axis=-1), eps))
        S, zk = based_state_update(S, zk, K, V, scale=scale)
    return np.concatenate(outputs, axis=-2), S, zk


def based_chunk_backward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    chunk: int,
    S0: np.ndarray | None,
    zk0: np.ndarray | None,
    do: np.ndarray,
    dS: np.ndarray | None = None,
    dzk: np.ndarray | None = None,
    *,
    eps: float = 1e-12,
    scale: float | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """S9: dq, dk, dv, dS0, dzk0 of `based_chunk`; do, dS and dzk are shaped as its outputs.

    >>> x = np.ones((1, 2, 1))
    >>> based_chunk_backward(x, x, x, 1, None, None, x)[2].ravel()
    array([1.5, 0.5])
    """
    o, S, zk = based_chunk(q, k, v, chunk, S0, zk0, eps=eps, scale=scale)
    check_shaped("do", do, o.shape)
    R, rz = np.zeros_like(S) if dS is None else dS, np.zeros_like(zk) if dzk is None else dzk
    check_shaped("dS", R, S.shape)
    check_shaped("dzk", rz, zk.shape)
    heads, kv_heads = q.shape[-3], k.shape[-3]
    factor = chosen_scale(scale, q.shape[-1])
    S, zk = first_state(S0, zk0, k, v)
    states = []
    for rows in _chunks(q.shape[-2], chunk):
        states.append((rows, S, zk))
        S, zk = based_state_update(S, zk, k[..., rows, :], v[..., rows, :], scale=factor)
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for rows, S, zk in reversed(states):
        Q, K, V, G = (x[..., rows, :] for x in (q, k, v, do))
        values = repeat_heads(V, heads)
        phi_q, phi_k = taylor_features(Q, scale=factor), taylor_features(K, scale=factor)
        W = np.tril(taylor_weights(Q, K, scale=factor))
        den = read(phi_q, S, zk)[1] + np.sum(W, axis=-1)
        dnum, dden = share_gradient(G, o[..., rows, :], den, eps)
        dw = np.tril(dnum @ np.swapaxes(values, -1, -2) + dden[..., None])
        dq_near, dk_near = taylor_weights_backward(Q, K, dw, scale=factor)
        S_T, z_row = np.swapaxes(S, -1, -2), zk[..., None, :]
        dphi_q = dnum @ repeat_heads(S_T, heads) + dden[..., None] * repeat_heads(z_row, heads)
        dphi_k = V @ np.swapaxes(R, -1, -2) + rz[..., None, :]
        dq[..., rows, :] = dq_near + taylor_features_backward(Q, dphi_q, scale=factor)
        dk[..., rows, :] = sum_groups(dk_near, kv_heads) + taylor_features_backward(
            K, dphi_k, scale=factor
        )
        dv[..., rows, :] = sum_groups(np.swapaxes(W, -1, -2) @ dnum, kv_heads) + phi_k @ R
        R = R + sum_groups(np.swapaxes(phi_q, -1, -2) @ dnum, kv_heads)
        to_z = np.sum(phi_q * dden[..., None], axis=-2)[..., None]
        rz = rz + sum_groups(to_z, kv_heads)[..., 0]
    return dq, dk, dv, R, rz


def read(features: np.ndarray, S: np.ndarray, zk: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """S6: phi(q)^T S (..., heads, q_tokens, dv) and phi(q)^T zk (..., heads, q_tokens).

    >>> read(np.ones((1, 1, 3)), np.ones((1, 3, 2)), np.ones((1, 3)))
    (array([[[3., 3.]]]), array([[3.]]))
    """
    heads = features.shape[-3]
    den = np.sum(features * repeat_heads(zk[..., None, :], heads), axis=-1)
    return features @ repeat_heads(S, heads), den


def divide(num: np.ndarray, den: np.ndarray, eps: float) -> np.ndarray:
    """S4: num / (den + eps), and exactly 0 where den is.

    >>> divide(np.array([[4.0], [0.0]]), np.array([2.0, 0.0]), 0.0)
    array([[2.],
           [0.]])
    """
    total = np.where(den == 0, np.ones_like(den), den + eps)
    return np.where(den[..., None] == 0, np.zeros_like(num), num / total[..., None])


def share_gradient(
    G: np.ndarray, o: np.ndarray, den: np.ndarray, eps: float
) -> tuple[np.ndarray, np.ndarray]:
    """S9: dnum and dden of `divide` from the gradient G of its result o.

    >>> share_gradient(np.array([[1.0]]), np.array([[3.0]]), np.array([2.0]), 0.0)
    (array([[0.5]]), array([-1.5]))
    """
    return divide(G, den, eps), -divide(np.sum(G * o, axis=-1)[..., None], den, eps)[..., 0]


def first_state(
    S0: np.ndarray | None, zk0: np.ndarray | None, k: np.ndarray, v: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """S6, K14: the state before the first token: what is given, after a check, else zeros.

    >>> first_state(None, None, np.ones((1, 5, 2)), np.ones((1, 5, 4)))[0].shape
    (1, 7, 4)
    """
    shape = (*k.shape[:-2], feature_count(k.shape[-1]))
    S = np.zeros_like(v, shape=(*shape, v.shape[-1])) if S0 is None else S0
    zk = np.zeros_like(v, shape=shape) if zk0 is None else zk0
    check_state(S, zk, k, v, names=("S0", "zk0"))
    return S, zk


def check_state(
    S: np.ndarray,
    zk: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    names: tuple[str, str] = ("S", "zk"),
) -> None:
    """K14: S and zk are a state for tokens like k and v.

    >>> x = np.ones((1, 5, 1))
    >>> check_state(np.ones((1, 2, 1)), np.ones((1, 3)), x, x)
    Traceback (most recent call last):
    ValueError: S: got shape (1, 2, 1), expected (1, 3, 1)
    """
    shape = (*k.shape[:-2], feature_count(k.shape[-1]))
    check_shaped(names[0], S, (*shape, v.shape[-1]))
    check_shaped(names[1], zk, shape)
    for name, x in zip(names, (S, zk), strict=True):
        if x.dtype != k.dtype:
            raise TypeError(f"{name}: got dtype {x.dtype}, expected {k.dtype}, as k")


def _chunks(T: int, chunk: int) -> list[slice]:
    return [slice(first, min(first + chunk, T)) for first in range(0, T, chunk)]
