"""The decode engine in Triton: what a call launches, with as little Python a call as there can be.

A decoding step of a short cache takes the device some ten microseconds, so the host must not take
more. What depends only on the kind of call is worked out once (`Launch`); a call then reads
strides and addresses and hands them to the compiled kernel, past Triton's own look-up.

The grid depends on the launch alone, never on the lengths, which only the device reads.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton.runtime import driver

from attnspec.fast.backend import FAR, count_launch
from attnspec.fast.engines.decode.configs import config
from attnspec.fast.engines.decode.triton_kernels import attend_kernel, join_kernel
from attnspec.fast.engines.prepared import HANDS_ON_CONSTANTS
from attnspec.fast.engines.sizes import cdiv, tile_width

LOG2E = 1 / math.log(2)
JOINED = 8192
"""Numbers of partial outputs that a program holds in registers while it joins them."""
JOINS = {"num_warps": 4, "num_stages": 1}
NOTHING: list[int | None] = [None] * 6
KEPT = 1 << 20
"""Partial numbers that a stream keeps from launch to launch; larger scratch is allocated anew."""

_kept: dict[tuple[torch.device, int], Tensor] = {}


@cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of `device`; the interpreter counts as four."""
    if device.type == "cpu":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def _architecture(device: torch.device) -> int:
    if device.type == "cpu":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def _bandwidth(device: torch.device) -> float:
    """Bytes a second of memory for each multiprocessor, by its clock; 0 if torch cannot tell."""
    if device.type == "cpu":
        return 0.0
    found = torch.cuda.get_device_properties(device)
    clock, bits = getattr(found, "memory_clock_rate", 0), getattr(found, "memory_bus_width", 0)
    # Kilohertz, and two transfers a cycle.
    return 2e3 * clock * bits / 8 / found.multi_processor_count


def partials(device: torch.device, stream: int, count: int) -> Tensor:
    """Room for `count` partial numbers of a launch on the current `stream`, -1 on a CPU.

    Launches that may run at the same time must not share any: each stream has its own, and each
    launch that a graph captures.
    """
    if stream >= 0 and torch.cuda.is_current_stream_capturing():
        return torch.empty(count, dtype=torch.float32, device=device)
    kept = _kept.get((device, stream))
    if kept is not None and kept.numel() >= count:
        return kept
    room = torch.empty(count, dtype=torch.float32, device=device)
    if count <= KEPT:
        _kept[device, stream] = room
    return room


