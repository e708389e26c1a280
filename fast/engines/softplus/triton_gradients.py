"""The softplus engine's backward kernels: row terms and dq by rows, dk and dv by keys.

With g = dout . v and delta = dout . out, the gradient of a softplus score s is m - c, where m is
(g - delta) over the first normaliser in the plain form, and in the sharpened one
power * gain * excess**(power - 1) * (g - delta) over the second; c is what the first normaliser
takes back from a sharpened row: the sum of s m over it. Every output element is written by one
program, so the gradients are the same on every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.fast.engines.flash.triton_tiles import (
    VARYING,
    key_tile,
    load_rows,
    owned_tile,
    plan_rows,
    row_tile,
    row_tiles,
    store_rows,
)
from attnspec.fast.engines.flash.triton_visible import (
    end_key,
    seen_rows,
    visible,
    visible_to,
)
from attnspec.fast.engines.softplus.triton_forward import load_scales
from attnspec.fast.engines.softplus.triton_maps import raised, soft_and_slope
from attnspec.fast.engines.softplus.triton_terms import (
    CUT,
    DELTA,
    FACTOR,
    FIRST,
    GAIN,
    SCALE,
    SCALED_FACTOR,
    SCALED_TAKEN,
    TAKEN,
    WEIGHT,
    load_term,
)


@triton.jit
def sharpened(softened, gain, cut, power, WHOLE: tl.constexpr):
    """Weights and their derivative, before their factors, of the second stage."""
    excess = tl.maximum(softened * gain - cut, 0.0)
    LESS: tl.constexpr = WHOLE - 1 if WHOLE > 0 else -1
    derivative = raised(excess, power - 1.0, LESS)
    return derivative * excess, derivative


@triton.jit
def pairs_of_tile(
    i, q_tile, dout_tile, terms, power, k_source, v_source, key_scales, walk, who,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    KEYS: tl.constexpr, ACCESS: tl.constexpr, PRECISION: tl.constexpr,
    PRECISE: tl.constexpr, SHARP: tl.constexpr, WHOLE: tl.constexpr, DESCRIBED: tl.constexpr,
    PASS: tl.constexpr,
):  # fmt: skip
    """The pairs of the i-th key tile: keys, their scales, who is seen, g less delta, softplus
    scores, their slopes, and weights with their derivative in these scores, before factors.
    """
    row, high, b, h, masks = who
    row_scale, row_delta, _, gain, cut = terms
    at, key_stop = key_tile(i, PASS, walk, 0, KEYS)
    key = at + tl.arange(0, KEYS)
    k_tile = load_rows(k_source, at, KEYS, WIDTH, D, ACCESS)
    v_tile = load_rows(v_source, at, KEYS, WIDTH_V, DV, ACCESS)
    scores = tl.dot(q_tile, k_tile.T, input_precision=PRECISION) * row_scale[:, None]
    scale = load_scales(key_scales, at, key_stop, KEYS, DESCRIBED)
    if key_scales[0] is not None:
        scores *= scale[None, :]
    gains = tl.dot(dout_tile, v_tile.T, input_precision=PRECISION) - row_delta[:, None]
    softened, slopes = soft_and_slope(scores, PRECISE)
    weights, derivative = softened, 1.0
    if SHARP:
        weights, derivative = sharpened(softened, gain[:, None], cut[:, None], power, WHOLE)
    seen = 1
    if PASS > 0:
        seen = visible(
            row[:, None], key[None, :], 0, high[:, None], b, h, key_stop, None, masks, False, False
        )
    return k_tile, scale, seen, gains, softened, slopes, weights, derivative


@triton.jit
def sum_tiles(
    count, sums, q_tile, dout_tile, terms, power, k_source, v_source, key_scales, walk, who,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    KEYS: tl.constexpr, ACCESS: tl.constexpr, PRECISION: tl.constexpr,
    PRECISE: tl.constexpr, SHARP: tl.constexpr, WHOLE: tl.constexpr, DESCRIBED: tl.constexpr,
    PASS: tl.constexpr,
):  # fmt: skip
    """The key tiles of a pass, added to each row's sums of weights, and of softplus scores times
    the weights' derivative, both times g less a rough delta and without.
    """
    mean, mass, steep, bare = sums
    for i in range(count):
        _, _, seen, gains, softened, _, weights, derivative = pairs_of_tile(
            i, q_tile, dout_tile, terms, power, k_source, v_source, key_scales, walk, who,
            D, DV, WIDTH, WIDTH_V, KEYS, ACCESS, PRECISION, PRECISE, SHARP, WHOLE,
            DESCRIBED, PASS,
        )  # fmt: skip
        if PASS > 0:
            gains = tl.where(seen, gains, 0.0)
            weights = tl.where(seen, weights, 0.0)
            softened = tl.where(seen, softened, 0.0)
        mass += tl.sum(weights, axis=1)
        mean += tl.sum(weights * gains, axis=1)
        softened *= derivative
        bare += tl.sum(softened, axis=1)
        steep += tl.sum(softened * gains, axis=1)
    return mean, mass, steep, bare


@triton.jit
def differentiate_tiles(
    count, grad, q_tile, dout_tile, terms, taken, power, k_source, v_source, key_scales, walk, who,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    KEYS: tl.constexpr, ACCESS: tl.constexpr, PRECISION: tl.constexpr,
    PRECISE: tl.constexpr, SHARP: tl.constexpr, WHOLE: tl.constexpr, MASKED: tl.constexpr,
    DESCRIBED: tl.constexpr, PASS: tl.constexpr,
):  # fmt: skip
    """The key tiles of a pass, added to dq over the rows' scales; `taken` is c of sharp rows."""
    factor = terms[2]
    for i in range(count):
        k_tile, scale, seen, gains, _, slopes, _, derivative = pairs_of_tile(
            i, q_tile, dout_tile, terms, power, k_source, v_source, key_scales, walk, who,
            D, DV, WIDTH, WIDTH_V, KEYS, ACCESS, PRECISION, PRECISE, SHARP, WHOLE,
            DESCRIBED, PASS,
        )  # fmt: skip
        gains *= factor[:, None]
        if SHARP:
            gains = gains * derivative - taken[:, None]
        slopes *= gains
        if key_scales[0] is not None:
            slopes *= scale[None, :]
        if PASS > 0:
            slopes = tl.where(seen, slopes, 0.0)
            if MASKED:
                # What no row sees may be NaN, and 0 * NaN is NaN.
                used = tl.max(seen.to(tl.int32), axis=0) > 0
                k_tile = tl.where(used[:, None], k_tile, 0.0)
        grad = tl.dot(slopes.to(k_tile.dtype), k_tile, grad, input_precision=PRECISION)
    return grad


