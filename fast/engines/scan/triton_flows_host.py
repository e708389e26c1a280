"""Launches of Flowformer's flows, recorded for calls of the same kind."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from attnspec.fast.engines.prepared import HANDS_ON_CONSTANTS
from attnspec.fast.engines.scan.configs import LaneConfig, ScanConfig, config, lanes
from attnspec.fast.engines.scan.flows_gradient import kept_lengths
from attnspec.fast.engines.scan.recorder import Recorder
from attnspec.fast.engines.scan.segments import Segments, cut
from attnspec.fast.engines.scan.triton_flows import (
    compete_kernel,
    merge_kernel,
    read_kernel,
    shares_kernel,
    sums_kernel,
)
from attnspec.fast.engines.scan.triton_flows_causal import (
    conserved_kernel,
    flows_kernel,
    ordered_read_kernel,
    prefix_kernel,
    source_states_kernel,
    weights_kernel,
)
from attnspec.fast.engines.scan.triton_plan import Call, device_of
from attnspec.fast.engines.sizes import tile_width

MOST_SEGMENTS = 256
"""Every program adds the parts of up to so many segments."""
MOST_PREFIXES = 1024
"""A program takes the sums before up to so many segments, one after the other."""
SHORTEST = 128
"""A state is kept for no fewer tokens."""
STEEPEST = 20.0
"""Weights down to e^-20 of one another are far from float32's least numbers and need no maximum."""


