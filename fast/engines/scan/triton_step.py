"""Triton kernel of one decoding step: decay the state, write one token, read it."""

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.fast.engines.scan.triton_common import CONSTANT, NONE, VECTOR


@triton.jit
def step_kernel(
    state, s_b, s_h, s_d, s_e, q, q_b, q_h, q_d, k, k_b, k_h, k_d, v, v_b, v_h, v_d,
    gates, g_b, g_h, g_d, out, new, scale, heads, group,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    """new = e^g state + k v^T and out = scale new^T q for one head and BV value channels."""
    tiles: tl.constexpr = (DV + BV - 1) // BV
    program = tl.program_id(0)
    tile = program % tiles
    head = ((program // tiles) % heads).to(tl.int64)
    batch = ((program // tiles) // heads).to(tl.int64)
    rows, columns = tl.arange(0, BD), tile * BV + tl.arange(0, BV)
    down, across = rows[:, None], columns[None, :]
    inside = (down < D) & (across < DV)
    base = state + batch * s_b + head * s_h
    S = tl.load(base + down * s_d + across * s_e, mask=inside, other=0.0)
    Q = tl.load(q + batch * q_b + head * q_h + rows * q_d, mask=rows < D, other=0.0)
    K = tl.load(k + batch * k_b + (head // group) * k_h + rows * k_d, mask=rows < D, other=0.0)
    V = tl.load(
        v + batch * v_b + (head // group) * v_h + columns * v_d, mask=columns < DV, other=0.0
    )
    if DECAY == CONSTANT:
        S *= tl.exp(-tl.load(gates + head))
    elif DECAY == VECTOR:
        g = tl.load(gates + batch * g_b + head * g_h + rows * g_d, mask=rows < D, other=0.0)
        S *= tl.exp(g.to(tl.float32))[:, None]
    elif DECAY != NONE:
        S *= tl.exp(tl.load(gates + batch * g_b + head * g_h).to(tl.float32))
    S += K.to(tl.float32)[:, None] * V.to(tl.float32)[None, :]
    row = batch * heads + head
    Y = tl.sum(S * Q.to(tl.float32)[:, None], 0) * scale
    tl.store(out + row * DV + columns, Y.to(out.dtype.element_ty), mask=columns < DV)
    tl.store(new + row * D * DV + down * DV + across, S, mask=inside)
