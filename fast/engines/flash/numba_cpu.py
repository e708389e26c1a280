"""The flash engine on CPU tensors: plans the query tiles and calls the Numba kernels.

float32 and float64 are computed as they are; float16 and bfloat16 are widened to a float32 copy and
the results rounded back. All strides are read in place. The number of threads is Numba's
(``numba.set_num_threads``); gradients are bitwise repeatable for a given number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch
from numba import types

from attnspec.fast.backend import count_launch
from attnspec.fast.engines.flash import numba_backward, numba_forward
from attnspec.fast.engines.flash.numba_lanes import REGISTER_BYTES
from attnspec.fast.engines.flash.numba_visible import KEYS, QUERIES

PARTS_A_THREAD = 4
WORTH_A_CALL = 1 << 24
"""Multiplications that take longer than starting a thread does."""


def widened(x: torch.Tensor) -> torch.Tensor:
    """float16 and bfloat16 as float32, everything else as it is."""
    x = x.detach()
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def number_type(x: torch.Tensor) -> types.Type:
    """The Numba type of a widened tensor's numbers."""
    return types.float64 if x.dtype == torch.float64 else types.float32


def option_array(x: torch.Tensor | None, axes: int, dtype: torch.dtype) -> np.ndarray:
    """The array of an option, empty if it is absent."""
    x = torch.empty((0,) * axes, dtype=dtype) if x is None else x.detach().to(dtype)
    return x.numpy()


