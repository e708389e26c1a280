"""Attention of `dsf`: softmax, linear and normalised. Clauses S5 to S7 and S16 are those of `dsf`.

All are causal self attention, one key head for each query head.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.conventions import (
    causal_mask,
    check_array,
    check_attention_inputs,
    check_shaped,
    check_size,
    default_scale,
)
from attnspec.reference.dense.attention import attend_backward
from attnspec.reference.linear.dsf_recurrence import (
    check_given,
    flat_scan,
    flat_scan_backward,
)
from attnspec.reference.primitives.softmax import softmax_lse

Pair = tuple[np.ndarray, np.ndarray]


def softmax_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """S6: y (..., heads, T, dv) of q, k (..., heads, T, d), v (..., heads, T, dv).

    >>> softmax_attention(*np.zeros((2, 1, 2, 1)), np.array([[[2.0], [4.0]]])).ravel()
    array([2., 3.])
    """
    check_tokens(q, k, v)
    return _weights(q, k) @ v


def softmax_attention_backward(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, dy: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S6: dq, dk, dv of `softmax_attention`.

    >>> one = np.ones((1, 1, 1))
    >>> [float(g.squeeze()) for g in softmax_attention_backward(one, one, one, 2 * one)]
    [0.0, 0.0, 2.0]
    """
    check_tokens(q, k, v)
    check_shaped("dy", dy, v.shape)
    return attend_backward(q, k, v, dy, causal=True)


def linear_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, state: Pair | None = None
) -> tuple[np.ndarray, Pair]:
    """S5: y (..., heads, T, dv) and the state: h (..., heads, dv, d), sum of features (..., heads,
    d).

    >>> v = np.array([[[2.0], [4.0]]])
    >>> y, (h, z) = linear_attention(*np.zeros((2, 1, 2, 1)), v)
    >>> y.ravel(), h.ravel(), z.ravel()
    (array([2., 3.]), array([6.]), array([2.]))
    """
    check_tokens(q, k, v)
    h0, z0 = check_pair(state, q, v)
    phi, psi = feature_map(q), feature_map(k)
    numerator, h = read_scan(phi, psi, v, h0)
    eta, z = read_scan(phi, psi, np.ones_like(v[..., :1]), z0[..., None, :])
    return _divide(numerator, eta), (h, z[..., 0, :])


def linear_attention_backward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    state: Pair | None,
    dy: np.ndarray,
    dh: np.ndarray | None = None,
    dz: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Pair | None]:
    """S16: dq, dk, dv and the pair dstate of `linear_attention`, None without a state.

    dy (..., heads, T, dv), dh (..., heads, dv, d) and dz (..., heads, d), or None, are the
    gradients of its outputs.

    >>> one = np.ones((1, 1, 1))
    >>> dq, dk, dv, _ = linear_attention_backward(one, one, one, None, 3 * one)
    >>> float(dq.squeeze()), float(dk.squeeze()), float(dv.squeeze())
    (0.0, 0.0, 3.0)
    >>> pair = 0 * one, 2 * one[0]
    >>> *_, (dh0, dz0) = linear_attention_backward(one, one, one, pair, 4 * one, one, one[0])
    >>> dh0.ravel(), dz0.ravel()
    (array([2.]), array([0.5]))
    """
    check_tokens(q, k, v)
    check_shaped("dy", dy, v.shape)
    h0, z0 = check_pair(state, q, v)
    dh, dz = check_given("dh", dh, h0.shape), check_given("dz", dz, z0.shape)
    phi, psi = feature_map(q), feature_map(k)
    ones = np.ones_like(v[..., :1])
    numerator, _ = read_scan(phi, psi, v, h0)
    eta, _ = read_scan(phi, psi, ones, z0[..., None, :])
    share = _divide(dy, eta)
    deta = -_divide(np.einsum("...v,...v->...", share, numerator)[..., None], eta)
    dphi, dpsi, dv, dh0 = read_scan_backward(phi, psi, v, h0, share, dh)
    dphi_eta, dpsi_eta, _, dz0 = read_scan_backward(
        phi, psi, ones, z0[..., None, :], deta, None if dz is None else dz[..., None, :]
    )
    return (
        (dphi + dphi_eta) * feature_slope(q),
        (dpsi + dpsi_eta) * feature_slope(k),
        dv,
        None if state is None else (dh0, dz0[..., 0, :]),
    )


def normalised_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    n: np.ndarray,
    h0: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """S7: y (..., heads, T, dv) and the last h (..., heads, dv, d).

    q, k (..., heads, T, d), v (..., heads, T, dv), n (..., heads, T).

    >>> one = np.ones((1, 2, 1))
    >>> y, h = normalised_attention(-one, one, one, np.log([[1.0, 4.0]]))
    >>> y.ravel(), h.ravel()
    (array([-1. , -0.5]), array([2.]))
    """
    check_tokens(q, k, v)
    check_shaped("n", n, q.shape[:-1])
    y, h = read_scan(q, k, v, check_state(h0, q, v))
    return np.exp(-n)[..., None] * y, h


