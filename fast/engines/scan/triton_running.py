"""Running sums of features and their dot products in Triton, one read of the tokens a pass.

A sequence is cut in segments. The first kernel sums each segment; the second adds up the sums of
the segments before its own (of all, without an order), then walks its tokens, with one tile at a
time scanned in registers. The gradient is two more walks: one as before, whose sums are what each
token was multiplied by, and one from the end, over the gradients of the dot products.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnspec.fast.engines.prepared import launch
from attnspec.fast.engines.scan.configs import lanes
from attnspec.fast.engines.scan.triton_common import LOG2E
from attnspec.fast.engines.scan.triton_plan import device_of
from attnspec.fast.engines.sizes import tile_width

MOST_SEGMENTS = 256
"""Every program reads the sums of up to so many segments."""


@triton.jit
def phi(x, KIND: tl.constexpr):
    """The features of x; NaN stays NaN. A power of 2 takes fewer instructions than one of e."""
    if KIND == 1:
        x = 1.0 / (1.0 + tl.exp2(-x * LOG2E))
    elif KIND == 2:
        x = tl.where(x <= 0.0, 0.0, x) + 1e-6
    return x


@triton.jit
def slope(x, KIND: tl.constexpr):
    """The derivative of the features, of x itself."""
    if KIND == 1:
        y = 1.0 / (1.0 + tl.exp(-x))
        return y * (1.0 - y)
    elif KIND == 2:
        return tl.where(x > 0.0, 1.0, 0.0)
    return tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def weight(w, valid, WEIGHTED: tl.constexpr):
    """The weights of a tile's rows, 0 beyond the last one."""
    if WEIGHTED:
        return tl.load(w, mask=valid, other=0.0)
    return tl.where(valid, 1.0, 0.0)


