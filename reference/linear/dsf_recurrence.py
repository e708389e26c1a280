"""The recurrence below every mixer of `dsf`, a number at a time. Clause S16 is that of `dsf`."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.conventions import check_array, check_shaped


def elementwise_scan(
    a: np.ndarray, x: np.ndarray, h0: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """S16: every h (..., T, N) of h_t = a_t h_(t-1) + x_t, and the last one (..., N).

    a and x (..., T, N), h0 (..., N) or None, which is 0.

    >>> h, last = elementwise_scan(np.array([[2.0], [0.0], [-1.0]]), np.ones((3, 1)))
    >>> h.ravel(), last
    (array([1., 1., 0.]), array([0.]))
    """
    h = check_scan(a, x, h0)
    states = np.zeros_like(x)
    for t in range(x.shape[-2]):
        h = a[..., t, :] * h + x[..., t, :]
        states[..., t, :] = h
    return states, h


def elementwise_scan_backward(
    a: np.ndarray,
    x: np.ndarray,
    h0: np.ndarray | None,
    dh: np.ndarray,
    dlast: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """S16: da, dx (..., T, N) and dh0 (..., N) of `elementwise_scan`, or None without an h0.

    dh (..., T, N) and dlast (..., N), or None, are the gradients of its outputs.

    >>> one = np.ones((2, 1))
    >>> [g.ravel() for g in elementwise_scan_backward(3 * one, one, one[0], one)]
    [array([4., 4.]), array([4., 1.]), array([12.])]
    >>> [g.ravel() for g in elementwise_scan_backward(3 * one, one, one[0], one, one[0])]
    [array([7., 8.]), array([7., 2.]), array([21.])]
    """
    first = check_scan(a, x, h0)
    check_shaped("dh", dh, x.shape)
    dlast = check_given("dlast", dlast, first.shape)
    states, _ = elementwise_scan(a, x, h0)
    before = np.concatenate([first[..., None, :], states], axis=-2)
    da, dx = np.zeros_like(a), np.zeros_like(x)
    carry = np.zeros_like(first) if dlast is None else dlast
    for t in reversed(range(x.shape[-2])):
        g = dh[..., t, :] + carry
        da[..., t, :], dx[..., t, :] = g * before[..., t, :], g
        carry = a[..., t, :] * g
    return da, dx, None if h0 is None else carry


def flat_scan(a: np.ndarray, x: np.ndarray, h0: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """S16 for a state of two axes: a, x and every h (..., T, dv, n), h0 and the last (..., dv, n).

    >>> one = np.ones((2, 1, 1))
    >>> flat_scan(one, one, one[0])[0].ravel()
    array([2., 3.])
    """
    states, last = elementwise_scan(_flat(a), _flat(x), None if h0 is None else _flat(h0))
    return states.reshape(x.shape), last.reshape((*x.shape[:-3], *x.shape[-2:]))


def flat_scan_backward(
    a: np.ndarray,
    x: np.ndarray,
    h0: np.ndarray | None,
    dh: np.ndarray,
    dlast: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """S16: da, dx and dh0 of `flat_scan`; dlast (..., dv, n) or None.

    >>> one = np.ones((1, 1, 1))
    >>> [float(g.squeeze()) for g in flat_scan_backward(2 * one, one, 5 * one[0], one)]
    [5.0, 1.0, 2.0]
    >>> [float(g.squeeze()) for g in flat_scan_backward(2 * one, one, 5 * one[0], one, 3 * one[0])]
    [20.0, 4.0, 8.0]
    """
    first = None if h0 is None else _flat(h0)
    last = None if dlast is None else _flat(dlast)
    da, dx, dh0 = elementwise_scan_backward(_flat(a), _flat(x), first, _flat(dh), last)
    back = None if h0 is None or dh0 is None else dh0.reshape(h0.shape)
    return da.reshape(a.shape), dx.reshape(x.shape), back


def _flat(x: np.ndarray) -> np.ndarray:
    """(..., dv, n) as (..., dv * n)."""
    return x.reshape((*x.shape[:-2], x.shape[-2] * x.shape[-1]))


def softplus(x: np.ndarray) -> np.ndarray:
    """log(1 + e^x), to full relative precision on both sides.

    >>> softplus(np.array([-800.0, 800.0]))
    array([  0., 800.])
    """
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def sigmoid_power(x: np.ndarray, a: float | np.ndarray = 1.0) -> np.ndarray:
    """S10: sigmoid(x)^a as e^(-a softplus(-x)).

    >>> sigmoid_power(np.array([0.0, -800.0, 800.0]), 2.0)
    array([0.25, 0.  , 1.  ])
    """
    return np.exp(-a * softplus(-x))


def check_scan(a: Any, x: Any, h0: Any) -> np.ndarray:
    """S16, K14: h0 or zeros, once a, x and h0 fit one another.

    >>> check_scan(np.ones((2, 3)), np.ones((2, 3)), np.ones(2))
    Traceback (most recent call last):
    ValueError: h0: got shape (2,), expected (3,)
    """
    check_array("a", a, ("T", "N"))
    check_shaped("x", x, a.shape)
    if h0 is None:
        return np.zeros_like(x, shape=(*x.shape[:-2], x.shape[-1]))
    check_shaped("h0", h0, (*x.shape[:-2], x.shape[-1]))
    return np.asanyarray(h0)


def check_given(name: str, x: Any, shape: tuple[int, ...]) -> Any:
    """K14: what may be None, once its shape is right.

    >>> check_given("dh", np.ones(2), (3,))
    Traceback (most recent call last):
    ValueError: dh: got shape (2,), expected (3,)
    """
    if x is not None:
        check_shaped(name, x, shape)
    return x


def check_number(name: str, value: Any) -> None:
    """K14: a finite number, or an array of one that has no axes.

    >>> check_number("alpha", np.array(1.0))
    >>> check_number("alpha", "1")
    Traceback (most recent call last):
    TypeError: alpha: got str, expected a number
    """
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    numbers = (int, float, np.floating, np.integer)
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a number")
    if not np.isfinite(value):
        raise ValueError(f"{name}: got {value}, expected a finite number")
