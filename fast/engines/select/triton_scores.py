"""Block scores and their gradients in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnspec.fast.engines.flash.triton_launch import readable
from attnspec.fast.engines.prepared import launch
from attnspec.fast.engines.select.configs import config
from attnspec.fast.engines.sizes import cdiv, next_power_of_2

LENGTHS = ["rows", "columns", "row_tiles", "scale"]


@triton.jit(do_not_specialize=[*LENGTHS, "column_tiles", "fill"])
def _scores(
    q, k, out, q_b, q_h, q_r, q_e, k_b, k_h, k_c, k_e,
    heads, group, rows, columns, row_tiles, column_tiles, width, scale, fill,
    CAUSAL: tl.constexpr, M: tl.constexpr, N: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tile_n, tile_m = program % column_tiles, program // column_tiles % row_tiles
    bh = (program // column_tiles // row_tiles).to(tl.int64)
    b, h = bh // heads, bh % heads
    q += b * q_b + h * q_h
    k += b * k_b + h // group * k_h
    row, column = tile_m * M + tl.arange(0, M), tile_n * N + tl.arange(0, N)
    seen = (row < rows)[:, None] & (column < columns)[None, :]
    real = seen
    if CAUSAL:
        seen = seen & (column[None, :] <= row[:, None] + (columns - rows))
    score = tl.zeros([M, N], tl.float32)
    if (not CAUSAL) or tile_n * N <= tile_m * M + (M - 1) + (columns - rows):
        for start in range(0, width, E):
            channel = start + tl.arange(0, E)
            q_tile = tl.load(
                q + row[:, None].to(tl.int64) * q_r + channel[None, :] * q_e,
                mask=(row < rows)[:, None] & (channel < width)[None, :], other=0.0,
            )  # fmt: skip
            k_tile = tl.load(
                k + column[None, :].to(tl.int64) * k_c + channel[:, None] * k_e,
                mask=(column < columns)[None, :] & (channel < width)[:, None], other=0.0,
            )  # fmt: skip
            score += tl.dot(q_tile, k_tile, input_precision="ieee")
    # The mask comes after the product: what a hidden pair holds is never read (K11).
    score = tl.where(seen, score * scale, fill)
    out += (bh * rows + row[:, None]) * columns + column[None, :]
    tl.store(out, score, mask=real)


@triton.jit(do_not_specialize=[*LENGTHS, "shift"])
def _product(
    a, y, out, a_b, a_h, a_r, a_c, y_b, y_h, y_c, y_e,
    heads, a_group, y_group, rows, columns, shift, row_tiles, width, scale,
    CAUSAL: tl.constexpr, TRANSPOSED: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """out[r] = scale * sum over visible c (and over the heads of a group) of a[r, c] * y[c]."""
    program = tl.program_id(0)
    tile_m, bh = program % row_tiles, (program // row_tiles).to(tl.int64)
    b, h = bh // heads, bh % heads
    row, channel = tile_m * M + tl.arange(0, M), tl.program_id(1) * E + tl.arange(0, E)
    total = tl.zeros([M, E], tl.float32)
    for g in range(a_group):
        a_head = a + b * a_b + (h * a_group + g) * a_h
        y_head = y + b * y_b + (h * a_group + g) // y_group * y_h
        for start in range(0, columns, N):
            column = start + tl.arange(0, N)
            seen = (row < rows)[:, None] & (column < columns)[None, :]
            if CAUSAL and not TRANSPOSED:
                seen = seen & (column[None, :] <= row[:, None] + shift)
            if CAUSAL and TRANSPOSED:
                seen = seen & (row[:, None] <= column[None, :] + shift)
            a_tile = tl.load(
                a_head + row[:, None].to(tl.int64) * a_r + column[None, :].to(tl.int64) * a_c,
                mask=seen, other=0.0,
            )  # fmt: skip
            y_tile = tl.load(
                y_head + column[:, None].to(tl.int64) * y_c + channel[None, :] * y_e,
                mask=(column < columns)[:, None] & (channel < width)[None, :], other=0.0,
            ).to(tl.float32)  # fmt: skip
            total += tl.dot(a_tile, y_tile, input_precision="ieee")
    out += (bh * rows + row[:, None]) * width + channel[None, :]
    real = (row < rows)[:, None] & (channel < width)[None, :]
    tl.store(out, (total * scale).to(out.dtype.element_ty), mask=real)


def scores(q: Tensor, k: Tensor, scale: float, causal: bool, fill: float) -> Tensor:
    batch, heads, rows, width = q.shape
    columns = k.shape[2]
    out = torch.empty(batch, heads, rows, columns, dtype=torch.float32, device=q.device)
    if not out.numel():
        return out
    q, k = readable(q, k)
    plan = config()
    tiles = cdiv(rows, plan.score_q), cdiv(columns, plan.score_k)
    launch(
        _scores, batch * heads * tiles[0] * tiles[1],
        q, k, out, *q.stride(), *k.stride(), heads, heads // k.shape[1], rows, columns, *tiles,
        width, scale, fill, CAUSAL=causal, M=plan.score_q, N=plan.score_k, E=_chunk(width),
        num_warps=plan.score_warps, num_stages=plan.score_stages,
    )  # fmt: skip
    return out


def scores_backward(
    dout: Tensor, q: Tensor, k: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    group, shift = q.shape[1] // k.shape[1], k.shape[2] - q.shape[2]
    dq = _run_product(dout, k, q, scale, causal, False, 1, group, shift)
    dk = _run_product(dout.transpose(2, 3), q, k, scale, causal, True, group, 1, shift)
    return dq, dk


def _run_product(
    a: Tensor, y: Tensor, like: Tensor, scale: float, causal: bool, transposed: bool,
    a_group: int, y_group: int, shift: int,
) -> Tensor:  # fmt: skip
    batch, heads, rows, width = like.shape
    out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    if not out.numel():
        return out
    chunk, tiles = min(32, _chunk(width)), cdiv(rows, 64)
    launch(
        _product, (batch * heads * tiles, cdiv(width, chunk)),
        a, y, out, *a.stride(), *y.stride(), heads, a_group, y_group, rows, y.shape[2], shift,
        tiles, width, scale, CAUSAL=causal, TRANSPOSED=transposed, M=64, N=32, E=chunk,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return out


def _chunk(width: int) -> int:
    """Channels a product takes at once: a power of two that the tensor cores accept."""
    return min(64, max(16, next_power_of_2(width)))
