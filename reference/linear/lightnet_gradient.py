"""The gradient of LightNet in order. The clauses are those of `lightnet`."""

from __future__ import annotations

import numpy as np

from attnspec.reference.conventions import (
    check_attention_inputs,
    check_shaped,
    check_size,
    repeat_heads,
)
from attnspec.reference.dense.attention_gradient import sum_groups
from attnspec.reference.linear.lightnet_scan import (
    additive_gates,
    check_scale,
    vector_decay_attend,
    vector_decay_backward,
)

State = tuple[np.ndarray, np.ndarray]


def lightnet_causal_backward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    state: State | None,
    do: np.ndarray,
    dS: np.ndarray | None = None,
    dz: np.ndarray | None = None,
    *,
    scale: float = 1.0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, State]:
    """S9, S10: dq, dk, dv of `lightnet_causal` and the gradient (dS0, dz0) of the state before.

    do, dS and dz are shaped as its outputs. No state means S = 0 and z = -inf.

    >>> one = np.ones((1, 1, 1))
    >>> dq, dk, dv, (dS0, dz0) = lightnet_causal_backward(one, one, 5 * one, None, one)
    >>> [float(x.squeeze()) for x in (dq, dk, dv, dz0)]
    [5.0, 0.0, 1.0, 0.0]
    """
    S0, z0 = check_state(state, q, k, v)
    check_scale(scale)
    check_shaped("do", do, (*q.shape[:-1], v.shape[-1]))
    kv_heads = k.shape[-3]
    k, v = repeat_heads(k, q.shape[-3]), repeat_heads(v, q.shape[-3])
    kbar, log_decay, _ = additive_gates(k, z0)
    S = vector_decay_attend(q, kbar, v, log_decay, S0, scale=scale)[1]
    dq, dkbar, dv, _, dS0 = vector_decay_backward(q, kbar, v, log_decay, S0, do, dS, scale=scale)
    dk, mean = np.zeros_like(k), np.zeros_like(S[..., 0])
    if dS is not None:
        mean = mean + np.sum(S * dS, axis=-1)
    if dz is not None:
        check_shaped("dz", dz, mean.shape)
        mean = mean - dz
    for t in reversed(range(k.shape[-2])):
        mean = q[..., t, :] * dq[..., t, :] + mean
        dk[..., t, :] = kbar[..., t, :] * (dkbar[..., t, :] - mean)
        mean = np.exp(log_decay[..., t, :]) * mean
    dz0 = np.zeros_like(mean)
    if state is not None:
        seen = ~np.isneginf(state[1])
        dz0 = np.where(seen, np.sum(state[0] * dS0, axis=-1) - mean, dz0)
    return dq, sum_groups(dk, kv_heads), sum_groups(dv, kv_heads), (dS0, dz0)


def check_state(
    state: State | None, q: np.ndarray, k: np.ndarray, v: np.ndarray
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """K14: S and z of a state, or None and None, once all arguments fit one another.

    >>> check_state(5, *np.ones((3, 1, 1, 1)))
    Traceback (most recent call last):
    TypeError: state: got int, expected (S, z)
    """
    check_attention_inputs(q, k, v)
    check_size("q", q.shape[-2], k.shape[-2], "tokens, as in k")
    return state_of_shape(state, (*q.shape[:-2], q.shape[-1], v.shape[-1]))


def state_of_shape(
    state: State | None, shape: tuple[int, ...]
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """K14: S of this shape and z without its last axis, or None and None.

    >>> state_of_shape((np.ones((1, 2)), np.ones(2)), (1, 2))
    Traceback (most recent call last):
    ValueError: state: got shape (2,), expected (1,)
    """
    if state is None:
        return None, None
    if not isinstance(state, tuple) or len(state) != 2:
        raise TypeError(f"state: got {type(state).__name__}, expected (S, z)")
    for x, expected in zip(state, (shape, shape[:-1]), strict=True):
        check_shaped("state", x, expected)
    return state
