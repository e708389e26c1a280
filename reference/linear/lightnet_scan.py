"""LightNet's recurrences: gates from logits, the general additive rule, and a scan with a decay for
every channel. The clauses are those of `lightnet`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.conventions import (
    check_array,
    check_attention_inputs,
    check_shaped,
    check_size,
)

RuleState = tuple[np.ndarray, np.ndarray, np.ndarray]


def additive_gates(
    k: np.ndarray, z0: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S4: kbar and log_decay (..., T, d), and the last z (..., d), of logits k (..., T, d).

    z0 (..., d) is the log of the sum before the first token, -inf if absent.

    >>> kbar, log_decay, z = additive_gates(np.zeros((3, 1)))
    >>> np.round(1 / kbar.ravel(), 3), np.round(np.exp(log_decay.ravel()), 3)
    (array([1., 2., 3.]), array([1.   , 0.5  , 0.667]))
    """
    check_array("k", k, ("T", "d"))
    top = np.full_like(k[..., :1, :].sum(axis=-2), -np.inf) if z0 is None else z0
    check_shaped("z0", top, (*k.shape[:-2], k.shape[-1]))
    total = np.where(np.isneginf(top), np.zeros_like(top), np.ones_like(top))
    kbar, log_decay = np.zeros_like(k), np.zeros_like(k)
    for t in range(k.shape[-2]):
        new = k[..., t, :]
        first, masked = total == 0, np.isneginf(new)
        x = finite(new) - finite(top) - np.log(np.where(first, np.ones_like(total), total))
        kbar[..., t, :] = np.where(masked, 0.0, np.where(first, 1.0, np.exp(-softplus(-x))))
        log_decay[..., t, :] = np.where(first | masked, 0.0, -softplus(x))
        above = np.maximum(top, new)
        total = np.exp(top - finite(above)) * total + np.exp(new - finite(above))
        top = above
    z = np.where(total == 0, -np.inf, top + np.log(np.where(total == 0, 1.0, total)))
    return kbar, log_decay, z.astype(k.dtype)


def additive_rule(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    g: np.ndarray,
    state: RuleState | None = None,
) -> tuple[np.ndarray, RuleState]:
    """S1, S2, S7: o (..., heads, T, e) and the state (s, Delta, m) of keys k under gates g.

    q, k, g (..., heads, T, d), v (..., heads, T, e); s (..., heads, d, e), Delta and m (..., heads,
    d). A gate of -inf is a token that is not there.

    >>> one = np.ones((1, 2, 1))
    >>> o, (s, Delta, m) = additive_rule(one, one, np.array([[[2.0], [4.0]]]), 0 * one)
    >>> o.ravel(), s.ravel(), Delta.ravel(), m.ravel()
    (array([2., 3.]), array([6.]), array([2.]), array([0.]))
    """
    check_tokens(q, k, v)
    check_shaped("g", g, q.shape)
    shape = (*q.shape[:-2], q.shape[-1])
    if state is None:
        s = np.zeros_like(q, shape=(*shape, v.shape[-1]))
        Delta, m = np.zeros_like(q, shape=shape), np.full_like(q, -np.inf, shape=shape)
    else:
        if not isinstance(state, tuple) or len(state) != 3:
            raise TypeError(f"state: got {type(state).__name__}, expected (s, Delta, m)")
        s, Delta, m = state
        for x, expected in ((s, (*shape, v.shape[-1])), (Delta, shape), (m, shape)):
            check_shaped("state", x, expected)
    o = np.zeros_like(v)
    for t in range(q.shape[-2]):
        gate = g[..., t, :]
        above = np.maximum(m, gate)
        old, new = np.exp(m - finite(above)), np.exp(gate - finite(above))
        key = new * k[..., t, :]
        s = old[..., None] * s + key[..., None] @ v[..., t, None, :]
        Delta, m = old * Delta + new, above
        share = q[..., t, :] / np.where(Delta == 0, np.ones_like(Delta), Delta)
        o[..., t, :] = np.einsum("...d,...de->...e", share, s)
    return o, (s, Delta, m)


