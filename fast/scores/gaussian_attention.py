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

from torch import Tensor

from attnspec.fast.backend import (
    check_bool,
    check_choice,
    check_positive,
    choose_by_dtype,
    wide_dtype,
)
from attnspec.fast.engines.density import Options, density
from attnspec.fast.scores.gaussian_attention_checks import (
    CLAMPS,
    COMBINATIONS,
    check_input,
    check_layer,
    check_mask,
)
from attnspec.fast.scores.gaussian_attention_steps import (
    apply,
    axis_stats,
    collapse,
    importance_factor,
    log_density,
    normalise,
    split_chunks,
)

__all__ = [
    "apply",
    "axis_stats",
    "block",
    "collapse",
    "importance_factor",
    "log_density",
    "multi_head",
    "normalise",
    "split_chunks",
]

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
    axis = check_layer(x, axis, params)
    check_mask(mask, x)
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
    check_input("x", x, -1)
    axes = []
    for number, layer in enumerate(layers):
        if not isinstance(layer, (tuple, list)) or len(layer) != 2:
            raise TypeError(f"layers: got {layer!r} as layer {number}, expected (axis, params)")
        try:
            axes.append(check_layer(x, *layer))
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


def _options(eps: Any, clamp: Any, combine: Any, exact_mask: Any, residual: bool) -> Options:
    check_positive("eps", eps)
    check_choice("clamp", clamp, CLAMPS)
    check_choice("combine", combine, COMBINATIONS)
    check_bool("exact_mask", exact_mask)
    product = combine == "product"
    return Options(float(eps), clamp == "source", exact_mask, residual, product)
