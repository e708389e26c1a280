"""Gates of an additive recurrence in Triton.

A channel's running logsumexp is kept as its maximum m and the sum of e^(k - m): an offset shared by
all logits costs no digits. Rows go one after the other, channels side by side, segments in
parallel: each segment's own sum, a chain over the segments of a sequence, and each segment again
from what enters it. The gradient does the same from the end. Packed sequences are one batch whose
segments a table lists; each has a chain of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnspec.fast.backend import interpreting
from attnspec.fast.engines.prepared import launch
from attnspec.fast.engines.scan.recorder import Recorder
from attnspec.fast.engines.scan.segments import Segments, cut
from attnspec.fast.engines.scan.triton_common import (
    LOG2E,
    links,
    load_tile,
    locate,
    log1p,
    offset,
)
from attnspec.fast.engines.scan.triton_levels import FLAGS, pick_steep
from attnspec.fast.engines.scan.triton_plan import odd_programs
from attnspec.fast.engines.sizes import tile_width

ROWS = 64
"""Rows of a segment."""
CHAINED, CHAINS, FEWER = 256, 8, 4
"""Segments and channels that a program of the chain scans at a time; and how many segments in the
interpreter, which goes through them one by one."""


@triton.jit
def spread(x):
    """x with 0 for -inf, to be subtracted."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit(do_not_specialize=["k_b", "k_h", "tokens", "segments"])
