"""Gaussian attention, the gradients: clause S10 of `gaussian_attention`."""

from __future__ import annotations

import math

import numpy as np

from attnspec.reference.conventions import check_shaped
from attnspec.reference.scores.gaussian_attention_checks import (
    check_layer,
    check_mask,
    check_options,
)
from attnspec.reference.scores.gaussian_attention_steps import (
    axis_stats,
    join,
    log_gaussians,
    normalise,
    offsets,
    raw_sum,
    split_chunks,
)

Params = tuple[np.ndarray, np.ndarray]


def multi_head_backward(
    x: np.ndarray,
    axis: int,
    params: Params,
    dout: np.ndarray,
    dw: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    eps: float = 1e-8,
    clamp: str = "source",
    *,
    combine: str = "product",
    exact_mask: bool = False,
) -> tuple[np.ndarray, Params]:
    """S10: dx and (ddelta, dc), shaped as x and the params; `dw` None means w is not used.

    >>> x, one = np.array([[1.0, 2.0]]), np.ones((1, 1))
    >>> dx, (ddelta, dc) = multi_head_backward(x, 1, (0 * one, one), np.ones((1, 2)))
    >>> dx.round(3), ddelta.round(3), dc.round(3)
    (array([[0.5, 0.5]]), array([[0.5]]), array([[0.]]))
    """
    axis = check_layer(x, axis, params)
    check_mask(mask, x)
    check_options(eps, clamp, combine, exact_mask)
    check_shaped("dout", dout, x.shape)
    if dw is not None:
        check_shaped("dw", dw, x.shape)
    delta, c = params
    dw = np.zeros_like(x) if dw is None else dw
    real = np.ones(x.shape, bool) if mask is None else np.broadcast_to(mask, x.shape)
    x, dout, dw, real = (np.moveaxis(a, axis, -1) for a in (x, dout, dw, real))
    pieces = []
    for head, chunk in enumerate(split_chunks(x.shape[-1], len(delta))):
        z, do, dweight, here = (a[..., slice(*chunk)] for a in (x, dout, dw, real))
        one = (delta[head], c[head])
        pieces.append(_chunk(z, one, do, dweight, here, eps, clamp, combine, exact_mask))
    dx, ddelta, dc = zip(*pieces, strict=True)
    return np.moveaxis(np.concatenate(dx, axis=-1), -1, axis), (np.stack(ddelta), np.stack(dc))


def _chunk(
    z: np.ndarray,
    params: Params,
    dout: np.ndarray,
    dw: np.ndarray,
    real: np.ndarray,
    eps: float,
    clamp: str,
    combine: str,
    exact_mask: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S10 of one head along the last axis: dz, ddelta (K) and dc (K)."""
    delta, c = params
    none = np.zeros_like(z)
    counted = real if exact_mask else np.ones_like(real)
    z = np.where(counted, z, none)  # an entry that S8 leaves out is not read
    mu, var = axis_stats(z, real, eps, exact_mask=exact_mask)
    log_each = log_gaussians(z, mu, var, delta, c)
    logw = np.where(counted, join(log_each, combine), np.full_like(z, -np.inf))
    w = normalise(logw, eps, clamp=clamp)
    up = np.where(real, dout * z, none) + dw
    top, total = raw_sum(logw, -1)
    clamped = (top + np.log(total) < math.log(eps)) & (clamp == "source")
    mean = np.sum(np.where(counted, w * up, none), axis=-1, keepdims=True)
    dlog = np.where(counted, w * (up - np.where(clamped, np.zeros_like(mean), mean)), none)

    share = np.exp(log_each - logw[..., None]) if combine == "sum" else np.ones_like(log_each)
    share = np.where(counted[..., None], share, np.zeros_like(share)) / _terms(combine, len(c))
    dlog_each = dlog[..., None] * share
    y = offsets(z, mu, var, delta)
    dy = -dlog_each * y / c**2
    others = tuple(range(z.ndim))
    ddelta = np.sum(-dy / np.sqrt(var)[..., None], axis=others)
    dc = np.sum(dlog_each * (y**2 / c**3 - 1 / c), axis=others)
    dz = np.sum(dy, axis=-1) / np.sqrt(var)
    dmu = -np.sum(dz, axis=-1, keepdims=True)
    dvar = -np.sum(np.sum(dy * y, axis=-1), axis=-1, keepdims=True) / (2 * var)

    entries = np.sum(counted, axis=-1, keepdims=True).astype(z.dtype)
    through = dmu / np.maximum(entries, 1) + dvar * 2 * (z - mu) / np.maximum(entries - 1, 1)
    dz = dz + np.where(real, dout * w, dout) + np.where(real, through, none)
    return dz, ddelta, dc


def _terms(combine: str, K: int) -> int:
    return K if combine == "sum" else 1
