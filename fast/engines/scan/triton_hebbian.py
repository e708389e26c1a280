"""The memory that is read before it is written, around the scan, which writes before it reads.

So token t reads what the scan leaves at t - 1: queries go in one token on, as a view, and come out
one token late. The first token asks the state that came in, and the last one's write is added
behind: `ends_kernel`. `combine_kernel` puts rows back in their places while it adds them. What a
query reads is linear in it: unless a gradient or a narrow range of numbers asks for unit queries,
they go in as they are, and what comes out is divided.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnspec.fast.engines.prepared import launch
from attnspec.fast.engines.scan import triton_host
from attnspec.fast.engines.scan.hebbian import constant_decay
from attnspec.fast.engines.scan.triton_plan import power
from attnspec.fast.engines.scan.triton_trace import aligned, floored, real_rows
from attnspec.fast.engines.scan.triton_units import (
    load_rows,
    programs,
    rows_of,
    tile,
    tile_of,
    units,
    units_backward,
)

PART = 32
"""Rows or columns of a state that a program of `ends_kernel` or its gradient owns at most."""
ITEMS = 4096
"""Numbers of a state in a program of the gradient."""


@triton.jit
def load_row(x, x_d, real, d, BD: tl.constexpr):
    """A token's channels (BD,) in float32, zeros if it is not real."""
    channels = tl.arange(0, BD)
    at = x + channels.to(tl.int64) * x_d
    return tl.load(at, mask=channels < tl.where(real, d, 0), other=0.0).to(tl.float32)


@triton.jit
def inverse_norm(x):
    """Of a row."""
    return 1.0 / floored(tl.sqrt(tl.sum(x * x, 0)))


