"""Gaussian attention on the fast path, the checks of arguments that its operations share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import FLOATS, check_broadcast, check_integer, check_same, check_tensor

CLAMPS = ("source", "none")
COMBINATIONS = ("product", "sum")


def check_layer(x: Any, axis: Any, params: Any) -> int:
    axis = check_input("x", x, axis)
    if x.dim() < 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected at least two axes")
    if not isinstance(params, (tuple, list)) or len(params) != 2:
        raise TypeError(f"params: got {type(params).__name__}, expected a pair (delta, c)")
    check_gaussians(params[0], params[1], ("h", "K"), x, name="params")
    heads = params[0].shape[0]
    if heads < 1 or x.shape[axis] // heads < 2:
        raise ValueError(
            f"params: got {heads} heads for {x.shape[axis]} entries along axis {axis}, expected "
            "at least one head and two entries for each"
        )
    return axis


def check_input(name: str, x: Any, axis: Any) -> int:
    check_tensor(name, x, ("...",) * x.dim() if isinstance(x, Tensor) else (), FLOATS)
    if not x.dim():
        raise ValueError(f"{name}: got shape (), expected (..., entries)")
    check_integer("axis", axis, least=-x.dim())
    if axis >= x.dim():
        raise ValueError(f"axis: got {axis}, expected an axis of {name}, which has {x.dim()}")
    return int(axis) % x.dim()


def check_mask(mask: Any, x: Tensor) -> None:
    if mask is None:
        return
    axes = ("...",) * mask.dim() if isinstance(mask, Tensor) else ()
    check_tensor("mask", mask, axes, (torch.bool,))
    check_broadcast("mask", mask, x.shape)
    if mask.device != x.device:
        raise ValueError(f"mask: got device {mask.device}, expected {x.device}")


def check_gaussians(
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