@triton.jit(do_not_specialize=[*VARYING, "terms_stride", "scales_stride", "power"])
def softplus_rows_kernel(
    q, k, v, dout, dq, terms, key_scales,
    q_stride_b, q_stride_h, q_stride_t, q_stride_d,
    k_stride_b, k_stride_h, k_stride_t, k_stride_d,
    v_stride_b, v_stride_h, v_stride_t, v_stride_d,
    dout_stride_b, dout_stride_h, dout_stride_t, dout_stride_d,
    key_mask, key_bounds, key_mask_stride_b, key_mask_stride_k,
    mask, mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k,
    q_tokens, k_tokens, tiles, sequences, section, terms_stride, scales_stride, power,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    CAUSAL: tl.constexpr, ACCESS: tl.constexpr, ALL_EDGE: tl.constexpr, PRECISION: tl.constexpr,
    PRECISE: tl.constexpr, SHARP: tl.constexpr, WHOLE: tl.constexpr, DESCRIBED: tl.constexpr,
    TERMS_ONLY: tl.constexpr,
):  # fmt: skip
    """delta and c of one tile of rows (TERMS_ONLY), or their dq, given these.

    A sharpened row's g may differ from delta by little, and delta comes from an output rounded to
    16 bits: TERMS_ONLY corrects it.
    """
    MASKED: tl.constexpr = key_mask is not None or mask is not None
    all_rows = q_tokens
    place, walk, lengths = plan_rows(
        tl.program_id(0), tiles, sequences, section, 0, None, None, None, q_tokens, k_tokens, None,
        None, None, None, key_bounds, None, None, None, 0, 0, 0, 0, 0,
        HEADS, ROWS, KEYS, 0, 0, CAUSAL, ALL_EDGE,
    )  # fmt: skip
    b, h, _, _, k_tokens, first, stop, shift = place
    masks = (
        key_mask, key_mask_stride_b, key_mask_stride_k,
        mask, mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k,
    )  # fmt: skip
    q_source = (q, b, h, 0, stop, q_stride_b, q_stride_h, q_stride_t, q_stride_d)
    dout_source = (dout, b, h, 0, stop, dout_stride_b, dout_stride_h, dout_stride_t, dout_stride_d)
    k_source = (k, b, h // GROUP, 0, k_tokens, k_stride_b, k_stride_h, k_stride_t, k_stride_d)
    v_source = (v, b, h // GROUP, 0, k_tokens, v_stride_b, v_stride_h, v_stride_t, v_stride_d)
    row = first + tl.arange(0, ROWS)
    inside = row < stop
    q_tile = load_rows(q_source, first, ROWS, WIDTH, D, ACCESS)
    dout_tile = load_rows(dout_source, first, ROWS, WIDTH_V, DV, ACCESS)
    sequence = b * HEADS + h
    at_row = sequence.to(tl.int64) * all_rows + row
    planes = (terms, sequences, sequence, terms_stride)
    scale = load_term(SCALE, planes, first, stop, ROWS, False)
    rough = load_term(DELTA, planes, first, stop, ROWS, False)
    weight = load_term(WEIGHT, planes, first, stop, ROWS, False)
    factor, gain, cut, taken = weight, weight, weight, weight
    if SHARP:
        factor = load_term(FACTOR, planes, first, stop, ROWS, False)
        gain = load_term(GAIN, planes, first, stop, ROWS, False)
        cut = load_term(CUT, planes, first, stop, ROWS, False)
    loaded = (scale, rough, factor, gain, cut)
    key_scales = (key_scales, b * (HEADS // GROUP) + h // GROUP, 0, scales_stride)
    high = end_key(row, 0, stop, shift, k_tokens, None, CAUSAL)
    who = (row, high, b, h, masks)
    if TERMS_ONLY:
        zeros = tl.zeros([ROWS], tl.float32)
        sums = (zeros, zeros, zeros, zeros)
        for PASS in tl.static_range(ALL_EDGE, 2):
            sums = sum_tiles(
                lengths[PASS], sums, q_tile, dout_tile, loaded, power, k_source, v_source,
                key_scales, walk, who,
                D, DV, WIDTH, WIDTH_V, KEYS, ACCESS, PRECISION, PRECISE, SHARP, WHOLE,
            DESCRIBED, PASS,
            )  # fmt: skip
        mean, mass, steep, bare = sums
        first_inverse = load_term(FIRST, planes, first, stop, ROWS, False)
        more = mean * weight + rough * (mass * weight - 1.0)
        taken = (steep - more * bare) * factor * first_inverse
        at_terms = terms + sequence.to(tl.int64) * terms_stride + row
        plane = sequences.to(tl.int64) * terms_stride
        tl.store(at_terms + DELTA * plane, rough + more, mask=inside)
        tl.store(at_terms + TAKEN * plane, taken, mask=inside)
        tl.store(at_terms + SCALED_TAKEN * plane, taken * scale, mask=inside)
    else:
        grad = tl.zeros([ROWS, WIDTH], tl.float32)
        if SHARP:
            taken = load_term(TAKEN, planes, first, stop, ROWS, False)
        for PASS in tl.static_range(ALL_EDGE, 2):
            grad = differentiate_tiles(
                lengths[PASS], grad, q_tile, dout_tile, loaded, taken, power, k_source, v_source,
                key_scales, walk, who,
                D, DV, WIDTH, WIDTH_V, KEYS, ACCESS, PRECISION, PRECISE, SHARP, WHOLE,
                MASKED, DESCRIBED, PASS,
            )  # fmt: skip
        grad *= scale[:, None]
        if key_scales[0] is not None:
            # What points along q changes its length alone, and the scores do not depend on it.
            wide = q_tile.to(tl.float32)
            square = tl.sum(wide * wide, axis=1)
            along = tl.sum(wide * grad, axis=1) / tl.maximum(square, 1e-24)
            along = tl.where(square > 1e-24, along, 0.0)
            grad -= wide * along[:, None]
        store_rows(dq, grad, at_row, inside, WIDTH, D)


@triton.jit(do_not_specialize=[*VARYING, "terms_stride", "scales_stride", "power"])
def softplus_dkdv_kernel(
    q, k, v, dout, dk, dv, terms, key_scales,
    q_stride_b, q_stride_h, q_stride_t, q_stride_d,
    k_stride_b, k_stride_h, k_stride_t, k_stride_d,
    v_stride_b, v_stride_h, v_stride_t, v_stride_d,
    dout_stride_b, dout_stride_h, dout_stride_t, dout_stride_d,
    key_mask, key_mask_stride_b, key_mask_stride_k,
    mask, mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k,
    q_tokens, k_tokens, tiles, sequences, section, terms_stride, scales_stride, power,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    CAUSAL: tl.constexpr, ACCESS: tl.constexpr, ALL_EDGE: tl.constexpr, PRECISION: tl.constexpr,
    PRECISE: tl.constexpr, SHARP: tl.constexpr, WHOLE: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys from one query head; scores lie transposed, (keys, rows)."""
    MASKED: tl.constexpr = key_mask is not None or mask is not None
    tile, sequence = owned_tile(tl.program_id(0), tiles, sequences, section, 0)
    b, h = sequence // HEADS, sequence % HEADS
    first = tile * KEYS
    stop = tl.minimum(first + KEYS, k_tokens)
    shift = k_tokens - q_tokens
    base, _, count, full_from, full_to = row_tiles(
        first, stop, 0, 0, shift, q_tokens, None, None, None, None, ROWS, CAUSAL, ALL_EDGE
    )
    masks = (
        key_mask, key_mask_stride_b, key_mask_stride_k,
        mask, mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k,
    )  # fmt: skip
    q_source = (q, b, h, 0, q_tokens, q_stride_b, q_stride_h, q_stride_t, q_stride_d)
    dout_source = (
        dout, b, h, 0, q_tokens, dout_stride_b, dout_stride_h, dout_stride_t, dout_stride_d
    )  # fmt: skip
    k_source = (k, b, h // GROUP, 0, stop, k_stride_b, k_stride_h, k_stride_t, k_stride_d)
    v_source = (v, b, h // GROUP, 0, stop, v_stride_b, v_stride_h, v_stride_t, v_stride_d)
    key = first + tl.arange(0, KEYS)
    low, high = seen_rows(key, stop, 0, 0, shift, q_tokens, None, None, None, None, CAUSAL)
    k_tile = load_rows(k_source, first, KEYS, WIDTH, D, ACCESS)
    v_tile = load_rows(v_source, first, KEYS, WIDTH_V, DV, ACCESS)
    key_scales = (key_scales, b * (HEADS // GROUP) + h // GROUP, 0, scales_stride)
    scale = load_scales(key_scales, first, stop, KEYS, False)
    planes = (terms, sequences, sequence, terms_stride)
    dk_tile = tl.zeros([KEYS, WIDTH], tl.float32)
    dv_tile = tl.zeros([KEYS, WIDTH_V], tl.float32)
    fulls = full_to - full_from
    walk = (base, full_from, full_to, 0, count - fulls, fulls, 0, q_tokens)
    lengths = (fulls, count - fulls, count)
    for PASS in tl.static_range(2 if MASKED else ALL_EDGE, 3 if MASKED else 2):
        for i in range(lengths[PASS]):
            at, _stop = row_tile(i, PASS, walk, 0, ROWS)
            row = at + tl.arange(0, ROWS)
            q_tile = load_rows(q_source, at, ROWS, WIDTH, D, ACCESS)
            dout_tile = load_rows(dout_source, at, ROWS, WIDTH_V, DV, ACCESS)
            row_scale = load_term(SCALE, planes, at, q_tokens, ROWS, DESCRIBED)
            scores = tl.dot(k_tile, q_tile.T, input_precision=PRECISION) * row_scale[None, :]
            if key_scales[0] is not None:
                scores *= scale[:, None]
            weights, slopes = soft_and_slope(scores, PRECISE)
            if SHARP:
                gain = load_term(GAIN, planes, at, q_tokens, ROWS, DESCRIBED)
                cut = load_term(CUT, planes, at, q_tokens, ROWS, DESCRIBED)
                weights, derivative = sharpened(weights, gain[None, :], cut[None, :], power, WHOLE)
            weights *= load_term(WEIGHT, planes, at, q_tokens, ROWS, DESCRIBED)[None, :]
            if PASS > 0:
                seen = visible_to(
                    row[None, :], key[:, None], low[:, None], high[:, None], b, h, q_tokens, stop,
                    masks, False,
                )  # fmt: skip
                weights = tl.where(seen, weights, 0.0)
            weights = weights.to(dout_tile.dtype)
            dv_tile = tl.dot(weights, dout_tile, dv_tile, input_precision=PRECISION)
            row_delta = load_term(DELTA, planes, at, q_tokens, ROWS, DESCRIBED)
            gains = tl.dot(v_tile, dout_tile.T, input_precision=PRECISION) - row_delta[None, :]
            gains *= load_term(SCALED_FACTOR, planes, at, q_tokens, ROWS, DESCRIBED)[None, :]
            if SHARP:
                taken = load_term(SCALED_TAKEN, planes, at, q_tokens, ROWS, DESCRIBED)
                gains = gains * derivative - taken[None, :]
            slopes *= gains
            if PASS > 0:
                slopes = tl.where(seen, slopes, 0.0)
            dk_tile = tl.dot(slopes.to(q_tile.dtype), q_tile, dk_tile, input_precision=PRECISION)
    if key_scales[0] is not None:
        dk_tile *= scale[:, None]
        wide = k_tile.to(tl.float32)
        along = tl.sum(wide * dk_tile, axis=1) * scale * scale
        along = tl.where(scale < 1e12, along, 0.0)
        grad = dk_tile - wide * along[:, None]
        if MASKED:
            # A key that no row sees may be NaN; its gradient is 0.
            unseen = tl.max((dk_tile != 0.0).to(tl.int32), axis=1) == 0
            grad = tl.where(unseen[:, None], 0.0, grad)
        dk_tile = grad
    at_key = (b * HEADS + h).to(tl.int64) * k_tokens + key
    store_rows(dk, dk_tile, at_key, key < stop, WIDTH, D)
    store_rows(dv, dv_tile, at_key, key < stop, WIDTH_V, DV)
