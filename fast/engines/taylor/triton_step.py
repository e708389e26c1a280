"""Triton kernel of one decoded token: the state is read once and written once."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def features_at(x, stride, scale, place, D: tl.constexpr):
    """Unpacked features of the vector at x for feature numbers `place`, whose shape they have."""
    pair = tl.maximum(place - 1 - D, 0)
    single = (place >= 1) & (place <= D)
    a = tl.where(single, place - 1, pair // D)
    used = (place >= 1) & (place < 1 + D + D * D)
    first = tl.load(x + a * stride, mask=used, other=0.0).to(tl.float32)
    second = tl.load(x + (pair % D) * stride, mask=used & (place > D), other=0.0).to(tl.float32)
    quadratic = first * second * (scale * 0.7071067811865476)
    value = tl.where(single, first * tl.sqrt(scale), quadratic)
    return tl.where(place == 0, 1.0, value)


@triton.jit
def step_kernel(
    S, s_b, s_h, s_f, s_v, zk, z_b, z_h, z_f, q, q_b, q_h, q_d, k, k_b, k_h, k_d, v, v_b, v_h, v_d,
    new_S, new_zk, out, scale, eps, kv_heads,
    D: tl.constexpr, DV: tl.constexpr, F: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr,
    GROUP: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """new_S = S + phi(k) v^T, new_zk = zk + phi(k), out = phi(q) new_S / (phi(q) new_zk + eps) for
    one kv head, its GROUP query heads and BV value channels.
    """
    tiles: tl.constexpr = (DV + BV - 1) // BV
    program = tl.program_id(0)
    columns = (program % tiles) * BV + tl.arange(0, BV)
    kv_head = ((program // tiles) % kv_heads).to(tl.int64)
    batch = ((program // tiles) // kv_heads).to(tl.int64)
    members = tl.arange(0, BG)
    heads = kv_head * GROUP + members
    wanted = columns < DV
    k += batch * k_b + kv_head * k_h
    V = tl.load(v + batch * v_b + kv_head * v_h + columns * v_d, mask=wanted, other=0.0)
    V = V.to(tl.float32)
    Q = q + batch * q_b + tl.where(members < GROUP, heads, kv_head * GROUP) * q_h
    S += batch * s_b + kv_head * s_h
    zk += batch * z_b + kv_head * z_h
    state = batch * kv_heads + kv_head
    num = tl.zeros((BG, BV), tl.float32)
    den = tl.zeros((BG,), tl.float32)
    for f0 in range(0, F, BF):
        f = f0 + tl.arange(0, BF)
        inside = f < F
        phi_k = features_at(k, k_d, scale, f, D)
        both = inside[:, None] & wanted[None, :]
        at = f[:, None] * s_f + columns[None, :] * s_v
        rows = tl.load(S + at, mask=both, other=0.0).to(tl.float32)
        sums = tl.load(zk + f * z_f, mask=inside, other=0.0).to(tl.float32)
        rows = tl.where(both, rows + phi_k[:, None] * V[None, :], 0.0)
        sums = tl.where(inside, sums + phi_k, 0.0)
        tl.store(new_S + state * F * DV + f[:, None] * DV + columns[None, :], rows, mask=both)
        if (program % tiles) == 0:
            tl.store(new_zk + state * F + f, sums, mask=inside)
        places = tl.broadcast_to(f[None, :], (BG, BF))
        phi_q = features_at(Q[:, None], q_d, scale, places, D)
        den += tl.sum(phi_q * sums[None, :], 1)
        num += tl.sum(phi_q[:, :, None] * rows[None, :, :], 1)
    o = tl.where(den[:, None] == 0, 0.0, num / (den + eps)[:, None])
    at = (batch * kv_heads * GROUP + heads)[:, None] * DV + columns[None, :]
    tl.store(
        out + at, o.to(out.dtype.element_ty), mask=(members < GROUP)[:, None] & wanted[None, :]
    )
