"""Gaussian attention, the steps: chunks, statistics, density, weights; S1 to S5, S7 and S9."""

from __future__ import annotations

import math

import numpy as np

from attnspec.reference.conventions import check_array, check_bool, check_choice, check_integer
from attnspec.reference.scores.gaussian_attention_checks import (
    CLAMPS,
    COMBINATIONS,
    check_axes,
    check_broadcast,
    check_dtype,
    check_gaussians,
    check_input,
    check_mask,
    check_positive,
)


def split_chunks(n: int, h: int) -> list[tuple[int, int]]:
    """S1: (start, stop) of each of `h` heads on an axis of `n`; the last takes the remainder.

    ValueError if a head would get nothing.

    >>> split_chunks(7, 3)
    [(0, 2), (2, 4), (4, 7)]
    """
    check_integer("n", n, least=1)
    check_integer("h", h, least=1)
    chunk = n // h
    if chunk == 0:
        raise ValueError(f"h: got {h} heads for {n} entries, expected at most one for each entry")
    return [(head * chunk, n if head == h - 1 else (head + 1) * chunk) for head in range(h)]


def axis_stats(
    z: np.ndarray,
    mask: np.ndarray | None = None,
    eps: float = 1e-8,
    axis: int = -1,
    *,
    exact_mask: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """S2: mean and unbiased variance of z along `axis`, which is kept with length 1.

    `mask` is bool and broadcasts to z, True = real; a padded entry counts as a zero and is not
    read. With `exact_mask` (S8) it is left out instead. `var` already holds `eps`.

    >>> mu, var = axis_stats(np.array([[1.0, 3.0, 9.0]]), np.array([True, True, False]))
    >>> mu.round(4), var.round(4)
    (array([[1.3333]]), array([[2.3333]]))
    """
    axis = check_input("z", z, axis)
    check_mask(mask, z)
    check_positive("eps", eps)
    check_bool("exact_mask", exact_mask)
    entries = z.shape[axis]
    if entries < 2:
        raise ValueError(f"z: got {entries} along axis {axis}, expected at least 2 entries")
    if mask is None:
        mu = np.mean(z, axis=axis, keepdims=True)
        return mu, np.sum((z - mu) ** 2, axis=axis, keepdims=True) / (entries - 1) + eps
    mask = np.broadcast_to(mask, z.shape)
    z0 = np.where(mask, z, np.zeros_like(z))
    if not exact_mask:
        return axis_stats(z0, None, eps, axis)
    real = np.sum(mask, axis=axis, keepdims=True).astype(z.dtype)
    mu = np.sum(z0, axis=axis, keepdims=True) / np.maximum(real, 1)
    away = np.where(mask, z0 - mu, np.zeros_like(z))
    return mu, np.sum(away**2, axis=axis, keepdims=True) / np.maximum(real - 1, 1) + eps


def log_density(
    z: np.ndarray,
    mu: np.ndarray,
    var: np.ndarray,
    delta: np.ndarray,
    c: np.ndarray,
    *,
    combine: str = "product",
) -> np.ndarray:
    """S3: the log of the combined density of every entry of z, all constants included.

    mu and var broadcast to z; delta (K) and c (K), none of which is 0. `combine` "product" sums
    the logs, "sum" is the log of the mean density.

    >>> one = np.array([[1.0]])
    >>> log_density(one, 0 * one, one, np.zeros(1), np.ones(1)).round(4)
    array([[-1.4189]])
    """
    check_array("z", z, ("entries",))
    for name, x in (("mu", mu), ("var", var)):
        check_array(name, x, ("1",))
        check_dtype(name, x, z, "z")
        check_broadcast(name, x, z)
    check_gaussians(delta, c, ("K",), z.dtype)
    check_choice("combine", combine, COMBINATIONS)
    return join(log_gaussians(z, mu, var, delta, c), combine)


def log_gaussians(
    z: np.ndarray, mu: np.ndarray, var: np.ndarray, delta: np.ndarray, c: np.ndarray
) -> np.ndarray:
    """S3: the log of each of the K densities, on a new last axis."""
    y = offsets(z, mu, var, delta)
    return -(y**2) / (2 * c**2) - np.log(2 * math.pi * c**2) / 2


def offsets(z: np.ndarray, mu: np.ndarray, var: np.ndarray, delta: np.ndarray) -> np.ndarray:
    """S3: y, in units of the standard deviation, on a new last axis."""
    return ((z - mu)[..., None] - delta) / np.sqrt(var)[..., None]


def join(log_densities: np.ndarray, combine: str) -> np.ndarray:
    """S3: the log of the product, or of the mean, of densities along the last axis."""
    if combine == "product":
        return np.sum(log_densities, axis=-1)
    top = np.max(log_densities, axis=-1, keepdims=True)
    return top[..., 0] + np.log(np.mean(np.exp(log_densities - top), axis=-1))


def normalise(
    logw: np.ndarray,
    eps: float = 1e-8,
    axis: int = -1,
    clamp: str = "source",
    mask: np.ndarray | None = None,
) -> np.ndarray:
    """S4: weights along `axis` from the log of raw ones; those hidden by `mask` (S8) are 0.

    `clamp` "source" divides by `eps` where the raw sum is less, "none" always by the sum.

    >>> normalise(np.log(np.array([[1.0, 3.0], [1e-9, 3e-9]]))).round(3)
    array([[0.25, 0.75],
           [0.1 , 0.3 ]])
    """
    axis = check_input("logw", logw, axis)
    check_positive("eps", eps)
    check_choice("clamp", clamp, CLAMPS)
    check_mask(mask, logw)
    if mask is not None:
        logw = np.where(mask, logw, np.full_like(logw, -np.inf))
    top, total = raw_sum(logw, axis)
    w = np.exp(logw - top) / total
    if clamp == "none":
        return w
    least = math.log(eps)
    return np.where(top + np.log(total) < least, np.exp(np.minimum(logw - least, 0)), w)


def raw_sum(logw: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """S4: t and s, the raw sum along `axis` being exp(t) s; 0 and 1 if nothing is there.

    They are kept apart because a large t would swallow the log of s.
    """
    top = np.max(logw, axis=axis, keepdims=True)
    top = np.where(np.isneginf(top), np.zeros_like(top), top)
    total = np.sum(np.exp(logw - top), axis=axis, keepdims=True)
    return top, np.where(total == 0, np.ones_like(total), total)


def apply(z: np.ndarray, w: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """S5: z times w of the same shape; a padded entry stays what it is.

    >>> apply(np.array([[2.0, 5.0]]), np.array([[0.5, 0.5]]), np.array([True, False]))
    array([[1., 5.]])
    """
    check_array("z", z, ("entries",))
    check_array("w", w, ("entries",))
    check_dtype("w", w, z, "z")
    if w.shape != z.shape:
        raise ValueError(f"w: got shape {w.shape}, expected {z.shape}, as z")
    check_mask(mask, z)
    return z * w if mask is None else np.where(mask, z * w, z)


def collapse(delta: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """S7: d* and lam, each (...), of the one Gaussian that a product of K is; delta, c (..., K).

    >>> collapse(np.array([0.0, 3.0]), np.array([1.0, 0.5]))
    (array(2.4), array(5.))
    """
    check_array("delta", delta, ("K",))
    check_gaussians(delta, c, delta.shape, delta.dtype)
    sharpness = 1 / c**2
    lam = np.sum(sharpness, axis=-1)
    return np.asanyarray(np.sum(delta * sharpness, axis=-1) / lam), np.asanyarray(lam)


def importance_factor(w: np.ndarray, axes: int | tuple[int, ...]) -> np.ndarray:
    """S9: how much each entry of the one axis that is not in `axes` matters, from 0 to 1.

    >>> importance_factor(np.array([[0.2, 0.8], [0.4, 0.6]]), 0)
    array([0., 1.])
    """
    check_input("w", w, -1)
    kept = check_axes(w, axes)
    if w.size == 0:
        raise ValueError(f"w: got shape {w.shape}, expected at least one entry")
    g = np.mean(w, axis=tuple(a for a in range(w.ndim) if a != kept))
    span = np.max(g) - np.min(g)
    return (g - np.min(g)) / np.where(span == 0, np.ones_like(span), span)
