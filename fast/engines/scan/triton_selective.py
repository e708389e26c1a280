"""The selective scan in Triton: the state (n, channels) of a warp's channels in its registers.

Segments in parallel: each one's own state from 0, a chain over the segments, and each segment again
from what enters it. The gradient marks the state before every tile of rows, and behind it the
gradient of the state, and then treats all tiles at once, one of the n numbers after the other.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnspec.fast.engines.prepared import launch
from attnspec.fast.engines.scan.configs import lanes
from attnspec.fast.engines.scan.segments import cut, marked_tiles, tile_starts
from attnspec.fast.engines.scan.triton_common import among
from attnspec.fast.engines.scan.triton_elementwise import place_of, segment_length, stretch_of
from attnspec.fast.engines.scan.triton_selective_gradient import gradient_kernel

FREE = [
    "d_b", "d_t", "b_b", "b_t", "c_b", "c_t", "u_b", "u_t", "y_b", "y_t", "tokens", "length",
    "segments", "tiles", "rows_all",
]  # fmt: skip
"""Arguments whose values compile nothing anew."""


@triton.jit
def rates_of(A, lanes, inside, N: tl.constexpr, BN: tl.constexpr):
    """-A in powers of 2, (BN, channels), and where it lies in (channels, N)."""
    numbers = tl.arange(0, BN)
    at = lanes[None, :] * N + numbers[:, None]
    known = (numbers < N)[:, None] & inside[None, :]
    return tl.load(A + at, mask=known, other=0.0) * -1.4426950408889634, at, known


@triton.jit
def numbers_of(
    Delta, d_t, u, u_t, b, b_t, c, c_t, t, start, stop, inside, real, READ: tl.constexpr
):
    """Delta, u, b and, if READ, c of token `t`; zeros if it is not one of start..stop-1."""
    channels, numbers = among(t, start, stop, inside), among(t, start, stop, real)
    d = tl.load(Delta + t * d_t, mask=channels, other=0.0)
    value = tl.load(u + t * u_t, mask=channels, other=0.0)
    B = tl.load(b + t * b_t, mask=numbers, other=0.0)
    C = B
    if READ:
        C = tl.load(c + t * c_t, mask=numbers, other=0.0)
    return d, value, B, C


@triton.jit(do_not_specialize=FREE)
def forward_kernel(
    Delta, d_b, d_t, d_c, A, b, b_b, b_t, b_n, c, c_b, c_t, c_n, u, u_b, u_t, u_c, D, h0, states,
    totals, marks, y, last, table, tokens, length, segments, tiles, channels,
    N: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, ROWS: tl.constexpr, MODE: tl.constexpr,
    STARTED: tl.constexpr, SKIP: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """By MODE, 0: a segment's own state and its sum of Delta. From the state that enters it, 1: its
    y, and the last state; 2: the state before every tile. The last segment of a packed sequence has
    no use for 0.
    """
    lanes, inside, segment, row = place_of(channels, segments, BC)
    sequence, start, stop, _, closes = stretch_of(
        table, segment, row, segments, tokens, length, PACKED
    )
    tile = row * tiles
    if PACKED:
        if start == stop:
            return
        if MODE == 0 and closes:
            return
        tile = sequence
    numbers = tl.arange(0, BN)
    real = numbers < N
    rates, at, known = rates_of(A, lanes, inside, N, BN)
    wide = lanes.to(tl.int64)
    Delta += row * d_b + wide * d_c
    u += row * u_b + wide * u_c
    b += row * b_b + numbers.to(tl.int64) * b_n
    c += row * c_b + numbers.to(tl.int64) * c_n
    size = tl.cast(channels, tl.int64) * N
    here = (row * segments + segment) * size + at
    h = tl.zeros((BN, BC), tl.float32)
    total = tl.zeros((BC,), tl.float32)
    skip = tl.zeros((BC,), tl.float32)
    if MODE > 0:
        if PACKED or segments > 1:
            h = tl.load(states + here, mask=known, other=0.0)
        elif STARTED:
            h = tl.load(h0 + row * size + at, mask=known, other=0.0)
    if SKIP:
        skip = tl.load(D + lanes, mask=inside, other=0.0)
    # A token ahead: nothing else hides how long a load takes.
    d_next, u_next, B_next, C_next = numbers_of(
        Delta, d_t, u, u_t, b, b_t, c, c_t, start, start, stop, inside, real, MODE == 1
    )
    for first in range(start, stop, ROWS):
        if MODE == 2:
            tl.store(marks + (tile + first // ROWS) * size + at, h, mask=known)
        for t in range(first, tl.minimum(first + ROWS, stop)):
            d, value, B = d_next.to(tl.float32), u_next.to(tl.float32), B_next.to(tl.float32)
            C = C_next.to(tl.float32)
            d_next, u_next, B_next, C_next = numbers_of(
                Delta, d_t, u, u_t, b, b_t, c, c_t, t + 1, start, stop, inside, real, MODE == 1
            )
            h = tl.exp2(d[None, :] * rates) * h + (d * value)[None, :] * B[:, None]
            if MODE == 0:
                total += d
            if MODE == 1:
                out = tl.sum(h * C[:, None], 0)
                if SKIP:
                    out += skip * value
                place = (row * tokens + t) * channels + lanes
                tl.store(y + place, out.to(y.dtype.element_ty), mask=inside)
    if MODE == 0:
        tl.store(states + here, h, mask=known)
        tl.store(totals + (row * segments + segment) * channels + lanes, total, mask=inside)
    if MODE == 1 and closes:
        tl.store(last + sequence * size + at, h, mask=known)


@triton.jit(do_not_specialize=FREE)
def reverse_kernel(
    Delta, d_b, d_t, d_c, A, c, c_b, c_t, c_n, dy, y_b, y_t, y_c, states, totals, marks, zeroth,
    table, tokens, length, segments, tiles, channels,
    N: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, ROWS: tl.constexpr, MARK: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """The gradient g of the states, from the end: a segment's own and its sum of Delta one row
    later; or, if MARK, the g behind every tile, and of packed sequences, whose first segments have
    no use for the former, the `zeroth`, that of the first row.
    """
    lanes, inside, segment, row = place_of(channels, segments, BC)
    sequence, start, stop, opens, closes = stretch_of(
        table, segment, row, segments, tokens, length, PACKED
    )
    tile, beyond = row * tiles, tl.cast(tokens, tl.int64)
    if PACKED:
        if start == stop:
            return
        if (not MARK) and opens:
            return
        tile, beyond = sequence, stop + tl.where(closes, 0, 1)
    numbers = tl.arange(0, BN)
    real = numbers < N
    rates, at, known = rates_of(A, lanes, inside, N, BN)
    wide = lanes.to(tl.int64)
    Delta += row * d_b + wide * d_c
    dy += row * y_b + wide * y_c
    c += row * c_b + numbers.to(tl.int64) * c_n
    size = tl.cast(channels, tl.int64) * N
    here = (row * segments + segment) * size + at
    g = tl.zeros((BN, BC), tl.float32)
    total = tl.zeros((BC,), tl.float32)
    if MARK:
        g = tl.load(states + here, mask=known, other=0.0)
    many = tl.cdiv(stop - start, ROWS)
    # A token ahead, as forward; Delta is that of the token behind.
    d_next = tl.load(Delta + stop * d_t, mask=among(stop, start, beyond, inside), other=0.0)
    _, up_next, C_next, _ = numbers_of(
        Delta, d_t, dy, y_t, c, c_t, c, c_t, stop - 1, start, stop, inside, real, False
    )
    for n in range(many):
        first = start + (many - 1 - n) * ROWS
        end = tl.minimum(first + ROWS, stop)
        if MARK:
            tl.store(marks + (tile + first // ROWS) * size + at, g, mask=known)
        for i in range(end - first):
            t = end - 1 - i
            d, up, C = d_next.to(tl.float32), up_next.to(tl.float32), C_next.to(tl.float32)
            d_next = tl.load(Delta + t * d_t, mask=inside, other=0.0)
            _, up_next, C_next, _ = numbers_of(
                Delta, d_t, dy, y_t, c, c_t, c, c_t, t - 1, start, stop, inside, real, False
            )
            g = tl.exp2(d[None, :] * rates) * g + up[None, :] * C[:, None]
            total += d
    if PACKED and MARK and opens:
        tl.store(zeroth + sequence * size + at, g, mask=known)
    if not MARK:
        tl.store(states + here, g, mask=known)
        tl.store(totals + (row * segments + segment) * channels + lanes, total, mask=inside)


@triton.jit(do_not_specialize=["segments"])
def chain_kernel(
    A, states, totals, first, last, bounds, segments, channels,
    N: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BACK: tl.constexpr, STARTED: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """Turn segments' own states into those that enter them, in place, and `first` into `last`; of a
    packed sequence, whose last segment has no state of its own, only if it has no tokens.
    """
    lanes, inside, _, row = place_of(channels, 1, BC)
    begin, many, summed = row * segments, tl.cast(segments, tl.int64), tl.cast(segments, tl.int64)
    if PACKED:
        begin = tl.load(bounds + row)
        many = tl.load(bounds + row + 1) - begin
        summed = many - 1
    rates, at, known = rates_of(A, lanes, inside, N, BN)
    size = tl.cast(channels, tl.int64) * N
    h = tl.zeros((BN, BC), tl.float32)
    if STARTED:
        h = tl.load(first + row * size + at, mask=known, other=0.0)
    for n in tl.range(0, many, num_stages=4):
        segment = begin + (many - 1 - n if BACK else n)
        own = tl.load(states + segment * size + at, mask=among(n, 0, summed, known), other=0.0)
        total = tl.load(
            totals + segment * channels + lanes, mask=among(n, 0, summed, inside), other=0.0
        )
        tl.store(states + segment * size + at, h, mask=known)
        h = tl.exp2(total[None, :] * rates) * h + own
    tl.store(last + row * size + at, h, mask=known)


class _Plan:
    """Sizes, scratch and the arguments that several launches share."""

    def __init__(self, A: Tensor, u: Tensor, offsets: Tensor | None) -> None:
        self.batch, self.tokens, self.channels = u.shape
        self.n = A.shape[1]
        chosen = lanes("selective")
        self.rows, width = chosen.rows, chosen.channels
        self.parts = -(-self.channels // width)
        self.length = segment_length(chosen, u, self.batch * self.parts, self.tokens)
        self.pieces = cut(self.batch, self.tokens, self.length, offsets)
        self.sequences, self.packed = self.pieces.sequences, offsets is not None
        self.segments = max(1, self.pieces.each)
        self.programs = self.batch * self.segments * self.parts
        self.tiles = marked_tiles(self.tokens, self.rows, offsets)
        self.device = u.device
        self.table = u if self.pieces.table is None else self.pieces.table
        self.shape = {"N": self.n, "BN": max(1, 1 << (self.n - 1).bit_length()), "BC": width}
        self.state = self.empty(self.sequences, self.channels, self.n)

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.float32, device=self.device)

    def own(self) -> tuple[Tensor, Tensor]:
        """A state for each segment, and a sum of Delta."""
        many = (self.batch, self.segments, self.channels)
        return self.empty(*many, self.n), self.empty(*many)

    def forward(
        self, inputs: tuple[Any, ...], mode: int, h0: Any, states: Any, totals: Any, marks: Any,
        y: Any,
    ) -> None:  # fmt: skip
        """One launch of `forward_kernel`; inputs are Delta, A, b, c, u, D."""
        Delta, A, b, c, u, D = inputs
        unused = self.state
        launch(
            forward_kernel, self.programs,
            Delta, *Delta.stride(), A, b, *b.stride(), c, *c.stride(), u, *u.stride(),
            *(unused if x is None else x for x in (D, h0, states, totals, marks, y)), self.state,
            self.table, self.tokens, self.length, self.segments, self.tiles, self.channels,
            **self.shape, ROWS=self.rows, MODE=mode, STARTED=h0 is not None, SKIP=D is not None,
            PACKED=self.packed, num_warps=1,
        )  # fmt: skip

    def chain(
        self, A: Tensor, states: Tensor, totals: Tensor, first: Tensor | None, last: Tensor,
        back: bool,
    ) -> None:  # fmt: skip
        """`last` is what is left at the end of the chain."""
        bounds = self.pieces.bounds
        launch(
            chain_kernel, self.sequences * self.parts,
            A, states, totals, last if first is None else first, last,
            last if bounds is None else bounds, self.segments, self.channels, **self.shape,
            BACK=back, STARTED=first is not None, PACKED=self.packed, num_warps=1,
        )  # fmt: skip

    def entering(self, inputs: tuple[Any, ...], h0: Tensor | None) -> Tensor | None:
        """The state that enters each segment, None if there is but one."""
        if self.segments == 1 and not self.packed:
            return None
        states, totals = self.own()
        self.forward(inputs, 0, None, states, totals, None, None)
        self.chain(inputs[1], states, totals, h0, self.state, back=False)
        return states


def _float(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.float32).contiguous()


def forward(
    Delta: Tensor, A: Tensor, b: Tensor, c: Tensor, u: Tensor, D: Tensor | None, h0: Tensor | None,
    offsets: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y in the dtype of u, and the last state."""
    plan, first = _Plan(A, u, offsets), _float(h0)
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    if u.numel() == 0:
        return y, plan.state.zero_() if first is None else plan.state.copy_(first)
    inputs = (Delta, _float(A), b, c, u, _float(D))
    plan.forward(inputs, 1, first, plan.entering(inputs, first), None, None, y)
    return y, plan.state


