"""State space models of `dsf`: S6, SSD and what SSD equals. Clauses S8, S9, S13, S14 are those of
`dsf`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.conventions import check_array, check_shaped
from attnspec.reference.linear.dsf_mixers import read_scan
from attnspec.reference.linear.dsf_recurrence import (
    check_given,
    flat_scan,
    flat_scan_backward,
)


def s6_scan(
    Delta: np.ndarray,
    A: np.ndarray,
    b: np.ndarray,
    c: np.ndarray,
    u: np.ndarray,
    D: np.ndarray | None = None,
    h0: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """S8: y (..., T, dv) and the last h (..., dv, n).

    Delta >= 0 (..., T, dv), A >= 0 (dv, n), b, c (..., T, n), u (..., T, dv), D (dv,) or None, h0
    (..., dv, n) or None.

    >>> one = np.ones((2, 1))
    >>> y, h = s6_scan(one, np.log(2 * one[:1]), one, one, one, one[0])
    >>> y.ravel(), h.ravel()
    (array([2. , 2.5]), array([1.5]))
    """
    check_s6_scan(Delta, A, b, c, u, D, h0)
    decay, new = _s6_system(Delta, A, b, u)
    states, last = flat_scan(decay, new, h0)
    y = np.einsum("...vn,...n->...v", states, c)
    return (y if D is None else y + D * u), last


def s6_scan_backward(
    Delta: np.ndarray,
    A: np.ndarray,
    b: np.ndarray,
    c: np.ndarray,
    u: np.ndarray,
    D: np.ndarray | None,
    h0: np.ndarray | None,
    dy: np.ndarray,
    dh: np.ndarray | None = None,
) -> tuple[np.ndarray | None, ...]:
    """S16: dDelta, dA, db, dc, du, dD, dh0 of `s6_scan`; None where the argument was None.

    dy (..., T, dv) and dh (..., dv, n), or None, are the gradients of its outputs.

    >>> one = np.ones((1, 1))
    >>> [float(g.squeeze()) for g in s6_scan_backward(
    ...     one, 0 * one, 2 * one, 3 * one, one, one[0], one, one)]
    [6.0, -3.0, 3.0, 3.0, 7.0, 1.0, 3.0]
    >>> [float(g.squeeze()) for g in s6_scan_backward(
    ...     one, 0 * one, 2 * one, 3 * one, one, one[0], one, one, one)]
    [8.0, -4.0, 4.0, 3.0, 9.0, 1.0, 4.0]
    """
    check_s6_scan(Delta, A, b, c, u, D, h0)
    check_shaped("dy", dy, u.shape)
    dh = check_given("dh", dh, (*Delta.shape[:-2], *A.shape))
    decay, new = _s6_system(Delta, A, b, u)
    states, _ = flat_scan(decay, new, h0)
    dc = np.einsum("...vn,...v->...n", states, dy)
    dstates = dy[..., None] * c[..., None, :]
    ddecay, dnew, dh0 = flat_scan_backward(decay, new, h0, dstates, dh)
    rate = -ddecay * decay
    strength = np.einsum("...vn,...n->...v", dnew, b)
    dDelta = np.einsum("...vn,vn->...v", rate, A) + strength * u
    leading = tuple(range(Delta.ndim - 1))
    dA = np.sum(rate * Delta[..., None], axis=leading)
    db = np.einsum("...vn,...v->...n", dnew, Delta * u)
    du = strength * Delta
    if D is None:
        return dDelta, dA, db, dc, du, None, dh0
    return dDelta, dA, db, dc, du + D * dy, np.sum(dy * u, axis=leading), dh0


def ssd_scan(
    Delta: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    c: np.ndarray,
    u: np.ndarray,
    h0: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """S9: y (..., heads, T, dv) and the last h (..., heads, dv, n).

    Delta >= 0 (..., heads, T), a >= 0 (heads,), b, c (..., heads, T, n), u (..., heads, T, dv), h0
    (..., heads, dv, n) or None.

    >>> one = np.ones((1, 2, 1))
    >>> y, h = ssd_scan(one[..., 0], np.log([2.0]), one, one, one)
    >>> y.ravel(), h.ravel()
    (array([1. , 1.5]), array([1.5]))
    """
    q, k, v, log_decay = ssd_as_attention(Delta, a, b, c, u)
    return read_scan(q, k, v, _ssd_state(h0, b, u), np.exp(log_decay))


def ssd_scan_backward(
    Delta: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    c: np.ndarray,
    u: np.ndarray,
    h0: np.ndarray | None,
    dy: np.ndarray,
    dh: np.ndarray | None = None,
) -> tuple[np.ndarray | None, ...]:
    """S16: dDelta, da, db, dc, du, dh0 of `ssd_scan`; dh0 is None without an h0.

    dy (..., heads, T, dv) and dh (..., heads, dv, n), or None, are the gradients of its outputs.

    >>> one = np.ones((1, 1, 1))
    >>> [float(g.squeeze()) for g in ssd_scan_backward(
    ...     one[..., 0], 0 * one[0, 0], 2 * one, 3 * one, one, one, one)]
    [6.0, -3.0, 3.0, 3.0, 6.0, 3.0]
    >>> [float(g.squeeze()) for g in ssd_scan_backward(
    ...     one[..., 0], 0 * one[0, 0], 2 * one, 3 * one, one, one, one, one)]
    [8.0, -4.0, 4.0, 3.0, 8.0, 4.0]
    """
    q, k, v, log_decay = ssd_as_attention(Delta, a, b, c, u)
    check_shaped("dy", dy, u.shape)
    state = _ssd_state(h0, b, u)
    dh = check_given("dh", dh, state.shape)
    new = v[..., :, None] * k[..., None, :]
    decay = np.exp(log_decay)[..., None, None] * np.ones_like(new)
    states, _ = flat_scan(decay, new, state)
    dc = np.einsum("...v,...vn->...n", dy, states)
    dstates = dy[..., :, None] * q[..., None, :]
    _, dnew, dstate = flat_scan_backward(decay, new, state, dstates, dh)
    # What decays is h less what token i has just added.
    rate = np.einsum("...vn,...vn->...", dnew, new) - np.einsum("...vn,...vn->...", dnew, states)
    dv = np.einsum("...vn,...n->...v", dnew, k)
    dDelta = a[..., None] * rate + np.einsum("...v,...v->...", dv, u)
    db = np.einsum("...vn,...v->...n", dnew, v)
    leading = tuple(range(Delta.ndim - 2))
    da = np.sum(np.einsum("...t,...t->...", rate, Delta), axis=leading)
    return dDelta, da, db, dc, Delta[..., None] * dv, None if h0 is None else dstate


def ssd_as_attention(
    Delta: np.ndarray, a: np.ndarray, b: np.ndarray, c: np.ndarray, u: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """S13: q, k, v and the log decay (..., heads, T) of the linear attention that is this SSD.

    >>> one = np.ones((1, 1, 1))
    >>> [x.ravel() for x in ssd_as_attention(2 * one[0], one[0, 0], 3 * one, 4 * one, 5 * one)]
    [array([4.]), array([3.]), array([10.]), array([-2.])]
    """
    check_ssd(Delta, a, b, c)
    check_array("u", u, ("heads", "T", "dv"))
    check_shaped("u", u, (*Delta.shape, u.shape[-1]))
    return c, b, Delta[..., None] * u, -a[..., None] * Delta


def ssd_as_normalised(
    Delta: np.ndarray, a: np.ndarray, b: np.ndarray, c: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S14: phi, psi (..., heads, T, n) and eta (..., heads, T), which grows as e^T.

    >>> one = np.ones((1, 2, 1))
    >>> phi, psi, eta = ssd_as_normalised(one[0].T, np.log([2.0]), one, one)
    >>> eta.ravel(), psi.ravel()
    (array([2., 4.]), array([2., 4.]))
    """
    check_ssd(Delta, a, b, c)
    eta = np.exp(a[..., None] * np.cumsum(Delta, axis=-1))
    return c, (eta * Delta)[..., None] * b, eta


