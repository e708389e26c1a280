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
from attnspec.fast.engines.scan.triton_plan import device_of, power


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


@triton.jit(do_not_specialize=["a_b", "a_t", "x_b", "x_t", "tokens", "length", "segments"])
def totals_kernel(
    a, a_b, a_t, a_c, x, x_b, x_t, x_c, products, sums, tokens, length, segments, channels,
    BC: tl.constexpr, ROWS: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """A segment's product of a and its last h from 0, rows (batch, segments, channels)."""
    lanes, inside, segment, row = place_of(channels, segments, BC)
    rows = tl.arange(0, ROWS)
    a += row * a_b + lanes.to(tl.int64) * a_c
    x += row * x_b + lanes.to(tl.int64) * x_c
    product = tl.full((BC,), 1.0, tl.float32)
    total = tl.zeros((BC,), tl.float32)
    start = segment.to(tl.int64) * length
    stop = tl.minimum(start + length, tokens)
    for first in range(start, stop, ROWS):
        at = first + rows
        valid = at < stop
        t = tl.cast(tokens, tl.int64) - 1 - at if BACK else at
        later = t + 1 if BACK else t
        known = (valid & (later < tokens))[:, None] & inside[None, :]
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
    tokens, length, segments, channels,
    BC: tl.constexpr, ROWS: tl.constexpr, BACK: tl.constexpr, STARTED: tl.constexpr,
    GRADIENT: tl.constexpr, PREVIOUS: tl.constexpr,
):  # fmt: skip
    """out (batch, tokens, channels) of a segment, from what enters it; `entering` holds the states
    after each segment.

    Backwards, out is dx. With GRADIENT also da = dx times the h before, which for token 0 is
    `before` if PREVIOUS, else 0; and `last` is a_0 dx_0, the gradient of what is before it.
    """
    lanes, inside, segment, row = place_of(channels, segments, BC)
    rows = tl.arange(0, ROWS)
    wide = lanes.to(tl.int64)
    a += row * a_b + wide * a_c
    x += row * x_b + wide * x_c
    out += row * tokens * channels + lanes
    state = tl.zeros((BC,), tl.float32)
    if segment > 0:
        state = tl.load(
            entering + (row * segments + segment - 1) * channels + lanes, mask=inside, other=0.0
        )
    elif STARTED:
        state = tl.load(h0 + row * channels + lanes, mask=inside, other=0.0).to(tl.float32)
    start = segment.to(tl.int64) * length
    stop = tl.minimum(start + length, tokens)
    for first in range(start, stop, ROWS):
        at = first + rows
        valid = at < stop
        t = tl.cast(tokens, tl.int64) - 1 - at if BACK else at
        later = t + 1 if BACK else t
        mask = valid[:, None] & inside[None, :]
        known = mask & (later < tokens)[:, None]
        A = tl.load(a + later[:, None] * a_t, mask=known, other=1.0).to(tl.float32)
        X = tl.load(x + t[:, None] * x_t, mask=mask, other=0.0)
        A, X = tl.associative_scan((A, X.to(tl.float32)), 0, join)
        H = X + tl.where(state[None, :] == 0.0, 0.0, A * state[None, :])
        tl.store(out + t[:, None] * channels, H.to(out.dtype.element_ty), mask=mask)
        if GRADIENT:
            past = mask & (t > 0)[:, None]
            P = tl.load(h + row * h_b + (t[:, None] - 1) * h_t + wide[None, :] * h_c, mask=past,
                        other=0.0).to(tl.float32)  # fmt: skip
            if PREVIOUS:
                zeroth = tl.load(before + row * channels + lanes, mask=inside, other=0.0)
                P = tl.where((t == 0)[:, None], zeroth.to(tl.float32)[None, :], P)
            slope = (H * P).to(da.dtype.element_ty)
            tl.store(da + (row * tokens + t[:, None]) * channels + lanes[None, :], slope, mask=mask)
        state = tl.sum(tl.where((rows == ROWS - 1)[:, None], H, 0.0), 0)
    if segment == segments - 1:
        if BACK:
            state *= tl.load(a, mask=inside, other=0.0).to(tl.float32)
        tl.store(last + row * channels + lanes, state, mask=inside)


