"""Positive features in Triton: a program owns a tile of rows of one head."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from attnspec.fast.engines.prepared import launch
from attnspec.fast.engines.sizes import cdiv, next_power_of_2

TILE = 4096
"""Numbers of a program."""


@triton.jit(do_not_specialize=["tokens", "tiles", "x_b", "x_h", "up_b", "up_h"])
def positive_kernel(
    x, x_b, x_h, x_t, x_d, up, up_b, up_h, up_t, up_d, out, tokens, tiles, heads,
    D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """out, contiguous, = elu(x) + 1, or its derivative times `up` if GRADIENT."""
    program = tl.program_id(0).to(tl.int64)
    sequence = program // tiles
    batch, head = sequence // heads, sequence % heads
    row = (program % tiles) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, BD)[None, :]
    inside = (row < tokens) & (channel < D)
    at = batch * x_b + head * x_h + row * x_t + channel.to(tl.int64) * x_d
    X = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    below = tl.exp(tl.where(X > 0, 0.0, X))
    if GRADIENT:
        at = batch * up_b + head * up_h + row * up_t + channel.to(tl.int64) * up_d
        Y = tl.load(up + at, mask=inside, other=0.0).to(tl.float32) * below
    else:
        Y = tl.where(X > 0, X + 1, below)
    at = (sequence * tokens + row) * D + channel
    tl.store(out + at, Y.to(out.dtype.element_ty), mask=inside)


def positive(x: Tensor, up: Tensor | None, out: Tensor) -> None:
    """Fill out, contiguous, as x (batch, heads, tokens, d), with features or their gradient."""
    batch, heads, tokens, d = x.shape
    width = next_power_of_2(max(1, d))
    rows = max(1, TILE // width)
    tiles = cdiv(tokens, rows)
    other = x if up is None else up
    launch(
        positive_kernel, batch * heads * tiles if d else 0,
        x, *x.stride(), other, *other.stride(), out, tokens, tiles, heads,
        D=d, BD=width, ROWS=rows, GRADIENT=up is not None, num_warps=4,
    )  # fmt: skip
