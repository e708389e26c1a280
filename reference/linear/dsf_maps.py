"""Mixers as systems: `dsf`, clauses S4 and S6 to S12. Each returns Lam, B, C, D of `dsf_scan`.

A state of dv times n numbers is flattened in this order.
"""

from __future__ import annotations

import math
from itertools import combinations_with_replacement, groupby

import numpy as np

from attnspec.reference.conventions import (
    check_array,
    check_bool,
    check_choice,
    check_integer,
    check_shaped,
)
from attnspec.reference.linear.dsf_recurrence import sigmoid_power
from attnspec.reference.linear.dsf_rnn import (
    check_gates,
    check_rg_lru,
    forget_gate,
    rg_lru_gates,
)
from attnspec.reference.linear.dsf_ssm import check_positive, check_s6

System = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def from_attention(
    phi_q: np.ndarray, psi_k: np.ndarray, eta: np.ndarray, dv: int, form: int = 2
) -> System:
    """S4: separable attention of features phi_q, psi_k (..., T, n), normalisers eta (..., T).

    >>> two, eta = np.full((2, 1), 2.0), np.array([1.0, 4.0])
    >>> [x.ravel() for x in from_attention(two, two, eta, 1, form=1)[:3]]
    [array([1.  , 0.25]), array([2. , 0.5]), array([2., 2.])]
    """
    check_array("phi_q", phi_q, ("T", "n"))
    check_shaped("psi_k", psi_k, phi_q.shape)
    check_shaped("eta", eta, phi_q.shape[:-1])
    check_integer("dv", dv, least=1)
    check_choice("form", form, (1, 2))
    if not np.all(eta > 0):
        raise ValueError("eta: got a value of 0 or less, or NaN, expected numbers > 0")
    if form == 2:
        return _separable(np.ones_like(eta), psi_k, phi_q / eta[..., None], dv)
    ratio = np.ones_like(eta)
    ratio[..., 1:] = eta[..., :-1] / eta[..., 1:]
    return _separable(ratio, psi_k / eta[..., None], phi_q, dv)


def from_normalised_attention(q: np.ndarray, k: np.ndarray, n: np.ndarray, dv: int) -> System:
    """S7: q, k (..., T, d), n (..., T); form 2 of S4.

    >>> one = np.ones((1, 1))
    >>> [float(x.squeeze()) for x in from_normalised_attention(one, -one, np.log([2.0]), 1)]
    [1.0, -1.0, 0.5, 0.0]
    """
    check_array("q", q, ("T", "d"))
    check_shaped("k", k, q.shape)
    check_shaped("n", n, q.shape[:-1])
    check_integer("dv", dv, least=1)
    return _separable(np.ones_like(n), k, q * np.exp(-n)[..., None], dv)


def from_s6(
    Delta: np.ndarray, A: np.ndarray, b: np.ndarray, c: np.ndarray, D: np.ndarray | None = None
) -> System:
    """S8: Delta (..., T, dv), A (dv, n), b, c (..., T, n), D (dv,) or None.

    >>> one = np.ones((1, 1))
    >>> [float(x.squeeze()) for x in from_s6(2 * one, 0 * one, 3 * one, 4 * one, 5 * one[0])]
    [1.0, 6.0, 4.0, 5.0]
    """
    check_s6(Delta, A, b, c, D)
    Lam = np.exp(-Delta[..., None] * A)
    B = _placed(Delta[..., None] * b[..., None, :])
    C = _placed(np.ones_like(Delta)[..., None] * c[..., None, :])
    skip = np.zeros_like(Delta) if D is None else D * np.ones_like(Delta)
    return Lam.reshape(B.shape[:-1]), B, np.swapaxes(C, -1, -2), _diagonal(skip)


def from_ssd(Delta: np.ndarray, a: np.ndarray, b: np.ndarray, c: np.ndarray, dv: int) -> System:
    """S9: Delta (..., T), a a number or (...), b, c (..., T, n).

    >>> one = np.ones((1, 1))
    >>> [float(x.squeeze()) for x in from_ssd(2 * one[0], np.zeros(()), 3 * one, 4 * one, 1)]
    [1.0, 6.0, 4.0, 0.0]
    """
    check_array("Delta", Delta, ("T",))
    check_array("a", a, ())
    if a.shape not in ((), Delta.shape[-2:-1]):
        raise ValueError(f"a: got shape {a.shape}, expected () or {Delta.shape[-2:-1]}")
    check_array("b", b, ("T", "n"))
    check_shaped("b", b, (*Delta.shape, b.shape[-1]))
    check_shaped("c", c, b.shape)
    check_positive("Delta", Delta)
    check_positive("a", a)
    check_integer("dv", dv, least=1)
    return _separable(np.exp(-a[..., None] * Delta), Delta[..., None] * b, c, dv)


