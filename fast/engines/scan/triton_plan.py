"""How one call of the scan is laid out for the Triton kernels: sizes, segments and launches."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from attnspec.fast.engines.flash.triton_launch import SPEAKS_GLUON, aligned, arch
from attnspec.fast.engines.scan.configs import REACH, ScanConfig, config
from attnspec.fast.engines.scan.recorder import Recorder
from attnspec.fast.engines.scan.segments import Segments, cut
from attnspec.fast.engines.scan.triton_states import chain_kernel, states_kernel
from attnspec.fast.engines.scan.triton_walk import walk_kernel
from attnspec.fast.engines.sizes import next_power_of_2, tile_width

NONE, CONSTANT, SCALAR, VECTOR, BITS = range(5)
KINDS = ("constant", "constant", "token", "channel", "token")
"""What the table of configurations calls these decays."""
SPECIALISED_COLUMNS, SPECIALISED_BLOCK, SPECIALISED_WIDTHS, CONSUMERS = 64, 64, (64, 128), 2
"""Of the specialised kernels: channels of v that each consumer has, rows of a block, channels of q
and k, padded, and consumers of a program."""
HOPPERS_ROOM, OTHERS_ROOM = 232448, 101376
"""Bytes of shared memory that a program may take, on Hopper and on processors with less."""


@cache
def _device(index: int | None) -> tuple[int, bool]:
    """Multiprocessors of a CUDA device, and whether it has Hopper's shared memory or more."""
    if index is None:
        return 1, False
    properties = torch.cuda.get_device_properties(index)
    return properties.multi_processor_count, properties.major >= 9


def device_of(x: Tensor) -> tuple[int, bool]:
    """`_device` of a tensor's device; one processor stands for the interpreter."""
    return _device(x.device.index if x.is_cuda else None)


