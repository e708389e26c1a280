"""Gaussian attention on the density engine: a layer is one kernel forward and two backward.

A product of Gaussians is collapsed to a single one, so that what an entry costs does not depend on
K; a sum has one component for each Gaussian. The steps alone are a few element-wise operations of
torch and launch no kernel of ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import (
    FLOATS,
    check_bool,
    check_broadcast,
    check_choice,
    check_integer,
    check_positive,
    check_same,
    check_tensor,
    choose_by_dtype,
    wide_dtype,
)
from attnspec.fast.engines.density import Options, density

CLAMPS = ("source", "none")
COMBINATIONS = ("product", "sum")
CLAIMS = {
    **{
        name: {"gradient": True, "blocks": (16, 64), "compiled": True, "triton": {"graph": True}}
        for name in ("multi_head", "block")
    },
    **{
        name: {"launches": None}
        for name in (
            "split_chunks", "axis_stats", "log_density", "normalise", "apply", "collapse",
            "importance_factor",
        )
    },
}  # fmt: skip

Params = tuple[Tensor, Tensor]


def multi_head(
    x: Tensor,
    axis: int,
    params: Params,
    mask: Tensor | None = None,
    eps: float = 1e-8,
    clamp: str = "source",
    *,
    combine: str = "product",
    exact_mask: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The weighed entries and their weights, both of x's shape and dtype.

    x any tensor of two axes or more, with at least two entries along `axis` for each head;
    `params` the offsets and the widths, each (h, K), in x's dtype or in float32; `mask` bool,
    broadcasts to x, True = real. Offsets and widths are looked at on CPU tensors only. An x whose
    other axes cannot be merged without one is copied. Differentiable in x and the params.
    """
    axis = _check_layer(x, axis, params)
    _check_mask(mask, x)
    options = _options(eps, clamp, combine, exact_mask, residual=False)
    backend = choose_by_dtype(backend, "x", x)
    return density(x, axis, *params, mask, options, backend)