def from_qlstm(
    f: np.ndarray, i: np.ndarray, o: np.ndarray, alpha: float = 1.0, reversed: bool = False
) -> System:
    """S11: pre-activations f, i, o (..., T, N); the input of the system is z.

    >>> zero = np.zeros((1, 1))
    >>> [float(x.squeeze()) for x in from_qlstm(zero, zero, zero, 2.0, True)]
    [0.25, 0.5, 0.5, 0.0]
    """
    check_gates(f, i, o, alpha, reversed)
    B, C = (_diagonal(sigmoid_power(x)) for x in (i, o))
    return forget_gate(f, alpha, reversed), B, C, _diagonal(np.zeros_like(f))


def from_rg_lru(r: np.ndarray, g: np.ndarray, lam: np.ndarray, *, c: float = 8.0) -> System:
    """S12: pre-activations r, g (..., T, N), lam (N,).

    >>> zero = np.zeros((1, 1))
    >>> [float(x.squeeze()) for x in from_rg_lru(zero, 800 + zero, np.full(1, 50.0))[1:]]
    [1.0, 1.0, 0.0]
    """
    check_array("r", r, ("T", "N"))
    check_rg_lru(r, g, lam, c, r)
    log_decay, strength = rg_lru_gates(r, g, lam, c)
    ones = np.ones_like(r)
    return np.exp(log_decay), _diagonal(strength), _diagonal(ones), _diagonal(0 * ones)


def taylor_features(x: np.ndarray, P: int, packed: bool = False) -> np.ndarray:
    """S6: features (..., n) of x (..., d) up to order P, by degree.

    Unpacked, a degree's products are in C order; packed, each product of channels c1 <= c2 <= ...
    comes once, times the root of how often it occurs, in lexicographic order.

    >>> taylor_features(np.array([1.0, 2.0]), 1) * [1, 2**0.25, 2**0.25]
    array([1., 1., 2.])
    >>> len(taylor_features(np.ones(3), 4)), len(taylor_features(np.ones(3), 4, packed=True))
    (121, 35)
    """
    check_array("x", x, ("d",))
    check_integer("P", P, least=0)
    check_bool("packed", packed)
    d = x.shape[-1]
    if d < 1:
        raise ValueError("x: got 0 channels, expected 1 or more")
    product = np.ones_like(x[..., :1])
    features = [product]
    for p in range(1, P + 1):
        if packed:
            chosen = list(combinations_with_replacement(range(d), p))
            channels = np.array(chosen).reshape(-1, p)
            product = np.prod(x[..., channels], axis=-1)
            weights = np.sqrt([_orders(c) for c in chosen]).astype(x.dtype)
        else:
            product = (product[..., :, None] * x[..., None, :]).reshape((*x.shape[:-1], d**p))
            weights = np.ones((), x.dtype)
        features.append(product * (weights / _unit(d, p)).astype(x.dtype))
    return np.concatenate(features, axis=-1)


def _unit(d: int, p: int) -> float:
    """S6: what a product of p channels is divided by."""
    return d ** (p / 4) * math.sqrt(math.factorial(p))


def _orders(chosen: tuple[int, ...]) -> int:
    """How many orders the same channels can have."""
    alike = (math.factorial(len(list(same))) for _, same in groupby(chosen))
    return math.factorial(len(chosen)) // math.prod(alike)


def _separable(Lam: np.ndarray, psi: np.ndarray, phi: np.ndarray, dv: int) -> System:
    """S4: a decay (..., T) for all of the state, input psi and read-out phi (..., T, n)."""
    ones = np.ones_like(psi, shape=(*psi.shape[:-1], dv))
    B, C = (_placed(ones[..., :, None] * x[..., None, :]) for x in (psi, phi))
    spread = Lam[..., None] * np.ones_like(psi, shape=(*psi.shape[:-1], dv * psi.shape[-1]))
    return spread, B, np.swapaxes(C, -1, -2), _diagonal(0 * ones)


def _placed(x: np.ndarray) -> np.ndarray:
    """(..., dv * n, dv): row (j, s) has x (..., dv, n) at [j, s] in column j."""
    dv, n = x.shape[-2:]
    spread = x[..., None] * np.eye(dv, dtype=x.dtype)[:, None, :]
    return spread.reshape((*x.shape[:-2], dv * n, dv))


def _diagonal(x: np.ndarray) -> np.ndarray:
    """(..., dv) as (..., dv, dv)."""
    return np.asanyarray(x[..., None] * np.eye(x.shape[-1], dtype=x.dtype))