def segment_length(chosen: LaneConfig, x: Tensor, lines: int, tokens: int) -> int:
    """Tokens of a segment, whole tiles, if `lines` programs walk each segment of x."""
    processors, _ = device_of(x)
    many = max(1, chosen.programs * processors // max(1, lines))
    least = max(-(-tokens // many), chosen.least_segment)
    return -(-least // chosen.rows) * chosen.rows


class Cut:
    """Where the programs of a scan over x (batch, tokens, channels) begin, and how they meet."""

    def __init__(self, x: Tensor, chosen: LaneConfig) -> None:
        self.batch, self.tokens, self.channels = x.shape
        self.device, self.rows = x.device, chosen.rows
        self.width = min(chosen.channels, power(self.channels))
        self.parts = -(-self.channels // self.width)
        self.length = segment_length(chosen, x, self.batch * self.parts, self.tokens)
        self.segments = -(-self.tokens // self.length)
        self.programs = self.batch * self.segments * self.parts
        self.options = {"BC": self.width, "ROWS": self.rows, "num_warps": 1}

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def own(self) -> tuple[Tensor, Tensor, Tensor]:
        """Each segment's product and sum, and the state behind it (batch, segments, channels)."""
        products, sums, behind = self.empty(3, self.batch, self.segments, self.channels).unbind()
        return products, sums, behind

    def meet(self, own: tuple[Tensor, Tensor, Tensor], h0: Tensor | None, last: Tensor) -> Tensor:
        """The states behind the segments, whose products and sums are a sequence of their own."""
        products, sums, behind = own
        launch(
            walk_kernel, self.batch * self.parts,
            products, *products.stride(), sums, *sums.stride(), last if h0 is None else h0, last,
            behind, last, sums, *sums.stride(), last, last,
            self.segments, self.segments, 1, self.channels,
            BACK=False, STARTED=h0 is not None, GRADIENT=False, PREVIOUS=False, **self.options,
        )  # fmt: skip
        return behind


def _run(
    a: Tensor, x: Tensor, h0: Tensor | None, out: Tensor, back: bool,
    h: Tensor | None = None, before: Tensor | None = None, da: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The last state, or from the end the gradient of the first; out and da are filled."""
    cut = Cut(x, lanes("elementwise"))
    last = entering = cut.empty(cut.batch, cut.channels)
    where = (cut.tokens, cut.length, cut.segments, cut.channels)
    if cut.segments > 1:
        own = cut.own()
        launch(
            totals_kernel, cut.programs,
            a, *a.stride(), x, *x.stride(), *own[:2], *where, BACK=back, **cut.options,
        )  # fmt: skip
        entering = cut.meet(own, h0, last)
    states = x if h is None else h
    launch(
        walk_kernel, cut.programs,
        a, *a.stride(), x, *x.stride(), last if h0 is None else h0, entering, out, last,
        states, *states.stride(), last if before is None else before, out if da is None else da,
        *where,
        BACK=back, STARTED=h0 is not None, GRADIENT=h is not None, PREVIOUS=before is not None,
        **cut.options,
    )  # fmt: skip
    return last


def forward(a: Tensor, x: Tensor, h0: Tensor | None) -> tuple[Tensor, Tensor]:
    """Every h in the dtype of x, and the last state."""
    h0 = None if h0 is None else h0.contiguous()
    h = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        last = torch.zeros(x.shape[0], x.shape[2], dtype=torch.float32, device=x.device)
        return h, last if h0 is None else last.copy_(h0)
    return h, _run(a, x, h0, h, back=False)


def backward(
    dh: Tensor, dlast: Tensor, a: Tensor, h: Tensor, h0: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """da, dx and the gradient of the state before the first token."""
    h0 = None if h0 is None else h0.contiguous()
    da = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    dx = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    if h.numel() == 0:
        return da, dx, dlast.clone()
    return da, dx, _run(a, dh, dlast.contiguous(), dx, True, h, h0, da)
