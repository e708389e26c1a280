"""The additive kernels in Triton.

A program holds a tile of scores in registers and walks along the channels: two vectors are loaded
and a tile of tanh is evaluated for each. For bfloat16 the hardware's tanh is used, whose relative
error (2^-11) is below the dtype's rounding; else a rational function right to float32 rounding.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnspec.fast.backend import interpreting
from attnspec.fast.engines.additive.configs import config
from attnspec.fast.engines.prepared import launch
from attnspec.fast.engines.sizes import cdiv, next_power_of_2

LENGTHS = ["steps", "slots", "step_tiles", "slot_tiles"]


@triton.jit
def _tanh(x, APPROXIMATE: tl.constexpr):
    if APPROXIMATE:
        y = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        # Beyond 9.02 tanh is 1 to float32 rounding; a NaN fails both comparisons and stays.
        x = tl.where(x > 9.02, 9.02, tl.where(x < -9.02, -9.02, x))
        z = x * x
        p = 1.331911527950787e-08 * z + 2.0583515509376204e-05
        p = (p * z + 0.0034940367726273365) * z + 0.1337971985063695
        r = 7.76203805407658e-07 * z + 0.00032830963646481254
        r = (r * z + 0.025871081760678306) * z + 0.4671303509484219
        y = x * (p * z + 1.0) / (r * z + 1.0)
    return y


@triton.jit
def _score_tile(
    k, q, v, step, slot, steps, slots, width, k_s, k_a, q_s, q_a, v_a,
    M: tl.constexpr, N: tl.constexpr, APPROXIMATE: tl.constexpr,
):  # fmt: skip
    score = tl.zeros([M, N], tl.float32)
    key = k + slot.to(tl.int64) * k_s
    query = q + step.to(tl.int64) * q_s
    for _ in range(width):
        x = tl.load(query, mask=step < steps, other=0.0).to(tl.float32)
        y = tl.load(key, mask=slot < slots, other=0.0).to(tl.float32)
        score += tl.load(v).to(tl.float32) * _tanh(x[:, None] + y[None, :], APPROXIMATE)
        query, key, v = query + q_a, key + k_a, v + v_a
    return score


@triton.jit(do_not_specialize=LENGTHS)
def _scores(
    k, q, v, out, k_b, k_s, k_a, q_b, q_s, q_a, v_a, steps, slots, step_tiles, slot_tiles, width,
    M: tl.constexpr, N: tl.constexpr, APPROXIMATE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    b = (program // slot_tiles // step_tiles).to(tl.int64)
    step = program // slot_tiles % step_tiles * M + tl.arange(0, M)
    slot = program % slot_tiles * N + tl.arange(0, N)
    score = _score_tile(
        k + b * k_b, q + b * q_b, v, step, slot, steps, slots, width, k_s, k_a, q_s, q_a, v_a,
        M, N, APPROXIMATE,
    )  # fmt: skip
    out += (b * steps + step[:, None]) * slots + slot[None, :]
    tl.store(out, score, mask=(step < steps)[:, None] & (slot < slots)[None, :])


@triton.jit(do_not_specialize=[*LENGTHS, "splits", "chunk"])
def _lse(
    k, q, v, target, mask, lse, at_target, k_b, k_s, k_a, q_b, q_s, q_a, v_a, t_b, t_s,
    m_b, m_s, m_n, steps, slots, step_tiles, splits, chunk, width,
    MASKED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, APPROXIMATE: tl.constexpr,
):  # fmt: skip
    """Each program: a tile of steps against one chunk of the slots."""
    program = tl.program_id(0)
    split, b = program % splits, (program // splits // step_tiles).to(tl.int64)
    step = program // splits % step_tiles * M + tl.arange(0, M)
    aim = tl.load(target + b * t_b + step * t_s, mask=step < steps, other=-1)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    hit = tl.zeros([M], tl.float32)
    for start in range(split * chunk, tl.minimum(slots, (split + 1) * chunk), N):
        slot = start + tl.arange(0, N)
        score = _score_tile(
            k + b * k_b, q + b * q_b, v, step, slot, steps, slots, width, k_s, k_a, q_s, q_a, v_a,
            M, N, APPROXIMATE,
        )  # fmt: skip
        seen = (step < steps)[:, None] & (slot < slots)[None, :]
        if MASKED:
            address = b * m_b + step[:, None].to(tl.int64) * m_s + slot[None, :] * m_n
            seen = seen & (tl.load(mask + address, mask=seen, other=0) != 0)
        score = tl.where(seen, score, float("-inf"))
        hit += tl.sum(tl.where(slot[None, :] == aim[:, None], score, 0.0), axis=1)
        best = tl.maximum(top, tl.max(score, axis=1))
        base = tl.where(best == float("-inf"), 0.0, best)
        total = total * tl.exp(top - base) + tl.sum(tl.exp(score - base[:, None]), axis=1)
        top = best
    safe = tl.where(total > 0, total, 1.0)
    place = (b * steps + step) * splits + split
    result = tl.where(total > 0, top + tl.log(safe), float("-inf"))
    tl.store(lse + place, result, mask=step < steps)
    tl.store(at_target + place, hit, mask=step < steps)


@triton.jit(do_not_specialize=LENGTHS)
def _score_gradients(
    dlse, dscore, lse, k, q, v, target, mask, out, dl_b, dl_s, ds_b, ds_s, k_b, k_s, k_a,
    q_b, q_s, q_a, v_a, t_b, t_s, m_b, m_s, m_n, steps, slots, step_tiles, slot_tiles, width,
    MASKED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, APPROXIMATE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    b = (program // slot_tiles // step_tiles).to(tl.int64)
    step = program // slot_tiles % step_tiles * M + tl.arange(0, M)
    slot = program % slot_tiles * N + tl.arange(0, N)
    score = _score_tile(
        k + b * k_b, q + b * q_b, v, step, slot, steps, slots, width, k_s, k_a, q_s, q_a, v_a,
        M, N, APPROXIMATE,
    )  # fmt: skip
    exists = step < steps
    aim = tl.load(target + b * t_b + step * t_s, mask=exists, other=-1)
    of_lse = tl.load(dlse + b * dl_b + step * dl_s, mask=exists, other=0.0)
    of_score = tl.load(dscore + b * ds_b + step * ds_s, mask=exists, other=0.0)
    norm = tl.load(lse + b * steps + step, mask=exists, other=float("-inf"))
    real = exists[:, None] & (slot < slots)[None, :]
    seen = real & (norm > float("-inf"))[:, None]
    if MASKED:
        address = b * m_b + step[:, None].to(tl.int64) * m_s + slot[None, :] * m_n
        seen = seen & (tl.load(mask + address, mask=seen, other=0) != 0)
    weight = tl.where(seen, tl.exp(score - norm[:, None]), 0.0)
    chosen = seen & (slot[None, :] == aim[:, None])
    gradient = of_lse[:, None] * weight + tl.where(chosen, of_score[:, None], 0.0)
    out += (b * steps + step[:, None]) * slots + slot[None, :]
    tl.store(out, gradient, mask=real)


@triton.jit(do_not_specialize=LENGTHS)
def _gradients(
    dout, y, x, v, dx, dv, d_b, d_s, d_n, y_b, y_s, y_a, x_b, x_s, x_a, v_a,
    steps, slots, step_tiles, width,
    OF_V: tl.constexpr, M: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):  # fmt: skip
    """Gradients of C channels of x (steps); with the roles exchanged, of the slots."""
    tile, b = tl.program_id(0) % step_tiles, (tl.program_id(0) // step_tiles).to(tl.int64)
    first, lane = tl.program_id(1) * C, tl.arange(0, C)
    step = tile * M + tl.arange(0, M)
    x += b * x_b + step.to(tl.int64) * x_s
    total = tl.zeros([M, C], tl.float32)
    total_v = tl.zeros([C], tl.float32)
    for start in range(0, slots, N):
        slot = start + tl.arange(0, N)
        real = (step < steps)[:, None] & (slot < slots)[None, :]
        address = step[:, None].to(tl.int64) * d_s + slot[None, :].to(tl.int64) * d_n
        upstream = tl.load(dout + b * d_b + address, mask=real, other=0.0).to(tl.float32)
        other = y + b * y_b + slot.to(tl.int64) * y_s
        for c in tl.static_range(C):
            a = first + c
            near, distant = x + a.to(tl.int64) * x_a, other + a.to(tl.int64) * y_a
            own = tl.load(near, mask=step < tl.where(a < width, steps, 0), other=0.0)
            far = tl.load(distant, mask=slot < tl.where(a < width, slots, 0), other=0.0)
            hidden = _tanh(own.to(tl.float32)[:, None] + far.to(tl.float32)[None, :], APPROXIMATE)
            # An upstream of exactly 0 means that the pair is not read (K11).
            hidden = tl.where(upstream != 0, hidden, 0.0)
            slope = tl.sum(upstream * (1.0 - hidden * hidden), axis=1)
            total += tl.where((lane == c)[None, :], slope[:, None], 0.0)
            if OF_V:
                total_v += tl.where(lane == c, tl.sum(tl.sum(upstream * hidden, axis=1), axis=0), 0)
    channel = first + lane
    weight = tl.load(v + channel * v_a, mask=channel < width, other=0.0).to(tl.float32)
    place = (b * steps + step[:, None]) * width + channel[None, :]
    real = (step < steps)[:, None] & (channel < width)[None, :]
    tl.store(dx + place, (total * weight[None, :]).to(dx.dtype.element_ty), mask=real)
    if OF_V:
        tl.store(dv + (b * step_tiles + tile) * width + channel, total_v, mask=channel < width)


def _approximate(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and not interpreting()


def _tile(size: int, largest: int) -> int:
    return min(largest, max(4, next_power_of_2(size)))


def _mask_arguments(mask: Tensor | None, q: Tensor) -> tuple[Any, ...]:
    """The mask as bytes and its strides, or a placeholder that is never read."""
    return (q, 0, 0, 0) if mask is None else (mask.view(torch.uint8), *mask.stride())


def scores(k: Tensor, q: Tensor, v: Tensor) -> Tensor:
    (batch, slots, width), steps = k.shape, q.shape[1]
    out = torch.empty(batch, steps, slots, dtype=torch.float32, device=q.device)
    if not out.numel():
        return out
    M, N = _tile(steps, config().rows), _tile(slots, config().columns)
    tiles = cdiv(steps, M), cdiv(slots, N)
    launch(
        _scores, batch * tiles[0] * tiles[1],
        k, q, v, out, *k.stride(), *q.stride(), v.stride(0), steps, slots, *tiles, width,
        M=M, N=N, APPROXIMATE=_approximate(q), num_warps=config().num_warps,
    )  # fmt: skip
    return out


def lse(
    k: Tensor, q: Tensor, v: Tensor, target: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    (batch, slots, width), steps, plan = k.shape, q.shape[1], config()
    M, N = _tile(steps, plan.rows), _tile(slots, plan.columns)
    tiles = cdiv(steps, M)
    wanted = cdiv(plan.programs, max(1, batch * tiles))
    splits = max(1, min(wanted, cdiv(slots, N)))
    chunk = cdiv(cdiv(slots, splits), N) * N
    partial = torch.empty(2, batch, steps, splits, dtype=torch.float32, device=q.device)
    bytes_, *mask_strides = _mask_arguments(mask, q)
    if batch * steps:
        launch(
            _lse, batch * tiles * splits,
            k, q, v, target, bytes_, partial[0], partial[1], *k.stride(), *q.stride(),
            v.stride(0), *target.stride(), *mask_strides, steps, slots, tiles, splits, chunk,
            width, MASKED=mask is not None, M=M, N=N, APPROXIMATE=_approximate(q),
            num_warps=plan.num_warps,
        )  # fmt: skip
    return torch.logsumexp(partial[0], -1), partial[1].sum(-1)


def score_gradients(
    dlse: Tensor, dscore: Tensor, lse: Tensor, k: Tensor, q: Tensor, v: Tensor, target: Tensor,
    mask: Tensor | None,
) -> Tensor:  # fmt: skip
    (batch, slots, width), steps = k.shape, q.shape[1]
    out = torch.empty(batch, steps, slots, dtype=torch.float32, device=q.device)
    if not out.numel():
        return out
    M, N = _tile(steps, config().rows), _tile(slots, config().columns)
    tiles = cdiv(steps, M), cdiv(slots, N)
    bytes_, *mask_strides = _mask_arguments(mask, q)
    launch(
        _score_gradients, batch * tiles[0] * tiles[1],
        dlse, dscore, lse.contiguous(), k, q, v, target, bytes_, out, *dlse.stride(),
        *dscore.stride(), *k.stride(), *q.stride(), v.stride(0), *target.stride(), *mask_strides,
        steps, slots, *tiles, width, MASKED=mask is not None, M=M, N=N,
        APPROXIMATE=_approximate(q), num_warps=config().num_warps,
    )  # fmt: skip
    return out


def _run_gradients(
    dout: Tensor, y: Tensor, x: Tensor, v: Tensor, of_v: bool
) -> tuple[Tensor, Tensor]:
    (batch, steps, width), slots, plan = x.shape, y.shape[1], config()
    M, N = _tile(steps, plan.rows), _tile(slots, plan.columns)
    tiles = cdiv(steps, M)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dv = torch.empty(batch, tiles, width if of_v else 0, dtype=torch.float32, device=x.device)
    if dx.numel():
        launch(
            _gradients, (batch * tiles, cdiv(width, plan.channels)),
            dout, y, x, v, dx, dv, *dout.stride(), *y.stride(), *x.stride(), v.stride(0), steps,
            slots, tiles, width, OF_V=of_v, M=M, N=N, C=plan.channels,
            APPROXIMATE=_approximate(x), num_warps=plan.num_warps,
        )  # fmt: skip
    return dx, dv.sum((0, 1))


def gradients(dout: Tensor, k: Tensor, q: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dq, dv = _run_gradients(dout, k, q, v, of_v=True)
    dk, _ = _run_gradients(dout.transpose(1, 2), q, k, v, of_v=False)
    return dk, dq, dv.to(v.dtype)
