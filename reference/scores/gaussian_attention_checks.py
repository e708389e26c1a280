"""Gaussian attention, the checks of arguments (K14)."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import numpy as np

from attnspec.reference.conventions import check_array, check_bool, check_choice, check_integer

CLAMPS = ("source", "none")
COMBINATIONS = ("product", "sum")


def check_input(name: str, x: Any, axis: Any) -> int:
    """K14: `x` is a float array that has the axis; returns the axis counted from the front."""
    check_array(name, x, ("entries",))
    check_integer("axis", axis, least=-x.ndim)
    if axis >= x.ndim:
        raise ValueError(f"axis: got {axis}, expected an axis of {name}, which has {x.ndim}")
    return axis % x.ndim


def check_mask(mask: Any, x: np.ndarray) -> None:
    """K14: `mask` is None or bool and broadcasts to `x`."""
    if mask is not None:
        check_array("mask", mask, (), dtype="bool")
        check_broadcast("mask", mask, x)


def check_broadcast(name: str, x: np.ndarray, to: np.ndarray) -> None:
    """K14: `x` broadcasts to the shape of `to`."""
    padded = (1,) * (to.ndim - x.ndim) + x.shape
    if len(padded) > to.ndim or any(a not in (1, b) for a, b in zip(padded, to.shape, strict=True)):
        raise ValueError(f"{name}: got shape {x.shape}, expected one that broadcasts to {to.shape}")


def check_gaussians(
    delta: Any, c: Any, shape: tuple[int | str, ...], dtype: np.dtype[Any], name: str = ""
) -> None:
    """K14: `delta` and `c` are finite, of the same shape, and no width is 0.

    `name` is that of the argument that holds both.
    """
    for own, x in (("delta", delta), ("c", c)):
        what = name or own
        check_array(what, x, ())
        if x.dtype != dtype:
            raise TypeError(f"{what}: got dtype {x.dtype} for {own}, expected {dtype}")
        if x.ndim != len(shape) or x.shape[-1] < 1:
            names = ", ".join(str(size) for size in shape)
            raise ValueError(f"{what}: got shape {x.shape} for {own}, expected ({names}), K >= 1")
        if not np.all(np.isfinite(x)):
            raise ValueError(f"{what}: got {x} for {own}, expected finite numbers")
    if c.shape != delta.shape:
        raise ValueError(f"{name or 'c'}: got shape {c.shape} for c, expected {delta.shape}")
    if np.any(c == 0):
        raise ValueError(f"{name or 'c'}: got {c} for c, expected no width of 0")


def check_dtype(name: str, x: np.ndarray, other: np.ndarray, other_name: str) -> None:
    """K14: `x` has the dtype of `other`."""
    if x.dtype != other.dtype:
        raise TypeError(f"{name}: got dtype {x.dtype}, expected {other.dtype}, as {other_name}")


def check_positive(name: str, value: Any) -> None:
    """K14: `value` is a finite number above 0."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Real):
        raise TypeError(f"{name}: got {value!r}, expected a finite number > 0")
    if not (float(value) > 0 and math.isfinite(value)):
        raise ValueError(f"{name}: got {value}, expected a finite number > 0")


def check_layer(x: Any, axis: Any, params: Any) -> int:
    """S1, K14: the layer's parameters fit x and its axis; returns the axis from the front."""
    axis = check_input("x", x, axis)
    if x.ndim < 2:
        raise ValueError(f"x: got shape {x.shape}, expected at least two axes")
    if not isinstance(params, (tuple, list)) or len(params) != 2:
        raise TypeError(f"params: got {type(params).__name__}, expected a pair (delta, c)")
    check_gaussians(params[0], params[1], ("h", "K"), x.dtype, name="params")
    heads = len(params[0])
    if heads < 1 or x.shape[axis] // heads < 2:
        raise ValueError(
            f"params: got {heads} heads for {x.shape[axis]} entries along axis {axis}, expected "
            "at least one head and two entries for each"
        )
    return axis


def check_layers(x: Any, layers: Any) -> None:
    """S6, K14: `layers` are pairs (axis, params) that fit x."""
    if not isinstance(layers, (tuple, list)) or not layers:
        raise TypeError(f"layers: got {layers!r}, expected a sequence of pairs (axis, params)")
    check_input("x", x, -1)
    for number, layer in enumerate(layers):
        if not isinstance(layer, (tuple, list)) or len(layer) != 2:
            raise TypeError(f"layers: got {layer!r} as layer {number}, expected (axis, params)")
        try:
            check_layer(x, *layer)
        except (TypeError, ValueError) as error:
            raise type(error)(f"layers: in layer {number}, {error}") from None


def check_options(eps: Any, clamp: Any, combine: Any, exact_mask: Any) -> None:
    """K14: the options of a layer are what they may be."""
    check_positive("eps", eps)
    check_choice("clamp", clamp, CLAMPS)
    check_choice("combine", combine, COMBINATIONS)
    check_bool("exact_mask", exact_mask)


def check_padding(value: Any) -> None:
    """S6, K14: `value` is None or a real number; NaN equals no entry, not even NaN."""
    if value is None:
        return
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Real):
        raise TypeError(f"padding_value: got {value!r}, expected a number or None")
    if math.isnan(value):
        raise ValueError(f"padding_value: got {value}, expected a number or None")


def check_axes(w: np.ndarray, axes: Any) -> int:
    """S9, K14: `axes` are all axes of w but one, each named once; returns that one."""
    given = axes if isinstance(axes, tuple) else (axes,)
    for axis in given:
        check_integer("axes", axis, least=-w.ndim)
    counted = {axis % w.ndim for axis in given if axis < w.ndim}
    if len(counted) != len(given) or len(counted) != w.ndim - 1:
        raise ValueError(f"axes: got {axes}, expected all but one of the {w.ndim} axes of w")
    return next(axis for axis in range(w.ndim) if axis not in counted)
