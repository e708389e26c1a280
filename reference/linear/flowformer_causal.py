"""Flowformer under a causal order: the clauses S7 to S11 of `flowformer`, with a state."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from attnspec.reference.conventions import (
    check_attention_inputs,
    check_shaped,
    check_size,
    repeat_heads,
)
from attnspec.reference.dense.attention_gradient import sum_groups
from attnspec.reference.linear.flowformer_flows import (
    Clamp,
    check_eps,
    clip,
    dot,
    features_slope,
    flow_features,
    over_square,
    quotient,
)
from attnspec.reference.primitives.sigmoid import sigmoid


class FlowState(NamedTuple):
    """S11: the sums of b, a, b N / O and a N / I (..., heads, d), of exp(Oh) (..., heads), of b
    (c v)^T (..., heads, d, dv), and the number of tokens N (..., heads), all for query heads.
    """

    sb: np.ndarray
    sa: np.ndarray
    sbO: np.ndarray  # noqa: N815
    saI: np.ndarray  # noqa: N815
    se: np.ndarray
    KV: np.ndarray
    N: np.ndarray


def flow_attend_causal(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    state: FlowState | None = None,
    *,
    eps: float = 1e-6,
    kind: str = "sigmoid",
    clamp: Clamp = (-1.0, 1.0),
) -> tuple[np.ndarray, FlowState]:
    """S7-S11: out (..., heads, T, dv), and the state behind the last token.

    q (..., heads, T, d), k (..., kv_heads, T, d), v (..., kv_heads, T, dv).

    >>> x = np.zeros((1, 2, 1))
    >>> flow_attend_causal(x, x, np.array([[[1.0], [3.0]]]), eps=0.0)[0].round(3).ravel()
    array([0.731, 1.462])
    """
    check_causal(q, k, v, eps)
    state = empty_state(q, v) if state is None else state
    outputs = [np.zeros_like(v, shape=(*q.shape[:-2], 0, v.shape[-1]))]
    for t in range(q.shape[-2]):
        now = slice(t, t + 1)
        out, state = flow_decode_step(
            state, q[..., now, :], k[..., now, :], v[..., now, :], eps=eps, kind=kind, clamp=clamp
        )
        outputs.append(out)
    if not q.shape[-2]:
        check_state(state, q, v)
        clip(state.se, clamp)
        flow_features(q, kind)
    return np.concatenate(outputs, axis=-2), state


def flow_decode_step(
    state: FlowState,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    eps: float = 1e-6,
    kind: str = "sigmoid",
    clamp: Clamp = (-1.0, 1.0),
) -> tuple[np.ndarray, FlowState]:
    """S7-S11: out (..., heads, 1, dv) of one token, and the state with it.

    >>> x = np.zeros((1, 1, 1))
    >>> out, state = flow_decode_step(empty_state(x, x), x, x, x + 1, eps=0.0)
    >>> out.round(3), state.N
    (array([[[0.731]]]), array([1.]))
    """
    check_causal(q, k, v, eps)
    check_size("q", q.shape[-2], 1, "one token")
    check_state(state, q, v)
    a, b = flow_features(q, kind), flow_features(repeat_heads(k, q.shape[-3]), kind)
    values = repeat_heads(v, q.shape[-3])
    a_t, b_t = a[..., 0, :], b[..., 0, :]
    N = state.N + 1
    sb, sa = state.sb + b_t, state.sa + a_t
    I, O = dot(a_t + eps, sb + eps), dot(b_t + eps, sa + eps)
    sbO, saI = state.sbO + quotient(b_t, O / N), state.saI + quotient(a_t, I / N)
    Ih, Oh = dot(a_t + eps, sbO + eps) / N, dot(b_t + eps, saI + eps) / N
    e = np.exp(clip(Oh, clamp))
    se = state.se + e
    c = N * e / se
    KV = state.KV + np.swapaxes(b, -1, -2) @ (c[..., None, None] * values)
    out = sigmoid(Ih)[..., None, None] * quotient(a @ KV, I[..., None])
    return out, FlowState(sb, sa, sbO, saI, se, KV, N)


def flow_causal_backward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    state: FlowState | None,
    dout: np.ndarray,
    dsb: np.ndarray | None = None,
    dsa: np.ndarray | None = None,
    dsbO: np.ndarray | None = None,
    dsaI: np.ndarray | None = None,
    dse: np.ndarray | None = None,
    dKV: np.ndarray | None = None,
    dN: np.ndarray | None = None,
    *,
    eps: float = 1e-6,
    kind: str = "sigmoid",
    clamp: Clamp = (-1.0, 1.0),
) -> tuple[np.ndarray, np.ndarray, np.ndarray, FlowState]:
    """S13: dq, dk, dv of `flow_attend_causal` and the gradient of the state before.

    dout is shaped as out; behind it come the gradients of the parts of the state behind the last
    token, in their order, each None if it is not used. No state means an empty one.

    >>> x = np.zeros((1, 2, 1))
    >>> flow_causal_backward(x, x, x, None, x + 1)[2].ravel().round(3)
    array([1.097, 0.366])
    """
    check_causal(q, k, v, eps)
    first = empty_state(q, v) if state is None else state
    check_state(first, q, v)
    last = _upstream(first, (dsb, dsa, dsbO, dsaI, dse, dKV, dN))
    heads = q.shape[-3]
    keys, values = repeat_heads(k, heads), repeat_heads(v, heads)
    a, b = flow_features(q, kind), flow_features(keys, kind)
    A, B = a + eps, b + eps
    N = first.N[..., None] + np.cumsum(np.ones_like(a[..., 0]), axis=-1)
    sb, sa = _running(first.sb, b), _running(first.sa, a)
    I, O = dot(A, sb + eps), dot(B, sa + eps)
    into, out_of = _running(first.sbO, quotient(b, O / N)), _running(first.saI, quotient(a, I / N))
    Ih, Oh = dot(A, into + eps) / N, dot(B, out_of + eps) / N
    x, g = clip(Oh, clamp), sigmoid(Ih)
    e = np.exp(x)
    E = first.se[..., None] + np.cumsum(e, axis=-1)
    c = N * e / E
    u = c[..., None] * values

    y, dr = np.zeros_like(dout), np.zeros_like(dout)
    da, db, du = np.zeros_like(a), np.zeros_like(b), np.zeros_like(u)
    S = first.KV
    for t in range(q.shape[-2]):
        now = slice(t, t + 1)
        S = S + np.swapaxes(b[..., now, :], -1, -2) @ u[..., now, :]
        y[..., now, :] = quotient(a[..., now, :] @ S, I[..., now])
        dr[..., now, :] = quotient(g[..., now, None] * dout[..., now, :], I[..., now])
        da[..., now, :] = dr[..., now, :] @ np.swapaxes(S, -1, -2)
    R = last.KV
    for t in reversed(range(q.shape[-2])):
        now = slice(t, t + 1)
        R = R + np.swapaxes(a[..., now, :], -1, -2) @ dr[..., now, :]
        db[..., now, :] = u[..., now, :] @ np.swapaxes(R, -1, -2)
        du[..., now, :] = b[..., now, :] @ R
    dI = -dot(dr, y)
    dIh = dot(dout, y) * g * sigmoid(-Ih) / N
    dc = dot(values, du)
    dE = -dc * c / E
    dx = dc * c + e * (_backward_sum(dE, -1) + last.se[..., None])
    dOh = np.where(x == Oh, dx, np.zeros_like(dx)) / N
    dinto = _backward_sum(dIh[..., None] * A) + last.sbO[..., None, :]
    dout_of = _backward_sum(dOh[..., None] * B) + last.saI[..., None, :]
    dA, dB = dIh[..., None] * (into + eps), dOh[..., None] * (out_of + eps)
    da, db = da + quotient(dout_of, I / N), db + quotient(dinto, O / N)
    by_I, by_O = dot(dout_of, a), dot(dinto, b)
    dI, dO = dI - over_square(N * by_I, I), -over_square(N * by_O, O)
    dA, dB = dA + dI[..., None] * (sb + eps), dB + dO[..., None] * (sa + eps)
    da = da + dA + _backward_sum(dO[..., None] * B) + last.sa[..., None, :]
    db = db + dB + _backward_sum(dI[..., None] * A) + last.sb[..., None, :]
    shares = _shares(by_I, I) + _shares(by_O, O)
    counts = shares + dc * e / E - dIh * Ih - dOh * Oh
    before = FlowState(
        sb=last.sb + np.sum(dI[..., None] * A, axis=-2),
        sa=last.sa + np.sum(dO[..., None] * B, axis=-2),
        sbO=last.sbO + np.sum(dIh[..., None] * A, axis=-2),
        saI=last.saI + np.sum(dOh[..., None] * B, axis=-2),
        se=last.se + np.sum(dE, axis=-1),
        KV=R,
        N=last.N + np.sum(counts, axis=-1),
    )
    return (
        da * features_slope(q, kind),
        sum_groups(db * features_slope(keys, kind), k.shape[-3]),
        sum_groups(c[..., None] * du, v.shape[-3]),
        before,
    )


def empty_state(q: np.ndarray, v: np.ndarray) -> FlowState:
    """S11: the state before the first token, for tokens like q and v.

    >>> empty_state(np.ones((2, 5, 3)), np.ones((1, 5, 4))).KV.shape
    (2, 3, 4)
    """
    sums = np.zeros_like(q, shape=(*q.shape[:-2], q.shape[-1]))
    one = np.zeros_like(q, shape=q.shape[:-2])
    KV = np.zeros_like(v, shape=(*sums.shape, v.shape[-1]))
    return FlowState(sums, sums, sums, sums, one, KV, one)


def check_causal(q: np.ndarray, k: np.ndarray, v: np.ndarray, eps: float) -> None:
    """K14: as many queries as keys: the causal form has no meaning for others.

    >>> x = np.ones((1, 2, 1))
    >>> check_causal(x, x[:, :1], x[:, :1], 0.0)
    Traceback (most recent call last):
    ValueError: q: got 2, expected 1 (tokens, as in k)
    """
    check_attention_inputs(q, k, v)
    check_size("q", q.shape[-2], k.shape[-2], "tokens, as in k")
    check_eps(eps)


def check_state(state: FlowState, q: np.ndarray, v: np.ndarray) -> None:
    """K14: `state` has seven arrays shaped for tokens like q and v.

    >>> x = np.ones((1, 1, 1))
    >>> check_state(empty_state(x, x)._replace(N=np.ones(3)), x, x)
    Traceback (most recent call last):
    ValueError: state.N: got shape (3,), expected (1,)
    """
    if not isinstance(state, tuple) or len(state) != len(FlowState._fields):
        raise TypeError(f"state: got {type(state).__name__}, expected FlowState")
    for name, x, expected in zip(FlowState._fields, state, empty_state(q, v), strict=True):
        if not isinstance(x, np.ndarray) or x.dtype != q.dtype:
            raise TypeError(f"state.{name}: got {type(x).__name__}, expected {q.dtype} numbers")
        if x.shape != expected.shape:
            raise ValueError(f"state.{name}: got shape {x.shape}, expected {expected.shape}")


def _upstream(state: FlowState, given: tuple[np.ndarray | None, ...]) -> FlowState:
    """K14: gradients of the parts of a state, zeros for those that are None."""
    parts = []
    for name, dx, x in zip(FlowState._fields, given, state, strict=True):
        parts.append(np.zeros_like(x) if dx is None else dx)
        check_shaped(f"d{name}", parts[-1], x.shape)
    return FlowState(*parts)


def _shares(x: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """x / flow, both (..., tokens), and 0 where the flow is 0."""
    return quotient(x[..., None], flow)[..., 0]


def _running(first: np.ndarray, x: np.ndarray) -> np.ndarray:
    return first[..., None, :] + np.cumsum(x, axis=-2)


def _backward_sum(x: np.ndarray, axis: int = -2) -> np.ndarray:
    """The sum over each token and all later ones."""
    return np.flip(np.cumsum(np.flip(x, axis), axis=axis), axis)