def backward(
    dy: Tensor, dlast: Tensor, Delta: Tensor, A: Tensor, b: Tensor, c: Tensor, u: Tensor,
    D: Tensor | None, h0: Tensor | None, offsets: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """dDelta, dA, db, dc, du and the gradient of the state before the first token."""
    plan, first, rates = _Plan(A, u, offsets), _float(h0), A.to(torch.float32).contiguous()
    dDelta, du = (torch.empty(u.shape, dtype=u.dtype, device=u.device) for _ in range(2))
    if u.numel() == 0:
        return dDelta, torch.zeros_like(A), torch.zeros_like(b), torch.zeros_like(c), du, dlast + 0
    batch, tokens, channels = u.shape
    inputs = (Delta, rates, b, c, u, _float(D))
    marks = (batch, plan.tiles, channels, plan.n)
    before, behind = plan.empty(*marks), plan.empty(*marks)
    if offsets is not None:
        # Tiles that are nobody's write nothing.
        before.zero_()
    plan.forward(inputs, 2, first, plan.entering(inputs, first), None, before, None)
    states, totals = plan.own()
    zeroth = torch.empty_like(plan.state)
    for mark in (False, True):
        launch(
            reverse_kernel, plan.programs,
            Delta, *Delta.stride(), rates, c, *c.stride(), dy, *dy.stride(), states, totals, behind,
            zeroth, plan.table, tokens, plan.length, plan.segments, plan.tiles, channels,
            **plan.shape, ROWS=plan.rows, MARK=mark, PACKED=plan.packed, num_warps=1,
        )  # fmt: skip
        if not mark:
            plan.chain(rates, states, totals, dlast.contiguous(), zeroth, back=True)
    db, dc = plan.empty(2, plan.parts, batch, tokens, plan.n).unbind()
    launch(
        gradient_kernel, batch * plan.tiles * plan.parts,
        Delta, *Delta.stride(), rates, b, *b.stride(), c, *c.stride(), u, *u.stride(),
        plan.state if D is None else inputs[5], dy, *dy.stride(), before, behind, dDelta, db, dc,
        du, u if offsets is None else tile_starts(tokens, plan.rows, offsets), tokens, plan.tiles,
        batch * tokens, channels,
        N=plan.n, BC=plan.shape["BC"], ROWS=plan.rows, SKIP=D is not None, PACKED=plan.packed,
        num_warps=1,
    )  # fmt: skip
    if offsets is None:
        dh0 = torch.exp(-Delta[:, 0].float()[..., None] * rates) * zeroth
    else:
        opening = Delta[0, offsets[:-1].long().clamp(max=tokens - 1)].float()
        decayed = torch.exp(-opening[..., None] * rates) * zeroth
        dh0 = torch.where((offsets.diff() > 0)[:, None, None], decayed, zeroth)
    dA, db, dc = before.sum((0, 1)), db.sum(0).to(b.dtype), dc.sum(0).to(c.dtype)
    return dDelta, dA, db, dc, du, dh0