@triton.jit(
    do_not_specialize=[
        "x_b", "x_h", "x_t", "y_b", "y_h", "y_t", "n", "m", "heads", "length", "segments", "shift",
    ]
)  # fmt: skip
def totals_kernel(
    x, x_b, x_h, x_t, x_d, y, y_b, y_h, y_t, y_d, wx, wy, totals_x, totals_y,
    n, m, heads, length, segments, d, shift,
    KIND: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Sums (batch * heads, segments, d) of w (phi(x) + shift), and those of y."""
    row = (tl.program_id(0) // segments).to(tl.int64)
    segment = tl.program_id(0) % segments
    lanes = tl.arange(0, BD)
    inside = lanes < d
    rows = tl.arange(0, ROWS)
    x += row // heads * x_b + row % heads * x_h + lanes.to(tl.int64) * x_d
    y += row // heads * y_b + row % heads * y_h + lanes.to(tl.int64) * y_d
    total_x = tl.zeros((BD,), tl.float32)
    total_y = tl.zeros((BD,), tl.float32)
    start = segment.to(tl.int64) * length
    for first in range(start, start + length, ROWS):
        t = first + rows
        WX = weight(wx + row * n + t, t < n, WEIGHTED)
        WY = weight(wy + row * m + t, t < m, WEIGHTED)
        in_x = (t < n)[:, None] & inside[None, :]
        in_y = (t < m)[:, None] & inside[None, :]
        X = tl.load(x + t[:, None] * x_t, mask=in_x, other=0.0).to(tl.float32)
        Y = tl.load(y + t[:, None] * y_t, mask=in_y, other=0.0).to(tl.float32)
        total_x += tl.sum(tl.where(in_x, (phi(X, KIND) + shift) * WX[:, None], 0.0), 0)
        total_y += tl.sum(tl.where(in_y, (phi(Y, KIND) + shift) * WY[:, None], 0.0), 0)
    here = (row * segments + segment) * d + lanes
    tl.store(totals_x + here, total_x, mask=inside)
    tl.store(totals_y + here, total_y, mask=inside)


@triton.jit
def entering(
    first, totals, row, low, high, segments, d, inside, lanes,
    STARTED: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """What precedes a segment: `first`, and the sums of the segments from `low` to `high`."""
    total = tl.zeros((BD,), tl.float32)
    if STARTED:
        total = tl.load(first + row * d + lanes, mask=inside, other=0.0)
    rows = tl.arange(0, ROWS)
    for tile in range(low, high, ROWS):
        at = tile + rows
        mask = (at < high)[:, None] & inside[None, :]
        places = (row * segments + at[:, None]) * d + lanes[None, :]
        total += tl.sum(tl.load(totals + places, mask=mask, other=0.0), 0)
    return total


@triton.jit(
    do_not_specialize=[
        "x_b", "x_h", "x_t", "y_b", "y_h", "y_t", "n", "m", "heads", "length", "segments",
        "shift_in", "shift_out",
    ]
)  # fmt: skip
def walk_kernel(
    x, x_b, x_h, x_t, x_d, y, y_b, y_h, y_t, y_d, wx, wy, first_x, first_y, totals_x, totals_y,
    last_x, last_y, dots_x, dots_y, mx, my, part_x, part_y, out_x, out_y,
    n, m, heads, length, segments, d, shift_in, shift_out,
    KIND: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr, WEIGHTED: tl.constexpr,
    CAUSAL: tl.constexpr, BACK: tl.constexpr, STARTED: tl.constexpr, DOTS: tl.constexpr,
    VECTORS: tl.constexpr, MULTIPLIED: tl.constexpr,
):  # fmt: skip
    """With S the sums of w (phi + shift_in): dots_x = (phi(x) + shift_out) . (S_y + shift_out).

    VECTORS = 1 stores out_x = mx (S_y + shift_out), 2 adds that to part_x, and multiplies by the
    slope of phi. The same for y with S_x. BACK sums from the end.
    """
    row = (tl.program_id(0) // segments).to(tl.int64)
    segment = tl.program_id(0) % segments
    lanes = tl.arange(0, BD)
    inside = lanes < d
    rows = tl.arange(0, ROWS)
    x += row // heads * x_b + row % heads * x_h + lanes.to(tl.int64) * x_d
    y += row // heads * y_b + row % heads * y_h + lanes.to(tl.int64) * y_d
    low = 0
    high = segments
    if CAUSAL:
        if BACK:
            low = segment + 1
        else:
            high = segment
    SX = entering(first_x, totals_x, row, low, high, segments, d, inside, lanes, STARTED, ROWS, BD)
    SY = entering(first_y, totals_y, row, low, high, segments, d, inside, lanes, STARTED, ROWS, BD)
    start = segment.to(tl.int64) * length
    for tile in range(0, length, ROWS):
        t = start + (length - ROWS - tile if BACK else tile) + rows
        in_x = (t < n)[:, None] & inside[None, :]
        in_y = (t < m)[:, None] & inside[None, :]
        X = tl.load(x + t[:, None] * x_t, mask=in_x, other=0.0).to(tl.float32)
        Y = tl.load(y + t[:, None] * y_t, mask=in_y, other=0.0).to(tl.float32)
        A = phi(X, KIND)
        B = phi(Y, KIND)
        if CAUSAL:
            WX = weight(wx + row * n + t, t < n, WEIGHTED)
            WY = weight(wy + row * m + t, t < m, WEIGHTED)
            PX = tl.where(in_x, (A + shift_in) * WX[:, None], 0.0)
            PY = tl.where(in_y, (B + shift_in) * WY[:, None], 0.0)
            UX = SX[None, :] + tl.cumsum(PX, 0, reverse=BACK)
            UY = SY[None, :] + tl.cumsum(PY, 0, reverse=BACK)
            end = (rows == (0 if BACK else ROWS - 1))[:, None]
            SX = tl.sum(tl.where(end, UX, 0.0), 0)
            SY = tl.sum(tl.where(end, UY, 0.0), 0)
        else:
            UX = tl.broadcast_to(SX[None, :], (ROWS, BD))
            UY = tl.broadcast_to(SY[None, :], (ROWS, BD))
        UX += shift_out
        UY += shift_out
        if DOTS:
            DX = tl.sum(tl.where(in_x, (A + shift_out) * UY, 0.0), 1)
            DY = tl.sum(tl.where(in_y, (B + shift_out) * UX, 0.0), 1)
            tl.store(dots_x + row * n + t, DX, mask=t < n)
            tl.store(dots_y + row * m + t, DY, mask=t < m)
        if VECTORS:
            at_x = (row * n + t[:, None]) * d + lanes[None, :]
            at_y = (row * m + t[:, None]) * d + lanes[None, :]
            VX = weight(mx + row * n + t, t < n, MULTIPLIED)[:, None] * UY
            VY = weight(my + row * m + t, t < m, MULTIPLIED)[:, None] * UX
            if VECTORS == 2:
                VX = (VX + tl.load(part_x + at_x, mask=in_x, other=0.0)) * slope(X, KIND)
                VY = (VY + tl.load(part_y + at_y, mask=in_y, other=0.0)) * slope(Y, KIND)
            tl.store(out_x + at_x, VX.to(out_x.dtype.element_ty), mask=in_x)
            tl.store(out_y + at_y, VY.to(out_y.dtype.element_ty), mask=in_y)
    ending = 0
    if CAUSAL and not BACK:
        ending = segments - 1
    if segment == ending:
        tl.store(last_x + row * d + lanes, SX, mask=inside)
        tl.store(last_y + row * d + lanes, SY, mask=inside)


class Walks:
    """The passes over one pair x (batch, heads, n, d) and y (batch, heads, m, d)."""

    def __init__(self, x: Tensor, y: Tensor, kind: int, causal: bool) -> None:
        batch, heads, n, d = x.shape
        m = y.shape[2]
        chosen = lanes("running")
        width = tile_width(d)
        rows = max(2, chosen.rows * chosen.channels // width)
        processors, _ = device_of(x)
        tokens = max(n, m, 1)
        many = min(MOST_SEGMENTS, chosen.programs * processors // max(1, batch * heads))
        length = max(-(-tokens // max(1, many)), chosen.least_segment)
        self.length = -(-length // rows) * rows
        self.segments = -(-tokens // self.length)
        self.sizes = (n, m, heads, self.length, self.segments, d)
        self.x, self.y, self.causal = x, y, causal
        self.lines = batch * heads
        self.options: dict[str, Any] = {"KIND": kind, "ROWS": rows, "BD": width, "num_warps": 1}

    def sums(self, *shape: int) -> tuple[Tensor, Tensor]:
        """A float32 buffer of each side."""
        made = [torch.empty(self.lines, *shape, dtype=torch.float32, device=self.x.device)
                for _ in range(2)]  # fmt: skip
        return made[0], made[1]

    def walk(
        self, weights: tuple[Tensor, Tensor] | None, first: tuple[Tensor, Tensor] | None,
        shift_in: float, shift_out: float, back: bool = False,
        dots: tuple[Tensor, Tensor] | None = None,
        factors: tuple[Tensor, Tensor] | None = None,
        parts: tuple[Tensor, Tensor] | None = None,
        vectors: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Fills `dots` and `vectors`; returns the last sums (batch * heads, d) of both sides."""
        tokens = (self.x, *self.x.stride(), self.y, *self.y.stride())
        last = self.sums(self.sizes[-1])
        programs = self.lines * self.segments
        totals = last
        weighed = weights or last
        if self.segments > 1 or not self.causal:
            totals = self.sums(self.segments, self.sizes[-1])
            launch(
                totals_kernel, programs,
                *tokens, *weighed, *totals, *self.sizes, shift_in, WEIGHTED=weights is not None,
                **self.options,
            )  # fmt: skip
        launch(
            walk_kernel, programs,
            *tokens, *weighed, *(first or last), *totals, *last, *(dots or last),
            *(factors or last), *(parts or last), *(vectors or last), *self.sizes,
            shift_in, shift_out, WEIGHTED=weights is not None, CAUSAL=self.causal, BACK=back,
            STARTED=first is not None, DOTS=dots is not None,
            VECTORS=0 if vectors is None else 1 if parts is None else 2,
            MULTIPLIED=factors is not None, **self.options,
        )  # fmt: skip
        return last


def forward(
    x: Tensor, y: Tensor, wx: Tensor | None, wy: Tensor | None, sx: Tensor | None,
    sy: Tensor | None, eps: float, kind: int, causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The dot products of x and of y, and the last sums of both."""
    walks = Walks(x, y, kind, causal)
    dots = tuple(torch.empty(z.shape[:3], dtype=torch.float32, device=z.device) for z in (x, y))
    first = _pair(sx, sy)
    last = walks.walk(_pair(wx, wy), first, 0.0, eps, dots=(dots[0], dots[1]))
    shape = (*x.shape[:2], x.shape[3])
    return dots[0], dots[1], last[0].view(shape), last[1].view(shape)


def backward(
    dx: Tensor, dy: Tensor, dsx: Tensor, dsy: Tensor, x: Tensor, y: Tensor, wx: Tensor | None,
    wy: Tensor | None, sx: Tensor | None, sy: Tensor | None, eps: float, kind: int, causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of x, y, wx, wy, sx and sy."""
    walks = Walks(x, y, kind, causal)
    weights, into = _pair(wx, wy), (dx.contiguous(), dy.contiguous())
    parts = [torch.empty(z.shape, dtype=torch.float32, device=z.device) for z in (x, y)]
    out = [torch.empty(z.shape, dtype=z.dtype, device=z.device) for z in (x, y)]
    slopes = [torch.empty_like(z) for z in into]
    walks.walk(weights, _pair(sx, sy), 0.0, eps, factors=into, vectors=(parts[0], parts[1]))
    last_x, last_y = walks.walk(
        into, _pair(dsy, dsx), eps, 0.0, back=True, dots=(slopes[0], slopes[1]), factors=weights,
        parts=(parts[0], parts[1]), vectors=(out[0], out[1]),
    )  # fmt: skip
    return *out, *slopes, last_y.view(dsx.shape), last_x.view(dsy.shape)  # type: ignore[return-value]


def _pair(x: Tensor | None, y: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Both as the kernels read them, or nothing."""
    return None if x is None or y is None else (x.contiguous(), y.contiguous())
