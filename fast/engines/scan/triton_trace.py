"""The moving average of unit keys in Triton: it is formed in a tile and used there.

Rows are counted by what they read: row p holds the key of token p and the trace before it, to which
the key of token p - 1 was the last to be added; row `tokens` has no key, and its trace is the last
one. A sequence is cut in segments. The first kernel sums each segment, the second adds up the sums
before its own and walks its rows, a tile scanned in registers at a time. For the gradient the same
walk keeps the trace before each tile, two numbers a row and what a segment adds to the gradient of
the trace before it; a third kernel walks from the end. Packed sequences have rows of their own,
each one more than tokens, and are cut one by one.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnspec.fast.engines.prepared import launch
from attnspec.fast.engines.scan.configs import lanes
from attnspec.fast.engines.scan.segments import cut
from attnspec.fast.engines.scan.triton_elementwise import join
from attnspec.fast.engines.scan.triton_plan import device_of
from attnspec.fast.engines.scan.triton_trace_rows import (
    FLOOR,
    bits_lost,
    floored,
    load_keys,
    load_numbers,
    place_of,
    real_rows,
    span_of,
)
from attnspec.fast.engines.sizes import tile_width

MOST_SEGMENTS = 256
"""Every program reads the sums of up to so many segments."""


@triton.jit(
    do_not_specialize=[
        "k_b", "k_h", "valid_b", "valid_t", "tokens", "heads", "length", "segments", "rest",
        "bits",
    ]
)  # fmt: skip
def totals_kernel(
    k, k_b, k_h, k_t, k_d, valid, valid_b, valid_t, inverses, totals, counts, table, bounds,
    offsets, tokens, heads, length, segments, d, rest, bits,
    ROWS: tl.constexpr, BD: tl.constexpr, VALID: tl.constexpr, ALIGNED: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """What a segment adds to the trace behind it (lines, segments, d), how many keys it has, and
    the inverse norm of each.
    """
    line, segment, channels, inside, k, valid = place_of(
        k, k_b, k_h, k_d, valid, valid_b, heads, segments, d, BD, ALIGNED
    )
    start, height, begin, stop, _low, _high, _own = span_of(
        line, segment, table, bounds, offsets, tokens, heads, length, segments, ROWS, PACKED
    )
    rows = tl.arange(0, ROWS)
    total = tl.zeros((BD,), tl.float32)
    count = tl.full((), 0.0, tl.float32)
    for first in range(start, start + height, ROWS):
        t = first + rows - 1
        real = real_rows(valid, valid_t, t, begin, stop, VALID)
        K = load_keys(k, k_t, t, real, inside)
        inverse = 1.0 / floored(tl.sqrt(tl.sum(K * K, 1)))
        tl.store(inverses + line * tokens + t, inverse, mask=(t >= begin) & (t < stop))
        one = tl.where(real, 1.0, 0.0)
        many = tl.sum(one, 0)
        weight = rest * inverse * tl.exp2(bits * (many - tl.cumsum(one, 0)))
        total = total * tl.exp2(bits * many) + tl.sum(K * weight[:, None], 0)
        count += many
    here = line * segments + segment
    tl.store(totals + here * d + channels, total, mask=inside)
    tl.store(counts + here, count)


@triton.jit
def entering(
    first, totals, counts, line, many, origin, segments, d, bits, channels, inside, own,
    STARTED: tl.constexpr, BACK: tl.constexpr, MANY: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """What `many` segments leave behind them, from `origin` on, or down if BACK, behind what the
    first row of their sequence left.
    """
    total = tl.zeros((BD,), tl.float32)
    if STARTED:
        total = tl.load(first + own * d + channels, mask=inside, other=0.0)
    for tile in range(0, many, MANY):
        at = tile + tl.arange(0, MANY)
        mask = at < many
        here = line * segments + (origin - at if BACK else origin + at)
        count = tl.load(counts + here, mask=mask, other=0.0)
        every = tl.sum(count, 0)
        weight = tl.exp2(bits * (every - tl.cumsum(count, 0)))
        places = here[:, None] * d + channels[None, :]
        sums = tl.load(totals + places, mask=mask[:, None] & inside[None, :], other=0.0)
        total = total * tl.exp2(bits * every) + tl.sum(sums * weight[:, None], 0)
    return total


@triton.jit
def traces(P, inverse, real, c, mu, rest):
    """The traces (rows, channels) before tokens whose predecessors' keys are P, after c."""
    A = tl.where(real, mu, 1.0)[:, None] + tl.zeros_like(P)
    A, X = tl.associative_scan((A, P * (rest * inverse)[:, None]), 0, join)
    return A * c[None, :] + X


