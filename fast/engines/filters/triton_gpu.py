"""The filter kernels in Triton: a program reads rows of one head, each tap from the cache.

Backward writes the gradient of the rows, and for each program a sum of its part of the gradients of
the filters; torch adds these up, in the same order on every run.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnspec.fast.engines.filters.configs import config
from attnspec.fast.engines.prepared import launch
from attnspec.fast.engines.sizes import tile_width

VARYING = [
    "p_b", "p_h", "s_b", "s_h", "g_b", "g_h", "HEADS", "tokens", "parts",
]  # fmt: skip
"""Arguments of the kernels whose values never lead to another compilation."""


@triton.jit
def rows_of(x, b, h, row, stop, x_b, x_h, x_t, x_d, D: tl.constexpr, WIDTH: tl.constexpr):
    """Rows `row` of x[b, h] as a tile in float32, 0 outside [0, stop)."""
    channel = tl.arange(0, WIDTH)
    base = x + b.to(tl.int64) * x_b + h.to(tl.int64) * x_h
    at = row.to(tl.int64)[:, None] * x_t + channel.to(tl.int64)[None, :] * x_d
    inside = ((row >= 0) & (row < stop))[:, None] & (channel < D)[None, :]
    return tl.load(base + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def met_rows(
    p, state, b, h, row, tokens, p_b, p_h, p_t, p_d, s_b, s_h, s_t, s_d,
    D: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Rows `row` of p[b, h], negative ones from the state if there is one."""
    tile = rows_of(p, b, h, row, tokens, p_b, p_h, p_t, p_d, D, WIDTH)
    if state is not None:
        tile += rows_of(state, b, h, row + (K - 1), K - 1, s_b, s_h, s_t, s_d, D, WIDTH)
    return tile


@triton.jit(do_not_specialize=VARYING)
def filter_forward_kernel(
    p, w, bias, state, y, p_b, p_h, p_t, p_d, s_b, s_h, s_t, s_d, HEADS, tokens, parts,
    D: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    sequence, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    b, h = sequence // HEADS, sequence % HEADS
    channel = tl.arange(0, WIDTH)
    there = channel < D
    number = tl.load(bias + channel, mask=there, other=0.0).to(tl.float32)
    for tile in range(TILES):
        row = (part * TILES + tile) * ROWS + tl.arange(0, ROWS)
        total = tl.zeros([ROWS, WIDTH], tl.float32) + number[None, :]
        for tap in tl.static_range(K):
            weight = tl.load(w + channel * K + tap, mask=there, other=0.0).to(tl.float32)
            met = met_rows(
                p, state, b, h, row + (tap - (K - 1)), tokens, p_b, p_h, p_t, p_d,
                s_b, s_h, s_t, s_d, D, WIDTH, K,
            )  # fmt: skip
            total += weight[None, :] * met
        at = (sequence.to(tl.int64) * tokens + row)[:, None] * D + channel[None, :]
        inside = (row < tokens)[:, None] & there[None, :]
        tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=VARYING)
