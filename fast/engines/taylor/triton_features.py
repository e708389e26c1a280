"""What the Triton kernels of the Taylor engine share: features in registers, tiles, weights.

With a 1 in front of the scaled channels, 1 + s + s^2/2 is a sum over pairs a <= b of the d + 1
entries, so all three orders are one kind of feature: x_a x_b times a factor. Feature number
b (b + 1) / 2 + a belongs to the pair (a, b), whose entries are picked out by a product with a
matrix of zeros and ones: exact, and done by the matrix units in the layout that the next product
needs. No feature is ever written to memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.fast.engines.scan.triton_common import locate


@triton.jit
def place(
    table, segment, segments, length, k_tokens, q_tokens, CAUSAL: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """Sequence and batch of a segment, its first query row and first key, and how many of each.

    Under a causal order a segment is a range of positions, and a row before the first query may be
    negative; otherwise it is a whole sequence.
    """
    if CAUSAL:
        sequence, batch, start, count, _, _ = locate(
            table, segment, segments, length, k_tokens, PACKED
        )
        q_start = start + q_tokens - k_tokens
        rows = count
        keys = count
    else:
        sequence = tl.cast(segment, tl.int64)
        batch = sequence
        start = sequence * 0
        q_start = start
        rows = tl.cast(q_tokens, tl.int32)
        keys = tl.cast(k_tokens, tl.int32)
    return sequence, batch, q_start, start, rows, keys


@triton.jit
def load_rows(
    base, row, inside, stride_t, stride_d, width, W: tl.constexpr, RAGGED: tl.constexpr,
    MATH: tl.constexpr,
):  # fmt: skip
    """Rows of a tensor as MATH, (rows, W), zeros beyond `width` channels and where not `inside`."""
    channels = tl.arange(0, W)
    at = row.to(tl.int64)[:, None] * stride_t + channels[None, :] * stride_d
    mask = inside[:, None]
    if RAGGED:
        mask = mask & (channels < width)[None, :]
    return tl.load(base + at, mask=mask, other=0.0).to(MATH)


@triton.jit
def store_rows(base, row, inside, stride_t, x, width, W: tl.constexpr, RAGGED: tl.constexpr):
    """Store x (rows, W) where `inside`, its first `width` channels."""
    channels = tl.arange(0, W)
    at = row.to(tl.int64)[:, None] * stride_t + channels[None, :]
    mask = inside[:, None]
    if RAGGED:
        mask = mask & (channels < width)[None, :]
    tl.store(base + at, x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def pair_of(feature):
    """The pair a <= b of a feature number."""
    b = ((tl.sqrt(8.0 * feature.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    b = tl.where((b + 1) * (b + 2) // 2 <= feature, b + 1, b)
    b = tl.where(b * (b + 1) // 2 > feature, b - 1, b)
    return feature - b * (b + 1) // 2, b


@triton.jit
def choose(first, scale, D: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, MATH: tl.constexpr):
    """What makes features first .. first + BF - 1: matrices (BD, BF) that pick their two channels,
    where the leading 1 is meant instead, and their factors, 0 beyond the last feature.
    """
    a, b = pair_of(first + tl.arange(0, BF))
    channel = tl.arange(0, BD)[:, None] + 1
    pick_a = (channel == a[None, :]).to(tl.float32).to(MATH)
    pick_b = (channel == b[None, :]).to(tl.float32).to(MATH)
    one_a = (a == 0).to(tl.float32)
    one_b = (b == 0).to(tl.float32)
    factor = tl.where(a == b, scale * 0.7071067811865476, scale)
    factor = tl.where(a == 0, tl.sqrt(scale), factor)
    factor = tl.where(b == 0, 1.0, factor)
    factor = tl.where(b <= D, factor, 0.0)
    return pick_a, pick_b, one_a, one_b, factor


@triton.jit
def pick(x, matrix, ones, PREC: tl.constexpr):
    """One entry (rows, BF) of each feature's pair, float32 and exact."""
    return tl.dot(x, matrix, input_precision=PREC) + ones[None, :]


@triton.jit
def load_state(
    base, first, column, F: tl.constexpr, DV: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr
):
    """Rows (BF, BV) of a state's S, zeros beyond, and entries (BF,) of its zk; float32."""
    features = first + tl.arange(0, BF)
    columns = column + tl.arange(0, BV)
    inside = features < F
    S = tl.load(
        base + features[:, None] * DV + columns[None, :],
        mask=inside[:, None] & (columns < DV)[None, :],
        other=0.0,
    )
    return S, tl.load(base + F * DV + features, mask=inside, other=0.0)


@triton.jit
def precise_dot(x, S, total, MATH: tl.constexpr, PREC: tl.constexpr, SPLIT: tl.constexpr):
    """total + x S with S in float32: in 16 bits it is split in two, so that it is not rounded."""
    high = S.to(MATH)
    total = tl.dot(x, high, total, input_precision=PREC)
    if SPLIT:
        total = tl.dot(x, (S - high.to(tl.float32)).to(MATH), total, input_precision=PREC)
    return total


@triton.jit
def spread_gradient(
    total, dphi, x_a, x_b, pick_a, pick_b, factor, MATH: tl.constexpr, PREC: tl.constexpr
):
    """total (rows, BD) and the gradient of x from that of BF features."""
    weighted = dphi * factor[None, :]
    total = tl.dot((weighted * x_b).to(MATH), tl.trans(pick_a), total, input_precision=PREC)
    return tl.dot((weighted * x_a).to(MATH), tl.trans(pick_b), total, input_precision=PREC)
