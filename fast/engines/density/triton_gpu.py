"""The density engine on the host side of Triton: grids, buffers and launches.

The array is read as (outer, axis, inner). Slices lie side by side: along the last axis, or, if that
is the axis itself, along the rows in front of it. Launches are worked out once for each kind of
call: shapes, strides, dtypes and options.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import FAR
from attnspec.fast.engines.density.configs import TABLE, config
from attnspec.fast.engines.density.op import Options, saved_shape
from attnspec.fast.engines.density.triton_forward import (
    held_kernel,
    moments_kernel,
    sums_kernel,
    walk_kernel,
    weigh_kernel,
)
from attnspec.fast.engines.density.triton_gradients import (
    backward_kernel,
    gaussians_kernel,
    pull_kernel,
    push_kernel,
)
from attnspec.fast.engines.prepared import Prepared
from attnspec.fast.engines.sizes import cdiv, next_power_of_2
from attnspec.fast.recent import Recent

MOST_PARTS = 64
"""Parts of a chunk: a program reads a number of every one."""
MOST_WARPS = 16
ADDED = 2048
"""Shares of a gradient that a program adds at a time."""
FEWER_REGISTERS = {walk_kernel: 64, backward_kernel: 96}
"""With so many, one more block of the kernels that walk along 16-bit arrays fits into a
multiprocessor, and next to nothing is spilled."""

_kinds: Recent[Hashable, Any] = Recent()


class Layout:
    """How a call's slices are dealt out to programs, and the arguments its kernels take."""

    def __init__(
        self, options: Options, x: Tensor, delta: Tensor, *others: Tensor | None, backward: bool
    ) -> None:
        mask = others[0]
        self.device, self.rows_in_front = x.device, x.shape[2] == 1
        (outer, n, fibres), (heads, K) = self.order(x.shape), delta.shape
        plan = config()
        chunk, extra = divmod(n, heads)
        longest, slices = chunk + extra, next_power_of_2(fibres)
        whole = next_power_of_2(longest)
        wide = 1 if self.rows_in_front else min(plan.wide, slices)
        self.held = whole * wide <= plan.held
        if backward:
            wide = min(plan.slim, wide)
            tile, thread = (plan.once, 32) if self.held else (plan.step, 8)
        else:
            tile, thread = plan.tile, 32 if self.held else 16
        L = whole if self.held else min(whole, max(tile // wide, 1))
        F = min(slices, max(tile // L, wide))
        least = 1 if self.rows_in_front else min(plan.least, F)
        fewer = F
        while least < fewer and outer * heads * cdiv(fibres, fewer) < plan.programs:
            fewer //= 2
        # Where fewer slices do not help enough, chunks are divided instead.
        if self.held or 2 * outer * heads * cdiv(fibres, fewer) >= plan.programs:
            L, F = min(whole, L * F // fewer), fewer
        tiles, blocks = cdiv(fibres, F), cdiv(longest, L)
        wanted = max(1, plan.programs // (outer * heads * tiles), longest // plan.longest)
        rows = cdiv(blocks, min(wanted, blocks, MOST_PARTS)) * L
        self.parts = 1 if self.held else cdiv(longest, rows)
        self.heads, self.shares = heads, outer * tiles
        self.programs = outer * heads * self.parts * tiles
        self.part_slices = outer * heads * fibres * self.parts
        self.warps = min(MOST_WARPS, max(1, L * F // (32 * thread)))
        self.product = options.product or K == 1
        self.alone = self.product and self.parts == 1
        self.components = 1 if self.product else K
        arrays = x, *(a for a in others if a is not None)
        self.arguments = {
            "chunk": chunk, "extra": extra, "fibres": fibres, "heads": heads, "tiles": tiles,
            "parts": self.parts, "rows": rows, "K": K, "M": self.components, "shares": self.shares,
            "eps": options.eps, "log_eps": math.log2(options.eps), "spread": math.log2(K),
            "CLAMP": options.clamp, "RESIDUAL": options.residual, "MASKED": mask is not None,
            "EXACT": options.exact and mask is not None, "PRODUCT": self.product,
            "KP": next_power_of_2(max(K, 4)) if self.product else 4,
            "WIDE": x.dtype == torch.float32, "WHOLE": not extra and not chunk % L,
            "EVEN": not fibres % F,
            "NEAR": all(_reach(self.order(a.stride()), L, F) < FAR for a in arrays),
            "ONE": self.held, "P": next_power_of_2(self.parts), "L": L, "F": F, "R": ADDED,
            "V": F if self.rows_in_front else min(plan.vector, F),
            **self.strides("x", x), **self.strides("m", mask),
            **self.strides("y", torch.empty(x.shape, device="meta")),
        }  # fmt: skip

    def order(self, axes: tuple[int, ...]) -> tuple[int, ...]:
        """Three axes with the slices last."""
        return axes[::-1] if self.rows_in_front else axes

    def strides(self, letter: str, x: Tensor | None) -> dict[str, int]:
        """The strides of an array of the shape of x; one that is absent is never read."""
        found: tuple[int, ...] = (0, 0, 0)
        if x is not None:
            # The stride of a single entry, often 1, would hide that addresses are aligned.
            both = zip(x.stride(), x.shape, strict=True)
            found = self.order(tuple(s if size > 1 else 0 for s, size in both))
        return {f"{letter}_{axis}": s for axis, s in zip("onf", found, strict=True)}

    def launch(self, kernel: Any, **more: Any) -> Prepared:
        """A launch of a kernel, whose tensors are yet to be given."""
        wanted = self.arguments | more
        arguments = {name: wanted.get(name) for name in kernel.arg_names}
        programs, how = self.programs, {"num_warps": self.warps}
        if kernel is gaussians_kernel:
            programs, how = self.heads * self.components, {"num_warps": ADDED // 256}
        plain = not any(arguments.get(name) for name in ("WIDE", "MASKED", "HAS_DW", "ONE"))
        if plain and kernel in FEWER_REGISTERS:
            how["maxnreg"] = FEWER_REGISTERS[kernel]
        return Prepared(kernel, programs, arguments, self.device, **how)

    def numbers(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)


def prepare_forward(
    x: Tensor, mask: Tensor | None, delta: Tensor, c: Tensor, options: Options
) -> Any:
    """How calls of this kind are computed, from x, mask, delta and c."""
    at = Layout(options, x, delta, mask, backward=False)
    shape, dtype, slices = x.shape, x.dtype, saved_shape(x, delta)

    def buffers() -> tuple[Tensor, Tensor, Tensor]:
        out, w = (torch.empty(shape, dtype=dtype, device=at.device) for _ in range(2))
        return out, w, at.numbers(*slices)

    if at.held or at.alone:
        whole = at.launch(held_kernel if at.held else walk_kernel)

        def alone(x: Tensor, mask: Tensor | None, delta: Tensor, c: Tensor) -> Any:
            out, w, saved = buffers()
            whole(x=x, mask=mask, delta=delta, c=c, out=out, w=w, saved=saved)
            return out, w, saved

        return alone

    first, second, third = (
        at.launch(kernel) for kernel in (moments_kernel, sums_kernel, weigh_kernel)
    )

    def split(x: Tensor, mask: Tensor | None, delta: Tensor, c: Tensor) -> Any:
        out, w, saved = buffers()
        moments = at.numbers(at.part_slices * 3)
        sums = at.numbers(at.part_slices * 2)
        first(x=x, mask=mask, moments=moments)
        second(x=x, mask=mask, delta=delta, c=c, moments=moments, sums=sums)
        third(
            x=x, mask=mask, delta=delta, c=c, moments=moments, sums=sums, out=out, w=w, saved=saved
        )
        return out, w, saved

    return split


def prepare_backward(
    dout: Tensor, dw: Tensor | None, x: Tensor, mask: Tensor | None, delta: Tensor, c: Tensor,
    options: Options,
) -> Any:  # fmt: skip
    """How gradients of calls of this kind are computed, from all of these tensors and the saved."""
    at = Layout(options, x, delta, mask, dout, dw, backward=True)
    shape, dtype = x.shape, x.dtype
    more = {"HAS_DW": dw is not None, **at.strides("d", dout), **at.strides("w", dw)}
    added = at.launch(gaussians_kernel)
    if at.alone:
        whole = at.launch(backward_kernel, **more)
    else:
        pull = at.launch(pull_kernel, **more)
        push = at.launch(push_kernel, **more)

    def run(
        dout: Tensor, dw: Tensor | None, x: Tensor, mask: Tensor | None, delta: Tensor, c: Tensor,
        saved: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        dx = torch.empty(shape, dtype=dtype, device=at.device)
        ddelta, dc = torch.empty_like(delta), torch.empty_like(c)
        partial = at.numbers(at.heads * at.components * 4 * at.shares)
        given = {
            "dout": dout, "dw": dw, "x": x, "mask": mask, "delta": delta, "c": c, "saved": saved
        }  # fmt: skip
        if at.alone:
            whole(**given, dx=dx, partial=partial)
        else:
            pulls = at.numbers(at.part_slices * (2 + 6 * at.components))
            pull(**given, pulls=pulls)
            push(**given, pulls=pulls, dx=dx, partial=partial)
        added(partial=partial, delta=delta, c=c, ddelta=ddelta, dc=dc)
        return dx, ddelta, dc

    return run


def forward(
    x: Tensor, mask: Tensor | None, delta: Tensor, c: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    if not x.numel():
        out, w = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
        return out, w, x.new_empty(saved_shape(x, delta), dtype=torch.float32)
    tensors = x, _bytes(mask), delta.contiguous(), c.contiguous()
    return _prepared(prepare_forward, tensors, options)(*tensors)


def backward(
    dout: Tensor,
    dw: Tensor | None,
    x: Tensor,
    mask: Tensor | None,
    delta: Tensor,
    c: Tensor,
    saved: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    if not x.numel():
        empty = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        return empty, torch.zeros_like(delta), torch.zeros_like(c)
    tensors = dout, dw, x, _bytes(mask), delta.contiguous(), c.contiguous()
    return _prepared(prepare_backward, tensors, options)(*tensors, saved)


def _reach(strides: tuple[int, ...], L: int, F: int) -> int:
    """How far the last entry of a tile lies from the first."""
    return L * abs(strides[1]) + F * abs(strides[2])


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.view(torch.uint8)


def _prepared(prepare: Any, tensors: tuple[Tensor | None, ...], options: Options) -> Any:
    """How calls with such tensors are computed: all but what they hold, and where."""
    kind = (
        prepare, options, TABLE.state(),
        *(None if x is None else (x.shape, x.stride(), x.dtype, x.device) for x in tensors),
    )  # fmt: skip
    found = _kinds.get(kind)
    if found is None:
        found = _kinds[kind] = prepare(*tensors, options)
    return found
