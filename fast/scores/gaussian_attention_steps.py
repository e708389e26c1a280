"""Gaussian attention's steps alone: torch, in float32 for 16-bit inputs and rounded once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnspec.fast.backend import (
    check_bool,
    check_broadcast,
    check_choice,
    check_integer,
    check_positive,
    check_same,
    wide_dtype,
)
from attnspec.fast.scores.gaussian_attention_checks import (
    CLAMPS,
    COMBINATIONS,
    check_gaussians,
    check_input,
    check_mask,
)


def split_chunks(n: int, h: int) -> list[tuple[int, int]]:
    """(start, stop) of each of `h` heads on an axis of `n`; the last takes the remainder."""
    check_integer("n", n, least=1)
    check_integer("h", h, least=1)
    chunk = n // h
    if chunk == 0:
        raise ValueError(f"h: got {h} heads for {n} entries, expected at most one for each entry")
    return [(head * chunk, n if head == h - 1 else (head + 1) * chunk) for head in range(h)]


def axis_stats(
    z: Tensor,
    mask: Tensor | None = None,
    eps: float = 1e-8,
    axis: int = -1,
    *,
    exact_mask: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance plus `eps` of z along `axis`, which is kept with length 1."""
    axis = check_input("z", z, axis)
    check_mask(mask, z)
    check_positive("eps", eps)
    check_bool("exact_mask", exact_mask)
    entries = z.shape[axis]
    if entries < 2:
        raise ValueError(f"z: got {entries} along axis {axis}, expected at least 2 entries")
    real = torch.ones_like(z, dtype=torch.bool) if mask is None else mask.expand(z.shape)
    counted = real if exact_mask else torch.ones_like(real)
    x = torch.where(real, z, 0).to(wide_dtype(z))
    count = counted.sum(axis, keepdim=True)
    mu = x.sum(axis, keepdim=True) / count.clamp(min=1)
    away = torch.where(counted, x - mu, 0)
    var = (away**2).sum(axis, keepdim=True) / (count - 1).clamp(min=1) + float(eps)
    return mu.to(z.dtype), var.to(z.dtype)


def log_density(
    z: Tensor,
    mu: Tensor,
    var: Tensor,
    delta: Tensor,
    c: Tensor,
    *,
    combine: str = "product",
    backend: str | None = None,
) -> Tensor:
    """The log of the combined density of every entry of z; delta and c (K)."""
    check_input("z", z, -1)
    for name, x in (("mu", mu), ("var", var)):
        check_input(name, x, -1)
        check_same(name, x, "z", z)
        check_broadcast(name, x, z.shape)
    check_gaussians(delta, c, ("K",), z)
    check_choice("combine", combine, COMBINATIONS)
    kind = wide_dtype(z)
    z, mu, var, delta, c, dtype = *(x.to(kind) for x in (z, mu, var, delta, c)), z.dtype
    y = ((z - mu)[..., None] - delta) / var.sqrt()[..., None]
    log = -(y**2) / (2 * c**2) - c.abs().log() - 0.5 * math.log(2 * math.pi)
    joined = log.sum(-1) if combine == "product" else log.logsumexp(-1) - math.log(len(c))
    return joined.to(dtype)


def normalise(
    logw: Tensor,
    eps: float = 1e-8,
    axis: int = -1,
    clamp: str = "source",
    mask: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Weights along `axis` from the log of raw ones; those hidden by `mask` are 0."""
    axis = check_input("logw", logw, axis)
    check_positive("eps", eps)
    check_choice("clamp", clamp, CLAMPS)
    check_mask(mask, logw)
    log = logw.to(wide_dtype(logw))
    if mask is not None:
        log = torch.where(mask, log, -torch.inf)
    top = log.amax(axis, keepdim=True)
    raw = torch.exp(log - torch.where(top == -torch.inf, 0, top))
    total = raw.sum(axis, keepdim=True)
    w = raw / torch.where(total == 0, 1, total)
    if clamp == "source":
        clamped = top + total.log() < math.log(eps)
        w = torch.where(clamped, torch.exp(log - math.log(eps)), w)
    return w.to(logw.dtype)


def apply(
    z: Tensor, w: Tensor, mask: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """z times w of the same shape; a padded entry stays what it is."""
    check_input("z", z, -1)
    check_input("w", w, -1)
    check_same("w", w, "z", z)
    if w.shape != z.shape:
        raise ValueError(f"w: got shape {tuple(w.shape)}, expected {tuple(z.shape)}, as z")
    check_mask(mask, z)
    return z * w if mask is None else torch.where(mask, z * w, z)


def collapse(delta: Tensor, c: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """d* and lam, each (...), of the one Gaussian that a product of K is; delta, c (..., K)."""
    check_input("delta", delta, -1)
    check_gaussians(delta, c, tuple(delta.shape), delta)
    sharp = c.to(wide_dtype(c)) ** -2
    lam = sharp.sum(-1)
    return ((delta.to(sharp.dtype) * sharp).sum(-1) / lam).to(c.dtype), lam.to(c.dtype)


def importance_factor(
    w: Tensor, axes: int | tuple[int, ...], *, backend: str | None = None
) -> Tensor:
    """How much each entry of the one axis that is not in `axes` matters, from 0 to 1."""
    given = axes if isinstance(axes, tuple) else (axes,)
    check_input("w", w, -1)
    for axis in given:
        check_integer("axes", axis, least=-w.dim())
    counted = {axis % w.dim() for axis in given if axis < w.dim()}
    if len(counted) != len(given) or len(counted) != w.dim() - 1:
        raise ValueError(f"axes: got {axes}, expected all but one of the {w.dim()} axes of w")
    if not w.numel():
        raise ValueError(f"w: got shape {tuple(w.shape)}, expected at least one entry")
    wider = w.to(wide_dtype(w))
    g = wider.mean(tuple(counted)) if counted else wider
    span = g.max() - g.min()
    return ((g - g.min()) / torch.where(span == 0, 1, span)).to(w.dtype)