class Launch:
    """How every call of one kind is launched: made from the first, checked one.

    Of the tensors it may depend on which there are, dtypes, the device, and all sizes but the
    number of tokens that keys, values and bias share; `rows`, `tile` and `workers` are 0 where the
    configuration decides.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Tensor | None,
        index: Tensor | None,
        counts: Tensor | None,
        block_table: Tensor | None,
        bias: Tensor | None,
        sink_logit: Tensor | None,
        scale: float,
        causal: bool,
        page: int,
        rows: int,
        tile: int,
        workers: int,
        paired: bool,
    ) -> None:
        batch, heads, q_tokens, d = q.shape
        kv_heads, dv = k.shape[1], v.shape[3]
        self.device = q.device
        self.out_shape, self.lse_shape = (batch, heads, q_tokens, dv), (batch, heads, q_tokens)
        self.pool = 0 if block_table is None else k.shape[2]
        self.one_page, self.one_head = k.shape[0] == 1, v.shape[1] == 1
        dp, dvp = tile_width(d), tile_width(dv)
        group, share = heads // kv_heads, v.shape[1] // kv_heads
        packed = group * q_tokens
        self.empty = batch * packed == 0
        self.optional = any(
            x is not None for x in (lengths, index, counts, block_table, bias, sink_logit)
        )
        indirect = index is not None or block_table is not None
        # A caller's few workers do not overlap on a multiprocessor.
        alone_there = 0 < workers <= _processors(q.device)
        settings = config(
            _architecture(q.device),
            q.element_size(),
            max(dp, dvp),
            packed,
            indirect,
            rows,
            tile,
            share,
            0.0 if alone_there else _bandwidth(q.device),
        )
        rows = max(1, min(packed, settings.rows))
        workers = workers or settings.workers * _processors(q.device)
        causal = causal and q_tokens > 1
        blocks = cdiv(packed, rows)
        per_head = lengths is not None and lengths.dim() == 2
        alone = batch == 1 and not (per_head and kv_heads > 1)
        uniform = (lengths is None or alone) and (not causal or blocks == 1)
        if index is not None:
            uniform = counts is None or (batch == 1 and kv_heads == 1)
        scanned = batch * blocks * (kv_heads if per_head or counts is not None else 1)
        span = next((size for size in (32, 256) if scanned <= size), 1024)
        self.grid, self.joins = (workers, 1, 1), (batch * kv_heads * blocks * rows, 1, 1)
        self.partials = 2 * workers * rows * (dv + 2)
        self.scale = scale * LOG2E
        chosen = 0 if index is None else index.shape[2] * page
        self.sizes = (batch, kv_heads, q_tokens)
        self.constants = (
            chosen, rows, k.shape[0], group, share, tile_width(rows), settings.tile, d, dv, dp, dvp,
            page, self.pool,
        )  # fmt: skip
        self.flags = (causal, paired, per_head, index is not None, uniform, span)
        # Outputs of one tile have nothing to be joined, if it is certain that they have one.
        self.tile, self.chosen = settings.tile, chosen
        self.certain = lengths is None and counts is None and not causal
        parts = max(1, min(64, JOINED // dvp))
        self.joined = (
            workers, *self.sizes, chosen, rows, group, settings.tile, dv, dvp, page, *self.flags,
            parts,
        )  # fmt: skip
        self.options = {"num_warps": settings.warps, "num_stages": settings.stages}
        self.kernels: dict[tuple[int, bool], Any] = {}
        self.join: Any = None

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Tensor | None,
        index: Tensor | None,
        counts: Tensor | None,
        block_table: Tensor | None,
        bias: Tensor | None,
        sink_logit: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """out (B, H, Tq, dv) and lse (B, H, Tq); the arguments of `op.decode`, checked."""
        device = self.device
        stream = -1
        if device.index is not None:
            if device.index != torch.cuda.current_device():
                with torch.cuda.device(device):
                    return self(q, k, v, lengths, index, counts, block_table, bias, sink_logit)
            stream = driver.active.get_current_stream(device.index)
        out = q.new_empty(self.out_shape)
        lse = q.new_empty(self.lse_shape, dtype=torch.float32)
        if self.empty:
            return out, lse
        scratch = partials(device, stream, self.partials)

        (q_b, q_h, q_t, q_d), (k_b, k_h, k_t, k_d) = q.stride(), k.stride()
        v_b, v_h, v_t, v_d = v.stride()
        k_tokens = k.shape[2] if block_table is None else block_table.shape[1] * self.pool
        # The stride of an axis of one element means nothing.
        if self.one_page:
            k_b = v_b = 0
        if self.one_head:
            k_h = v_h = 0
        if k.shape[2] == 1:
            k_t = v_t = 0
        bits = k_b | k_h | k_t | v_b | v_h | v_t
        unit = 1 if bits & 7 else 8
        others: tuple[int, ...] = (0, 0, 0, 0, 0, 0)
        if self.optional:
            lengths = None if lengths is None else lengths.contiguous()
            counts = None if counts is None else counts.contiguous()
            index, block_table, sink_logit = map(_packed, (index, block_table, sink_logit))
            others = (
                *((0, 0, 0) if bias is None else bias.stride()),
                *((0, 0) if index is None else index.stride()[:2]),
                0 if block_table is None else block_table.stride(0),
            )
        optional = (lengths, index, counts, block_table, bias, sink_logit)
        addresses = (
            q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), lse.data_ptr(),
            scratch.data_ptr(),
        )  # fmt: skip
        variant = (unit, k_d == 1 and v_d == 1)
        rest = (
            self.scale, q_b, q_h, q_t, q_d, k_b // unit, k_h // unit, k_t // unit, k_d,
            v_b // unit, v_h // unit, v_t // unit, v_d, *others, *self.sizes, k_tokens,
            *self.constants, *variant, *self.flags,
        )  # fmt: skip
        # What Triton would look at again: alignment to 16 bytes, and integers of 64 bits.
        wide = bits | q_b | q_h | q_t | q_d | k_d | v_d
        misaligned = addresses[0] | addresses[1] | addresses[2]
        if self.optional:
            optional_addresses = [None if x is None else x.data_ptr() for x in optional]
            for stride in others:
                wide |= stride
            for address in optional_addresses:
                misaligned |= address or 0
        else:
            optional_addresses = NOTHING
        plain = not misaligned & 15 and wide < FAR
        kernel = self.kernels.get(variant) if plain else None
        count_launch()
        if kernel is not None:
            kernel(*addresses, *optional_addresses, *rest, stream=stream)
        else:
            kernel = attend_kernel[self.grid](
                q, k, v, out, lse, scratch, *optional, *rest, **self.options
            )
            if plain and HANDS_ON_CONSTANTS and getattr(kernel, "module", None) is not None:
                self.kernels[variant] = kernel[self.grid]

        keys = k_tokens if index is None else self.chosen
        if self.certain and 0 < keys <= self.tile:
            return out, lse
        count_launch()
        if plain and self.join is not None:
            lengths_at, _, counts_at, _, _, sink_at = optional_addresses
            self.join(
                addresses[5], addresses[3], addresses[4], lengths_at, counts_at, sink_at,
                k_tokens, *self.joined, stream=stream,
            )  # fmt: skip
        else:
            join = join_kernel[self.joins](
                scratch, out, lse, lengths, counts, sink_logit, k_tokens, *self.joined, **JOINS
            )
            if plain and HANDS_ON_CONSTANTS and getattr(join, "module", None) is not None:
                self.join = join[self.joins]
        return out, lse


def _packed(x: Tensor | None) -> Tensor | None:
    """`x` with entries side by side along its last axis; a copy if they are not."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def prepare(*arguments: Any) -> Launch:
    """The launch that serves every call of the kind of this one."""
    return Launch(*arguments)