def is_ssd(eta: np.ndarray, psi: np.ndarray | None = None) -> np.ndarray:
    """S14: bool (...), whether separable attention with normalisers eta (..., T) is an SSD.

    With psi (..., T, n), eta must also grow at every token but the first whose psi is not 0.

    >>> is_ssd(np.array([[1.0, 2.0, 4.0], [1.0, 2.0, 1.0]]))
    array([ True, False])
    """
    check_array("eta", eta, ("T",))
    if not np.all(eta > 0):
        raise ValueError("eta: got a value of 0 or less, or NaN, expected numbers > 0")
    before, after = eta[..., :-1], eta[..., 1:]
    fits = after >= before
    if psi is not None:
        check_array("psi", psi, ("T", "n"))
        check_shaped("psi", psi, (*eta.shape, psi.shape[-1]))
        fits = fits & ((after > before) | ~np.any(psi[..., 1:, :] != 0, axis=-1))
    return np.all(fits, axis=-1)


def _s6_system(
    Delta: np.ndarray, A: np.ndarray, b: np.ndarray, u: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """S8: decay and input (..., T, dv, n)."""
    return np.exp(-Delta[..., None] * A), (Delta * u)[..., None] * b[..., None, :]


def _ssd_state(h0: np.ndarray | None, b: np.ndarray, u: np.ndarray) -> np.ndarray:
    shape = (*b.shape[:-2], u.shape[-1], b.shape[-1])
    if h0 is None:
        return np.zeros_like(u, shape=shape)
    check_shaped("h0", h0, shape)
    return h0


def check_s6_scan(Delta: Any, A: Any, b: Any, c: Any, u: Any, D: Any, h0: Any) -> None:
    check_s6(Delta, A, b, c, D)
    check_shaped("u", u, Delta.shape)
    if h0 is not None:
        check_shaped("h0", h0, (*Delta.shape[:-2], *A.shape))


def check_s6(Delta: Any, A: Any, b: Any, c: Any, D: Any) -> None:
    """S8, K14: the arguments of an S6 layer fit one another.

    >>> check_s6(*-np.ones((2, 1, 1)), *np.ones((2, 1, 1)), None)
    Traceback (most recent call last):
    ValueError: Delta: got a value below 0 or NaN, expected numbers >= 0
    """
    check_array("Delta", Delta, ("T", "dv"))
    check_array("A", A, ("dv", "n"))
    check_shaped("A", A, (Delta.shape[-1], A.shape[-1]))
    for name, x in (("b", b), ("c", c)):
        check_shaped(name, x, (*Delta.shape[:-1], A.shape[-1]))
    if D is not None:
        check_shaped("D", D, Delta.shape[-1:])
    check_positive("Delta", Delta)
    check_positive("A", A)


def check_ssd(Delta: Any, a: Any, b: Any, c: Any) -> None:
    """S9, K14: the arguments of an SSD layer fit one another.

    >>> check_ssd(np.ones((2, 3)), np.ones(1), *np.ones((2, 2, 3, 1)))
    Traceback (most recent call last):
    ValueError: a: got shape (1,), expected (2,)
    """
    check_array("Delta", Delta, ("heads", "T"))
    check_shaped("a", a, Delta.shape[-2:-1])
    check_array("b", b, ("heads", "T", "n"))
    check_shaped("b", b, (*Delta.shape, b.shape[-1]))
    check_shaped("c", c, b.shape)
    check_positive("Delta", Delta)
    check_positive("a", a)


def check_positive(name: str, x: np.ndarray) -> None:
    """K14: no number below 0.

    >>> check_positive("A", -np.ones(1))
    Traceback (most recent call last):
    ValueError: A: got a value below 0 or NaN, expected numbers >= 0
    """
    if not np.all(x >= 0):
        raise ValueError(f"{name}: got a value below 0 or NaN, expected numbers >= 0")