def odd_programs(many: int, span: int) -> int:
    """Programs for `many` blocks, `span` each, that lie as far apart as there are programs: an odd
    number, so that the steep blocks of one head do not come to one program.
    """
    return -(-many // span) | 1


def consumed(columns: int) -> int:
    """How many consumers of the specialised kernels share so many channels of v."""
    return -(-columns // SPECIALISED_COLUMNS)


@dataclass
class Weighted:
    """Under a decay per channel: weighted q and k, block totals, products inside the blocks, and
    which blocks are steep (none are told for float32, all of whose blocks are treated as such).
    """

    q: Tensor
    k: Tensor
    totals: Tensor
    pairs: Tensor
    steep: Tensor


@dataclass
class Call:
    """One call: sizes, decay, configuration, and the segments its sequences are cut in."""

    batch: int
    heads: int
    tokens: int
    d: int
    dv: int
    dtype: torch.dtype
    device: torch.device
    decay: int
    gates: Tensor | None
    scale: float
    cfg: ScanConfig
    processors: int
    room: int
    block: int
    segments: Segments
    recorder: Recorder

    @classmethod
    def plan(
        cls, q: Tensor, v: Tensor, heads: int, slopes: Tensor | None, log_decay: Tensor | None,
        offsets: Tensor | None, scale: float, block: int, *, segment: int | None = None,
        gradient: bool = False, follows: bool = False, bits: bool = False,
    ) -> Call:  # fmt: skip
        """`segment` fixes the rows of a segment; `gradient` if a decay's gradient is wanted;
        `follows` if the launches are to be recorded; `bits` if log decays a token are to base 2.
        """
        batch, _, tokens, d = q.shape
        decay, gates = NONE, None
        if slopes is not None:
            decay, gates = CONSTANT, slopes.to(torch.float32).contiguous()
        elif log_decay is not None:
            scalar = BITS if bits else SCALAR
            decay, gates = (scalar if log_decay.dim() == 3 else VECTOR), log_decay
        processors, hopper = device_of(q)
        cfg = config(q.element_size(), d, hopper, KINDS[decay])
        rows = min(cfg.most, tile_width(block)) if block else cfg.block
        call = cls(
            batch, heads, tokens, d, v.shape[3], q.dtype, q.device, decay, gates, scale, cfg,
            processors, HOPPERS_ROOM if hopper else OTHERS_ROOM, rows,
            Segments(batch, batch, 1, max(tokens, 1)), Recorder(follows),
        )  # fmt: skip
        length = segment or cfg.segment
        if length is None:
            tile = call.tile(cfg.walk_items, d, call.dv)
            walks, programs = batch * heads * -(-call.dv // tile), cfg.programs
            if offsets is None and call.specialises(q, v):
                walks = batch * call.walkers(call.dv)
                programs = cfg.specialised_programs
            many = max(1, int(programs * processors) // walks)
            length = max(-(-tokens // many), cfg.least_segment)
            if gradient:
                length = min(length, cfg.gate_segment)
        if segment is None:
            length = -(-length // rows) * rows
        call.segments = cut(batch, tokens, length, offsets)
        return call

    @staticmethod
    def tile(items: int, rows: int, columns: int) -> int:
        """State columns a program owns, so that it holds at most `items` numbers."""
        return max(16, min(128, tile_width(columns), items // tile_width(rows)))

    def specialises(self, *tensors: Tensor) -> bool:
        """Whether the specialised kernels know a call's decay and (q, ..., v): rows lie where
        descriptors can load them, segments are whole blocks of sequences that are not packed, and
        none of two consumers has nothing to do.
        """
        first, last = tensors[0], tensors[-1]
        tiles = self.heads * consumed(last.shape[3])
        segments = self.segments
        return (
            self.cfg.specialised > 0 and SPEAKS_GLUON and first.is_cuda and arch(first) == 90
            and self.decay != VECTOR and segments.table is None and tiles % CONSUMERS == 0
            and self.block == SPECIALISED_BLOCK and tile_width(first.shape[3]) in SPECIALISED_WIDTHS
            and (segments.each == 1 or segments.length % self.block == 0)
            and all(aligned(x) for x in tensors)
        )  # fmt: skip

    def walkers(self, columns: int) -> int:
        """Programs of a specialised kernel for a segment of all heads and so many channels of v."""
        return self.heads * consumed(columns) // CONSUMERS

    def shares(self, q: Tensor, k: Tensor, columns: int) -> bool:
        """Whether two tiles of v's channels, dealt out one head after the other, have q and k in
        common.
        """
        whole = consumed(columns) % CONSUMERS == 0
        return whole or all(self.heads // x.shape[1] % 2 == 0 for x in (q, k))

    @property
    def nothing(self) -> bool:
        """Whether there is no token to compute."""
        return not (self.batch and self.heads and self.tokens)

    def stages(self, wanted: int, columns: int, state: int) -> int:
        """How many blocks of `columns` numbers a row are on their way beside a state of so many
        numbers: `wanted`, or as many as shared memory has room for.
        """
        size = self.dtype.itemsize
        return max(1, min(wanted, (self.room - state * size) // (self.block * columns * size)))

    def span(self, blocks: int) -> int:
        """How many blocks a program for steep ones looks after: few do anything."""
        if self.dtype not in REACH:
            return 1
        return min(128, max(1, blocks // (4 * self.processors)))

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """An uninitialised buffer."""
        return self.recorder.buffer(torch.empty(shape, dtype=dtype, device=self.device))

    def rows(self, width: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised (batch, heads, tokens, width)."""
        return self.empty(self.batch, self.heads, self.tokens, width, dtype=dtype)

    def last_states(self, state: Tensor | None, offsets: Tensor | None) -> Tensor:
        """Room for the last states; a sequence without tokens keeps its initial one."""
        shape = (self.segments.sequences, self.heads, self.d, self.dv)
        if offsets is None and not self.nothing:
            return self.empty(*shape)
        if state is not None:
            return state.clone()
        return torch.zeros(shape, device=self.device)

    def place(self) -> tuple[int, int, int, int]:
        """The integers every kernel over segments takes."""
        return self.segments.each, self.segments.length, self.tokens, self.heads

    def table(self, like: Tensor) -> Tensor:
        """The table of packed segments; `like` stands in for none."""
        return like if self.segments.table is None else self.segments.table

    def gate_arguments(self, like: Tensor) -> tuple[Any, ...]:
        """Log decays (slopes, if constant) and their strides; `like` stands in for none."""
        if self.gates is None:
            return like, 0, 0, 0
        if self.decay in (CONSTANT, VECTOR):
            return self.gates, 0, 0, 0
        return self.gates, *self.gates.stride()

    def weight_arguments(self, weights: Tensor | None, like: Tensor) -> tuple[Any, ...]:
        """Weights of rows (batch, heads, tokens) and their strides; `like` stands in for none."""
        return (like, 0, 0, 0) if weights is None else (weights, *weights.stride())

    def shared_by(self, weights: Tensor | None) -> int:
        """How many heads share weights."""
        return 1 if weights is None else self.heads // weights.shape[1]

    def layout(self, *tensors: Tensor) -> dict[str, bool]:
        """What the kernels need to know of strides: whether those of batches, heads and tokens are
        multiples of 16 elements, and whether the span of a tile exceeds 32 bits.
        """
        aligned = all(stride % 16 == 0 for x in tensors for stride in x.stride()[:3])
        span = max(self.block * x.stride(2) + 256 * x.stride(3) for x in tensors)
        return {"ALIGNED": aligned, "WIDE": span >= 2**31}

    def describe(self, layout: dict[str, bool], *tensors: Tensor) -> dict[str, bool]:
        """`layout`, and whether tensor descriptors can load the tiles."""
        fits = layout["ALIGNED"] and all(
            x.stride(3) == 1 and x.stride(2) > 0 and x.data_ptr() % 16 == 0
            and x.shape[3] * x.element_size() % 16 == 0
            for x in tensors
        )  # fmt: skip
        used = self.cfg.descriptors and fits
        if used:
            prepare()
        return {**layout, "DESCRIPTORS": used}


def prepare() -> None:
    """Before kernels are launched: where they find scratch memory."""
    triton.set_allocator(_scratch)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Device memory for tensor descriptors."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def sum_segments(
    call: Call, a: Tensor, b: Tensor, totals: Tensor | None, *, backward: bool, every: bool = False,
    inner: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Every segment's own contribution to the state, and its log decay; `inner` weighs rows."""
    cfg = call.cfg
    states = call.empty(call.segments.total, call.heads, call.d, call.dv)
    width = call.d if call.decay == VECTOR else 1
    decays = call.empty(call.segments.total, call.heads, width)
    if call.specialises(a, b):
        from attnspec.fast.engines.scan import triton_specialised_host

        triton_specialised_host.sum_segments(
            call, a, b, states, decays, backward=backward, every=every, inner=inner
        )
        return states, decays
    tile = call.tile(cfg.states_items, call.d, call.dv)
    call.recorder.launch(
        states_kernel, call.segments.total * call.heads * -(-call.dv // tile),
        a, *a.stride(), b, *b.stride(), *call.gate_arguments(a), *call.weight_arguments(inner, a),
        a if totals is None else totals, states, decays, call.table(a), call.scale, *call.place(),
        call.heads // a.shape[1], call.heads // b.shape[1], call.shared_by(inner),
        D=call.d, DV=call.dv, BD=tile_width(call.d), BV=tile, C=call.block, DECAY=call.decay,
        PACKED=call.segments.table is not None, BACKWARD=backward, EVERY=every,
        INNER=inner is not None, **call.describe(call.layout(a, b), a, b),
        num_warps=cfg.states_warps,
        num_stages=call.stages(
            cfg.states_stages, tile_width(call.d) + tile, tile_width(call.d) * tile
        ),
    )  # fmt: skip
    return states, decays


def chain(
    call: Call, states: Tensor, decays: Tensor, initial: Tensor | None, *, backward: bool,
    final: Tensor | None = None,
) -> None:  # fmt: skip
    """Turn the segments' sums into the states between them, in place."""
    segments, items = call.segments, min(1024, next_power_of_2(call.d * call.dv))
    parts = -(-call.d * call.dv // items)
    call.recorder.launch(
        chain_kernel, segments.sequences * call.heads * parts,
        states, decays, states if initial is None else initial, states if final is None else final,
        decays if segments.bounds is None else segments.bounds, segments.each, call.heads,
        D=call.d, DV=call.dv, ITEMS=items, PACKED=segments.table is not None, DECAY=call.decay,
        INITIAL=initial is not None, BACKWARD=backward, FINAL=final is not None, num_warps=4,
    )  # fmt: skip


def enter(
    call: Call, k: Tensor, v: Tensor, state: Tensor | None, totals: Tensor | None,
    writes: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """The state entering each segment; None for zeros."""
    if not call.segments.chained:
        return state
    states, decays = sum_segments(call, k, v, totals, backward=False, inner=writes)
    chain(call, states, decays, state, backward=False)
    return states


def walk(
    call: Call, q: Tensor, k: Tensor, v: Tensor, entering: Tensor | None, dtype: torch.dtype, *,
    final: Tensor | None = None, weighted: Weighted | None = None, pairs: bool = False,
    backward: bool = False, transposed: bool = False, product: Tensor | None = None,
    inner: Tensor | None = None, outer: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The walk over all segments, (batch, heads, tokens, width of v) in `dtype`, its terms weighted
    by `inner` and its rows by `outer`, and the products of the rows before `outer` with `product`,
    if given: summed over the channels of a tile (tiles, batch, heads, tokens), or under a decay per
    channel over the rows of a block (blocks, heads, width of v).
    """
    operands = (q, k, v) if product is None else (q, k, product, v)
    if dtype == call.dtype and call.specialises(*operands):
        from attnspec.fast.engines.scan import triton_specialised_host

        return triton_specialised_host.walk(
            call, q, k, v, entering, final=final, product=product, backward=backward,
            transposed=transposed, inner=inner, outer=outer,
        )  # fmt: skip
    cfg = call.cfg
    rows, columns = q.shape[3], v.shape[3]
    tile = call.tile(cfg.walk_items, rows, columns)
    tiles = -(-columns // tile)
    read = 2 * tile_width(rows) + tile + (call.block if pairs and weighted is not None else 0)
    out = call.rows(columns, dtype)
    products = out
    if product is not None and weighted is not None:
        products = call.empty(weighted.totals.shape[0], call.heads, columns)
    elif product is not None:
        products = call.empty(tiles, call.batch, call.heads, call.tokens)
    w = q if product is None else product
    call.recorder.launch(
        walk_kernel, call.segments.total * call.heads * tiles,
        q, *q.stride(), k, *k.stride(), v, *v.stride(), w, *w.stride(), *call.gate_arguments(q),
        *call.weight_arguments(inner, q), *call.weight_arguments(outer, q),
        q if weighted is None else weighted.pairs, q if weighted is None else weighted.totals,
        q if entering is None else entering, out, products, q if final is None else final,
        call.table(q), call.scale, *call.place(), call.batch,
        *(call.heads // x.shape[1] for x in (q, k, v, w)),
        call.shared_by(inner), call.shared_by(outer),
        R=rows, V=columns, BR=tile_width(rows), BV=tile, C=call.block, DECAY=call.decay,
        PACKED=call.segments.table is not None, BACKWARD=backward, TRANSPOSED=transposed,
        ENTERING=entering is not None, FINAL=final is not None, PAIRS=pairs,
        PRODUCTS=product is not None, INNER=inner is not None, OUTER=outer is not None,
        **call.describe(call.layout(q, k, v, w), q, k, v),
        num_warps=cfg.walk_warps,
        num_stages=call.stages(cfg.walk_stages, read, tile_width(rows) * tile),
    )  # fmt: skip
    return out, products