def block(
    x: Tensor,
    layers: Sequence[tuple[int, Params]],
    padding_value: float | None = None,
    *,
    eps: float = 1e-8,
    clamp: str = "source",
    combine: str = "product",
    exact_mask: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """x after all `layers` with residuals, and each layer's weights; pairs (axis, params).

    The residual is added inside the kernel; between layers x is float32, not rounded to a half.
    Differentiable in x and all params.
    """
    if not isinstance(layers, (tuple, list)) or not layers:
        raise TypeError(f"layers: got {layers!r}, expected a sequence of pairs (axis, params)")
    _check_input("x", x, -1)
    axes = []
    for number, layer in enumerate(layers):
        if not isinstance(layer, (tuple, list)) or len(layer) != 2:
            raise TypeError(f"layers: got {layer!r} as layer {number}, expected (axis, params)")
        try:
            axes.append(_check_layer(x, *layer))
        except (TypeError, ValueError) as error:
            raise type(error)(f"layers: in layer {number}, {error}") from None
    if padding_value is not None:
        if isinstance(padding_value, bool) or not isinstance(padding_value, Real):
            raise TypeError(f"padding_value: got {padding_value!r}, expected a number or None")
        if math.isnan(padding_value):
            raise ValueError(f"padding_value: got {padding_value}, expected a number or None")
    options = _options(eps, clamp, combine, exact_mask, residual=True)
    backend = choose_by_dtype(backend, "x", x)
    weights, dtype = [], x.dtype
    x = x.to(wide_dtype(x)) if len(layers) > 1 else x
    for axis, (_, (delta, c)) in zip(axes, layers, strict=True):
        mask = None if padding_value is None else x != padding_value
        x, w = density(x, axis, delta, c, mask, options, backend)
        weights.append(w.to(dtype))
    return x.to(dtype), tuple(weights)


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
    axis = _check_input("z", z, axis)
    _check_mask(mask, z)
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
    _check_input("z", z, -1)
    for name, x in (("mu", mu), ("var", var)):
        _check_input(name, x, -1)
        check_same(name, x, "z", z)
        check_broadcast(name, x, z.shape)
    _check_gaussians(delta, c, ("K",), z)
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
    axis = _check_input("logw", logw, axis)
    check_positive("eps", eps)
    check_choice("clamp", clamp, CLAMPS)
    _check_mask(mask, logw)
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
    _check_input("z", z, -1)
    _check_input("w", w, -1)
    check_same("w", w, "z", z)
    if w.shape != z.shape:
        raise ValueError(f"w: got shape {tuple(w.shape)}, expected {tuple(z.shape)}, as z")
    _check_mask(mask, z)
    return z * w if mask is None else torch.where(mask, z * w, z)


def collapse(delta: Tensor, c: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """d* and lam, each (...), of the one Gaussian that a product of K is; delta, c (..., K)."""
    _check_input("delta", delta, -1)
    _check_gaussians(delta, c, tuple(delta.shape), delta)
    sharp = c.to(wide_dtype(c)) ** -2
    lam = sharp.sum(-1)
    return ((delta.to(sharp.dtype) * sharp).sum(-1) / lam).to(c.dtype), lam.to(c.dtype)


def importance_factor(
    w: Tensor, axes: int | tuple[int, ...], *, backend: str | None = None
) -> Tensor:
    """How much each entry of the one axis that is not in `axes` matters, from 0 to 1."""
    given = axes if isinstance(axes, tuple) else (axes,)
    _check_input("w", w, -1)
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


def _options(eps: Any, clamp: Any, combine: Any, exact_mask: Any, residual: bool) -> Options:
    check_positive("eps", eps)
    check_choice("clamp", clamp, CLAMPS)
    check_choice("combine", combine, COMBINATIONS)
    check_bool("exact_mask", exact_mask)
    product = combine == "product"
    return Options(float(eps), clamp == "source", exact_mask, residual, product)


def _check_layer(x: Any, axis: Any, params: Any) -> int:
    axis = _check_input("x", x, axis)
    if x.dim() < 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected at least two axes")
    if not isinstance(params, (tuple, list)) or len(params) != 2:
        raise TypeError(f"params: got {type(params).__name__}, expected a pair (delta, c)")
    _check_gaussians(params[0], params[1], ("h", "K"), x, name="params")
    heads = params[0].shape[0]
    if heads < 1 or x.shape[axis] // heads < 2:
        raise ValueError(
            f"params: got {heads} heads for {x.shape[axis]} entries along axis {axis}, expected "
            "at least one head and two entries for each"
        )
    return axis


def _check_input(name: str, x: Any, axis: Any) -> int:
    check_tensor(name, x, ("...",) * x.dim() if isinstance(x, Tensor) else (), FLOATS)
    if not x.dim():
        raise ValueError(f"{name}: got shape (), expected (..., entries)")
    check_integer("axis", axis, least=-x.dim())
    if axis >= x.dim():
        raise ValueError(f"axis: got {axis}, expected an axis of {name}, which has {x.dim()}")
    return int(axis) % x.dim()


def _check_mask(mask: Any, x: Tensor) -> None:
    if mask is None:
        return
    axes = ("...",) * mask.dim() if isinstance(mask, Tensor) else ()
    check_tensor("mask", mask, axes, (torch.bool,))
    check_broadcast("mask", mask, x.shape)
    if mask.device != x.device:
        raise ValueError(f"mask: got device {mask.device}, expected {x.device}")


def _check_gaussians(
    delta: Any, c: Any, shape: tuple[int | str, ...], x: Tensor, name: str = ""
) -> None:
    for own, values in (("delta", delta), ("c", c)):
        what = name or own
        axes = ("...",) * values.dim() if isinstance(values, Tensor) else ()
        check_tensor(what, values, axes, FLOATS)
        if values.dtype != torch.float32 or x.dtype == torch.float64:
            check_same(what, values, "the entries", x)
        if values.device != x.device:
            raise ValueError(f"{what}: got device {values.device} for {own}, expected {x.device}")
        if values.dim() != len(shape) or values.shape[-1] < 1:
            names = ", ".join(str(size) for size in shape)
            got = tuple(values.shape)
            raise ValueError(f"{what}: got shape {got} for {own}, expected ({names}), K >= 1")
    if c.shape != delta.shape:
        got, expected = tuple(c.shape), tuple(delta.shape)
        raise ValueError(f"{name or 'c'}: got shape {got} for c, expected {expected}")
    if c.is_cuda or torch.compiler.is_compiling():
        return
    fine = torch.isfinite(delta).all() & (torch.isfinite(c) & (c != 0)).all()
    if not bool(fine):
        raise ValueError(f"{name or 'c'}: expected finite offsets and widths, no width of 0")
