"""The gradient of the memory that is read before it is written by that of the scan, which writes
before it reads: for states that no program holds as a whole.

Token t reads what the scan leaves at t - 1: unit queries go in one token on, as a view, and their
gradient comes out one token late. The first token, which asks the state that came in, and the last
one's write are for `ends_gradient_kernel`; `units_backward` puts rows back in their places. Packed
sequences go in one token longer each, which needs neither.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnspec.fast.engines.prepared import launch
from attnspec.fast.engines.scan import triton_host
from attnspec.fast.engines.scan.triton_trace_rows import bits_lost, floored, real_rows
from attnspec.fast.engines.scan.triton_units import rows_of, units, units_backward
from attnspec.fast.engines.sizes import tile_width

PART = 32
"""Rows or columns of a state that a program of `ends_gradient_kernel` owns at most."""
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
    real = real_rows(valid, valid_t, end, 0, tokens, VALID)
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
        asks = real_rows(valid, valid_t, tl.full((), 0, tl.int64), 0, tokens, VALID)
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


def backward(
    dy: Tensor, dlast: Tensor, q: Tensor, k: Tensor, v: Tensor, rho: Tensor, S0: Tensor | None,
    valid: Tensor | None, eta: float, lam: float, scale: float, block: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k, v, rho and the initial state; dlast, rho and S0 are contiguous."""
    batch, heads, tokens, d = q.shape
    kv_heads, dv = k.shape[1], v.shape[3]
    group = heads // kv_heads
    longer = tokens > 1
    behind = torch.zeros(batch, heads if longer else kv_heads, d, dv, device=q.device)
    first = torch.empty(batch, heads if S0 is not None else 0, d, device=q.device)
    end_k = torch.empty(batch, kv_heads, d, device=q.device)
    end_v = torch.empty(batch, kv_heads, 1, dv, dtype=v.dtype, device=q.device)
    dS0 = torch.empty_like(dlast)
    BD = min(PART, tile_width(d), ITEMS // tile_width(dv))
    launch(
        ends_gradient_kernel, batch * kv_heads * -(-d // BD),
        q, *_row(q), k, *k.stride(), v, *v.stride(), dy, *_row(dy), *rows_of(valid, q), rho,
        dlast if S0 is None else S0, dlast, behind, first, end_k, end_v, dS0, tokens, heads,
        kv_heads, group if longer else 1, eta, lam, scale,
        D=d, DV=dv, FULL=tile_width(d), BD=BD, BV=tile_width(dv), VALID=valid is not None,
        STARTED=S0 is not None, num_warps=4,
    )  # fmt: skip
    dqh = dgated = None
    if longer:
        state = None if S0 is None else S0.repeat_interleave(group, 1)
        log_decay = _log_decay(lam, rho, heads, valid)
        qh, gated = units(q, valid, None, 1.0), units(k, valid, rho, eta)
        dqh, dgated, dv_inner, _, _, _, behind = triton_host.backward(
            dy[:, :, 1:], behind, qh[:, :, 1:], gated[:, :, :-1], v[:, :, :-1], None, log_decay,
            None, None, state, None, behind, scale, block, False, bits=True,
        )  # fmt: skip
        end_v = torch.cat([dv_inner, end_v], 2)
    if S0 is not None:
        dS0 += behind.unflatten(1, (kv_heads, -1)).sum(2)
    edge = None if S0 is None else first
    dq, _ = units_backward(q, valid, None, 1.0, dqh, edge, 1)
    dk, drho = units_backward(k, valid, rho, eta, dgated, end_k, 0)
    return dq, dk, end_v, drho, dS0


def packed_backward(
    dy: Tensor, dlast: Tensor, q: Tensor, k: Tensor, v: Tensor, rho: Tensor, S0: Tensor | None,
    offsets: Tensor, eta: float, lam: float, scale: float, block: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The same of sequences laid end to end in a batch of one.

    A sequence of n tokens has n + 1 places: token t reads at place t and is written at t + 1.
    """
    _, heads, tokens, _ = q.shape
    kv_heads = k.shape[1]
    offsets = offsets.to(torch.int64)
    sequences = len(offsets) - 1
    place = torch.arange(tokens, device=q.device)
    before = torch.searchsorted(offsets[1:].contiguous(), place, right=True)
    reads = place + before.clamp(max=sequences - 1)

    def spread(rows: Tensor, at: Tensor) -> Tensor:
        made = rows.new_zeros(1, rows.shape[1], tokens + sequences, rows.shape[3])
        return made.index_copy_(2, at, rows)

    Q, dY = spread(units(q, None, None, 1.0), reads), spread(dy, reads)
    K, V = spread(units(k, None, rho, eta), reads + 1), spread(v, reads + 1)
    decay = None
    if lam != 1:
        steps = rho.new_full((1, 1, tokens, 1), -bits_lost(lam))
        decay = spread(steps, reads + 1)[..., 0].expand(-1, heads, -1)
    group = heads // kv_heads
    state = None if S0 is None else S0.repeat_interleave(group, 1)
    behind = dlast.new_zeros(sequences, heads, *dlast.shape[2:])
    behind[:, ::group] = dlast
    dQ, dK, dV, _, _, _, first = triton_host.backward(
        dY, behind, Q, K, V, None, decay, None, None, state,
        offsets + torch.arange(sequences + 1, device=q.device), behind, scale, block, False,
        bits=True,
    )  # fmt: skip
    dq, _ = units_backward(q, None, None, 1.0, dQ.index_select(2, reads), None, 0)
    dk, drho = units_backward(k, None, rho, eta, dK.index_select(2, reads + 1), None, 0)
    dS0 = first.unflatten(1, (kv_heads, group)).sum(2)
    return dq, dk, dV.index_select(2, reads + 1), drho, dS0


def _row(x: Tensor) -> tuple[int, int, int]:
    """The strides of the first token's row."""
    return x.stride(0), x.stride(1), x.stride(3)


def _log_decay(lam: float, like: Tensor, heads: int, valid: Tensor | None) -> Tensor | None:
    """Logarithms of decays to base 2 (batch, heads, tokens - 1), of all tokens but the last: their
    sums are exact for lam = 1/2.
    """
    if lam == 1:
        return None
    step = like.new_full((), -bits_lost(lam))
    if valid is None:
        return step.expand(like.shape[0], heads, like.shape[2] - 1)
    return torch.where(valid, step, 0.0)[:, None, :-1].expand(-1, heads, -1)
