"""SiLU times a factor in Triton: a program takes a run of numbers."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnspec.fast.engines.prepared import Prepared
from attnspec.fast.engines.sizes import cdiv

RUN = 4096
"""Numbers of a program."""
UNIT = 16
"""Numbers that are masked together, if there are no others: whole words are then read."""


@triton.jit
def numbers_of(units, RUN: tl.constexpr, UNIT: tl.constexpr):
    """Where the numbers of a program are, and which of them there are."""
    ROWS: tl.constexpr = RUN // UNIT
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    at = row * UNIT + tl.arange(0, UNIT)[None, :]
    return at, row < units


@triton.jit(do_not_specialize=["units"])
def gate_kernel(g, u, y, units, RUN: tl.constexpr, UNIT: tl.constexpr):
    at, inside = numbers_of(units, RUN, UNIT)
    gate = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(u + at, mask=inside, other=0.0).to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * factor
    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["units"])
def gate_gradient_kernel(dy, g, u, dg, du, units, RUN: tl.constexpr, UNIT: tl.constexpr):
    at, inside = numbers_of(units, RUN, UNIT)
    gate = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(u + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
    share = 1.0 / (1.0 + tl.exp(-gate))
    opened = gate * share
    slope = share * (1.0 + gate * (1.0 - share))
    tl.store(dg + at, (up * factor * slope).to(dg.dtype.element_ty), mask=inside)
    tl.store(du + at, (up * opened).to(du.dtype.element_ty), mask=inside)


@functools.lru_cache(maxsize=64)
def _launch(gradient: bool, count: int, dtype: torch.dtype, device: torch.device) -> Prepared:
    x = torch.empty(0, dtype=dtype)
    kernel = gate_gradient_kernel if gradient else gate_kernel
    names = ("dy", "g", "u", "dg", "du") if gradient else ("g", "u", "y")
    unit = 1 if count % UNIT else UNIT
    arguments = {**dict.fromkeys(names, x), "units": count // unit, "RUN": RUN, "UNIT": unit}
    return Prepared(kernel, cdiv(count, RUN), arguments, device, num_warps=8)


def gate(g: Tensor, u: Tensor) -> Tensor:
    """silu(g) u, contiguous."""
    y = g.new_empty(g.shape)
    _launch(False, g.numel(), g.dtype, g.device)(
        g=g.detach().contiguous(), u=u.detach().contiguous(), y=y
    )
    return y


def gate_backward(dy: Tensor, g: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of g and u, contiguous."""
    dg, du = g.new_empty(g.shape), u.new_empty(u.shape)
    _launch(True, g.numel(), g.dtype, g.device)(
        dy=dy.contiguous(), g=g.detach().contiguous(), u=u.detach().contiguous(), dg=dg, du=du
    )
    return dg, du
