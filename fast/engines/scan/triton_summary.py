"""The summary of a sequence under a softmax over time, its gradient, and products over time.

A program sums e^(k - m) v^T over a segment. The offset m of a channel stays what it was until a
logit lies MARGIN above it, which few blocks see: so sums are hardly ever rescaled, and no maximum
is taken across threads. Segments are joined by a second kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnspec.fast.engines.prepared import launch
from attnspec.fast.engines.scan.triton_additive import spread
from attnspec.fast.engines.scan.triton_common import LOG2E, load_tile, offset, store_tile
from attnspec.fast.engines.scan.triton_plan import device_of
from attnspec.fast.engines.scan.triton_widths import narrow, padded, padded_state, tiled
from attnspec.fast.engines.sizes import tile_width

MARGIN = {torch.float16: 8.0, torch.bfloat16: 40.0, torch.float32: 40.0}
"""How far a logit may lie above its channel's offset: e^MARGIN, and sums of many, fit the type."""
LEAST = tl.constexpr(torch.finfo(torch.float32).min)
"""The offset of a channel that has no key yet."""
WAYS = 16
"""Rows of a block that are summed apart, so that they need not leave their thread."""


@triton.jit(do_not_specialize=["k_b", "k_h", "v_b", "v_h", "tokens", "length", "segments"])
def summary_kernel(
    k, k_b, k_h, k_t, k_d, v, v_b, v_h, v_t, v_d, sums, tops, totals, tokens, length, segments,
    heads,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    WAYS: tl.constexpr, SOFT: tl.constexpr, MARGIN: tl.constexpr, ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """sum_t e^(k_t - m) v_t (D, DV) of a segment and BV value channels, m and sum_t e^(k_t - m); or
    unless SOFT, sum_t k_t v_t alone.
    """
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
    top = tl.full((BD,), LEAST, tl.float32)
    total = tl.zeros((WAYS, BD), tl.float32)
    S = tl.zeros((BV, BD), tl.float32)
    other: tl.constexpr = float("-inf") if SOFT else 0.0
    for i in range(tl.cdiv(count, C)):
        left = count - i * C
        K = load_tile(k, k_t, k_d, left, D, C, BD, D < BD, WIDE, OTHER=other)
        V = load_tile(v, v_t, v_d, left, width, C, BV, DV % BV != 0, WIDE)
        k += tl.cast(C, tl.int64) * k_t
        v += tl.cast(C, tl.int64) * v_t
        if SOFT:
            K = K.to(tl.float32)
            above = K - top[None, :]
            if tl.max(above) > MARGIN:
                highest = tl.maximum(top, tl.max(K, 0))
                old = tl.exp(top - highest)
                S *= old[None, :]
                total *= old[None, :]
                top = highest
                above = K - top[None, :]
            P = tl.exp2(above * LOG2E)
            total += tl.sum(tl.reshape(P, (C // WAYS, WAYS, BD)), 0)
            K = P.to(V.dtype)
        S = tl.dot(tl.trans(V), K, S, input_precision="ieee")
    rows, columns = tl.arange(0, BD), tile * BV + tl.arange(0, BV)
    where = row * segments + segment
    mask = (rows < D)[:, None] & (columns < DV)[None, :]
    places = where * D * DV + rows[:, None] * DV + columns[None, :]
    tl.store(sums + places, tl.trans(S), mask=mask)
    if SOFT:  # noqa: SIM102 (a constant, and a number on the device)
        if tile == 0:
            tl.store(tops + where * D + rows, top, mask=rows < D)
            tl.store(totals + where * D + rows, tl.sum(total, 0), mask=rows < D)


@triton.jit(do_not_specialize=["segments"])
def join_summaries_kernel(
    sums, tops, totals, KV, z, segments,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, SOFT: tl.constexpr,
):  # fmt: skip
    """KV (D, DV) of BD of a head's key channels, and z, from what segments have summed."""
    parts: tl.constexpr = (D + BD - 1) // BD
    program = tl.program_id(0)
    row = (program // parts).to(tl.int64)
    channels = (program % parts) * BD + tl.arange(0, BD)
    columns = tl.arange(0, BV)[None, :]
    inside = channels < D
    mask = inside[:, None] & (columns < DV)
    top = tl.full((BD,), LEAST, tl.float32)
    total = tl.zeros((BD,), tl.float32)
    S = tl.zeros((BD, BV), tl.float32)
    for segment in range(segments):
        where = row * segments + segment
        at = (where * D + channels.to(tl.int64))[:, None] * DV + columns
        more = tl.load(sums + at, mask=mask, other=0.0)
        if SOFT:
            new = tl.load(tops + where * D + channels, mask=inside, other=0.0)
            above = tl.maximum(top, new)
            old, fresh = tl.exp(top - above), tl.exp(new - above)
            total *= old
            total += fresh * tl.load(totals + where * D + channels, mask=inside, other=0.0)
            S = S * old[:, None] + more * fresh[:, None]
            top = above
        else:
            S += more
    if SOFT:
        empty = total == 0.0
        S /= tl.where(empty, 1.0, total)[:, None]
        last = tl.where(empty, float("-inf"), top + tl.log(tl.where(empty, 1.0, total)))
        tl.store(z + row * D + channels, last, mask=inside)
    tl.store(KV + (row * D + channels)[:, None] * DV + columns, S, mask=mask)


@triton.jit(do_not_specialize=["k_b", "k_h", "v_b", "v_h", "tokens", "blocks"])
def summary_gradient_kernel(
    k, k_b, k_h, k_t, k_d, v, v_b, v_h, v_t, v_d, dKV, z, means, dk, dv, tokens, blocks, heads,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    ALIGNED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dk and dv (batch, heads, tokens, width) of C rows: with P = e^(k - z), dv = P dKV and
    dk = P (v dKV^T - means), means (D,) the sums of KV dKV over value channels.
    """
    program = tl.program_id(0)
    start = (program % blocks).to(tl.int64) * C
    row = (program // blocks).to(tl.int64)
    left = (tokens - start).to(tl.int32)
    k += offset(row // heads, k_b, row % heads, k_h, start, k_t, ALIGNED)
    v += offset(row // heads, v_b, row % heads, v_h, start, v_t, ALIGNED)
    channels = tl.arange(0, BD)
    last = tl.load(z + row * D + channels, mask=channels < D, other=0.0)
    mean = tl.load(means + row * D + channels, mask=channels < D, other=0.0)
    K = load_tile(k, k_t, k_d, left, D, C, BD, D < BD, WIDE, OTHER=float("-inf")).to(tl.float32)
    P = tl.exp2((K - spread(last)[None, :]) * LOG2E)
    # As the right operand, which comes from shared memory: see `triton_gates.py` of the left one.
    P_turned = tl.trans(P.to(v.dtype.element_ty))
    dP = tl.zeros((C, BD), tl.float32) - mean[None, :]
    out = row * tokens + start
    for column in range(0, DV, BV):
        wide = tl.cast(column, tl.int64)
        width = DV - column
        V = load_tile(v + wide * v_d, v_t, v_d, left, width, C, BV, DV % BV != 0, WIDE)
        G = load_tile(dKV + row * D * DV + wide, DV, 1, D, width, BD, BV, DV % BV != 0)
        dP = tl.dot(V, tl.trans(G), dP, input_precision="ieee")
        dV = tl.trans(tl.dot(tl.trans(G), P_turned, input_precision="ieee"))
        store_tile(dv + out * DV + wide, DV, dV, left, width, C, BV, DV % BV != 0)
    store_tile(dk + out * D, D, P * dP, left, D, C, BD, D < BD)


def summary(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """softmax_time(k)^T v (batch, heads, d, dv) and the logsumexp of k (batch, heads, d)."""
    return _summed(k, v, soft=True)


def product_over_time(a: Tensor, b: Tensor) -> Tensor:
    """a^T b (batch, heads, width of a, width of b) in float32."""
    return _summed(a, b, soft=False)[0]


def summary_backward(
    dKV: Tensor, KV: Tensor, z: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """dk and dv, contiguous."""
    batch, heads, tokens, d = k.shape
    dv = v.shape[3]
    if narrow(k, v):
        whole = (padded_state(dKV), padded_state(KV), padded(z), padded(k), padded(v))
        dk, dv_out = summary_backward(*whole)
        return dk[..., :d].contiguous(), dv_out[..., :dv].contiguous()
    k, v = tiled(k, v)
    # Both terms see the same rounded dKV, so that they cancel where one key has all the weight.
    small = dKV.to(v.dtype).contiguous()
    means = (KV * small).sum(-1)
    dk, dv_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    if dk.numel() == 0:
        return dk, dv_out
    block, columns = (16, 16) if k.dtype == torch.float32 else (64, 64)
    blocks = -(-tokens // block)
    layout = _layout(block, k, v)
    launch(
        summary_gradient_kernel, batch * heads * blocks,
        k, *k.stride(), v, *v.stride(), small, z, means, dk, dv_out, tokens, blocks, heads,
        D=d, DV=dv, BD=tile_width(d), BV=min(columns, tile_width(dv)), C=block, **layout,
        num_warps=4 if d <= 128 else 8, num_stages=1,
    )  # fmt: skip
    return dk, dv_out


def _layout(block: int, *tensors: Tensor) -> dict[str, bool]:
    """Whether rows start at multiples of 16 numbers, and whether tiles span more than 32 bits."""
    aligned = all(stride % 16 == 0 for x in tensors for stride in x.stride()[:3])
    span = max(block * x.stride(2) + 256 * x.stride(3) for x in tensors)
    return {"ALIGNED": aligned, "WIDE": span >= 2**31}


def _summed(k: Tensor, v: Tensor, *, soft: bool) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, d = k.shape
    dv = v.shape[3]
    if batch * heads * tokens == 0:
        KV = torch.zeros(batch, heads, d, dv, device=k.device)
        return KV, torch.full((batch, heads, d), -torch.inf, device=k.device)
    if narrow(k, v):
        KV, z = _summed(padded(k), padded(v), soft=soft)
        return KV[:, :, :d, :dv].contiguous(), z[:, :, :d].contiguous()
    k, v = tiled(k, v)
    exact = k.dtype == torch.float32
    block, items = (16, 2048) if exact else (64, 16384)
    rows = tile_width(d)
    tile = max(16, min(128, tile_width(dv), items // rows))
    tiles = -(-dv // tile)
    processors, hopper = device_of(k)
    many = max(1, 2 * processors // (batch * heads * tiles))
    length = -(-max(-(-tokens // many), 256) // block) * block
    segments = -(-tokens // length)
    sums = torch.empty(batch, heads, segments, d, dv, device=k.device)
    tops, totals = torch.empty(2, batch, heads, segments, d, device=k.device).unbind()
    KV = torch.empty(batch, heads, d, dv, device=k.device)
    z = torch.empty(batch, heads, d, device=k.device)
    launch(
        summary_kernel, batch * heads * segments * tiles,
        k, *k.stride(), v, *v.stride(), sums, tops, totals, tokens, length, segments, heads,
        D=d, DV=dv, BD=rows, BV=tile, C=block, WAYS=WAYS, SOFT=soft, MARGIN=MARGIN[k.dtype],
        **_layout(block, k, v), num_warps=8,
        num_stages=1 if exact else 3 if hopper else 2,
    )  # fmt: skip
    channels = min(16, rows)
    launch(
        join_summaries_kernel, batch * heads * -(-d // channels),
        sums, tops, totals, KV, z, segments,
        D=d, DV=dv, BD=channels, BV=tile_width(dv), SOFT=soft, num_warps=4,
    )  # fmt: skip
    return KV, z
