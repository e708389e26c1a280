"""The prefix engine's backward kernels: by rows, sums over rows, and the sums of those.

With `share` and `part` of the forward pass, out = share * soft + part * num; G is dout, W = G Z^T.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.fast.engines.prefix.triton_forward import PLACE
from attnspec.fast.engines.prefix.triton_parts import (
    add_product,
    features,
    load_matrix,
    load_rows,
    locate_rows,
    positive,
    positive_slope,
    split,
    store_rows,
    transposed,
)

VARYING = ["q_b", "q_h", "q_t", "g_b", "g_h", "g_t", *PLACE]


@triton.jit(do_not_specialize=VARYING)
def prefix_rows_kernel(
    dout, q, soft, Z, k, share, part, dq, dsoft, dlse, dden, q_b, q_h, q_t, g_b, g_h, g_t,
    batch, tokens, span, tiles, each,
    HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    INVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr,
    CHUNK: tl.constexpr, MATH: tl.constexpr, Z_EXACT: tl.constexpr, G_EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dsoft, dlse, the prefix's share of dq, and dden, for `each` tiles of ROWS rows of a head.

    num need not be formed again: G . num is phi(q) . W, and dq needs W anyhow.
    """
    head = tl.program_id(0) % HEADS
    first_tile = tl.program_id(0) // HEADS * each
    Z += head.to(tl.int64) * D * DV
    channel = tl.arange(0, BD)
    kappa = tl.load(k + head * D + channel, mask=channel < D, other=0.0).to(tl.float32)
    kappa = tl.where(channel < D, positive(kappa, SOFTPLUS), 0.0)
    z = load_matrix(Z, 0, HEADS * D * DV, CHUNK, BD, DV, D, 1, DV, MATH, Z_EXACT)
    for tile in range(first_tile, tl.minimum(first_tile + each, tiles)):
        b, t, exists = locate_rows(tile, span, batch, tokens, ROWS)
        at = (b * HEADS + head) * tokens + t
        wide_head = tl.cast(head, tl.int64)
        q_at = b * q_b + wide_head * q_h + t * q_t
        g_at = b * g_b + wide_head * g_h + t * g_t
        of_soft = tl.load(share + at, mask=exists, other=0.0)
        of_num = tl.load(part + at, mask=exists, other=0.0)
        x = load_rows(q, q_at, exists, 0, BD, D, UNIT)
        W = tl.zeros([BD, ROWS], tl.float32)
        with_soft = tl.zeros([ROWS], tl.float32)
        for first in tl.static_range(0, BDV, CHUNK):
            g = load_rows(dout, g_at, exists, first, CHUNK, DV, UNIT)
            mixed = load_rows(soft, at * DV, exists, first, CHUNK, DV, 1)
            wide = g.to(tl.float32)
            with_soft += tl.sum(wide * mixed.to(tl.float32), axis=1)
            store_rows(dsoft, at, exists, first, of_soft[:, None] * wide, CHUNK, DV)
            g_parts = transposed(split(g, MATH, G_EXACT))
            if CHUNK < BDV:
                z_chunk = load_matrix(
                    Z, first, HEADS * D * DV, CHUNK, BD, DV, D, 1, DV, MATH, Z_EXACT
                )
                W = add_product(W, z_chunk, g_parts, Z_EXACT, G_EXACT, PRECISION)
            else:
                W = add_product(W, z, g_parts, Z_EXACT, G_EXACT, PRECISION)
        dfeatures = tl.trans(W)
        phi, slope = features(x, INVERSE)
        with_num = tl.sum(phi * dfeatures, axis=1)
        with_out = of_soft * with_soft + of_num * with_num
        of_den = -of_num * with_out
        # A row without a prefix may have an of_den that is not finite, which concerns no key.
        own = tl.where(kappa == 0.0, 0.0, kappa[None, :] * of_den[:, None])
        change = slope * INVERSE * (of_num[:, None] * dfeatures + own)
        store_rows(dq, at, exists, 0, change, BD, D)
        tl.store(dlse + at, of_soft * (with_soft - with_out), mask=exists)
        tl.store(dden + at, of_den, mask=exists)


