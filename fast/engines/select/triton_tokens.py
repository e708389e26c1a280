"""Tokens in another order, in Triton: a program moves some tokens of one head."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnspec.fast.engines.prepared import Prepared
from attnspec.fast.engines.sizes import cdiv, next_power_of_2
from attnspec.fast.engines.strides import layout_of

NUMBERS = 4096
"""Numbers a program moves."""

VARYING = [
    "x_heads", "x_b", "x_h", "x_t", "y_heads", "y_b", "y_h", "y_t", "tokens", "x_programs",
]  # fmt: skip


@triton.jit
def move(
    program, x, x_b, x_h, x_t, x_d, out, order, heads, tokens,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    tiles = (tokens + ROWS - 1) // ROWS
    line = (program // tiles).to(tl.int64)
    row = (program % tiles) * ROWS + tl.arange(0, ROWS)
    source = tl.load(order + row, mask=row < tokens, other=0).to(tl.int64)
    channel = tl.arange(0, WIDTH).to(tl.int64)[None, :]
    inside = (row < tokens)[:, None] & (channel < D)
    # Strides of aligned rows are counted in 16 bytes, so that the compiler knows them to be that.
    x += ((line // heads) * x_b + (line % heads) * x_h) * UNIT + (source * x_t * UNIT)[:, None]
    if UNIT > 1:
        x_d = 1
    taken = tl.load(x + channel * x_d, mask=inside, other=0.0)
    tl.store(out + ((line * tokens + row) * D)[:, None] + channel, taken, mask=inside)


@triton.jit(do_not_specialize=VARYING)
def take_tokens_kernel(
    x, x_b, x_h, x_t, x_d, x_out, x_heads, y, y_b, y_h, y_t, y_d, y_out, y_heads, order, tokens,
    x_programs, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr,
    DV: tl.constexpr, WIDTH_V: tl.constexpr, ROWS_V: tl.constexpr, UNIT_V: tl.constexpr,
):  # fmt: skip
    """The programs of x come first, then those of y."""
    program = tl.program_id(0)
    if program < x_programs:
        move(
            program, x, x_b, x_h, x_t, x_d, x_out, order, x_heads, tokens, D, WIDTH, ROWS, UNIT
        )  # fmt: skip
    elif y is not None:
        move(
            program - x_programs, y, y_b, y_h, y_t, y_d, y_out, order, y_heads, tokens, DV,
            WIDTH_V, ROWS_V, UNIT_V,
        )  # fmt: skip


Kind = tuple[torch.Size, torch.dtype, int, tuple[int, ...]]


def _kind(x: Tensor) -> Kind:
    """What a launch depends on."""
    return x.shape, x.dtype, *layout_of(x)


@functools.lru_cache(maxsize=64)
def _launch(
    x: Kind, y: Kind | None, tokens: int, numbers: torch.dtype, device: torch.device
) -> Prepared:
    arguments = {"order": torch.empty(0, dtype=numbers), "tokens": tokens}
    programs = 0
    for name, mark, kind in (("x", "", x), ("y", "_V", y)):
        shape, dtype, unit, strides = (*x[:2], 1, (0,) * 4) if kind is None else kind
        batch, heads, _, d = shape
        given = None if kind is None else torch.empty(0, dtype=dtype)
        width = next_power_of_2(d)
        rows = max(1, NUMBERS // width)
        arguments |= {
            name: given, f"{name}_out": given, f"{name}_heads": heads,
            **{f"{name}_{axis}": s for axis, s in zip("bhtd", strides, strict=True)},
            f"D{mark[1:]}": d, f"WIDTH{mark}": width, f"ROWS{mark}": rows, f"UNIT{mark}": unit,
        }  # fmt: skip
        programs += 0 if kind is None else batch * heads * cdiv(tokens, rows)
        arguments.setdefault("x_programs", programs)
    return Prepared(take_tokens_kernel, programs, arguments, device, num_warps=4)


def take_tokens(x: Tensor, y: Tensor | None, order: Tensor) -> tuple[Tensor, Tensor]:
    """As `tokens.take_tokens`; without y the second result is empty."""
    x_out, y_out = (
        x.new_empty(0) if z is None else z.new_empty(*z.shape[:2], order.shape[0], z.shape[3])
        for z in (x, y)
    )
    order = order.contiguous()
    if x_out.numel():
        other = None if y is None else _kind(y)
        launch = _launch(_kind(x), other, order.shape[0], order.dtype, x.device)
        launch(
            x=x.detach(), x_out=x_out, order=order, y=None if y is None else y.detach(),
            y_out=None if y is None else y_out,
        )  # fmt: skip
    return x_out, y_out
