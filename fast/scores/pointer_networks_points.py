"""What the pointer network's tasks share: the geometry engine, and checks of points and indices."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import choose_backend, load
from attnspec.fast.growing import checkable

FLOATS = (torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)


def kernels() -> ModuleType:
    """The geometry engine; ImportError names the extra that brings what it needs."""
    return load("attnspec.fast.engines.geometry.numba_cpu")


def check_coordinates(name: str, x: Any, least: int) -> None:
    """`x` is a finite float tensor (..., n, 2) with n at least `least`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, expected torch.Tensor")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}: got dtype {x.dtype}, expected float32 or float64")
    if x.dim() < 2 or x.shape[-1] != 2:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected (..., n, 2)")
    if x.shape[-2] < least:
        raise ValueError(f"{name}: got n = {x.shape[-2]}, expected at least {least}")
    if checkable(x) and not bool(x.isfinite().all()):
        raise ValueError(f"{name}: got NaN or Inf, expected finite coordinates")


def check_points(
    points: Any,
    least: int,
    backend: str | None,
    batched: bool | None = None,
    name: str = "points",
) -> None:
    """`points` are CPU point sets: one, a batch, or either if `batched` is None."""
    check_coordinates(name, points, least)
    if points.dim() not in {None: (2, 3), False: (2,), True: (3,)}[batched]:
        expected = {None: "(n, 2) or (batch, n, 2)", False: "(n, 2)", True: "(batch, n, 2)"}
        raise ValueError(f"{name}: got shape {tuple(points.shape)}, expected {expected[batched]}")
    if choose_backend(backend, points) != "numba":
        raise ValueError(f"backend: got 'triton' on {points.device}, expected CPU tensors")


def check_distinct(sets: Tensor) -> None:
    """No two points of one of the sets (batch, n, 2) are equal."""
    order = sets[..., 1].sort(dim=-1, stable=True).indices
    order = order.gather(-1, sets[..., 0].gather(-1, order).sort(dim=-1, stable=True).indices)
    ordered = sets.gather(1, order[..., None].expand(sets.shape))
    if bool((ordered[:, 1:] == ordered[:, :-1]).all(-1).any()):
        raise ValueError("points: got the same point twice, expected distinct points")


def check_hulls(vertices: Tensor) -> None:
    """The engine's counts of hull vertices say that every set has a hull."""
    if bool((vertices == 0).any()):
        raise ValueError("points: got the same point twice, expected distinct points")
    if bool((vertices < 3).any()):
        raise ValueError("points: got points on one line, expected a hull of at least 3 vertices")


def check_integers(name: str, x: Any) -> None:
    """`x` is an integer tensor of at least one axis."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, expected torch.Tensor")
    if x.dtype not in INTEGERS:
        raise TypeError(f"{name}: got dtype {x.dtype}, expected int32 or int64")
    if x.dim() == 0:
        raise ValueError(f"{name}: got shape (), expected (..., m)")


def check_range(name: str, x: Tensor, low: int, high: int) -> None:
    """Every entry is from `low` to `high` - 1, where reading it costs nothing."""
    if checkable(x):
        outside = x[(x < low) | (x >= high)]
        if outside.numel():
            raise ValueError(
                f"{name}: got {int(outside[0])}, expected an index from 0 to {high - 1}"
            )
