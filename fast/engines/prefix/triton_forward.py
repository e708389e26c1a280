"""The prefix engine's forward kernel: num, den and the merge, in one pass over the rows."""

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.fast.engines.prefix.triton_parts import (
    add_product,
    features,
    load_matrix,
    load_rows,
    locate_rows,
    positive,
    split,
    store_rows,
    transposed,
)

PLACE = ["batch", "tokens", "span", "tiles", "each"]
LARGEST = tl.constexpr(87.72283905206835)
"""log of the largest float32, less 1."""


@triton.jit
def shares(lse, den, some):
    """What softmax's output and num are multiplied by in each row; `some`: num is not all 0."""
    held = (den != 0.0) | some
    top = tl.where(held & (lse < 0.0), 0.0, lse)
    top = tl.where(top == -float("inf"), 0.0, top)
    # Only a row without a prefix has top < 0. Kept finite there, the factor times 0 is 0.
    unit = tl.exp(tl.where(-top > LARGEST, LARGEST, -top))
    mass = tl.exp(lse - top)
    total = mass + unit * den
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    return mass / total, tl.where(empty, 0.0, unit) / total


@triton.jit(do_not_specialize=["q_b", "q_h", "q_t", *PLACE])
def prefix_forward_kernel(
    q, soft, lse, Z, k, out, share, part, q_b, q_h, q_t, batch, tokens, span, tiles, each,
    HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    INVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, KEEP: tl.constexpr, UNIT: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, MATH: tl.constexpr, Z_EXACT: tl.constexpr,
    PHI_EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Each program: `each` tiles of ROWS rows of a head.

    soft (batch, HEADS, tokens, DV), lse and out likewise, contiguous; Z (HEADS, D, DV), with what
    it lacks behind it unless it is exact; k (HEADS, D). KEEP: `share` and `part`, float32 like lse,
    are what the gradient needs.
    """
    head = tl.program_id(0) % HEADS
    first_tile = tl.program_id(0) // HEADS * each
    Z += head.to(tl.int64) * D * DV
    k += head * D
    # One chunk of Z is all of it, and stays.
    z = load_matrix(Z, 0, HEADS * D * DV, CHUNK, BDV, D, DV, DV, 1, MATH, Z_EXACT)
    for tile in range(first_tile, tl.minimum(first_tile + each, tiles)):
        b, t, exists = locate_rows(tile, span, batch, tokens, ROWS)
        at = (b * HEADS + head) * tokens + t
        q_at = b * q_b + tl.cast(head, tl.int64) * q_h + t * q_t
        log_mass = tl.load(lse + at, mask=exists, other=0.0)
        mixed = load_rows(soft, at * DV, exists, 0, BDV, DV, 1)
        num = tl.zeros([BDV, ROWS], tl.float32)
        den = tl.zeros([ROWS], tl.float32)
        for first in tl.static_range(0, BD, CHUNK):
            channel = first + tl.arange(0, CHUNK)
            kappa = positive(
                tl.load(k + channel, mask=channel < D, other=0.0).to(tl.float32), SOFTPLUS
            )
            kappa = tl.where(channel < D, kappa, 0.0)
            phi, _ = features(load_rows(q, q_at, exists, first, CHUNK, D, UNIT), INVERSE)
            den += tl.sum(phi * kappa[None, :], axis=1)
            phi_parts = transposed(split(phi, MATH, PHI_EXACT))
            if CHUNK < BD:
                z_chunk = load_matrix(
                    Z, first, HEADS * D * DV, CHUNK, BDV, D, DV, DV, 1, MATH, Z_EXACT
                )
                num = add_product(num, z_chunk, phi_parts, Z_EXACT, PHI_EXACT, PRECISION)
            else:
                num = add_product(num, z, phi_parts, Z_EXACT, PHI_EXACT, PRECISION)
        some = tl.max((num != 0.0).to(tl.int32), axis=0) > 0
        of_soft, of_num = shares(log_mass, den, some)
        merged = of_soft[:, None] * mixed.to(tl.float32) + of_num[:, None] * tl.trans(num)
        store_rows(out, at, exists, 0, merged, BDV, DV)
        if KEEP:
            tl.store(share + at, of_soft, mask=exists)
            tl.store(part + at, of_num, mask=exists)
