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
from attnspec.fast.engines.decode.triton_kernels import attend_kernel
from attnspec.fast.engines.prepared import HANDS_ON_CONSTANTS
from attnspec.fast.engines.sizes import cdiv, tile_width

LOG2E = 1 / math.log(2)
JOINED = 8192
"""Numbers of partial outputs that four warps hold in registers while they join them."""
NOTHING: list[int | None] = [None] * 6
KEPT = 1 << 20
"""Partial numbers that a stream keeps from launch to launch; larger scratch is allocated anew."""
SLAB = 1 << 16
"""Arrival counters set aside, on a device's first call, for the graphs captured later."""


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


class Workspace:
    """What launches on a device need beside their outputs: arrival counters and partial outputs.

    Counters are zero, and zero again after every launch. Launches that may run at the same time
    must not share any: each stream has its own, and each launch that a graph captures has its own
    for good.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.of_stream: dict[int, tuple[Tensor, Tensor]] = {}
        self.slab: Tensor | None = None
        self.used = 0

    def take(self, stream: int, counters: int, partials: int) -> tuple[Tensor, Tensor]:
        """At least so many counters and partial numbers for a launch on the current `stream`."""
        if stream >= 0 and torch.cuda.is_current_stream_capturing():
            return self._captured(counters), self._numbers(partials)
        kept = self.of_stream.get(stream)
        if kept is not None and kept[0].numel() >= counters and kept[1].numel() >= partials:
            return kept
        if kept is None or kept[0].numel() < counters:
            arrivals = self._zeros(max(1024, 2 * counters))
        else:
            arrivals = kept[0]
        scratch = self._numbers(partials)
        if partials <= KEPT:
            self.of_stream[stream] = arrivals, scratch
        elif kept is None or arrivals is not kept[0]:
            self.of_stream[stream] = arrivals, self._numbers(0) if kept is None else kept[1]
        if self.slab is None and stream >= 0:
            self.slab = self._zeros(SLAB)
        return arrivals, scratch

    def _captured(self, count: int) -> Tensor:
        """A graph without an eager call before it, or after too many others, zeroes its own."""
        start, self.used = self.used, self.used + -(-count // 4) * 4
        if self.slab is None or self.used > SLAB:
            return self._zeros(count)
        return self.slab[start : start + count]

    def _zeros(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int32, device=self.device)

    def _numbers(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.float32, device=self.device)


_workspace = cache(Workspace)


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
        settings = config(
            _architecture(q.device),
            q.element_size(),
            max(dp, dvp),
            packed,
            indirect,
            rows,
            tile,
            share,
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
        self.outputs = batch * kv_heads * blocks
        scanned = batch * blocks * (kv_heads if per_head or counts is not None else 1)
        span = next((size for size in (32, 256) if scanned <= size), 1024)
        lanes = min(tile_width(rows, 1), 8)
        parts = min(32, max(1, JOINED * settings.warps // 4 // (lanes * dvp)))
        self.grid = (workers, 1, 1)
        self.partials = 2 * workers * rows * (dv + 2)
        self.scale = scale * LOG2E
        chosen = 0 if index is None else index.shape[2] * page
        self.sizes = (batch, kv_heads, q_tokens)
        self.constants = (
            chosen, rows, k.shape[0], group, share, tile_width(rows), settings.tile, d, dv, dp, dvp,
            page, self.pool,
        )  # fmt: skip
        self.flags = (causal, paired, per_head, index is not None, uniform, span, lanes, parts)
        self.options = {"num_warps": settings.warps, "num_stages": settings.stages}
        self.workspace = _workspace(q.device)
        self.kernels: dict[tuple[int, bool], Any] = {}

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
        arrivals, scratch = self.workspace.take(stream, self.outputs, self.partials)

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
            scratch.data_ptr(), arrivals.data_ptr(),
        )  # fmt: skip
        variant = (unit, k_d == 1 and v_d == 1)
        rest = (
            self.scale, q_b, q_h, q_t, q_d, k_b // unit, k_h // unit, k_t // unit, k_d,
            v_b // unit, v_h // unit, v_t // unit, v_d, *others, *self.sizes, k_tokens,
            *self.constants, *variant, *self.flags,
        )  # fmt: skip
        # What Triton would look at again: alignment to 16 bytes, and integers of 64 bits.
        wide = bits | q_b | q_h | q_t | q_d | k_d | v_d
        misaligned = addresses[0] | addresses[1] | addresses[2] | addresses[6]
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
                q, k, v, out, lse, scratch, arrivals, *optional, *rest, **self.options
            )
            if plain and HANDS_ON_CONSTANTS and getattr(kernel, "module", None) is not None:
                self.kernels[variant] = kernel[self.grid]
        return out, lse


def _packed(x: Tensor | None) -> Tensor | None:
    """`x` with entries side by side along its last axis; a copy if they are not."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def prepare(*arguments: Any) -> Launch:
    """The launch that serves every call of the kind of this one."""
    return Launch(*arguments)
