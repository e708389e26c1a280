"""The elementwise scan in Triton: tiles of rows, each scanned in the registers of its threads.

A sequence is cut in segments. Each segment's own product of a and its own sum make a short sequence
of their own, which is scanned in the same way and gives what enters each segment; then every
segment is walked from there. A sequence that is one segment is walked at once. The gradient is the
same recurrence from the end, with a taken one row later.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnspec.fast.engines.prepared import launch
from attnspec.fast.engines.scan.configs import LaneConfig, lanes
from attnspec.fast.engines.scan.segments import cut as cut_sequences
from attnspec.fast.engines.scan.triton_common import packed_segment
from attnspec.fast.engines.scan.triton_plan import device_of
from attnspec.fast.engines.sizes import tile_width


@triton.jit
def join(a, x, later_a, later_x):
    """Two stretches of the recurrence as one."""
    return a * later_a, later_a * x + later_x


@triton.jit
def place_of(channels, segments, BC: tl.constexpr):
    """A program's channels and which of them there are, its segment, and its row of the batch."""
    parts = tl.cdiv(channels, BC)
    program = tl.program_id(0)
    lanes = (program % parts) * BC + tl.arange(0, BC)
    segment = (program // parts) % segments
    row = ((program // parts) // segments).to(tl.int64)
    return lanes, lanes < channels, segment, row


@triton.jit
def stretch_of(table, segment, row, segments, tokens, length, PACKED: tl.constexpr):
    """A segment's sequence, its first row and the one behind its last, and whether it is the first
    and the last of its sequence. Those of packed sequences are told by a `Segments.table`.
    """
    if PACKED:
        sequence, start, count, opens, closes = packed_segment(table, segment)
        stop = start + count
    else:
        sequence = row
        start = segment.to(tl.int64) * length
        stop = tl.minimum(start + length, tokens)
        opens, closes = segment == 0, segment == segments - 1
    return sequence, start, stop, opens, closes


@triton.jit
def walk_of(
    table, segment, row, segments, tokens, length, BACK: tl.constexpr, PACKED: tl.constexpr
):
    """The same in steps of a walk; if BACK, row t is taken at step tokens - 1 - t. Only packed
    segments keep the numbers of a walk forward.
    """
    sequence, start, stop, begins, ends = stretch_of(
        table, segment, row, segments, tokens, length, PACKED
    )
    if PACKED and BACK:
        start, stop = tokens - stop, tokens - start
        begins, ends = ends, begins
    return sequence, start, stop, begins, ends


@triton.jit(do_not_specialize=["a_b", "a_t", "x_b", "x_t", "tokens", "length", "segments"])
def totals_kernel(
    a, a_b, a_t, a_c, x, x_b, x_t, x_c, products, sums, table, tokens, length, segments, channels,
    BC: tl.constexpr, ROWS: tl.constexpr, BACK: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """A segment's product of a and its last h from 0, rows (batch, segments, channels); of packed
    sequences only those that another segment follows.
    """
    lanes, inside, segment, row = place_of(channels, segments, BC)
    rows = tl.arange(0, ROWS)
    _, start, stop, begins, ends = walk_of(
        table, segment, row, segments, tokens, length, BACK, PACKED
    )
    beyond = tl.cast(tokens, tl.int64)
    if PACKED:
        if (start == stop) | ends:
            return
        if BACK:
            beyond += tl.where(begins, 0, 1) - start
    a += row * a_b + lanes.to(tl.int64) * a_c
    x += row * x_b + lanes.to(tl.int64) * x_c
    product = tl.full((BC,), 1.0, tl.float32)
    total = tl.zeros((BC,), tl.float32)
    for first in range(start, stop, ROWS):
        at = first + rows
        valid = at < stop
        t = tl.cast(tokens, tl.int64) - 1 - at if BACK else at
        later = t + 1 if BACK else t
        known = (valid & (later < beyond))[:, None] & inside[None, :]
        A = tl.load(a + later[:, None] * a_t, mask=known, other=1.0).to(tl.float32)
        X = tl.load(x + t[:, None] * x_t, mask=valid[:, None] & inside[None, :], other=0.0)
        A, X = tl.associative_scan((A, X.to(tl.float32)), 0, join)
        end = (rows == ROWS - 1)[:, None]
        whole = tl.sum(tl.where(end, A, 0.0), 0)
        total = whole * total + tl.sum(tl.where(end, X, 0.0), 0)
        product *= whole
    here = (row * segments + segment) * channels + lanes
    tl.store(products + here, product, mask=inside)
    tl.store(sums + here, total, mask=inside)


# Without the alignment of the channels a thread holds all rows of its own: no scan leaves it.
@triton.jit(
    do_not_specialize=[
        "a_b", "a_t", "x_b", "x_t", "h_b", "h_t", "tokens", "length", "segments", "channels",
    ]
)  # fmt: skip
def walk_kernel(
    a, a_b, a_t, a_c, x, x_b, x_t, x_c, h0, entering, out, last, h, h_b, h_t, h_c, before, da,
    table, tokens, length, segments, channels,
    BC: tl.constexpr, ROWS: tl.constexpr, BACK: tl.constexpr, STARTED: tl.constexpr,
    GRADIENT: tl.constexpr, PREVIOUS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """out (batch, tokens, channels) of a segment, from what enters it; `entering` holds the states
    after each segment.

    Backwards, out is dx. With GRADIENT also da = dx times the h before, which for token 0 is
    `before` if PREVIOUS, else 0; and `last` is a_0 dx_0, the gradient of what is before it.
    """
    lanes, inside, segment, row = place_of(channels, segments, BC)
    rows = tl.arange(0, ROWS)
    sequence, start, stop, begins, ends = walk_of(
        table, segment, row, segments, tokens, length, BACK, PACKED
    )
    previous = row * segments + segment - 1
    origin, beyond = tl.cast(0, tl.int64), tl.cast(tokens, tl.int64)
    if PACKED:
        if start == stop:
            return
        if BACK:
            previous += 2
            beyond += tl.where(begins, 0, 1) - start
            # A row before every other, unless the sequence's own first is in this segment.
            origin = tl.where(ends, tokens - stop, -1)
    wide = lanes.to(tl.int64)
    a += row * a_b + wide * a_c
    x += row * x_b + wide * x_c
    out += row * tokens * channels + lanes
    state = tl.zeros((BC,), tl.float32)
    if not begins:
        state = tl.load(entering + previous * channels + lanes, mask=inside, other=0.0)
    elif STARTED:
        state = tl.load(h0 + sequence * channels + lanes, mask=inside, other=0.0).to(tl.float32)
    for first in range(start, stop, ROWS):
        at = first + rows
        valid = at < stop
        t = tl.cast(tokens, tl.int64) - 1 - at if BACK else at
        later = t + 1 if BACK else t
        mask = valid[:, None] & inside[None, :]
        known = mask & (later < beyond)[:, None]
        A = tl.load(a + later[:, None] * a_t, mask=known, other=1.0).to(tl.float32)
        X = tl.load(x + t[:, None] * x_t, mask=mask, other=0.0)
        A, X = tl.associative_scan((A, X.to(tl.float32)), 0, join)
        H = X + tl.where(state[None, :] == 0.0, 0.0, A * state[None, :])
        tl.store(out + t[:, None] * channels, H.to(out.dtype.element_ty), mask=mask)
        if GRADIENT:
            past = mask & (t > origin)[:, None]
            P = tl.load(h + row * h_b + (t[:, None] - 1) * h_t + wide[None, :] * h_c, mask=past,
                        other=0.0).to(tl.float32)  # fmt: skip
            if PREVIOUS:
                zeroth = tl.load(before + sequence * channels + lanes, mask=inside, other=0.0)
                P = tl.where((t == origin)[:, None], zeroth.to(tl.float32)[None, :], P)
            slope = (H * P).to(da.dtype.element_ty)
            tl.store(da + (row * tokens + t[:, None]) * channels + lanes[None, :], slope, mask=mask)
        state = tl.sum(tl.where((rows == ROWS - 1)[:, None], H, 0.0), 0)
    if ends:
        if BACK:
            state *= tl.load(a + origin * a_t, mask=inside, other=0.0).to(tl.float32)
        tl.store(last + sequence * channels + lanes, state, mask=inside)


@triton.jit
def chain_kernel(
    products, sums, behind, bounds, first, last, channels,
    BC: tl.constexpr, BACK: tl.constexpr, STARTED: tl.constexpr,
):  # fmt: skip
    """The states behind the segments of a packed sequence but its last, or but its first from the
    end if BACK; `last` of a sequence without tokens is `first`.
    """
    lanes, inside, _, sequence = place_of(channels, 1, BC)
    start, stop = tl.load(bounds + sequence), tl.load(bounds + sequence + 1)
    state = tl.zeros((BC,), tl.float32)
    if STARTED:
        state = tl.load(first + sequence * channels + lanes, mask=inside, other=0.0)
        state = state.to(tl.float32)
    tl.store(last + sequence * channels + lanes, state, mask=inside)
    for n in tl.range(0, stop - start - 1, num_stages=4):
        at = (stop - 1 - n if BACK else start + n) * channels + lanes
        A = tl.load(products + at, mask=inside, other=0.0)
        X = tl.load(sums + at, mask=inside, other=0.0)
        state = X + tl.where(state == 0.0, 0.0, A * state)
        tl.store(behind + at, state, mask=inside)


def segment_length(chosen: LaneConfig, x: Tensor, lines: int, tokens: int) -> int:
    """Tokens of a segment, whole tiles, if `lines` programs walk each segment of x."""
    processors, _ = device_of(x)
    many = max(1, chosen.programs * processors // max(1, lines))
    least = max(-(-tokens // many), chosen.least_segment)
    return -(-least // chosen.rows) * chosen.rows


class Cut:
    """Where the programs of a scan over x (batch, tokens, channels) begin, and how they meet."""

    def __init__(self, x: Tensor, chosen: LaneConfig, offsets: Tensor | None = None) -> None:
        self.batch, self.tokens, self.channels = x.shape
        self.device, self.rows = x.device, chosen.rows
        self.width = min(chosen.channels, tile_width(self.channels))
        self.parts = -(-self.channels // self.width)
        self.length = segment_length(chosen, x, self.batch * self.parts, self.tokens)
        self.packed = offsets is not None
        self.pieces = cut_sequences(self.batch, self.tokens, self.length, offsets)
        self.sequences = self.pieces.sequences
        self.segments = self.pieces.each
        self.table = x if self.pieces.table is None else self.pieces.table
        self.programs = self.pieces.total * self.parts
        self.options = {"BC": self.width, "ROWS": self.rows, "PACKED": self.packed, "num_warps": 1}
        self.where = (self.table, self.tokens, self.length, self.segments, self.channels)

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def own(self) -> tuple[Tensor, Tensor, Tensor]:
        """Each segment's product and sum, and the state behind it (batch, segments, channels)."""
        products, sums, behind = self.empty(3, self.batch, self.segments, self.channels).unbind()
        return products, sums, behind

    @property
    def chained(self) -> bool:
        """Whether a sequence may have more than one segment."""
        return self.pieces.chained

    def meet(
        self, own: tuple[Tensor, Tensor, Tensor], h0: Tensor | None, last: Tensor, back: bool
    ) -> Tensor:
        """The states behind the segments, whose products and sums are a sequence of their own."""
        products, sums, behind = own
        if self.pieces.bounds is not None:
            launch(
                chain_kernel, self.sequences * self.parts,
                products, sums, behind, self.pieces.bounds, last if h0 is None else h0, last,
                self.channels, BC=self.width, BACK=back, STARTED=h0 is not None, num_warps=1,
            )  # fmt: skip
            return behind
        launch(
            walk_kernel, self.batch * self.parts,
            products, *products.stride(), sums, *sums.stride(), last if h0 is None else h0, last,
            behind, last, sums, *sums.stride(), last, last, last,
            self.segments, self.segments, 1, self.channels,
            BACK=False, STARTED=h0 is not None, GRADIENT=False, PREVIOUS=False, **self.options,
        )  # fmt: skip
        return behind


def _run(
    a: Tensor, x: Tensor, h0: Tensor | None, offsets: Tensor | None, out: Tensor, back: bool,
    h: Tensor | None = None, before: Tensor | None = None, da: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The last state, or from the end the gradient of the first; out and da are filled."""
    cut = Cut(x, lanes("elementwise"), offsets)
    last = entering = cut.empty(cut.sequences, cut.channels)
    if cut.chained:
        own = cut.own()
        launch(
            totals_kernel, cut.programs,
            a, *a.stride(), x, *x.stride(), *own[:2], *cut.where, BACK=back, **cut.options,
        )  # fmt: skip
        entering = cut.meet(own, h0, last, back)
    states = x if h is None else h
    launch(
        walk_kernel, cut.programs,
        a, *a.stride(), x, *x.stride(), last if h0 is None else h0, entering, out, last,
        states, *states.stride(), last if before is None else before, out if da is None else da,
        *cut.where,
        BACK=back, STARTED=h0 is not None, GRADIENT=h is not None, PREVIOUS=before is not None,
        **cut.options,
    )  # fmt: skip
    return last


def forward(
    a: Tensor, x: Tensor, h0: Tensor | None, offsets: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Every h in the dtype of x, and the last state."""
    h0 = None if h0 is None else h0.contiguous()
    h = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        sequences = x.shape[0] if offsets is None else offsets.shape[0] - 1
        last = torch.zeros(sequences, x.shape[2], dtype=torch.float32, device=x.device)
        return h, last if h0 is None else last.copy_(h0)
    return h, _run(a, x, h0, offsets, h, back=False)


def backward(
    dh: Tensor, dlast: Tensor, a: Tensor, h: Tensor, h0: Tensor | None, offsets: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """da, dx and the gradient of the state before the first token."""
    h0 = None if h0 is None else h0.contiguous()
    da = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    dx = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    if h.numel() == 0:
        return da, dx, dlast.clone()
    return da, dx, _run(a, dh, dlast.contiguous(), offsets, dx, True, h, h0, da)
