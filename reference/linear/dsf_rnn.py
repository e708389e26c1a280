"""Recurrent mixers of `dsf`: qLSTM and RG-LRU. Clauses S10 to S12 and S16 are those of `dsf`."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.conventions import check_array, check_bool, check_shaped
from attnspec.reference.linear.dsf_recurrence import (
    check_given,
    check_number,
    elementwise_scan,
    elementwise_scan_backward,
    sigmoid_power,
    softplus,
)


def qlstm(
    f: np.ndarray,
    i: np.ndarray,
    o: np.ndarray,
    z: np.ndarray,
    alpha: float = 1.0,
    reversed: bool = False,
    h0: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """S11: y (..., T, N) and the last h (..., N), of pre-activations f, i, o and inputs z (..., T,
    N); h0 (..., N) or None. `alpha`, a number or an array of no axes, is only used by the reversed
    gate.

    >>> zero = np.zeros((2, 1))
    >>> y, h = qlstm(zero, zero, zero, 4 + zero)
    >>> y.ravel(), h
    (array([1. , 1.5]), array([3.]))
    """
    check_gates(f, i, o, alpha, reversed)
    check_shaped("z", z, f.shape)
    states, last = elementwise_scan(
        forget_gate(f, alpha, reversed), sigmoid_power(i) * z, check_given("h0", h0, _last(z))
    )
    return sigmoid_power(o) * states, last


def qlstm_backward(
    f: np.ndarray,
    i: np.ndarray,
    o: np.ndarray,
    z: np.ndarray,
    h0: np.ndarray | None,
    dy: np.ndarray,
    dh: np.ndarray | None = None,
    *,
    alpha: float = 1.0,
    reversed: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """S16: df, di, do, dz, dalpha, dh0 of `qlstm`; dh0 is None without an h0.

    dy (..., T, N) and dh (..., N), or None, are the gradients of its outputs. dalpha has no axes;
    it is 0 where alpha is not used or below 0, and at 0 the slope above (ours).

    >>> zero = np.zeros((1, 1))
    >>> start, one = zero[0], 1 + zero
    >>> [float(g.squeeze()) for g in qlstm_backward(zero, zero, zero, 8 * one, start, one)]
    [0.0, 1.0, 1.0, 0.25, 0.0, 0.25]
    >>> [float(g.squeeze()) for g in qlstm_backward(zero, zero, zero, 8 * one, start, one, one[0])]
    [0.0, 3.0, 1.0, 0.75, 0.0, 0.75]
    >>> qlstm_backward(zero, zero, zero, zero, one[0], 4 * one, reversed=True)[4].round(4)
    np.float64(-0.6931)
    """
    check_gates(f, i, o, alpha, reversed)
    check_shaped("z", z, f.shape)
    check_shaped("dy", dy, z.shape)
    dh = check_given("dh", dh, _last(z))
    a, enter, read = forget_gate(f, alpha, reversed), sigmoid_power(i), sigmoid_power(o)
    first = check_given("h0", h0, _last(z))
    states, _ = elementwise_scan(a, enter * z, first)
    da, dx, dh0 = elementwise_scan_backward(a, enter * z, first, read * dy, dh)
    kept = da * a
    if reversed:
        slope = -max(alpha, 0.0) * sigmoid_power(f)
        # Where nothing is kept, not even an infinite exponent changes anything.
        by_power = -np.where(kept == 0, np.zeros_like(kept), kept * softplus(f))
    else:
        slope, by_power = sigmoid_power(-f), np.zeros_like(kept)
    dalpha = np.asanyarray(np.sum(by_power if alpha >= 0 else np.zeros_like(kept)))
    return (
        kept * slope,
        dx * z * enter * sigmoid_power(-i),
        dy * states * read * sigmoid_power(-o),
        dx * enter,
        dalpha,
        dh0,
    )


def forget_gate(f: np.ndarray, alpha: float = 1.0, reversed: bool = False) -> np.ndarray:
    """S10, S11: a of pre-activations f.

    >>> forget_gate(np.zeros(1)), forget_gate(np.zeros(1), 2.0, True)
    (array([0.5]), array([0.25]))
    """
    return sigmoid_power(-f, max(alpha, 0.0)) if reversed else sigmoid_power(f)


def rg_lru(
    u: np.ndarray,
    r: np.ndarray,
    g: np.ndarray,
    lam: np.ndarray,
    *,
    c: float = 8.0,
    h0: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """S12: y (..., T, N) and the last h (..., N).

    u, r, g (..., T, N): inputs, pre-activations of the decay and of the input gate; lam (N,), h0
    (..., N) or None.

    >>> zero = np.zeros((2, 1))
    >>> y, h = rg_lru(2 + zero, zero, zero, np.full(1, 50.0))
    >>> np.round(y, 3).ravel()
    array([1., 1.])
    """
    check_array("u", u, ("T", "N"))
    check_rg_lru(r, g, lam, c, u)
    log_decay, strength = rg_lru_gates(r, g, lam, c)
    return elementwise_scan(np.exp(log_decay), strength * u, check_given("h0", h0, _last(u)))


def rg_lru_gates(
    r: np.ndarray, g: np.ndarray, lam: np.ndarray, c: float
) -> tuple[np.ndarray, np.ndarray]:
    """S12: the log of Lambda and the diagonal of B (..., T, N).

    >>> w, strength = rg_lru_gates(np.zeros(1), np.zeros(1), np.full(1, 50.0), 8.0)
    >>> w, strength
    (array([-200.]), array([0.5]))
    """
    log_decay = -c * softplus(lam) * sigmoid_power(r)
    return log_decay, np.sqrt(-np.expm1(2 * log_decay)) * sigmoid_power(g)


def rg_lru_backward(
    u: np.ndarray,
    r: np.ndarray,
    g: np.ndarray,
    lam: np.ndarray,
    dy: np.ndarray,
    dh: np.ndarray | None = None,
    *,
    c: float = 8.0,
    h0: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """S16: du, dr, dg, dlam, dh0 of `rg_lru`; dh0 is None without an h0.

    dy (..., T, N) and dh (..., N), or None, are the gradients of its outputs. A root of 0 counts as
    a constant (ours).

    >>> zero = np.zeros((1, 1))
    >>> [float(np.round(x, 3).squeeze()) for x in rg_lru_backward(
    ...     2 + zero, zero, zero, np.full(1, 50.0), 1 + zero, 2 + zero[0], h0=zero[0])]
    [1.5, 0.0, 1.5, 0.0, 0.0]
    """
    check_array("u", u, ("T", "N"))
    check_rg_lru(r, g, lam, c, u)
    check_shaped("dy", dy, u.shape)
    first, dh = check_given("h0", h0, _last(u)), check_given("dh", dh, _last(u))
    log_decay, strength = rg_lru_gates(r, g, lam, c)
    decay = np.exp(log_decay)
    da, dx, dh0 = elementwise_scan_backward(decay, strength * u, first, dy, dh)
    lost = -np.expm1(2 * log_decay)
    forgets = lost > 0
    droot = dx * u * sigmoid_power(g) / np.sqrt(np.where(forgets, lost, np.ones_like(lost)))
    dlog = decay * (da - np.where(forgets, droot * decay, np.zeros_like(droot)))
    dr = dlog * log_decay * sigmoid_power(-r)
    dlam = -c * dlog * sigmoid_power(r) * sigmoid_power(lam)
    return (
        dx * strength,
        dr,
        dx * u * strength * sigmoid_power(-g),
        np.sum(dlam, axis=tuple(range(u.ndim - 1))),
        dh0,
    )


def _last(x: np.ndarray) -> tuple[int, ...]:
    return *x.shape[:-2], x.shape[-1]


def check_gates(f: Any, i: Any, o: Any, alpha: Any, reversed: Any) -> None:
    """S11, K14: gates have one shape.

    >>> check_gates(*np.ones((3, 2, 1)), 1.0, 1)
    Traceback (most recent call last):
    TypeError: reversed: got 1, expected True or False
    """
    check_array("f", f, ("T", "N"))
    for name, x in (("i", i), ("o", o)):
        check_shaped(name, x, f.shape)
    check_number("alpha", alpha)
    check_bool("reversed", reversed)


def check_rg_lru(r: Any, g: Any, lam: Any, c: Any, like: np.ndarray) -> None:
    """S12, K14: gates and rates fit the input.

    >>> check_rg_lru(*np.ones((2, 2, 1)), np.ones(1), 0, np.ones((2, 1)))
    Traceback (most recent call last):
    ValueError: c: got 0, expected a number > 0
    """
    for name, x in (("r", r), ("g", g)):
        check_shaped(name, x, like.shape)
    check_shaped("lam", lam, like.shape[-1:])
    check_number("c", c)
    if not c > 0:
        raise ValueError(f"c: got {c}, expected a number > 0")
