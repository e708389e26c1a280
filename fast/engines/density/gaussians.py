"""Gaussians as the kernels on the CPU take them: components (d, a, C, b) of a head's density."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnspec.fast.backend import wide


def components(delta: Tensor, c: Tensor, product: bool) -> Tensor:
    """Components (heads, M, 4) of offsets and widths (heads, K): one of a product, K of a mean.

    Completing the square leaves one Gaussian of a product; what is left over is a sum of squares,
    so nothing cancels.
    """
    delta, c = wide(delta), wide(c)
    sharp, log_peak = c**-2, -0.5 * math.log(2 * math.pi) - c.abs().log()
    if not product:
        C = log_peak - math.log(c.shape[1])
        return torch.stack((delta, sharp, C, torch.zeros_like(c)), -1)
    a = sharp.sum(1)
    d = (delta * sharp).sum(1) / a
    b = ((delta - d[:, None]) ** 2 * sharp).sum(1)
    return torch.stack((d, a, log_peak.sum(1), b), -1)[:, None]


def gradients(delta: Tensor, c: Tensor, product: bool, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """ddelta and dc from the gradient of the components."""
    offset, width = wide(delta), wide(c)
    sharp = width**-2
    of_d, of_a, of_C, of_b = upstream.unbind(-1)
    if product:
        a = sharp.sum(1, keepdim=True)
        away = offset - (offset * sharp).sum(1, keepdim=True) / a
        of_offset = sharp * (of_d / a + 2 * of_b * away)
        of_sharp = of_a + of_d / a * away + of_b * away**2
    else:
        of_offset, of_sharp = of_d, of_a
    of_width = (-2 * sharp * of_sharp - of_C) / width
    return of_offset.to(delta.dtype), of_width.to(c.dtype)