def tile_table(
    q_tokens: int,
    k_tokens: int,
    q_block: int,
    q_offsets: torch.Tensor | None,
    k_offsets: torch.Tensor | None,
) -> np.ndarray:
    """(tiles, 5): first query, end, first key, end, shift; no tile crosses a sequence or block."""
    if q_offsets is None or k_offsets is None:
        q_ends, k_ends = [0, q_tokens], [0, k_tokens]
    else:
        q_ends, k_ends = q_offsets.tolist(), k_offsets.tolist()
    tiles = []
    for i in range(len(q_ends) - 1):
        first, shift = q_ends[i], k_ends[i + 1] - q_ends[i + 1]
        while first < q_ends[i + 1]:
            last = min(first + QUERIES, q_ends[i + 1])
            if q_block:
                last = min(last, (first // q_block + 1) * q_block)
            tiles.append((first, last, k_ends[i], k_ends[i + 1], shift))
            first = last
    return np.array(tiles, np.int64).reshape(-1, 5)


def run_parts(
    kernel: Callable[..., None],
    arguments: Sequence[Any],
    tasks: int,
    work: int,
    real: torch.dtype,
    scratch_size: int,
    most_spans: int,
) -> None:
    """Call `kernel` with `arguments` on every part of its tasks, on Numba's number of threads.

    There are more parts than threads, so that a delayed thread does not delay the call, but none
    for less than `WORTH_A_CALL` of `work`, the multiplications in all.
    """
    threads = numba.get_num_threads()
    parts = max(1, min(PARTS_A_THREAD * threads if threads > 1 else 1, tasks, work // WORTH_A_CALL))

    def run(part: int) -> None:
        scratch = torch.empty(scratch_size, dtype=real).numpy()
        kernel(*arguments, part, parts, scratch, np.empty((most_spans, 3), np.int64))

    count_launch()
    if parts == 1:
        run(0)
        return
    with ThreadPoolExecutor(min(threads, parts)) as pool:
        for done in [pool.submit(run, part) for part in range(parts)]:
            done.result()


def most_spans_of(k_tokens: int, block_index: np.ndarray, k_block: int) -> int:
    """Most spans that a tile can see."""
    if k_block:
        return int(block_index.shape[3]) * (k_block // KEYS + 2) + 2
    return k_tokens // KEYS + 3


def visible_arguments(
    q: torch.Tensor,
    k: torch.Tensor,
    causal: bool,
    window: int | None,
    sinks: int,
    row_start: torch.Tensor | None,
    row_end: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    mask: torch.Tensor | None,
    block_index: torch.Tensor | None,
    block_count: torch.Tensor | None,
    block_full: torch.Tensor | None,
    q_block: int,
    k_block: int,
) -> tuple[Any, ...]:
    """The kernels' arguments that decide which pairs are seen."""
    batch, heads, q_tokens = q.shape[:3]
    if mask is not None:
        mask = mask.expand(batch, heads, q_tokens, k.shape[2])
    return (
        causal,
        window or 0,
        sinks,
        option_array(row_start, 1, torch.int64),
        option_array(row_end, 1, torch.int64),
        option_array(key_mask, 2, torch.bool),
        option_array(mask, 4, torch.bool),
        option_array(block_index, 4, torch.int32),
        option_array(block_count, 3, torch.int32),
        option_array(block_full, 3, torch.int32),
        q_block,
        k_block,
    )


def _bias(
    slopes: torch.Tensor | None, slope_positions: torch.Tensor | None, dtype: torch.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """The kernels' arguments that add slopes[head] * (key - position of the query) to a score."""
    return option_array(slopes, 1, dtype), option_array(slope_positions, 1, torch.int64)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    sinks: int,
    row_start: torch.Tensor | None,
    row_end: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    mask: torch.Tensor | None,
    block_index: torch.Tensor | None,
    block_count: torch.Tensor | None,
    block_full: torch.Tensor | None,
    q_block: int,
    k_block: int,
    q_offsets: torch.Tensor | None,
    k_offsets: torch.Tensor | None,
    sink_logit: torch.Tensor | None,
    slopes: torch.Tensor | None = None,
    slope_positions: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out (batch, heads, q_tokens, dv) in q's dtype and lse (batch, heads, q_tokens) in float32,
    float64 for float64 inputs.
    """
    wide = widened(q)
    batch, heads, q_tokens, d = q.shape
    dv = v.shape[3]
    out = torch.empty(batch, heads, q_tokens, dv, dtype=wide.dtype)
    lse = torch.empty(batch, heads, q_tokens, dtype=wide.dtype)
    see = visible_arguments(
        q, k, causal, window, sinks, row_start, row_end, key_mask, mask, block_index, block_count,
        block_full, q_block, k_block,
    )  # fmt: skip
    tiles = tile_table(q_tokens, k.shape[2], q_block, q_offsets, k_offsets)
    arguments = [
        wide.numpy(), widened(k).numpy(), widened(v).numpy(), out.numpy(), lse.numpy(), scale, *see,
        option_array(sink_logit, 1, wide.dtype), *_bias(slopes, slope_positions, wide.dtype), tiles,
    ]  # fmt: skip
    run_parts(
        numba_forward.forward_kernel(number_type(wide)), arguments, batch * heads * len(tiles),
        batch * heads * q_tokens * k.shape[2] * (d + dv), wide.dtype,
        numba_forward.scratch_size(d, dv), most_spans_of(k.shape[2], see[7], k_block),
    )  # fmt: skip
    return out.to(q.dtype), lse


def backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    sinks: int,
    row_start: torch.Tensor | None,
    row_end: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    mask: torch.Tensor | None,
    block_index: torch.Tensor | None,
    block_count: torch.Tensor | None,
    block_full: torch.Tensor | None,
    q_block: int,
    k_block: int,
    q_offsets: torch.Tensor | None,
    k_offsets: torch.Tensor | None,
    sink_logit: torch.Tensor | None,
    slopes: torch.Tensor | None = None,
    slope_positions: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk and dv in the inputs' dtype, and dsink (heads,) in float32 (float64 for float64
    inputs), zeros without a sink logit.
    """
    wide, wide_dout = widened(q), widened(dout)
    batch, heads, q_tokens, d = q.shape
    kv_heads, k_tokens, d_v = k.shape[1], k.shape[2], v.shape[3]
    shift = -(wide_dout * widened(out)).sum(-1)
    if dlse is not None:
        shift += dlse.detach()
    lanes = REGISTER_BYTES // wide.element_size()
    d_padded, dv_padded = -(-d // lanes) * lanes, -(-d_v // lanes) * lanes
    see = visible_arguments(
        q, k, causal, window, sinks, row_start, row_end, key_mask, mask, block_index, block_count,
        block_full, q_block, k_block,
    )  # fmt: skip
    tiles = tile_table(q_tokens, k_tokens, q_block, q_offsets, k_offsets)
    shares = shares_of(batch * kv_heads, len(tiles))
    dq = torch.empty(batch, heads, q_tokens, d, dtype=wide.dtype)
    dk = torch.zeros(shares, batch, kv_heads, k_tokens, d_padded, dtype=wide.dtype)
    dv = torch.zeros(shares, batch, kv_heads, k_tokens, dv_padded, dtype=wide.dtype)
    arguments = [
        wide.numpy(), widened(k).numpy(), widened(v).numpy(), wide_dout.numpy(),
        lse.detach().numpy(), shift.numpy(), dq.numpy(), dk.numpy(), dv.numpy(), scale, *see,
        *_bias(slopes, slope_positions, wide.dtype), tiles,
    ]  # fmt: skip
    run_parts(
        numba_backward.backward_kernel(number_type(wide)), arguments, shares * batch * kv_heads,
        2 * batch * heads * q_tokens * k_tokens * (d + d_v), wide.dtype,
        numba_backward.scratch_size(d_padded, dv_padded), most_spans_of(k_tokens, see[7], k_block),
    )  # fmt: skip
    dsink = torch.zeros(heads, dtype=wide.dtype)
    if sink_logit is not None:
        weight = torch.exp(sink_logit.detach().to(wide.dtype)[:, None] - lse.detach())
        dsink = torch.where(lse == -math.inf, 0.0, weight * shift).sum((0, 2))
    dk, dv = dk.sum(0)[..., :d], dv.sum(0)[..., :d_v]
    return (
        dq.to(q.dtype),
        dk.to(k.dtype).contiguous(),
        dv.to(v.dtype).contiguous(),
        dsink,
    )


def shares_of(kv_pairs: int, tiles: int) -> int:
    """Into how many shares a kv head's query tiles are split to keep every thread busy."""
    threads = numba.get_num_threads()
    shares = 1
    while shares < tiles and kv_pairs * shares % threads and kv_pairs * shares < 4 * threads:
        shares += 1
    return shares


def prepare_forward(*arguments: Any) -> Callable[..., Any]:
    """What computes every call of the kind of this one."""
    return forward


def prepare_backward(*arguments: Any) -> Callable[..., Any]:
    """What computes the gradients of every call of the kind of this one."""
    return backward
