"""The coefficients of a chunk of Titans: what momentum and forgetting do, as a few scalars.

The clause S6 of `titans` and its gradient. Everything is a product or a sum of rates, never a
quotient, so a token that forgets everything needs no care.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from attnspec.reference.conventions import check_array


class Coefficients(NamedTuple):
    """S6: of a chunk of C tokens; n and G are indexed [t, j], a row for each read."""

    beta: np.ndarray  # (..., C): what is left of the first weights
    m: np.ndarray  # (..., C): what is left of the first momentum
    f: np.ndarray  # (..., C): how much of the first momentum has gone into the weights
    n: np.ndarray  # (..., C, C): how much of a token's gradient is in the momentum
    G: np.ndarray  # (..., C, C): and in the weights


def titans_coefficients(theta: np.ndarray, eta: np.ndarray, alpha: np.ndarray) -> Coefficients:
    """S6: beta, m, f (..., C), n, G (..., C, C) of rates theta, eta, alpha (..., C).

    >>> half = np.array([0.5, 0.5])
    >>> beta, m, f, n, G = titans_coefficients(np.ones(2), half, half)
    >>> f, G
    (array([0.5, 0.5]), array([[1., 0.],
           [1., 1.]]))
    """
    check_rates(theta, eta, alpha)
    return coefficients(theta, eta, alpha)


def coefficients(
    theta: np.ndarray, eta: np.ndarray, alpha: np.ndarray, stored: np.ndarray | None = None
) -> Coefficients:
    """S6, S19: as `titans_coefficients`; tokens that are not `stored` (..., C) change nothing.

    >>> one = np.ones(2)
    >>> coefficients(one, one, 0 * one, np.array([True, False])).f
    array([1., 1.])
    """
    leading, C = theta.shape[:-1], theta.shape[-1]
    beta, m = np.ones_like(theta, shape=leading), np.ones_like(theta, shape=leading)
    f, n, G = np.zeros_like(beta), np.zeros_like(theta), np.zeros_like(theta)
    steps = []
    for t in range(C):
        old = (beta, m, f, n, G)
        kept, carried = 1 - alpha[..., t], eta[..., t]
        m = carried * m
        n = np.where(np.arange(C) == t, theta[..., t, None], carried[..., None] * n)
        beta, f, G = kept * beta, kept * f + m, kept[..., None] * G + n
        if stored is not None:
            real = stored[..., t]
            beta, m, f = (np.where(real, x, y) for x, y in zip((beta, m, f), old[:3], strict=True))
            n, G = (np.where(real[..., None], x, y) for x, y in zip((n, G), old[3:], strict=True))
        steps.append((beta, m, f, n, G))
    if not steps:
        square = np.zeros_like(theta, shape=(*leading, 0, 0))
        return Coefficients(theta, theta, theta, square, square)
    return Coefficients(*(np.stack(x, axis=theta.ndim - 1) for x in zip(*steps, strict=True)))


def titans_coefficients_backward(
    theta: np.ndarray,
    eta: np.ndarray,
    alpha: np.ndarray,
    dbeta: np.ndarray,
    dm: np.ndarray,
    df: np.ndarray,
    dn: np.ndarray,
    dG: np.ndarray,
    *,
    stored: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S21: dtheta, deta, dalpha (..., C) from the gradients of the five coefficients.

    Entries of dn and dG above the diagonal are not read: there the coefficients are always 0.

    >>> one, none = np.ones(1), np.zeros((1, 1))
    >>> titans_coefficients_backward(one, one, one, one, one, one, none, none)
    (array([0.]), array([2.]), array([-1.]))
    """
    check_rates(theta, eta, alpha)
    of = coefficients(theta, eta, alpha, stored)
    for name, x, like in zip(
        ("dbeta", "dm", "df", "dn", "dG"), (dbeta, dm, df, dn, dG), of, strict=True
    ):
        check_array(name, x, ())
        if x.shape != like.shape:
            raise ValueError(f"{name}: got shape {x.shape}, expected {like.shape}")
    C = theta.shape[-1]
    real = np.ones(theta.shape, bool) if stored is None else stored
    gradients = [np.zeros_like(theta) for _ in range(3)]
    dtheta, deta, dalpha = gradients
    ubeta, um, uf = (np.zeros_like(theta[..., 0]) for _ in range(3)) if C else (theta,) * 3
    un, uG = np.zeros_like(theta), np.zeros_like(theta)
    for t in reversed(range(C)):
        seen = np.arange(C) <= t
        ubeta, um, uf = ubeta + dbeta[..., t], um + dm[..., t], uf + df[..., t]
        un = un + np.where(seen, dn[..., t, :], 0.0)
        uG = uG + np.where(seen, dG[..., t, :], 0.0)
        beta, m, f, n, G = _before(of, t)
        on, on_row = real[..., t], real[..., t, None]
        through_m, through_n = um + uf, un + uG
        dtheta[..., t] = np.where(on, through_n[..., t], 0.0)
        through_n = np.where(np.arange(C) == t, 0.0, through_n)
        deta[..., t] = np.where(on, through_m * m + np.sum(through_n * n, axis=-1), 0.0)
        lost = ubeta * beta + uf * f + np.sum(uG * G, axis=-1)
        dalpha[..., t] = np.where(on, -lost, 0.0)
        kept, carried = 1 - alpha[..., t], eta[..., t]
        ubeta, uf = np.where(on, kept * ubeta, ubeta), np.where(on, kept * uf, uf)
        um = np.where(on, carried * through_m, um)
        un = np.where(on_row, carried[..., None] * through_n, un)
        uG = np.where(on_row, kept[..., None] * uG, uG)
    return dtheta, deta, dalpha


def _before(of: Coefficients, t: int) -> tuple[np.ndarray, ...]:
    """The coefficients behind token t - 1, those of S6 with index 0 for t = 0."""
    if t:
        return (*(x[..., t - 1] for x in of[:3]), *(x[..., t - 1, :] for x in of[3:]))
    one = np.ones_like(of.beta[..., 0])
    return one, one, 0 * one, np.zeros_like(of.beta), np.zeros_like(of.beta)


def check_rates(theta: np.ndarray, eta: np.ndarray, alpha: np.ndarray, *, prefix: str = "") -> None:
    """S3, K14: theta >= 0, eta and alpha in [0, 1], of one shape (..., C) and dtype.

    >>> check_rates(-np.ones(1), np.ones(1), np.ones(1))
    Traceback (most recent call last):
    ValueError: theta: got values from -1.0 to -1.0, expected finite values >= 0
    """
    for name, x in (("theta", theta), ("eta", eta), ("alpha", alpha)):
        full = prefix + name
        check_array(full, x, ("C",))
        if x.dtype != theta.dtype:
            raise TypeError(f"{full}: got dtype {x.dtype}, expected {theta.dtype}, as theta")
        if x.shape != theta.shape:
            raise ValueError(f"{full}: got shape {x.shape}, expected {theta.shape}, as theta")
        most = np.inf if name == "theta" else 1.0
        if not np.all(np.isfinite(x) & (x >= 0) & (x <= most)):
            wanted = "finite values >= 0" if name == "theta" else "values from 0 to 1"
            raise ValueError(
                f"{full}: got values from {np.min(x)} to {np.max(x)}, expected {wanted}"
            )