def filter_backward_kernel(
    dy, p, w, state, dp, dstate, sums, g_b, g_h, g_t, g_d, p_b, p_h, p_t, p_d, s_b, s_h, s_t, s_d,
    HEADS, tokens, parts,
    D: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
    STATE_ROWS: tl.constexpr,
):  # fmt: skip
    """dp, and by the first program of a head dstate; sums (programs, K + 1, D) of dw and db."""
    sequence, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    b, h = sequence // HEADS, sequence % HEADS
    channel = tl.arange(0, WIDTH)
    there = channel < D
    entry = tl.program_id(0).to(tl.int64) * ((K + 1) * D) + channel
    for tap in tl.static_range(K):
        total = tl.zeros([WIDTH], tl.float32)
        for tile in range(TILES):
            row = (part * TILES + tile) * ROWS + tl.arange(0, ROWS)
            grad = rows_of(dy, b, h, row, tokens, g_b, g_h, g_t, g_d, D, WIDTH)
            met = met_rows(
                p, state, b, h, row + (tap - (K - 1)), tokens, p_b, p_h, p_t, p_d,
                s_b, s_h, s_t, s_d, D, WIDTH, K,
            )  # fmt: skip
            # Rows beyond the end have no gradient, but what they meet may be NaN.
            total += tl.sum(tl.where((row < tokens)[:, None], grad * met, 0.0), axis=0)
        tl.store(sums + entry + tap * D, total, mask=there)
    total = tl.zeros([WIDTH], tl.float32)
    for tile in range(TILES):
        row = (part * TILES + tile) * ROWS + tl.arange(0, ROWS)
        moved = tl.zeros([ROWS, WIDTH], tl.float32)
        for tap in tl.static_range(K):
            weight = tl.load(w + channel * K + tap, mask=there, other=0.0).to(tl.float32)
            grad = rows_of(dy, b, h, row + (K - 1 - tap), tokens, g_b, g_h, g_t, g_d, D, WIDTH)
            moved += weight[None, :] * grad
        total += tl.sum(rows_of(dy, b, h, row, tokens, g_b, g_h, g_t, g_d, D, WIDTH), axis=0)
        at = (sequence.to(tl.int64) * tokens + row)[:, None] * D + channel[None, :]
        inside = (row < tokens)[:, None] & there[None, :]
        tl.store(dp + at, moved.to(dp.dtype.element_ty), mask=inside)
    tl.store(sums + entry + K * D, total, mask=there)
    if state is not None:
        # Only the first program of a head has rows of the state; for the others all lie outside.
        row = tl.arange(0, STATE_ROWS) + tl.where(part == 0, 0, tokens + K)
        moved = tl.zeros([STATE_ROWS, WIDTH], tl.float32)
        for tap in tl.static_range(K):
            weight = tl.load(w + channel * K + tap, mask=there, other=0.0).to(tl.float32)
            grad = rows_of(dy, b, h, row - tap, tokens, g_b, g_h, g_t, g_d, D, WIDTH)
            moved += weight[None, :] * grad
        at = (sequence.to(tl.int64) * (K - 1) + row)[:, None] * D + channel[None, :]
        inside = (row < K - 1)[:, None] & there[None, :]
        tl.store(dstate + at, moved.to(dstate.dtype.element_ty), mask=inside)


def strides(name: str, x: Tensor | None) -> dict[str, int]:
    """The strides of a tensor (batch, heads, rows, channels), zeros if it is absent."""
    found = (0,) * 4 if x is None else x.stride()
    return {f"{name}_{axis}": stride for axis, stride in zip("bhtd", found, strict=True)}


def shared_arguments(p: Tensor, w: Tensor, state: Tensor | None) -> tuple[int, int, dict[str, Any]]:
    """How many programs there are, their warps, and the arguments both kernels take."""
    batch, heads, tokens, d = p.shape
    chosen, width = config(), tile_width(d)
    rows = chosen.rows(width)
    parts = math.ceil(tokens / (rows * chosen.tiles))
    return batch * heads * parts, chosen.warps, {
        "p": p, "w": w.contiguous(), "state": state, **strides("p", p), **strides("s", state),
        "HEADS": heads, "tokens": tokens, "parts": parts, "D": d, "WIDTH": width, "K": w.shape[1],
        "ROWS": rows, "TILES": chosen.tiles,
    }  # fmt: skip


def present(state: Tensor | None) -> Tensor | None:
    """A state, unless it is one of no rows."""
    return None if state is None or state.shape[2] == 0 else state


def forward(p: Tensor, w: Tensor, b: Tensor, state: Tensor | None) -> Tensor:
    """y, contiguous, in p's dtype."""
    y = torch.empty_like(p, memory_format=torch.contiguous_format)
    programs, warps, arguments = shared_arguments(p, w, present(state))
    launch(filter_forward_kernel, programs, **arguments, bias=b.contiguous(), y=y, num_warps=warps)
    return y


def backward(
    dy: Tensor, p: Tensor, w: Tensor, b: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dp, dw, db and dstate in the inputs' dtype."""
    dp = torch.empty_like(p, memory_format=torch.contiguous_format)
    dstate = p.new_empty(0 if state is None else state.shape)
    K, d = w.shape[1], p.shape[3]
    programs, warps, arguments = shared_arguments(p, w, present(state))
    sums = torch.empty(programs, K + 1, d, dtype=torch.float32, device=p.device)
    launch(
        filter_backward_kernel, programs,
        **arguments, dy=dy, **strides("g", dy), dp=dp, dstate=dstate, sums=sums,
        STATE_ROWS=tile_width(max(K - 1, 1)), num_warps=warps,
    )  # fmt: skip
    total = sums.sum(0)
    dw, db = w.new_empty(w.shape).copy_(total[:K].mT), b.new_empty(b.shape).copy_(total[K])
    return dp, dw, db, dstate