@triton.jit(
    do_not_specialize=[
        "q_b", "q_h", "k_b", "k_h", "k_t", "v_b", "v_h", "v_t", "valid_b", "valid_t", "tokens",
        "heads", "kv_heads", "apart", "eta", "lam", "scale",
    ]
)  # fmt: skip
def ends_kernel(
    q, q_b, q_h, q_d, k, k_b, k_h, k_t, k_d, v, v_b, v_h, v_t, v_d, valid, valid_b, valid_t, rho,
    behind, initial, first, last, tokens, heads, kv_heads, apart, eta, lam, scale,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, VALID: tl.constexpr,
    WRITTEN: tl.constexpr, STARTED: tl.constexpr,
):  # fmt: skip
    """`last` (batch, kv_heads, D, DV) from the state `behind` the last token but one, of which
    there are `apart` for each kv head, and what the first token of every head reads, `first`
    (batch, heads, DV).
    """
    tiles: tl.constexpr = (DV + BV - 1) // BV
    line = (tl.program_id(0) // tiles).to(tl.int64)
    batch, kv_head = line // kv_heads, line % kv_heads
    channels = tl.arange(0, BD)
    values = tl.program_id(0) % tiles * BV + tl.arange(0, BV)
    places = channels[:, None] * DV + values[None, :]
    inside = (channels < D)[:, None] & (values < DV)[None, :]
    valid += batch * valid_b
    end = tl.cast(tokens, tl.int64) - 1
    real = real_rows(valid, valid_t, end, tokens, VALID)
    S = tl.zeros((BD, BV), tl.float32)
    if WRITTEN:
        S = tl.load(behind + line * apart * D * DV + places, mask=inside, other=0.0)
    K = load_row(k + batch * k_b + kv_head * k_h + end * k_t, k_d, real, D, BD)
    at = v + batch * v_b + kv_head * v_h + end * v_t + values.to(tl.int64) * v_d
    X = tl.load(at, mask=values < tl.where(real, DV, 0), other=0.0).to(tl.float32)
    gate = eta * tl.load(rho + line * tokens + end, mask=real, other=0.0)
    K *= gate * inverse_norm(K)
    S = tl.where(real, lam * S + K[:, None] * X[None, :], S)
    tl.store(last + line * D * DV + places, S, mask=inside)
    if STARTED:
        S = tl.load(initial + line * D * DV + places, mask=inside, other=0.0)
        asks = real_rows(valid, valid_t, tl.full((), 0, tl.int64), tokens, VALID)
        group = heads // kv_heads
        for n in range(group):
            head = kv_head * group + n
            Q = load_row(q + batch * q_b + head * q_h, q_d, asks, D, BD)
            Y = tl.sum((Q * inverse_norm(Q) * scale)[:, None] * S, 0)
            tl.store(first + (batch * heads + head) * DV + values, Y, mask=values < DV)


@triton.jit(
    do_not_specialize=[
        "q_b", "q_h", "k_b", "k_h", "k_t", "v_b", "v_h", "v_t", "dy_b", "dy_h", "valid_b",
        "valid_t", "tokens", "heads", "kv_heads", "apart", "eta", "lam", "scale",
    ]
)  # fmt: skip
def ends_gradient_kernel(
    q, q_b, q_h, q_d, k, k_b, k_h, k_t, k_d, v, v_b, v_h, v_t, v_d, dy, dy_b, dy_h, dy_d, valid,
    valid_b, valid_t, rho, initial, dlast, dbehind, dq, dk, dv, dinitial, tokens, heads, kv_heads,
    apart, eta, lam, scale,
    D: tl.constexpr, DV: tl.constexpr, FULL: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    VALID: tl.constexpr, STARTED: tl.constexpr,
):  # fmt: skip
    """The gradients of the state `behind`, of the first unit queries (batch, heads, D), of the last
    gated unit keys (batch, kv_heads, D), of the last values (batch, kv_heads, DV) and, if STARTED,
    of the initial state by the first queries. A program owns BD channels of keys.
    """
    parts: tl.constexpr = (D + BD - 1) // BD
    line = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    batch, kv_head = line // kv_heads, line % kv_heads
    channels = part * BD + tl.arange(0, BD)
    values = tl.arange(0, BV)
    within = values < DV
    places = channels[:, None] * DV + values[None, :]
    inside = (channels < D)[:, None] & within[None, :]
    valid += batch * valid_b
    end = tl.cast(tokens, tl.int64) - 1
    real = real_rows(valid, valid_t, end, tokens, VALID)
    dlast += line * D * DV
    dS = tl.load(dlast + places, mask=inside, other=0.0)
    kept = dS * tl.where(real, lam, 1.0)
    tl.store(dbehind + line * apart * D * DV + places, kept, mask=inside)
    X = load_row(v + batch * v_b + kv_head * v_h + end * v_t, v_d, real, DV, BV)
    learned = tl.where(real, tl.sum(dS * X[None, :], 1), 0.0)
    tl.store(dk + line * D + channels, learned, mask=channels < D)
    if part == 0:
        k += batch * k_b + kv_head * k_h + end * k_t
        gate = eta * tl.load(rho + line * tokens + end, mask=real, other=0.0)
        gate *= inverse_norm(load_row(k, k_d, real, D, FULL))
        dX = tl.zeros((BV,), tl.float32)
        for n in range(parts):
            some = n * BD + tl.arange(0, BD)
            wanted = some < tl.where(real, D, 0)
            K = tl.load(k + some.to(tl.int64) * k_d, mask=wanted, other=0.0).to(tl.float32)
            at = dlast + some[:, None] * DV + values[None, :]
            rows = tl.load(at, mask=wanted[:, None] & within[None, :], other=0.0)
            dX += tl.sum(rows * (K * gate)[:, None], 0)
        tl.store(dv + line * DV + values, dX.to(dv.dtype.element_ty), mask=within)
    if STARTED:
        S = tl.load(initial + line * D * DV + places, mask=inside, other=0.0)
        asks = real_rows(valid, valid_t, tl.full((), 0, tl.int64), tokens, VALID)
        dS = tl.zeros((BD, BV), tl.float32)
        group = heads // kv_heads
        for m in range(group):
            head = kv_head * group + m
            dY = load_row(dy + batch * dy_b + head * dy_h, dy_d, asks, DV, BV) * scale
            asked = q + batch * q_b + head * q_h
            inverse = inverse_norm(load_row(asked, q_d, asks, D, FULL))
            at = asked + channels.to(tl.int64) * q_d
            Q = (
                tl.load(at, mask=channels < tl.where(asks, D, 0), other=0.0).to(tl.float32)
                * inverse
            )
            dQ = tl.sum(S * dY[None, :], 1)
            tl.store(dq + (batch * heads + head) * D + channels, dQ, mask=channels < D)
            dS += Q[:, None] * dY[None, :]
        tl.store(dinitial + line * D * DV + places, dS, mask=inside)


@triton.jit(
    do_not_specialize=["q_b", "q_h", "onto_b", "onto_h", "valid_b", "valid_t", "tokens", "heads"]
)
def combine_kernel(
    rest, first, q, q_b, q_h, q_t, q_d, onto, onto_b, onto_h, onto_t, onto_d, valid, valid_b,
    valid_t, out, tokens, heads, d_q, d, R: tl.constexpr, BQ: tl.constexpr, BD: tl.constexpr,
    VALID: tl.constexpr, STARTED: tl.constexpr, DIVIDED: tl.constexpr, ADDED: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """out (lines, tokens, d): `first` (lines, d) and, behind it, `rest` (lines, tokens - 1, d), if
    DIVIDED by the norms of q, and what they are added to; 0 at padding.
    """
    line, batch, t, valid = tile_of(tokens, heads, valid, valid_b, R)
    real = real_rows(valid, valid_t, t, tokens, VALID)
    channels = tl.arange(0, BD)
    inside = channels < d
    known = real & (t > 0)
    at = rest + (line * (tokens - 1) + t[:, None] - 1) * d + channels[None, :]
    Y = tl.load(at, mask=known[:, None] & inside[None, :], other=0.0).to(tl.float32)
    if DIVIDED:
        Q = load_rows(q, q_b, q_h, q_t, q_d, batch, line % heads, t, real, d_q, BQ, ALIGNED)
        Y *= (1.0 / floored(tl.sqrt(tl.sum(Q * Q, 1))))[:, None]
    if STARTED:
        F = tl.load(first + line * d + channels, mask=inside, other=0.0)
        Y = tl.where((real & (t == 0))[:, None], F[None, :], Y)
    if ADDED:
        Y += load_rows(
            onto, onto_b, onto_h, onto_t, onto_d, batch, line % heads, t, real, d, BD, ALIGNED
        )
    at = out + (line * tokens + t[:, None]) * d + channels[None, :]
    mask = (t < tokens)[:, None] & inside[None, :]
    tl.store(at, Y.to(out.dtype.element_ty), mask=mask)


def forward(
    q: Tensor, k: Tensor, v: Tensor, rho: Tensor, S0: Tensor | None, valid: Tensor | None,
    onto: Tensor | None, eta: float, lam: float, scale: float, block: int, trained: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """m, added to `onto`, the last state, unit queries, if `trained`, and gated unit keys."""
    batch, heads, tokens, d = q.shape
    kv_heads, dv = k.shape[1], v.shape[3]
    out = torch.empty(batch, heads, tokens, dv, dtype=q.dtype, device=q.device)
    shape = (batch, kv_heads, d, dv)
    S0 = None if S0 is None else S0.contiguous()
    rho = rho.contiguous()
    if not batch * tokens:
        last = torch.zeros(shape, device=q.device) if S0 is None else S0.clone()
        return out, last, q.new_empty(q.shape), k.new_empty(k.shape)
    behind: Tensor | None
    divided = tokens > 1 and not trained and q.dtype != torch.float16
    if tokens > 1:
        qh = q if divided else units(q, valid, None, 1.0)
        gated = units(k, valid, rho, eta)
        state = None if S0 is None else S0.repeat_interleave(heads // kv_heads, 1)
        slopes, log_decay = _decay(lam, rho, heads, valid)
        rest, behind = triton_host.forward(
            qh[:, :, 1:], gated[:, :, :-1], v[:, :, :-1], slopes, log_decay, None, None, state,
            None, scale, block,
        )  # fmt: skip
    else:
        qh, gated = q.new_empty(q.shape), k.new_empty(k.shape)
        rest, behind = out, S0
    last = torch.empty(shape, device=q.device)
    first = torch.empty(batch, heads if S0 is not None else 0, dv, device=q.device)
    BV = min(PART, power(dv))
    launch(
        ends_kernel, batch * kv_heads * -(-dv // BV),
        q, *_row(q), k, *k.stride(), v, *v.stride(), *rows_of(valid, q), rho,
        last if behind is None else behind, last if S0 is None else S0, first, last, tokens, heads,
        kv_heads, heads // kv_heads if tokens > 1 else 1, eta, lam, scale,
        D=d, DV=dv, BD=power(d), BV=BV, VALID=valid is not None, WRITTEN=behind is not None,
        STARTED=S0 is not None, num_warps=4,
    )  # fmt: skip
    added = out if onto is None else onto
    launch(
        combine_kernel, programs(batch * heads, tokens, max(d, dv)),
        rest, first, q, *q.stride(), added, *added.stride(), *rows_of(valid, q), out, tokens, heads,
        d, dv, R=tile(max(d, dv))["R"], BQ=power(d), BD=power(dv), VALID=valid is not None,
        STARTED=S0 is not None, DIVIDED=divided, ADDED=onto is not None,
        ALIGNED=aligned(q) and aligned(added), num_warps=4,
    )  # fmt: skip
    return out, last, qh, gated


def backward(
    dy: Tensor, dlast: Tensor, q: Tensor, k: Tensor, v: Tensor, rho: Tensor, S0: Tensor | None,
    valid: Tensor | None, qh: Tensor, gated: Tensor, eta: float, lam: float, scale: float,
    block: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k, v, rho and the initial state."""
    batch, heads, tokens, d = q.shape
    kv_heads, dv = k.shape[1], v.shape[3]
    group = heads // kv_heads
    dlast, rho = dlast.contiguous(), rho.contiguous()
    if not batch * tokens:
        made = (x.new_zeros(x.shape) for x in (q, k, v, rho))
        return *made, dlast.clone()  # type: ignore[return-value]
    longer = tokens > 1
    S0 = None if S0 is None else S0.contiguous()
    behind = torch.zeros(batch, heads if longer else kv_heads, d, dv, device=q.device)
    first = torch.empty(batch, heads if S0 is not None else 0, d, device=q.device)
    end_k = torch.empty(batch, kv_heads, d, device=q.device)
    end_v = torch.empty(batch, kv_heads, 1, dv, dtype=v.dtype, device=q.device)
    dS0 = torch.empty_like(dlast)
    BD = min(PART, power(d), ITEMS // power(dv))
    launch(
        ends_gradient_kernel, batch * kv_heads * -(-d // BD),
        q, *_row(q), k, *k.stride(), v, *v.stride(), dy, *_row(dy), *rows_of(valid, q), rho,
        dlast if S0 is None else S0, dlast, behind, first, end_k, end_v, dS0, tokens, heads,
        kv_heads, group if longer else 1, eta, lam, scale,
        D=d, DV=dv, FULL=power(d), BD=BD, BV=power(dv), VALID=valid is not None,
        STARTED=S0 is not None, num_warps=4,
    )  # fmt: skip
    dqh = dgated = None
    if longer:
        state = None if S0 is None else S0.repeat_interleave(group, 1)
        slopes, log_decay = _decay(lam, rho, heads, valid)
        dqh, dgated, dv_inner, _, _, _, behind = triton_host.backward(
            dy[:, :, 1:], behind, qh[:, :, 1:], gated[:, :, :-1], v[:, :, :-1], slopes, log_decay,
            None, None, state, None, behind, scale, block, False,
        )  # fmt: skip
        end_v = torch.cat([dv_inner, end_v], 2)
    if S0 is not None:
        dS0 += behind.unflatten(1, (kv_heads, -1)).sum(2)
    edge = None if S0 is None else first
    dq, _ = units_backward(q, valid, None, 1.0, dqh, edge, 1)
    dk, drho = units_backward(k, valid, rho, eta, dgated, end_k, 0)
    return dq, dk, end_v, drho, dS0


def _row(x: Tensor) -> tuple[int, int, int]:
    """The strides of the first token's row."""
    return x.stride(0), x.stride(1), x.stride(3)


def _decay(
    lam: float, like: Tensor, heads: int, valid: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Slopes and log decays of all tokens but the last."""
    slopes, steps = constant_decay(lam, like, heads, valid)
    return slopes, None if steps is None else steps[:, :, :-1]