@dataclass
class Plan:
    """One call: its tensors, how they are read, and the tiles of its kernels."""

    q: Tensor
    k: Tensor
    v: Tensor
    unit: int
    half: bool
    cfg: ScanConfig
    processors: int
    recorder: Recorder

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, *others: Tensor) -> Plan:
        """Rows of 16-bit tensors are loaded as vectors if they lie at multiples of 16 numbers, and
        multiplied in bfloat16 if their widths are such multiples too.
        """
        regular = all(
            x.stride(3) == 1 and x.data_ptr() % 16 == 0 and all(s % 16 == 0 for s in x.stride()[:3])
            for x in (q, k, v, *others)
        )
        whole = q.shape[3] % 16 == 0 and v.shape[3] % 16 == 0
        half = q.dtype == torch.bfloat16 and regular and whole
        processors, hopper = device_of(q)
        cfg = config(2 if half else 4, q.shape[3], hopper)
        return cls(
            q, k, v, 16 if regular else 1, half, cfg, processors, Recorder(HANDS_ON_CONSTANTS)
        )

    def rows(self, chosen: LaneConfig) -> int:
        """Rows of a tile without products."""
        return max(2, chosen.rows * chosen.channels // tile_width(self.d))

    def length(self, tokens: int, programs: float, most: int, least: int, step: int) -> int:
        """Tokens of a segment, a multiple of `step`, if each line has its share of `programs` a
        multiprocessor, and `most` at most.
        """
        many = max(1, min(most, int(programs * self.processors) // self.lines))
        return -(-max(-(-tokens // many), least) // step) * step

    @property
    def lines(self) -> int:
        return self.q.shape[0] * self.q.shape[1]

    @property
    def heads(self) -> tuple[int, int]:
        return self.q.shape[1], self.k.shape[1]

    @property
    def d(self) -> int:
        return self.q.shape[3]

    @property
    def dv(self) -> int:
        return self.v.shape[3]

    @property
    def product(self) -> tuple[torch.dtype, Any]:
        """The dtype of operands, as torch and as Triton name it."""
        return (torch.bfloat16, tl.bfloat16) if self.half else (torch.float32, tl.float32)

    def place(self, x: Tensor, unit: int = 0) -> tuple[Tensor, int, int, int, int]:
        """A tensor and its strides, as the kernels read it, in the call's unit or one that divides
        it.
        """
        batch, head, row, channel = x.stride()
        unit = unit or self.unit
        return x, batch // unit, head // unit, row // unit, channel

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """An uninitialised buffer."""
        return self.recorder.buffer(torch.empty(shape, dtype=dtype, device=self.q.device))

    def warps(self, tile: int, least: int) -> int:
        """Warps of a program that keeps so many rows of a state: enough registers for that and for
        a tile of features.
        """
        return max(least, min(8, tile_width(self.d) * max(tile, self.cfg.block) // 1024))

    def keep(self, key: Hashable, given: Sequence[Any], made: Sequence[Tensor]) -> None:
        """Let calls of this kind repeat what has been launched."""
        if self.recorder.follows:
            self.recorder.keep(key, given, made, nothing)


def attend(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, query_mask: Tensor | None,
    eps: float, kind: int, clamp: tuple[float, float] | None, key: Hashable,
) -> Tensor:  # fmt: skip
    """out (batch, heads, n, dv) of sinks q and sources k, of both at least one."""
    plan = Plan.of(q, k, v)
    chosen, launch = lanes("flows"), plan.recorder.launch
    width = tile_width(plan.d)
    rows, block = plan.rows(chosen), plan.cfg.block
    n, m, step = q.shape[2], k.shape[2], max(rows, block)
    # Sinks and sources are programs of one launch, each with half of them.
    length = plan.length(max(n, m), chosen.programs / 2, MOST_SEGMENTS, chosen.least_segment, step)
    n_segments, m_segments = -(-n // length), -(-m // length)
    cuts = (n, m, length, n_segments, m_segments, plan.lines, *plan.heads)
    sinks = (q, 0, 0) if query_mask is None else (query_mask, *query_mask.stride())
    sources = (k, 0, 0) if key_mask is None else (key_mask, *key_mask.stride())
    tokens = (*plan.place(q), *plan.place(k), *sinks, *sources)
    shape: dict[str, Any] = {"D": plan.d, "BD": width, "UNIT": plan.unit, "KIND": kind}
    masked = {"SINKS": query_mask is not None, "SOURCES": key_mask is not None}

    programs = plan.lines * n_segments + q.shape[0] * k.shape[1] * m_segments
    sums, counts = plan.empty(programs, plan.d), plan.empty(programs)
    launch(sums_kernel, programs, *tokens, sums, counts, q, *cuts, ROWS=rows, **shape, **masked,
           COUNTED=True, PACKED=False, num_warps=4)  # fmt: skip
    programs = plan.lines * (n_segments + m_segments)
    shares, parts = plan.empty(plan.lines, n), plan.empty(programs, plan.d)
    launch(shares_kernel, programs, *tokens, sums, shares, parts, *cuts, eps, ROWS=rows, **shape,
           **masked, num_warps=4)  # fmt: skip

    tile = Call.tile(plan.cfg.states_items, plan.d, plan.dv)
    where = plan.lines * m_segments
    states, masses = plan.empty(where, plan.dv, plan.d), plan.empty(where, 2)
    low, high = clamp or (0.0, 0.0)
    launch(
        compete_kernel, where * -(-plan.dv // tile), *plan.place(k), *plan.place(v), *sources,
        parts, states, masses, m, length, n_segments, m_segments, *plan.heads, eps, low, high,
        DV=plan.dv, BV=tile, ROWS=block, **shape, SOURCES=masked["SOURCES"],
        CLAMPED=clamp is not None, BOUNDED=clamp is not None and high - low <= STEEPEST,
        PRODUCT=plan.product[1], num_warps=plan.warps(tile, 4),
        num_stages=plan.cfg.walk_stages,
    )  # fmt: skip
    items = min(256, tile_width(plan.d * plan.dv))
    KV = plan.empty(plan.lines, plan.dv, plan.d, dtype=plan.product[0])
    into, ratios = plan.empty(plan.lines, plan.d), plan.empty(plan.lines)
    launch(
        merge_kernel, plan.lines * -(-plan.d * plan.dv // items), states, masses, parts, counts, KV,
        into, ratios, n_segments, m_segments, plan.lines, *plan.heads, D=plan.d, DV=plan.dv,
        BD=width, ITEMS=items, num_warps=2,
    )  # fmt: skip

    tile = Call.tile(plan.cfg.walk_items, plan.d, plan.dv)
    tiles = -(-plan.dv // tile)
    length = plan.length(n, chosen.programs / tiles, n, block, block)
    segments = -(-n // length)
    out = plan.empty(*q.shape[:3], plan.dv, dtype=q.dtype)
    launch(
        read_kernel, plan.lines * segments * tiles, *plan.place(q), *sinks, shares,
        into, ratios, KV, out, n, length, segments, q.shape[1], eps, DV=plan.dv, BV=tile,
        ROWS=block, **shape, SINKS=masked["SINKS"],
        num_warps=plan.warps(tile, plan.cfg.walk_warps),
        num_stages=plan.cfg.walk_stages,
    )  # fmt: skip
    plan.keep(key, (q, k, v, key_mask, query_mask), (out,))
    return out


def attend_in_order(
    tensors: Sequence[Tensor], eps: float, kind: int, clamp: tuple[float, float] | None,
    key: Hashable, keep: bool = False, offsets: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """out (batch, heads, tokens, dv), and the sums of b, a, b N / O, a N / I and e^Oh, the state
    and the number of tokens behind the last of at least one. `tensors` are q, k, v and, if any
    tokens precede them, the first of these in float32. To `keep` adds what the gradient needs, see
    `flows_gradient.py`. `offsets` packs sequences in a batch of one, with a state for each.
    """
    q, k, v, *first = tensors
    plan = Plan.of(q, k, v)
    if offsets is not None:
        # Tables of segments are made by torch, which a recorder would miss.
        plan.recorder = Recorder()
    chosen, launch = lanes("ordered"), plan.recorder.launch
    # Where there is no first state, kernels take any tensor and leave it alone.
    sb, sa, sbO, saI, se, KV, N = [x.contiguous() for x in first] or [q] * 7
    begun = {"STARTED": bool(first)}
    rows, tokens, width = plan.rows(chosen), q.shape[2], tile_width(plan.d)
    length = plan.length(tokens, chosen.programs, MOST_PREFIXES, chosen.least_segment, rows)
    states_length = plan.length(tokens, plan.cfg.programs, MOST_SEGMENTS, SHORTEST, plan.cfg.block)
    if keep:
        length, states_length = kept_lengths(plan.lines, tokens)
    pieces = cut(q.shape[0], tokens, length, offsets)
    segments, packed = pieces.each, {"PACKED": pieces.packed}
    tables = pieces.tables(q)
    where = (*tables, tokens, length, segments, plan.lines, *plan.heads)
    many = (pieces.sequences, q.shape[1])
    sides = (*plan.place(q), *plan.place(k))
    shape: dict[str, Any] = {"D": plan.d, "BD": width, "UNIT": plan.unit, "KIND": kind}
    walks: dict[str, Any] = {"ROWS": rows, **shape, **begun, **packed, "num_warps": 1}
    items = min(16, width)
    prefixes: dict[str, Any] = {
        "ROWS": 32, "ITEMS": items, **begun, **packed, "REVERSE": False, "num_warps": 1,
    }  # fmt: skip
    programs = 2 * prod(many) * -(-plan.d // items)
    chain = (tables[1], plan.lines, prod(many), segments, *plan.heads)
    last = [plan.empty(*many, plan.d) for _ in range(4)]

    kv_lines = q.shape[0] * k.shape[1]
    totals = plan.empty(2 * plan.lines, segments, plan.d)
    before = plan.empty(2 * plan.lines, segments, plan.d)
    launch(sums_kernel, (plan.lines + kv_lines) * segments, *sides, q, 0, 0, k, 0, 0, totals,
           totals, tables[0], tokens, tokens, length, segments, segments, plan.lines, *plan.heads,
           ROWS=rows, **shape, **packed, SINKS=False, SOURCES=False, COUNTED=False,
           num_warps=1)  # fmt: skip
    launch(prefix_kernel, programs, totals, sa, sb, before, last[1], last[0], *chain, WIDTH=plan.d,
           SHARED=kv_lines < plan.lines, ACROSS=0, **prefixes)  # fmt: skip
    shares = plan.empty(2, plan.lines, tokens)
    launch(flows_kernel, plan.lines * segments, *sides, before, N, shares, totals, *where, eps,
           **walks)  # fmt: skip
    between = plan.empty(2 * plan.lines, segments, plan.d) if keep else before
    launch(prefix_kernel, programs, totals, saI, sbO, between, last[3], last[2], *chain,
           WIDTH=plan.d, SHARED=False, ACROSS=0, **prefixes)  # fmt: skip
    gates, weights = plan.empty(plan.lines, tokens), plan.empty(plan.lines, tokens)
    masses = plan.empty(plan.lines, segments)
    low, high = clamp or (0.0, 0.0)
    conserved, sums = gates, weights
    if keep:
        conserved, sums = plan.empty(2, plan.lines, tokens), plan.empty(plan.lines, tokens)
    launch(conserved_kernel, plan.lines * segments, *sides, between, N, shares, gates, weights,
           masses, conserved, *where, eps, low, high, CLAMPED=clamp is not None, KEEP=keep,
           **walks)  # fmt: skip
    numbers = [plan.empty(*many) for _ in range(2)]
    if offsets is not None:
        # A sequence without tokens keeps what it was given.
        numbers = [se.clone(), N.clone()] if first else [x.zero_() for x in numbers]
    launch(weights_kernel, plan.lines * segments, masses, se, N, weights, sums, *numbers, *tables,
           tokens, length, segments, plan.heads[0], TILE=64, **begun, **packed, KEEP=keep,
           num_warps=1)  # fmt: skip
    out, state, entering = _read_in_order(
        plan, gates, weights, KV, prefixes, shape, cut(q.shape[0], tokens, states_length, offsets)
    )
    made: tuple[Tensor, ...] = (out, *last, numbers[0], state, numbers[1])
    if keep:
        made = (*made, shares, conserved, gates, weights, sums, before, between, entering)
    plan.keep(key, tensors, made)
    return made


def _read_in_order(
    plan: Plan, gates: Tensor, weights: Tensor, KV: Tensor, prefixes: dict[str, Any],
    shape: dict[str, Any], pieces: Segments,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """out, the last state and those before every one of `pieces`, linear attention with sources of
    these weights.
    """
    q, k, v, cfg, launch = plan.q, plan.k, plan.v, plan.cfg, plan.recorder.launch
    tokens = q.shape[2]
    tile = Call.tile(cfg.states_items, plan.d, plan.dv)
    segments, (table, bounds) = pieces.each, pieces.tables(q)
    many = (pieces.sequences, q.shape[1])
    where = plan.lines * segments
    cuts = (table, tokens, pieces.length, segments)
    shape = {**shape, "DV": plan.dv, "ROWS": cfg.block, "PRODUCT": plan.product[1]}
    shape["PACKED"] = pieces.packed
    shape["num_stages"] = cfg.walk_stages
    states = plan.empty(where, plan.dv, plan.d)
    entering = plan.empty(where, plan.dv, plan.d)
    state = plan.empty(*many, plan.d, plan.dv)
    launch(
        source_states_kernel, where * -(-plan.dv // tile), *plan.place(k), *plan.place(v), weights,
        states, *cuts, *plan.heads, BV=tile, **shape,
        num_warps=plan.warps(tile, 4),
    )  # fmt: skip
    items = min(64, tile_width(plan.d * plan.dv))
    launch(
        prefix_kernel, prod(many) * -(-plan.d * plan.dv // items), states, KV, KV, entering, state,
        state, bounds, plan.lines, prod(many), segments, *plan.heads, WIDTH=plan.d * plan.dv,
        SHARED=False, ACROSS=plan.d, **{**prefixes, "ROWS": 16, "ITEMS": items},
    )  # fmt: skip
    tile = Call.tile(cfg.walk_items, plan.d, plan.dv)
    out = plan.empty(*q.shape[:3], plan.dv, dtype=q.dtype)
    launch(
        ordered_read_kernel, where * -(-plan.dv // tile), *plan.place(q), *plan.place(k),
        *plan.place(v), gates, weights, entering, out, *cuts, q.shape[1], 1,
        q.shape[1] // k.shape[1], BV=tile, **shape, BACKWARD=False,
        num_warps=plan.warps(tile, cfg.walk_warps),
    )  # fmt: skip
    return out, state, entering


def nothing() -> None:
    """What these kernels need before a launch."""