def normalised_attention_backward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    n: np.ndarray,
    h0: np.ndarray | None,
    dy: np.ndarray,
    dh: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """S16: dq, dk, dv, dn, dh0 of `normalised_attention`; dh0 is None without an h0.

    dy (..., heads, T, dv) and dh (..., heads, dv, d), or None, are the gradients of its outputs.

    >>> one = np.ones((1, 1, 1))
    >>> [float(g.squeeze()) for g in normalised_attention_backward(
    ...     2 * one, 3 * one, one, 0 * one[..., 0], 0 * one, one)]
    [3.0, 2.0, 6.0, -6.0, 2.0]
    >>> [float(g.squeeze()) for g in normalised_attention_backward(
    ...     2 * one, 3 * one, one, 0 * one[..., 0], 0 * one, one, one)]
    [3.0, 3.0, 9.0, -6.0, 3.0]
    """
    y, _ = normalised_attention(q, k, v, n, h0)
    check_shaped("dy", dy, v.shape)
    state = check_state(h0, q, v)
    dh = check_given("dh", dh, state.shape)
    dq, dk, dv, dstate = read_scan_backward(q, k, v, state, np.exp(-n)[..., None] * dy, dh)
    dn = -np.einsum("...v,...v->...", y, dy)
    return dq, dk, dv, dn, None if h0 is None else dstate


def read_scan(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, h0: np.ndarray, a: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """S4: q_i . h_i (..., T, dv) of h_i = a_i h_(i-1) + v_i k_i^T, and the last h (..., dv, n).

    a (..., T) is 1 if absent.

    >>> one = np.ones((2, 1))
    >>> read_scan(one, one, one, 0 * one[:1])[0].ravel()
    array([1., 2.])
    """
    new = v[..., :, None] * k[..., None, :]
    states, last = flat_scan(_spread(a, new), new, h0)
    return np.einsum("...n,...vn->...v", q, states), last


def read_scan_backward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    h0: np.ndarray,
    dy: np.ndarray,
    dh: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """S16: dq, dk, dv, dh0 of `read_scan` without decay; dh (..., dv, n) is 0 if absent.

    >>> one = np.ones((1, 1))
    >>> [float(g.squeeze()) for g in read_scan_backward(2 * one, 3 * one, one, 0 * one, one, one)]
    [3.0, 3.0, 9.0, 3.0]
    """
    new = v[..., :, None] * k[..., None, :]
    a = np.ones_like(new)
    states, _ = flat_scan(a, new, h0)
    dq = np.einsum("...v,...vn->...n", dy, states)
    _, dnew, dh0 = flat_scan_backward(a, new, h0, dy[..., :, None] * q[..., None, :], dh)
    assert dh0 is not None
    return (
        dq,
        np.einsum("...vn,...v->...n", dnew, v),
        np.einsum("...vn,...n->...v", dnew, k),
        dh0,
    )


def feature_map(x: np.ndarray) -> np.ndarray:
    """S5: elu(x) + 1, positive.

    >>> feature_map(np.array([-np.log(2.0), 0.0, 2.0]))
    array([0.5, 1. , 3. ])
    """
    return np.exp(np.minimum(x, 0)) + np.maximum(x, 0)


def feature_slope(x: np.ndarray) -> np.ndarray:
    """S16: the derivative of `feature_map`.

    >>> feature_slope(np.array([-np.log(2.0), 2.0]))
    array([0.5, 1. ])
    """
    return np.exp(np.minimum(x, 0))


def _weights(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    scores = default_scale(q.shape[-1]) * (q @ np.swapaxes(k, -1, -2))
    tokens = q.shape[-2]
    weights, _ = softmax_lse(np.where(causal_mask(tokens, tokens), scores, -np.inf))
    return np.asanyarray(weights)


def _spread(a: np.ndarray | None, new: np.ndarray) -> np.ndarray:
    return np.ones_like(new) if a is None else a[..., None, None] * np.ones_like(new)


def _divide(x: np.ndarray, eta: np.ndarray) -> np.ndarray:
    """K4: 0 where eta is 0."""
    return np.where(eta == 0, np.zeros_like(x), x / np.where(eta == 0, np.ones_like(eta), eta))


def check_tokens(q: Any, k: Any, v: Any) -> None:
    """K14: one key and value for each query, no groups of heads.

    >>> check_tokens(*(np.ones((heads, 1, 1)) for heads in (2, 1, 1)))
    Traceback (most recent call last):
    ValueError: k: got 1, expected 2 (heads, as in q)
    """
    check_attention_inputs(q, k, v)
    check_size("k", k.shape[-3], q.shape[-3], "heads, as in q")
    check_size("k", k.shape[-2], q.shape[-2], "tokens, as in q")


def check_state(h0: Any, q: np.ndarray, v: np.ndarray) -> np.ndarray:
    """K14: h0 (..., heads, dv, d), or zeros.

    >>> check_state(None, np.ones((1, 2, 3)), np.ones((1, 2, 1)))
    array([[[0., 0., 0.]]])
    """
    shape = (*q.shape[:-2], v.shape[-1], q.shape[-1])
    if h0 is None:
        return np.zeros_like(q, shape=shape)
    check_shaped("h0", h0, shape)
    return np.asanyarray(h0)


def check_pair(state: Any, q: np.ndarray, v: np.ndarray) -> Pair:
    """K14: h (..., heads, dv, d) and the sum of features (..., heads, d), or zeros.

    >>> check_pair(5, *np.ones((2, 1, 1, 1)))
    Traceback (most recent call last):
    TypeError: state: got int, expected (h, z)
    """
    shape = (*q.shape[:-2], q.shape[-1])
    if state is None:
        return check_state(None, q, v), np.zeros_like(q, shape=shape)
    if not isinstance(state, tuple) or len(state) != 2:
        raise TypeError(f"state: got {type(state).__name__}, expected (h, z)")
    check_array("state", state[0], ())
    check_shaped("state", state[0], (*shape[:-1], v.shape[-1], shape[-1]))
    check_shaped("state", state[1], shape)
    return state