@triton.jit(do_not_specialize=VARYING)
def prefix_sums_kernel(
    dout, q, part, dden, sums, q_b, q_h, q_t, g_b, g_h, g_t, batch, tokens, span, tiles, each,
    HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, INVERSE: tl.constexpr,
    UNIT: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr, COLUMNS: tl.constexpr,
    MATH: tl.constexpr, PHI_EXACT: tl.constexpr, G_EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums of phi(q)^T (part * G) and of phi(q) dden over `each` tiles of rows of a head, for a
    tile of features and columns: sums (programs a head, HEADS, D * DV + D).
    """
    column_tiles: tl.constexpr = (DV + COLUMNS - 1) // COLUMNS
    feature_tiles: tl.constexpr = (D + FEATURES - 1) // FEATURES
    program = tl.program_id(0)
    column = program % column_tiles * COLUMNS
    feature = program // column_tiles % feature_tiles * FEATURES
    head = program // (column_tiles * feature_tiles) % HEADS
    group = program // (column_tiles * feature_tiles * HEADS)
    dZ = tl.zeros([COLUMNS, FEATURES], tl.float32)
    dkappa = tl.zeros([FEATURES], tl.float32)
    for tile in range(group * each, tl.minimum(group * each + each, tiles)):
        b, t, exists = locate_rows(tile, span, batch, tokens, ROWS)
        at = (b * HEADS + head) * tokens + t
        wide_head = tl.cast(head, tl.int64)
        q_at = b * q_b + wide_head * q_h + t * q_t
        g_at = b * g_b + wide_head * g_h + t * g_t
        phi, _ = features(load_rows(q, q_at, exists, feature, FEATURES, D, UNIT), INVERSE)
        g = load_rows(dout, g_at, exists, column, COLUMNS, DV, UNIT)
        of_num = tl.load(part + at, mask=exists, other=0.0)
        of_den = tl.load(dden + at, mask=exists, other=0.0)
        dkappa += tl.sum(phi * of_den[:, None], axis=0)
        phi_parts = split(phi * of_num[:, None], MATH, PHI_EXACT)
        g_parts = split(g, MATH, G_EXACT)
        dZ = add_product(dZ, g_parts, phi_parts, G_EXACT, PHI_EXACT, PRECISION)
    row, lane = feature + tl.arange(0, FEATURES), column + tl.arange(0, COLUMNS)
    sums += (group.to(tl.int64) * HEADS + head) * (D * DV + D)
    keep = (row < D)[:, None] & (lane < DV)[None, :]
    tl.store(sums + row[:, None] * DV + lane[None, :], tl.trans(dZ), mask=keep)
    if column == 0:
        tl.store(sums + D * DV + row, dkappa, mask=row < D)


@triton.jit(do_not_specialize=["groups"])
def prefix_reduce_kernel(
    sums, k, dZ, dk, groups, HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    SOFTPLUS: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """dZ and dk from the sums of all groups, added in their order."""
    blocks: tl.constexpr = (D * DV + D + ITEMS - 1) // ITEMS
    head = tl.program_id(0) // blocks
    item = tl.program_id(0) % blocks * ITEMS + tl.arange(0, ITEMS)
    of_Z = item < D * DV
    of_k = (item >= D * DV) & (item < D * DV + D)
    total = tl.zeros([ITEMS], tl.float32)
    for group in range(groups):
        at = (tl.cast(group, tl.int64) * HEADS + head) * (D * DV + D)
        total += tl.load(sums + at + item, mask=of_Z | of_k, other=0.0)
    dZ += tl.cast(head, tl.int64) * D * DV
    tl.store(dZ + item, total.to(dZ.dtype.element_ty), mask=of_Z)
    place = head * D + item - D * DV
    slope = positive_slope(tl.load(k + place, mask=of_k, other=0.0).to(tl.float32), SOFTPLUS)
    # Where k does not move kappa, a sum that is not finite must not say otherwise.
    change = tl.where(slope == 0.0, 0.0, slope * total)
    tl.store(dk + place, change.to(dk.dtype.element_ty), mask=of_k)
