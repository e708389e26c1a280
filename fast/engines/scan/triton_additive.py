"""Gates of an additive recurrence and the summary of a sequence, in Triton.

A channel's running logsumexp is kept as its maximum m and the sum of e^(k - m): an offset shared by
all logits costs no digits. Rows go one after the other, channels side by side, segments in
parallel: each segment's own sum, a chain over the segments, and each segment again from what
enters it. The gradient does the same from the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnspec.fast.backend import count_launch
from attnspec.fast.engines.scan.triton_common import load_tile, offset
from attnspec.fast.engines.scan.triton_plan import device_of, power

ROWS = 64
"""Rows of a segment."""


@triton.jit
def spread(x):
    """x with 0 for -inf, to be subtracted."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def log1p(u):
    """log(1 + u) for 0 <= u <= 1 to full relative precision."""
    above = 1.0 + u
    gap = above - 1.0
    return tl.where(gap == 0.0, u, tl.log(above) * (u / tl.where(gap == 0.0, 1.0, gap)))


@triton.jit(do_not_specialize=["k_b", "k_h", "tokens", "segments"])
def totals_kernel(
    k, k_b, k_h, k_t, k_d, tops, totals, tokens, segments, heads,
    D: tl.constexpr, BC: tl.constexpr, ROWS: tl.constexpr, BR: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Maximum and sum of e^(k - maximum) of a segment of ROWS rows, in a tile of BR."""
    parts: tl.constexpr = (D + BC - 1) // BC
    program = tl.program_id(0)
    channel = ((program % parts) * BC).to(tl.int64)
    segment = (program // parts) % segments
    row = ((program // parts) // segments).to(tl.int64)
    start = segment.to(tl.int64) * ROWS
    left = tl.minimum(tokens - start, ROWS)
    k += offset(row // heads, k_b, row % heads, k_h, start, k_t, ALIGNED) + channel * k_d
    K = load_tile(k, k_t, k_d, left, D - channel, BR, BC, D % BC != 0, True).to(tl.float32)
    K = tl.where((tl.arange(0, BR) < left)[:, None], K, float("-inf"))
    top = tl.max(K, 0)
    total = tl.sum(tl.exp(K - spread(top)[None, :]), 0)
    channels = channel + tl.arange(0, BC)
    at = (row * segments + segment) * D + channels
    tl.store(tops + at, top, mask=channels < D)
    tl.store(totals + at, total, mask=channels < D)


@triton.jit(do_not_specialize=["k_b", "k_h", "tokens", "segments", "slots"])
def gates_kernel(
    k, k_b, k_h, k_t, k_d, tops, totals, kbar, log_decay, wanted, tokens, segments, heads, slots,
    D: tl.constexpr, BC: tl.constexpr, ROWS: tl.constexpr, SOME: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """The gates of a segment from the maximum and the sum that enter it; if SOME, of those alone
    that are `wanted` (batch, slots, heads).
    """
    parts: tl.constexpr = (D + BC - 1) // BC
    program = tl.program_id(0)
    channels = (program % parts) * BC + tl.arange(0, BC)
    segment = (program // parts) % segments
    row = ((program // parts) // segments).to(tl.int64)
    if SOME:  # noqa: SIM102 (a constant, and a number on the device)
        if tl.load(wanted + ((row // heads) * slots + segment) * heads + row % heads) == 0:
            return
    inside = channels < D
    start = segment.to(tl.int64) * ROWS
    count = tl.minimum(tokens - start, ROWS).to(tl.int32)
    k += offset(row // heads, k_b, row % heads, k_h, start, k_t, ALIGNED)
    k += channels.to(tl.int64) * k_d
    at = (row * segments + segment) * D + channels
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
        decay = log1p(smaller / tl.where(larger == 0.0, 1.0, larger)) + tl.where(
            more < old, 0.0, tl.maximum(x, 0.0)
        )
        gate = more / tl.where(masked, 1.0, old + more)
        here = out + tl.cast(t, tl.int64) * D
        tl.store(kbar + here, gate.to(kbar.dtype.element_ty), mask=inside)
        idle = first | masked | (gate != gate)
        tl.store(log_decay + here, tl.where(idle, 0.0, -decay), mask=inside)
        top, total = above, old + more


@triton.jit(do_not_specialize=["segments"])
def chain_gates_kernel(
    tops, totals, z0, last, segments, D: tl.constexpr, BC: tl.constexpr, STARTED: tl.constexpr
):
    """Turn segments' own maxima and sums into those that enter them, in place; and z at the end."""
    parts: tl.constexpr = (D + BC - 1) // BC
    program = tl.program_id(0)
    channels = (program % parts) * BC + tl.arange(0, BC)
    row = (program // parts).to(tl.int64)
    inside = channels < D
    top = tl.full((BC,), float("-inf"), tl.float32)
    if STARTED:
        top = tl.load(z0 + row * D + channels, mask=inside, other=0.0)
    total = tl.where(top == float("-inf"), 0.0, 1.0)
    for segment in tl.range(0, segments, num_stages=4):
        at = (row * segments + segment) * D + channels
        new = tl.load(tops + at, mask=inside, other=0.0)
        more = tl.load(totals + at, mask=inside, other=0.0)
        tl.store(tops + at, top, mask=inside)
        tl.store(totals + at, total, mask=inside)
        above = tl.maximum(top, new)
        base = spread(above)
        total = total * tl.exp(top - base) + more * tl.exp(new - base)
        top = above
    empty = total == 0.0
    z = tl.where(empty, float("-inf"), top + tl.log(tl.where(empty, 1.0, total)))
    tl.store(last + row * D + channels, z, mask=inside)


@triton.jit(do_not_specialize=["tokens", "segments"])
def gates_gradient_kernel(
    dkbar, dlog_decay, kbar, log_decay, carries, factors, dk, tokens, segments,
    D: tl.constexpr, BC: tl.constexpr, ROWS: tl.constexpr, WRITE: tl.constexpr,
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
    start = segment.to(tl.int64) * ROWS
    count = tl.minimum(tokens - start, ROWS).to(tl.int32)
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
def chain_gradient_kernel(carries, factors, dz, dz0, segments, D: tl.constexpr, BC: tl.constexpr):
    """Turn what segments hand on into what they are handed, in place, from the last to dz0."""
    parts: tl.constexpr = (D + BC - 1) // BC
    program = tl.program_id(0)
    channels = (program % parts) * BC + tl.arange(0, BC)
    row = (program // parts).to(tl.int64)
    inside = channels < D
    carry = tl.load(dz + row * D + channels, mask=inside, other=0.0)
    for n in tl.range(0, segments, num_stages=4):
        at = (row * segments + segments - 1 - n) * D + channels
        own = tl.load(carries + at, mask=inside, other=0.0)
        factor = tl.load(factors + at, mask=inside, other=0.0)
        tl.store(carries + at, carry, mask=inside)
        carry = own + factor * carry
    tl.store(dz0 + row * D + channels, carry, mask=inside)


@triton.jit(do_not_specialize=["k_b", "k_h", "v_b", "v_h", "tokens", "length", "segments"])
def summary_kernel(
    k, k_b, k_h, k_t, k_d, v, v_b, v_h, v_t, v_d, sums, tops, totals, tokens, length, segments,
    heads,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    ALIGNED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """sum_t e^(k_t - m) v_t (D, DV) of a segment and BV value channels, m and sum_t e^(k_t - m)."""
    tiles: tl.constexpr = (DV + BV - 1) // BV
    program = tl.program_id(0)
    tile = (program % tiles).to(tl.int64)
    segment = (program // tiles) % segments
    row = ((program // tiles) // segments).to(tl.int64)
    start = segment.to(tl.int64) * length
    count = tl.minimum(tokens - start, length).to(tl.int32)
    k += offset(row // heads, k_b, row % heads, k_h, start, k_t, ALIGNED)
    v += offset(row // heads, v_b, row % heads, v_h, start, v_t, ALIGNED) + tile * BV * v_d
    width = DV - tile * BV
    top = tl.full((BD,), float("-inf"), tl.float32)
    total = tl.zeros((BD,), tl.float32)
    S = tl.zeros((BD, BV), tl.float32)
    for i in range(tl.cdiv(count, C)):
        at = tl.cast(i, tl.int64) * C
        left = count - i * C
        K = load_tile(k + at * k_t, k_t, k_d, left, D, C, BD, D < BD, WIDE).to(tl.float32)
        V = load_tile(v + at * v_t, v_t, v_d, left, width, C, BV, DV % BV != 0, WIDE)
        K = tl.where((tl.arange(0, C) < left)[:, None], K, float("-inf"))
        above = tl.maximum(top, tl.max(K, 0))
        base = spread(above)
        P = tl.exp(K - base[None, :])
        old = tl.exp(top - base)
        total = total * old + tl.sum(P, 0)
        S = tl.dot(tl.trans(P.to(V.dtype)), V, S * old[:, None], input_precision="ieee")
        top = above
    rows, columns = tl.arange(0, BD), tile * BV + tl.arange(0, BV)
    where = row * segments + segment
    mask = (rows < D)[:, None] & (columns < DV)[None, :]
    tl.store(sums + where * D * DV + rows[:, None] * DV + columns[None, :], S, mask=mask)
    if tile == 0:
        tl.store(tops + where * D + rows, top, mask=rows < D)
        tl.store(totals + where * D + rows, total, mask=rows < D)


def _channels(d: int) -> tuple[int, int]:
    """Channels of a program, and how many programs hold them all."""
    channels = min(128, power(d))
    return channels, -(-d // channels)


@dataclass(frozen=True)
class Totals:
    """The running logsumexp where segments of `rows` rows begin, as maxima and sums of (batch,
    heads, segments, d), and z (batch, heads, d) behind the last.
    """

    k: Tensor
    rows: int
    tops: Tensor
    sums: Tensor
    z: Tensor

    @classmethod
    def of(cls, k: Tensor, z0: Tensor | None, rows: int) -> Totals:
        """`k` (batch, heads, tokens, d), of one token or more."""
        batch, heads, tokens, d = k.shape
        segments = -(-tokens // rows)
        tops, sums = torch.empty(2, batch, heads, segments, d, device=k.device).unbind()
        z = torch.empty(batch, heads, d, dtype=torch.float32, device=k.device)
        made = cls(k, rows, tops, sums, z)
        channels, parts = _channels(d)
        programs = batch * heads * parts
        count_launch()
        totals_kernel[(programs * segments,)](
            k, *k.stride(), tops, sums, tokens, segments, heads,
            d, channels, rows, power(rows), ALIGNED=made.aligned, num_warps=4,
        )  # fmt: skip
        z0 = None if z0 is None else z0.to(torch.float32).contiguous()
        count_launch()
        chain_gates_kernel[(programs,)](
            tops, sums, tops if z0 is None else z0, z, segments, d, channels,
            STARTED=z0 is not None, num_warps=1,
        )  # fmt: skip
        return made

    @property
    def aligned(self) -> bool:
        """Whether rows of k start at multiples of 16 numbers."""
        return all(stride % 16 == 0 for stride in self.k.stride()[:3])

    def write(
        self, kbar: Tensor, log_decay: Tensor, wanted: Tensor | None = None, slots: int = 0
    ) -> None:
        """The gates of all segments, or of those that are `wanted` (batch, slots, heads)."""
        batch, heads, segments, d = self.tops.shape
        channels, parts = _channels(d)
        count_launch()
        gates_kernel[(batch * heads * parts * segments,)](
            self.k, *self.k.stride(), self.tops, self.sums, kbar, log_decay,
            self.tops if wanted is None else wanted, self.k.shape[2], segments, heads, slots,
            d, channels, self.rows, SOME=wanted is not None, ALIGNED=self.aligned, num_warps=1,
        )  # fmt: skip


def gates(k: Tensor, z0: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """kbar, log_decay (batch, heads, tokens, d) and z (batch, heads, d)."""
    batch, heads, _, d = k.shape
    kbar = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    log_decay = torch.empty(k.shape, dtype=torch.float32, device=k.device)
    if kbar.numel() == 0:
        z = torch.empty(batch, heads, d, dtype=torch.float32, device=k.device)
        return kbar, log_decay, z.fill_(-torch.inf) if z0 is None else z.copy_(z0)
    totals = Totals.of(k, z0, ROWS)
    totals.write(kbar, log_decay)
    return kbar, log_decay, totals.z


def gates_backward(
    dkbar: Tensor, dlog_decay: Tensor, dz: Tensor, kbar: Tensor, log_decay: Tensor
) -> tuple[Tensor, Tensor]:
    """dk, and the gradient of z before the first row."""
    batch, heads, tokens, d = kbar.shape
    dk, dz0 = torch.empty_like(kbar), torch.empty_like(dz, memory_format=torch.contiguous_format)
    if dk.numel() == 0:
        return dk, dz0.copy_(dz)
    segments = -(-tokens // ROWS)
    channels, parts = _channels(d)
    carries, factors = torch.empty(2, batch * heads, segments, d, device=kbar.device).unbind()
    arguments = (
        dkbar.contiguous(), dlog_decay.contiguous(), kbar, log_decay, carries, factors, dk, tokens,
        segments, d, channels, ROWS,
    )  # fmt: skip
    programs = batch * heads * parts
    count_launch()
    gates_gradient_kernel[(programs * segments,)](*arguments, WRITE=False, num_warps=1)
    count_launch()
    chain_gradient_kernel[(programs,)](
        carries, factors, dz.contiguous(), dz0, segments, d, channels, num_warps=1
    )
    count_launch()
    gates_gradient_kernel[(programs * segments,)](*arguments, WRITE=True, num_warps=1)
    return dk, dz0


def summary(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """softmax_time(k)^T v (batch, heads, d, dv) and the logsumexp of k (batch, heads, d)."""
    batch, heads, tokens, d = k.shape
    dv = v.shape[3]
    if batch * heads * tokens == 0:
        KV = torch.zeros(batch, heads, d, dv, device=k.device)
        return KV, torch.full((batch, heads, d), -torch.inf, device=k.device)
    exact = k.dtype == torch.float32
    block, items = (16, 2048) if exact else (64, 16384)
    rows = power(d)
    tile = max(16, min(128, power(dv), items // rows))
    tiles = -(-dv // tile)
    processors, _ = device_of(k)
    many = max(1, 2 * processors // (batch * heads * tiles))
    length = -(-max(-(-tokens // many), 256) // block) * block
    segments = -(-tokens // length)
    sums = torch.empty(batch, heads, segments, d, dv, device=k.device)
    tops, totals = torch.empty(2, batch, heads, segments, d, device=k.device).unbind()
    aligned = all(stride % 16 == 0 for x in (k, v) for stride in x.stride()[:3])
    span = max(block * x.stride(2) + 256 * x.stride(3) for x in (k, v))
    count_launch()
    summary_kernel[(batch * heads * segments * tiles,)](
        k, *k.stride(), v, *v.stride(), sums, tops, totals, tokens, length, segments, heads,
        D=d, DV=dv, BD=rows, BV=tile, C=block, ALIGNED=aligned, WIDE=span >= 2**31,
        num_warps=8, num_stages=1 if exact else 2,
    )  # fmt: skip
    top = tops.amax(2, keepdim=True)
    weights = torch.exp(tops - torch.where(top == -torch.inf, 0.0, top))
    total = (totals * weights).sum(2)
    KV = (sums * weights[..., None]).sum(2) / torch.where(total == 0, 1.0, total)[..., None]
    return KV, top[:, :, 0] + total.log()
