"""Weights inside a block under a decay per channel, for the Triton kernels.

The pair (i, j) weighs sum_c q_ic k_jc e^(G_ic - G_jc). One matrix product needs it split in two
factors, e^(G_i - m) and e^(m - G_j), of which one exceeds 1 unless m lies between the two rows.

A group of rows is gentle if no channel decays by more than e^-REACH over it. Then m is the middle
of the channel's range, no factor exceeds e^(REACH / 2), rounding a factor is a relative error that
its partner cannot magnify, and all pairs of the group are one product. A steep block is cut in
groups of 16 rows if they are gentle, else of one row, and groups are joined again level by level:
at level n, two groups of 2^n rows meet in a middle, and the pairs with i in the upper and j in the
lower one are a product of q e^x and k e^x, where x <= 0 is the sum of the log decays between a row
and the middle. The level of a pair is the highest bit in which i and j differ.

All these sums of log decays are products of a (C, C) matrix of weights and g (C, W). On a matrix
unit they cost less than scans across warps, and which groups a block needs, only a kernel knows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.fast.engines.scan.triton_common import LOG2E, LOWEST, load_tile

SOME = tl.constexpr(4)
"""The level of groups of 16 rows."""
FLAGS = tl.constexpr(128)
"""Most blocks that a program for steep blocks looks after."""


@triton.jit
def load_gates(
    base, stride_t, stride_d, left, width, C: tl.constexpr, W: tl.constexpr, RAGGED: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Log decays (C, W), zeros beyond `left` rows and `width` channels; NaN stays NaN."""
    g = load_tile(base, stride_t, stride_d, left, width, C, W, RAGGED, WIDE).to(tl.float32)
    return tl.maximum(g, LOWEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def top_bits(x):
    """float32 x with the lower half of its bits 0: bfloat16 holds that exactly, and float16 what is
    not too small to matter.
    """
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def sum_rows(weights, g, dtype: tl.constexpr):
    """weights (C, C) @ g (C, W) in units of log 2, exact but for its float32 sums: for a 16-bit
    dtype, g is cut in three parts that it holds.
    """
    g *= LOG2E
    if dtype == tl.float32:
        return tl.dot(weights, g, input_precision="ieee")
    else:
        weights = weights.to(dtype)
        high = top_bits(g)
        rest = g - high
        middle = top_bits(rest)
        sums = tl.dot(weights, high.to(dtype))
        sums = tl.dot(weights, middle.to(dtype), sums)
        return tl.dot(weights, (rest - middle).to(dtype), sums)


@triton.jit
def group_weights(level, C: tl.constexpr):
    """For `sum_rows`: sums from the first row of a group less half the group's total; 0 for a group
    of one row.
    """
    down, across = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    inside = ((down ^ across) >> level) == 0
    half = tl.where(level > 0, 0.5, 0.0)
    return tl.where(inside, tl.where(down >= across, half, -half), 0.0)


@triton.jit
def level_weights(level, C: tl.constexpr):
    """For `sum_rows`: sums between a row and the middle of its two groups of 2^level rows."""
    down, across = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    upper = ((down >> level) & 1) == 1
    inside = ((down ^ across) >> level) == 0
    return tl.where(inside & (upper == (down >= across)), 1.0, 0.0)


@triton.jit
def group_pairs(level, C: tl.constexpr):
    """Which pairs (C, C) lie in one group of 2^level rows."""
    down, across = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    return (down >= across) & (((down ^ across) >> level) == 0)


@triton.jit
def level_pairs(level, C: tl.constexpr):
    """Which pairs (C, C) have this level."""
    down, across = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    return (down > across) & (((down ^ across) >> level) == 1)


@triton.jit
def mend_gates(Q, g):
    """Log decays without NaN, which a sum of products would spread to earlier rows; NaN stands in
    Q (C, W) instead, from its row on.
    """
    unknown = g != g
    if tl.max(tl.max(unknown.to(tl.int32), 1), 0) == 1:
        behind = tl.cumsum(unknown.to(tl.int32), 0) > 0
        Q = tl.where(behind, float("nan"), Q)
        g = tl.where(unknown, LOWEST, g)
    return Q, g


@triton.jit
def fits(totals, REACH: tl.constexpr):
    """Whether all log decays (W,) are at least -REACH; not if one is NaN."""
    return tl.min((totals >= -REACH).to(tl.int32), 0) == 1


@triton.jit
def weigh_rows(Q, g, dtype: tl.constexpr, C: tl.constexpr, REACH: tl.constexpr):
    """Q and g (C, W) without NaN in g; the level of the largest gentle groups of rows; and in units
    of log 2 (C, W) the sums of `group_weights` there, those up to a row, and those behind it.
    """
    Q, g = mend_gates(Q, g)
    if REACH > 0:
        lowest: tl.constexpr = -0.5 * LOG2E * REACH
        near = sum_rows(group_weights(SOME, C), g, dtype)
        level = tl.where(tl.min(tl.min(near, 1), 0) >= lowest, SOME, 0)
        near = tl.where(level > 0, near, 0.0)
    else:
        level = tl.full((), 0, tl.int32)
        near = tl.zeros_like(g)
    # Not the total less what is until a row: where little is left, that difference is all error.
    down, across = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    until = sum_rows(tl.where(down >= across, 1.0, 0.0), g, dtype)
    behind = sum_rows(tl.where(down < across, 1.0, 0.0), g, dtype)
    return Q, g, level, near, until, behind


@triton.jit
def pick_steep(steep, span, many, REACH: tl.constexpr):
    """Which of a program's blocks (FLAGS,) are steep; all of them if REACH is 0. They lie as far
    apart as there are programs: steep blocks are often neighbours, and none is to have them all.
    """
    places = tl.arange(0, FLAGS)
    blocks = tl.program_id(0) + places * tl.num_programs(0)
    inside = (places < span) & (blocks < many)
    if REACH > 0:
        return tl.load(steep + blocks, mask=inside, other=0).to(tl.int32)
    else:
        return inside.to(tl.int32)
