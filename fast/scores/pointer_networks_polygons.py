"""Polygons: whether an answer is simple, and the area that it shares with the true hull."""

from __future__ import annotations

import torch
from torch import Tensor

from attnspec.fast.backend import check_same, count_launch
from attnspec.fast.scores.pointer_networks_points import check_points, kernels


def is_simple_polygon(polygon: Tensor, *, backend: str | None = None) -> bool:
    """Whether `polygon` (vertices, 2) is simple: 3 points at least, none twice, no edges that meet
    outside of the vertex that neighbours share.
    """
    check_points(polygon, 0, backend, batched=False, name="polygon")
    count_launch()
    return bool(kernels().is_simple(polygon.contiguous().numpy()))


def convex_clip_area(pred: Tensor, true: Tensor, *, backend: str | None = None) -> Tensor:
    """The area that a simple polygon `pred` (m, 2) shares with the convex `true` (h, 2), a scalar.

    `pred` may run either way round and need not be convex; `true` is counter-clockwise. ValueError
    if `pred` is not simple or `true` is not convex and counter-clockwise.
    """
    check_points(pred, 0, backend, batched=False, name="pred")
    check_points(true, 3, backend, batched=False, name="true")
    check_same("true", true, "pred", pred)
    polygon, convex = pred.contiguous().numpy(), true.contiguous().numpy()
    rounding = 64 * torch.finfo(true.dtype).eps
    count_launch()
    if not kernels().is_simple(polygon):
        raise ValueError(f"pred: got {pred.tolist()}, expected a simple polygon")
    if not kernels().is_convex(convex, rounding):
        raise ValueError(f"true: got {true.tolist()}, expected convex and counter-clockwise")
    return pred.new_tensor(kernels().shared_area(polygon, convex))