@triton.jit(
    do_not_specialize=[
        "k_b", "k_h", "valid_b", "valid_t", "tokens", "heads", "length", "segments", "mu",
        "rest", "bits",
    ]
)  # fmt: skip
def walk_kernel(
    k, k_b, k_h, k_t, k_d, valid, valid_b, valid_t, inverses, totals, counts, c0, rho, last, dlast,
    toward, along, starts, back_totals, back_counts, table, bounds, offsets, tokens, heads, length,
    segments, d, mu, rest, bits,
    ROWS: tl.constexpr, BD: tl.constexpr, VALID: tl.constexpr, ALIGNED: tl.constexpr,
    PACKED: tl.constexpr, STARTED: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """rho of a segment's rows, and the last trace. With GRADIENT `rho` holds its gradient and the
    kernel writes, of the gradient u of the trace before a row = toward kh - along c, both factors
    and what is left of all u of a segment before it; and the trace before each tile.
    """
    line, segment, channels, inside, k, valid = place_of(
        k, k_b, k_h, k_d, valid, valid_b, heads, segments, d, BD, ALIGNED
    )
    start, height, begin, stop, low, _high, own = span_of(
        line, segment, table, bounds, offsets, tokens, heads, length, segments, ROWS, PACKED
    )
    rows = tl.arange(0, ROWS)
    c = entering(
        c0, totals, counts, line, segment - low, low, segments, d, bits, channels, inside, own,
        STARTED, False, 4 * ROWS, BD,
    )  # fmt: skip
    back = tl.zeros((BD,), tl.float32)
    seen = tl.full((), 0.0, tl.float32)
    for first in range(start, start + height, ROWS):
        t = first + rows
        real = real_rows(valid, valid_t, t, begin, stop, VALID)
        before = real_rows(valid, valid_t, t - 1, begin, stop, VALID)
        K = load_keys(k, k_t, t, real, inside)
        P = load_keys(k, k_t, t - 1, before, inside)
        inverse = load_numbers(inverses, line, t, real, tokens)
        if GRADIENT:
            tile = (line * segments + segment) * (length // ROWS) + (first - start) // ROWS
            tl.store(starts + tile * d + channels, c, mask=inside)
        C = traces(P, load_numbers(inverses, line, t - 1, before, tokens), before, c, mu, rest)
        c = tl.sum(tl.where((rows == ROWS - 1)[:, None], C, 0.0), 0)
        dot = tl.sum(K * C, 1) * inverse
        norm = tl.sqrt(tl.sum(C * C, 1))
        size = floored(norm)
        inner = t < stop
        if GRADIENT:
            g = tl.where(dot > 0.0, load_numbers(rho, line, t, real, tokens), 0.0) / size
            # Below the floor the norm is a constant.
            inward = tl.where(norm > FLOOR, g * (dot / size) / size, 0.0)
            tl.store(toward + line * tokens + t, g, mask=inner)
            tl.store(along + line * tokens + t, inward, mask=inner)
            U = K * (g * inverse)[:, None] - C * inward[:, None]
            dc = tl.load(dlast + own * d + channels, mask=inside, other=0.0)
            U = tl.where((t == stop)[:, None], dc[None, :], U)
            one = tl.where(real, 1.0, 0.0)
            weight = tl.exp2(bits * (seen + tl.cumsum(one, 0) - one))
            back += tl.sum(U * weight[:, None], 0)
            seen += tl.sum(one, 0)
        else:
            found = tl.sum(tl.where(C != 0.0, 1.0, 0.0), 1) > 0.0
            cosine = dot / size
            cosine = tl.where(cosine < 0.0, 0.0, cosine)
            cosine = tl.where(real, tl.where(found, cosine, 1.0), 0.0)
            tl.store(rho + line * tokens + t, cosine, mask=inner)
            at = last + own * d + channels[None, :] + tl.zeros_like(t)[:, None]
            tl.store(at, C, mask=(t == stop)[:, None] & inside[None, :])
    if GRADIENT:
        here = line * segments + segment
        tl.store(back_totals + here * d + channels, back, mask=inside)
        tl.store(back_counts + here, seen)


@triton.jit(
    do_not_specialize=[
        "k_b", "k_h", "valid_b", "valid_t", "tokens", "heads", "length", "segments", "mu",
        "rest", "bits",
    ]
)  # fmt: skip
def gradient_kernel(
    k, k_b, k_h, k_t, k_d, valid, valid_b, valid_t, inverses, toward, along, starts, back_totals,
    back_counts, dlast, dk, dc0, table, bounds, offsets, tokens, heads, length, segments, d, mu,
    rest, bits,
    ROWS: tl.constexpr, BD: tl.constexpr, VALID: tl.constexpr, ALIGNED: tl.constexpr,
    PACKED: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """dk (lines, tokens, d) of a segment's rows, from the end, added to what is there if ADDED, and
    the gradient of the first trace.
    """
    line, segment, channels, inside, k, valid = place_of(
        k, k_b, k_h, k_d, valid, valid_b, heads, segments, d, BD, ALIGNED
    )
    start, height, begin, stop, low, high, own = span_of(
        line, segment, table, bounds, offsets, tokens, heads, length, segments, ROWS, PACKED
    )
    rows = tl.arange(0, ROWS)
    dc = entering(
        dlast, back_totals, back_counts, line, high - 1 - segment, high - 1, segments, d, bits,
        channels, inside, own, False, True, 4 * ROWS, BD,
    )  # fmt: skip
    final = tl.load(dlast + own * d + channels, mask=inside, other=0.0)
    here = (line * segments + segment) * (length // ROWS)
    for skipped in range(0, height, ROWS):
        first = start + height - ROWS - skipped
        t = first + rows
        real = real_rows(valid, valid_t, t, begin, stop, VALID)
        before = real_rows(valid, valid_t, t - 1, begin, stop, VALID)
        P = load_keys(k, k_t, t - 1, before, inside)
        tile = here + (first - start) // ROWS
        c = tl.load(starts + tile * d + channels, mask=inside, other=0.0)
        C = traces(P, load_numbers(inverses, line, t - 1, before, tokens), before, c, mu, rest)
        K = load_keys(k, k_t, t, real, inside)
        inverse = load_numbers(inverses, line, t, real, tokens)
        H = K * inverse[:, None]
        g = load_numbers(toward, line, t, real, tokens)
        inward = load_numbers(along, line, t, real, tokens)

        # The gradient of the trace behind a row is that before the next one.
        later = real_rows(valid, valid_t, t + 1, begin, stop, VALID) & (rows < ROWS - 1)
        N = load_keys(k, k_t, t + 1, later, inside)
        factor = load_numbers(inverses, line, t + 1, later, tokens)
        factor *= load_numbers(toward, line, t + 1, later, tokens)
        D = tl.where(real[:, None], mu * C + rest * H, C)
        D = N * factor[:, None] - D * load_numbers(along, line, t + 1, later, tokens)[:, None]
        D = tl.where(((t + 1 == stop) & (rows < ROWS - 1))[:, None], final[None, :], D)
        A = tl.where(later, mu, 1.0)[:, None] + tl.zeros_like(P)
        A, D = tl.associative_scan((A, D), 0, join, reverse=True)
        D += A * dc[None, :]

        U = tl.where((t == stop)[:, None], final[None, :], H * g[:, None] - C * inward[:, None])
        U += tl.where(real, mu, 1.0)[:, None] * D
        dc = tl.sum(tl.where((rows == 0)[:, None], U, 0.0), 0)
        D = rest * D + C * g[:, None]
        radial = tl.where(tl.sqrt(tl.sum(K * K, 1)) > FLOOR, tl.sum(D * H, 1), 0.0)
        D = tl.where(real[:, None], (D - H * radial[:, None]) * inverse[:, None], 0.0)
        mask = (t < stop)[:, None] & inside[None, :]
        at = dk + (line * tokens + t[:, None]) * d + channels[None, :]
        if ADDED:
            D += tl.load(at, mask=mask, other=0.0)
        tl.store(at, D.to(dk.dtype.element_ty), mask=mask)
    if segment == low:
        tl.store(dc0 + own * d + channels, dc, mask=inside)


def aligned(x: Tensor) -> bool:
    """Whether all rows lie at multiples of 16 numbers behind the first."""
    return all(stride % 16 == 0 for stride in x.stride()[:3])


class Pass:
    """How keys (batch, heads, tokens, d) are cut, and the sums of their segments."""

    def __init__(
        self, k: Tensor, valid: Tensor | None, mu: float, offsets: Tensor | None
    ) -> None:  # fmt: skip
        batch, heads, tokens, d = k.shape
        chosen = lanes("trace")
        width = tile_width(d)
        rows = max(2, chosen.rows * chosen.channels // width)
        processors, _ = device_of(k)
        self.lines, self.d, self.device = batch * heads, d, k.device
        many = min(MOST_SEGMENTS, chosen.programs * processors // max(1, self.lines))
        least = max(-(-(tokens + 1) // max(1, many)), chosen.least_segment)
        length = -(-least // rows) * rows
        self.segments = -(-(tokens + 1) // length)
        packing: tuple[Any, ...] = (k, k, k)
        if offsets is not None:
            offsets = offsets.to(torch.int64)
            more = torch.arange(len(offsets), device=k.device)
            made = cut(1, tokens + len(offsets) - 1, length, offsets + more)
            self.segments = made.total
            packing = (made.table, made.bounds, offsets)
        self.tiles = self.segments * (length // rows)
        given = (k, 0, 0) if valid is None else (valid, *valid.stride())
        self.keys = (k, *k.stride(), *given)
        self.sizes = (*packing, tokens, heads, length, self.segments, d)
        self.decay = (mu, 1.0 - mu, -bits_lost(mu))
        self.options: dict[str, Any] = {
            "ROWS": rows, "BD": width, "VALID": valid is not None, "ALIGNED": aligned(k),
            "PACKED": offsets is not None, "num_warps": 1,
        }  # fmt: skip
        self.inverses = self.empty(tokens)
        self.totals, self.counts = self.empty(self.segments, d), self.empty(self.segments)
        self.launch(
            totals_kernel, *self.keys, self.inverses, self.totals, self.counts, *self.sizes,
            *self.decay[1:],
        )  # fmt: skip

    def empty(self, *shape: int) -> Tensor:
        """A float32 buffer for every head."""
        return torch.empty(self.lines, *shape, dtype=torch.float32, device=self.device)

    def launch(self, kernel: Any, *arguments: Any, **options: Any) -> None:
        """A program for each segment of each head."""
        launch(kernel, self.lines * self.segments, *arguments, **self.options, **options)


def forward(
    k: Tensor, valid: Tensor | None, c0: Tensor | None, mu: float, offsets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """rho (batch, heads, tokens) and the last traces (batch, heads, d), or (sequences, heads, d) of
    the sequences that `offsets` (sequences + 1) pack in a batch of one.
    """
    made = Pass(k, valid, mu, offsets)
    many = k.shape[0] if offsets is None else len(offsets) - 1
    rho = made.empty(k.shape[2])
    last = torch.empty(many, k.shape[1], made.d, dtype=torch.float32, device=k.device)
    first = last if c0 is None else c0.contiguous()
    made.launch(
        walk_kernel, *made.keys, made.inverses, made.totals, made.counts, first, rho, last,
        *[last] * 6, *made.sizes, *made.decay, STARTED=c0 is not None, GRADIENT=False,
    )  # fmt: skip
    return rho.view(k.shape[:3]), last


def backward(
    drho: Tensor, dlast: Tensor, k: Tensor, valid: Tensor | None, c0: Tensor | None, mu: float,
    added: Tensor | None = None, offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of k, added to what is given, contiguous, in place, and of the first traces."""
    made = Pass(k, valid, mu, offsets)
    drho, dlast = drho.contiguous(), dlast.contiguous()
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device) if added is None else added
    dc0 = torch.empty_like(dlast)
    toward, along = made.empty(k.shape[2]), made.empty(k.shape[2])
    starts = made.empty(made.tiles, made.d)
    back = made.empty(made.segments, made.d), made.empty(made.segments)
    first = dlast if c0 is None else c0.contiguous()
    made.launch(
        walk_kernel, *made.keys, made.inverses, made.totals, made.counts, first, drho, dc0, dlast,
        toward, along, starts, *back, *made.sizes, *made.decay, STARTED=c0 is not None,
        GRADIENT=True,
    )  # fmt: skip
    made.launch(
        gradient_kernel, *made.keys, made.inverses, toward, along, starts, *back, dlast, dk, dc0,
        *made.sizes, *made.decay, ADDED=added is not None,
    )  # fmt: skip
    return dk, dc0