def additive_rule_backward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    g: np.ndarray,
    state: RuleState | None,
    do: np.ndarray,
    ds: np.ndarray | None = None,
    dDelta: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, RuleState]:
    """S16: dq, dk, dv, dg of `additive_rule` and the gradient of the state before; do, ds and
    dDelta are shaped as its outputs.

    >>> one = np.ones((1, 2, 1))
    >>> v = np.array([[[2.0], [4.0]]])
    >>> gradients = additive_rule_backward(one, one, v, 0 * one, None, one)
    >>> [x.ravel() for x in gradients[1:4]]
    [array([3., 2.]), array([1.5, 0.5]), array([-0.5,  0.5])]
    """
    _, (s, Delta, _) = additive_rule(q, k, v, g, state)
    S0, z0 = None, None
    if state is not None:
        empty = state[1] == 0
        total = np.where(empty, np.ones_like(state[1]), state[1])
        S0 = np.where(empty[..., None], np.zeros_like(state[0]), state[0] / total[..., None])
        z0 = np.where(empty, -np.inf, state[2] + np.log(total))
    weights, log_decay, _ = additive_gates(g, z0)
    dS, dz = np.zeros_like(s), np.zeros_like(Delta)
    if ds is not None:
        check_shaped("ds", ds, s.shape)
        dS, dz = Delta[..., None] * ds, np.sum(s * ds, axis=-1)
    if dDelta is not None:
        check_shaped("dDelta", dDelta, Delta.shape)
        dz = dz + Delta * dDelta
    dq, dkbar, dv, dw, dS0 = vector_decay_backward(q, weights * k, v, log_decay, S0, do, dS)
    dg = np.zeros_like(g)
    for t in reversed(range(g.shape[-2])):
        gate, w, di = weights[..., t, :], log_decay[..., t, :], k[..., t, :] * dkbar[..., t, :]
        first = (w == 0) & (gate == 1)
        dw_t = np.where(first, np.zeros_like(dz), dw[..., t, :])
        dz = dz - gate * di - dw_t
        dg[..., t, :] = gate * (di + dz)
        dz = np.where(first, np.zeros_like(dz), np.exp(w) * dz + dw_t)
    before = (np.zeros_like(s), np.zeros_like(Delta), np.zeros_like(Delta))
    if S0 is not None:
        dm = np.where(empty, np.zeros_like(dz), dz)
        dtotal = (dm - np.sum(S0 * dS0, axis=-1)) / total
        before = (
            np.where(empty[..., None], np.zeros_like(s), dS0 / total[..., None]),
            np.where(empty, np.zeros_like(dtotal), dtotal),
            dm,
        )
    return dq, weights * dkbar, dv, dg, before