def totals_kernel(
    k, k_b, k_h, k_t, k_d, tops, totals, table, tokens, segments, heads,
    D: tl.constexpr, BC: tl.constexpr, ROWS: tl.constexpr, BR: tl.constexpr, ALIGNED: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """Maximum and sum of e^(k - maximum) of a segment of ROWS rows, in a tile of BR."""
    parts: tl.constexpr = (D + BC - 1) // BC
    program = tl.program_id(0)
    channel = ((program % parts) * BC).to(tl.int64)
    segment = (program // parts) % segments
    row = ((program // parts) // segments).to(tl.int64)
    _, _, start, left, _, _ = locate(table, segment, segments, ROWS, tokens, PACKED)
    k += offset(row // heads, k_b, row % heads, k_h, start, k_t, ALIGNED) + channel * k_d
    K = load_tile(
        k, k_t, k_d, left, D - channel, BR, BC, D % BC != 0, True, OTHER=float("-inf")
    ).to(tl.float32)
    top = tl.max(K, 0)
    total = tl.sum(tl.exp2((K - spread(top)[None, :]) * LOG2E), 0)
    channels = channel + tl.arange(0, BC)
    at = (row * segments + segment) * D + channels
    tl.store(tops + at, top, mask=channels < D)
    tl.store(totals + at, total, mask=channels < D)


@triton.jit(do_not_specialize=["k_b", "k_h", "tokens", "segments", "blocks", "span", "many"])
def gates_kernel(
    k, k_b, k_h, k_t, k_d, tops, totals, kbar, log_decay, wanted, table, tokens, segments, heads,
    blocks, span, many,
    D: tl.constexpr, BC: tl.constexpr, ROWS: tl.constexpr, SOME: tl.constexpr,
    ALIGNED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The gates of a segment and BC channels from the maximum and the sum that enter it; if SOME,
    of those of `span` segments that are `wanted` (batch, blocks, heads).
    """
    parts: tl.constexpr = (D + BC - 1) // BC
    program, programs = tl.program_id(0), tl.num_programs(0)
    if SOME:
        chosen = pick_steep(wanted, span, many, 1.0)
        if tl.max(chosen, 0) > 0:
            for n in range(span):
                if tl.sum(tl.where(tl.arange(0, FLAGS) == n, chosen, 0), 0) == 1:
                    which = program + n * programs
                    row = ((which // heads) // blocks).to(tl.int64) * heads + which % heads
                    for part in range(parts):
                        write_gates(
                            k, k_b, k_h, k_t, k_d, tops, totals, kbar, log_decay, table, tokens,
                            segments, heads, row, (which // heads) % blocks, part, D, BC, ROWS,
                            ALIGNED, PACKED,
                        )  # fmt: skip
    else:
        write_gates(
            k, k_b, k_h, k_t, k_d, tops, totals, kbar, log_decay, table, tokens, segments, heads,
            ((program // parts) // segments).to(tl.int64), (program // parts) % segments,
            program % parts, D, BC, ROWS, ALIGNED, PACKED,
        )  # fmt: skip


@triton.jit
def write_gates(
    k, k_b, k_h, k_t, k_d, tops, totals, kbar, log_decay, table, tokens, segments, heads, row,
    segment, part,
    D: tl.constexpr, BC: tl.constexpr, ROWS: tl.constexpr, ALIGNED: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """The gates of one segment and part of the channels."""
    channels = part * BC + tl.arange(0, BC)
    inside = channels < D
    _, _, start, count, _, _ = locate(table, segment, segments, ROWS, tokens, PACKED)
    k += offset(row // heads, k_b, row % heads, k_h, start, k_t, ALIGNED)
    k += channels.to(tl.int64) * k_d
    at = (row * (segments + 1) + segment) * D + channels
    top = tl.load(tops + at, mask=inside, other=0.0)
    total = tl.load(totals + at, mask=inside, other=1.0)
    out = (row * tokens + start) * D + channels
    for t in range(count):
        new = tl.load(k + tl.cast(t, tl.int64) * k_t, mask=inside, other=0.0).to(tl.float32)
        above = tl.maximum(top, new)
        base = spread(above)
        old, more = total * tl.exp(top - base), tl.exp(new - base)
        first = total == 0.0
        masked = new == float("-inf")
        x = spread(new) - spread(top) - tl.log(tl.where(first, 1.0, total))
        smaller = tl.where(more < old, more, old)
        larger = tl.where(more < old, old, more)
        ratio = smaller / tl.where(larger == 0.0, 1.0, larger)
        decay = log1p(ratio, False) + tl.where(more < old, 0.0, tl.maximum(x, 0.0))
        gate = more / tl.where(masked, 1.0, old + more)
        here = out + tl.cast(t, tl.int64) * D
        tl.store(kbar + here, gate.to(kbar.dtype.element_ty), mask=inside)
        idle = first | masked | (gate != gate)
        tl.store(log_decay + here, tl.where(idle, 0.0, -decay), mask=inside)
        top, total = above, old + more


@triton.jit
def join(top, total, later_top, later_total):
    """Maximum and sum of two runs of rows."""
    above = tl.maximum(top, later_top)
    base = spread(above)
    old, new = tl.exp2((top - base) * LOG2E), tl.exp2((later_top - base) * LOG2E)
    return above, total * old + later_total * new


@triton.jit(do_not_specialize=["segments"])
def chain_gates_kernel(
    own_tops, own_totals, tops, totals, z0, last, bounds, segments, heads,
    D: tl.constexpr, BC: tl.constexpr, MANY: tl.constexpr, STARTED: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """From segments' own maxima and sums those that enter each of them, and leave the last: of BC
    channels, MANY segments at a time; and z at the end. What leaves a sequence is not stored if
    PACKED: the next one begins there.
    """
    parts: tl.constexpr = (D + BC - 1) // BC
    program = tl.program_id(0)
    channels = (program % parts) * BC + tl.arange(0, BC)
    row = (program // parts).to(tl.int64)
    line, low, many = links(bounds, row, segments, heads, PACKED)
    inside = channels < D
    top = tl.full((BC,), float("-inf"), tl.float32)
    if STARTED:
        top = tl.load(z0 + row * D + channels, mask=inside, other=0.0)
    total = tl.where(top == float("-inf"), 0.0, 1.0)
    entering = (line * (segments + 1) + low) * D + channels
    begun = channels < tl.where(many > 0, D, 0)
    tl.store(tops + entering, top, mask=begun)
    tl.store(totals + entering, total, mask=begun)
    places = tl.arange(0, MANY)
    for n in range(tl.cdiv(many, MANY)):
        segment = n * MANY + places
        at = (line * segments + low + segment.to(tl.int64))[:, None] * D + channels[None, :]
        mask = (segment < many)[:, None] & inside[None, :]
        own_top = tl.load(own_tops + at, mask=mask, other=float("-inf"))
        own_total = tl.load(own_totals + at, mask=mask, other=0.0)
        run_top, run_total = tl.associative_scan((own_top, own_total), 0, join)
        run_top, run_total = join(top[None, :], total[None, :], run_top, run_total)
        # One after these, in a table with a row more.
        at += (line + 1) * D
        if PACKED:
            mask = (segment + 1 < many)[:, None] & inside[None, :]
        tl.store(tops + at, run_top, mask=mask)
        tl.store(totals + at, run_total, mask=mask)
        end = (places == MANY - 1)[:, None]
        top = tl.max(tl.where(end, run_top, float("-inf")), 0)
        total = tl.sum(tl.where(end, run_total, 0.0), 0)
    empty = total == 0.0
    z = tl.where(empty, float("-inf"), top + tl.log(tl.where(empty, 1.0, total)))
    tl.store(last + row * D + channels, z, mask=inside)


@triton.jit(do_not_specialize=["tokens", "segments"])
def gates_gradient_kernel(
    dkbar, dlog_decay, kbar, log_decay, carries, factors, dk, table, tokens, segments,
    D: tl.constexpr, BC: tl.constexpr, ROWS: tl.constexpr, PACKED: tl.constexpr,
    WRITE: tl.constexpr,
):  # fmt: skip
    """What a segment hands to the row before it: a sum, and the factor of what it is handed itself;
    or, if WRITE, its dk from that.

    With a_t the gradient of z_t, row t adds e^(w_t) a_t + dw_t to that of z_(t-1).
    """
    parts: tl.constexpr = (D + BC - 1) // BC
    program = tl.program_id(0)
    channels = (program % parts) * BC + tl.arange(0, BC)
    segment = (program // parts) % segments
    row = ((program // parts) // segments).to(tl.int64)
    inside = channels < D
    _, _, start, count, _, _ = locate(table, segment, segments, ROWS, tokens, PACKED)
    at = (row * segments + segment) * D + channels
    carry = tl.zeros((BC,), tl.float32)
    factor = tl.full((BC,), 1.0, tl.float32)
    if WRITE:
        carry = tl.load(carries + at, mask=inside, other=0.0)
    first = (row * tokens + start) * D + channels
    for n in range(count):
        here = first + tl.cast(count - 1 - n, tl.int64) * D
        gate = tl.load(kbar + here, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(log_decay + here, mask=inside, other=0.0)
        dgate = tl.load(dkbar + here, mask=inside, other=0.0).to(tl.float32)
        dw = tl.load(dlog_decay + here, mask=inside, other=0.0).to(tl.float32)
        fresh = (w == 0.0) & (gate > 0.5)
        dw = tl.where(fresh, 0.0, dw)
        decay = tl.where(fresh, 0.0, tl.exp(w))
        dz = carry - dgate * gate - dw
        if WRITE:
            tl.store(dk + here, (gate * (dgate + dz)).to(dk.dtype.element_ty), mask=inside)
        carry = decay * dz + dw
        factor *= decay
    if not WRITE:
        tl.store(carries + at, carry, mask=inside)
        tl.store(factors + at, factor, mask=inside)


@triton.jit(do_not_specialize=["segments"])
def chain_gradient_kernel(
    carries, factors, dz, dz0, bounds, segments, heads,
    D: tl.constexpr, BC: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Turn what segments hand on into what they are handed, in place, from the last to dz0."""
    parts: tl.constexpr = (D + BC - 1) // BC
    program = tl.program_id(0)
    channels = (program % parts) * BC + tl.arange(0, BC)
    row = (program // parts).to(tl.int64)
    line, low, many = links(bounds, row, segments, heads, PACKED)
    inside = channels < D
    carry = tl.load(dz + row * D + channels, mask=inside, other=0.0)
    for n in tl.range(0, many, num_stages=4):
        at = (line * segments + low + many - 1 - n) * D + channels
        own = tl.load(carries + at, mask=inside, other=0.0)
        factor = tl.load(factors + at, mask=inside, other=0.0)
        tl.store(carries + at, carry, mask=inside)
        carry = own + factor * carry
    tl.store(dz0 + row * D + channels, carry, mask=inside)


def _channels(d: int) -> tuple[int, int]:
    """Channels of a program, and how many programs hold them all."""
    channels = min(128, tile_width(d))
    return channels, -(-d // channels)


@dataclass(frozen=True)
class Totals:
    """The running logsumexp where segments of `rows` rows begin, and behind the last, as maxima and
    sums of (batch, heads, segments + 1, d); and z (sequences, heads, d) behind the last.
    """

    k: Tensor
    cuts: Segments
    tops: Tensor
    sums: Tensor
    z: Tensor
    recorder: Recorder

    @classmethod
    def of(
        cls, k: Tensor, z0: Tensor | None, rows: int, recorder: Recorder,
        offsets: Tensor | None = None,
    ) -> Totals:  # fmt: skip
        """`k` (batch, heads, tokens, d), of one token or more."""
        batch, heads, tokens, d = k.shape
        cuts = cut(batch, tokens, rows, offsets)
        segments = cuts.each

        def empty(batch: int, *shape: int) -> Tensor:
            return recorder.buffer(torch.empty(batch, heads, *shape, d, device=k.device))

        own_tops, own_sums = (empty(batch, segments) for _ in range(2))
        tops, sums = (empty(batch, segments + 1) for _ in range(2))
        made = cls(k, cuts, tops, sums, empty(cuts.sequences), recorder)
        table, bounds = cuts.tables(k)
        channels, parts = _channels(d)
        recorder.launch(
            totals_kernel, batch * heads * parts * segments,
            k, *k.stride(), own_tops, own_sums, table, tokens, segments, heads,
            D=d, BC=channels, ROWS=rows, BR=tile_width(rows), ALIGNED=made.aligned,
            PACKED=cuts.packed, num_warps=4,
        )  # fmt: skip
        z0 = None if z0 is None else z0.to(torch.float32).contiguous()
        recorder.launch(
            chain_gates_kernel, cuts.sequences * heads * -(-d // CHAINS),
            own_tops, own_sums, made.tops, made.sums, own_tops if z0 is None else z0, made.z,
            bounds, segments, heads, D=d, BC=CHAINS, MANY=FEWER if interpreting() else CHAINED,
            STARTED=z0 is not None, PACKED=cuts.packed, num_warps=4,
        )  # fmt: skip
        return made

    @property
    def aligned(self) -> bool:
        """Whether rows of k start at multiples of 16 numbers."""
        return all(stride % 16 == 0 for stride in self.k.stride()[:3])

    def write(self, kbar: Tensor, log_decay: Tensor) -> None:
        """The gates of all segments."""
        batch, heads, segments, d = self.tops.shape
        programs = batch * heads * (segments - 1) * _channels(d)[1]
        self._write(kbar, log_decay, None, programs, 0, 1)

    def write_some(
        self, kbar: Tensor, log_decay: Tensor, wanted: Tensor, blocks: int, span: int
    ) -> None:
        """The gates of those segments that are `wanted` (batch, blocks, heads); a program looks
        after `span` of them.
        """
        programs = odd_programs(wanted.numel(), span)
        self._write(kbar, log_decay, wanted, programs, blocks, span)

    def _write(
        self, kbar: Tensor, log_decay: Tensor, wanted: Tensor | None, programs: int, blocks: int,
        span: int,
    ) -> None:  # fmt: skip
        _, heads, segments, d = self.tops.shape
        table, _ = self.cuts.tables(self.k)
        self.recorder.launch(
            gates_kernel, programs,
            self.k, *self.k.stride(), self.tops, self.sums, kbar, log_decay,
            self.tops if wanted is None else wanted, table, self.k.shape[2], segments - 1, heads,
            blocks, span, 0 if wanted is None else wanted.numel(),
            D=d, BC=_channels(d)[0], ROWS=self.cuts.length, SOME=wanted is not None,
            ALIGNED=self.aligned, PACKED=self.cuts.packed, num_warps=1,
        )  # fmt: skip


def gates(k: Tensor, z0: Tensor | None, offsets: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """kbar, log_decay (batch, heads, tokens, d) and z (sequences, heads, d)."""
    batch, heads, _, d = k.shape
    sequences = batch if offsets is None else offsets.shape[0] - 1
    kbar = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    log_decay = torch.empty(k.shape, dtype=torch.float32, device=k.device)
    if kbar.numel() == 0:
        z = torch.empty(sequences, heads, d, dtype=torch.float32, device=k.device)
        return kbar, log_decay, z.fill_(-torch.inf) if z0 is None else z.copy_(z0)
    totals = Totals.of(k, z0, ROWS, Recorder(), offsets)
    totals.write(kbar, log_decay)
    return kbar, log_decay, totals.z


def gates_backward(
    dkbar: Tensor, dlog_decay: Tensor, dz: Tensor, kbar: Tensor, log_decay: Tensor,
    offsets: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dk, and the gradient of z before the first row."""
    batch, heads, tokens, d = kbar.shape
    dk, dz0 = torch.empty_like(kbar), torch.empty_like(dz, memory_format=torch.contiguous_format)
    if dk.numel() == 0:
        return dk, dz0.copy_(dz)
    cuts = cut(batch, tokens, ROWS, offsets)
    segments = cuts.each
    table, bounds = cuts.tables(kbar)
    channels, parts = _channels(d)
    carries, factors = torch.empty(2, batch * heads, segments, d, device=kbar.device).unbind()
    arguments = (
        dkbar.contiguous(), dlog_decay.contiguous(), kbar, log_decay, carries, factors, dk, table,
        tokens, segments, d, channels, ROWS, cuts.packed,
    )  # fmt: skip
    programs = batch * heads * parts * segments
    launch(gates_gradient_kernel, programs, *arguments, WRITE=False, num_warps=1)
    launch(
        chain_gradient_kernel, cuts.sequences * heads * parts,
        carries, factors, dz.contiguous(), dz0, bounds, segments, heads, d, channels,
        PACKED=cuts.packed, num_warps=1,
    )  # fmt: skip
    launch(gates_gradient_kernel, programs, *arguments, WRITE=True, num_warps=1)
    return dk, dz0