def vector_decay_attend(
    q: np.ndarray,
    kbar: np.ndarray,
    v: np.ndarray,
    log_decay: np.ndarray,
    S0: np.ndarray | None = None,
    *,
    scale: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """S5: o (..., heads, T, e) and the last S (..., heads, d, e).

    q, kbar, log_decay (..., heads, T, d), v (..., heads, T, e); log decays are at most 0.

    >>> one, half = np.ones((1, 2, 1)), np.full((1, 2, 1), np.log(0.5))
    >>> o, S = vector_decay_attend(one, one, one, half)
    >>> o.ravel(), S.ravel()
    (array([1. , 1.5]), array([1.5]))
    """
    S = first_state(q, kbar, v, log_decay, S0, scale)
    o = np.zeros_like(v)
    for t in range(q.shape[-2]):
        S = step_state(S, kbar, v, log_decay, t)
        o[..., t, :] = scale * np.einsum("...d,...de->...e", q[..., t, :], S)
    return o, S


def vector_decay_backward(
    q: np.ndarray,
    kbar: np.ndarray,
    v: np.ndarray,
    log_decay: np.ndarray,
    S0: np.ndarray | None,
    do: np.ndarray,
    dS: np.ndarray | None = None,
    *,
    scale: float = 1.0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """S9: dq, dkbar, dv, dlog_decay and dS0 of `vector_decay_attend`; do and dS are shaped as its
    outputs. No S0 means zeros, for which dS0 is returned all the same.

    >>> one = np.ones((1, 1, 1))
    >>> gradients = vector_decay_backward(one, 2 * one, 3 * one, 0 * one, None, one)
    >>> [float(x.squeeze()) for x in gradients]
    [6.0, 3.0, 2.0, 0.0, 1.0]
    """
    S = first_state(q, kbar, v, log_decay, S0, scale)
    check_shaped("do", do, v.shape)
    R = np.zeros_like(S) if dS is None else dS
    check_shaped("dS", R, S.shape)
    dq, dkbar, dv, dlog_decay = (np.zeros_like(x) for x in (q, kbar, v, log_decay))
    for t in range(q.shape[-2]):
        S = step_state(S, kbar, v, log_decay, t)
        dq[..., t, :] = scale * np.einsum("...de,...e->...d", S, do[..., t, :])
    suffix = np.sum(S * R, axis=-1)
    for t in reversed(range(q.shape[-2])):
        R = scale * (q[..., t, :, None] @ do[..., t, None, :]) + R
        dkbar[..., t, :] = np.einsum("...de,...e->...d", R, v[..., t, :])
        dv[..., t, :] = np.einsum("...de,...d->...e", R, kbar[..., t, :])
        R = np.exp(log_decay[..., t, :, None]) * R
        read, written = q[..., t, :] * dq[..., t, :], kbar[..., t, :] * dkbar[..., t, :]
        suffix = suffix + read - written
        dlog_decay[..., t, :] = suffix
    return dq, dkbar, dv, dlog_decay, R


def first_state(q: Any, kbar: Any, v: Any, log_decay: Any, S0: Any, scale: Any) -> np.ndarray:
    """S5, K14: S0 or zeros, once all arguments fit one another.

    >>> first_state(*np.ones((3, 1, 2, 1)), np.ones((1, 2, 1)), None, 1.0)
    Traceback (most recent call last):
    ValueError: log_decay: got a value above 0 or NaN, expected at most 0
    """
    check_tokens(q, kbar, v, name="kbar")
    check_shaped("log_decay", log_decay, q.shape)
    if not np.all(log_decay <= 0):
        raise ValueError("log_decay: got a value above 0 or NaN, expected at most 0")
    check_scale(scale)
    shape = (*q.shape[:-2], q.shape[-1], v.shape[-1])
    if S0 is None:
        return np.zeros_like(q, shape=shape)
    check_shaped("S0", S0, shape)
    return S0


def step_state(
    S: np.ndarray, kbar: np.ndarray, v: np.ndarray, log_decay: np.ndarray, t: int
) -> np.ndarray:
    """S5: the state with token t.

    >>> step_state(np.ones((1, 1)), np.ones((1, 1)), np.ones((1, 1)), np.zeros((1, 1)), 0)
    array([[2.]])
    """
    decayed = np.exp(log_decay[..., t, :, None]) * S
    return decayed + kbar[..., t, :, None] @ v[..., t, None, :]


def softplus(x: np.ndarray) -> np.ndarray:
    """log(1 + e^x), to full relative precision on both sides.

    >>> softplus(np.array([-800.0, 800.0]))
    array([  0., 800.])
    """
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def finite(x: np.ndarray) -> np.ndarray:
    """x with 0 for -inf.

    >>> finite(np.array([-np.inf, 1.0]))
    array([0., 1.])
    """
    return np.where(np.isneginf(x), np.zeros_like(x), x)


def check_tokens(q: Any, k: Any, v: Any, name: str = "k") -> None:
    """K14: one key for each query and no groups of heads.

    >>> check_tokens(*(np.ones((heads, 1, 1)) for heads in (2, 1, 1)))
    Traceback (most recent call last):
    ValueError: k: got 1, expected 2 (heads, as in q)
    """
    check_array(name, k, ("heads", "T", "d"))
    check_attention_inputs(q, k, v)
    check_size(name, k.shape[-3], q.shape[-3], "heads, as in q")
    check_size(name, k.shape[-2], q.shape[-2], "tokens, as in q")


def check_scale(scale: Any) -> None:
    """K14: a positive number.

    >>> check_scale(0)
    Traceback (most recent call last):
    ValueError: scale: got 0, expected a number > 0
    """
    if isinstance(scale, bool) or not isinstance(scale, (int, float, np.floating, np.integer)):
        raise TypeError(f"scale: got {type(scale).__name__}, expected a number > 0")
    if not scale > 0:
        raise ValueError(f"scale: got {scale}, expected a number > 0")
