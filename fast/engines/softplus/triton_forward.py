"""The softplus engine's forward kernel: one program owns a tile of rows of one query head.

The plain weights need one sweep over the keys, with sums that nothing rescales. Sharpened ones need
two, because the power acts on weights that are already normalised: the first sweep reads keys only
and finds each row's sum and largest score, so that in the second the largest weight is exactly 1
whatever the power, and nothing underflows or has to be rescaled.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnspec.fast.engines.flash.triton_tiles import (
    VARYING,
    key_tile,
    load_numbers,
    load_rows,
    plan_rows,
    store_rows,
)
from attnspec.fast.engines.flash.triton_visible import end_key, visible
from attnspec.fast.engines.softplus import triton_launch as host
from attnspec.fast.engines.softplus.triton_maps import (
    added_eps,
    first_terms,
    raised,
    second_terms,
    soft,
)


@triton.jit
def load_scales(source, first, stop, KEYS: tl.constexpr, DESCRIBED: tl.constexpr):
    """The scales of keys [first, first + KEYS), 1 without any; `source` as for `load_numbers`."""
    scale = tl.full([KEYS], 1.0, tl.float32)
    if source[0] is not None:
        scale = load_numbers(source, first, stop, 0.0, KEYS, False, DESCRIBED)
    return scale


@triton.jit
def measure_tiles(
    count, sums, q_tile, row_scale, k_source, key_scales, walk, who,
    D: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr,
    ACCESS: tl.constexpr, PRECISION: tl.constexpr, PRECISE: tl.constexpr,
    DESCRIBED: tl.constexpr, PASS: tl.constexpr,
):  # fmt: skip
    """The first sweep over the key tiles of a pass: sums of softplus scores, largest scores."""
    total, peak = sums
    row, high, b, h, masks = who
    for i in range(count):
        at, key_stop = key_tile(i, PASS, walk, 0, KEYS)
        key = at + tl.arange(0, KEYS)
        k_tile = load_rows(k_source, at, KEYS, WIDTH, D, ACCESS)
        scores = tl.dot(q_tile, k_tile.T, input_precision=PRECISION) * row_scale[:, None]
        if key_scales[0] is not None:
            scores *= load_scales(key_scales, at, key_stop, KEYS, DESCRIBED)[None, :]
        if PASS > 0:
            seen = visible(
                row[:, None], key[None, :], 0, high[:, None], b, h, key_stop, None, masks, False,
                False,
            )  # fmt: skip
            scores = tl.where(seen, scores, -float("inf"))
        total += tl.sum(soft(scores, PRECISE), axis=1)
        peak = tl.maximum(peak, tl.max(scores, axis=1))
    return total, peak


@triton.jit
def attend_tiles(
    count, sums, q_tile, row_scale, gain, cut, power, k_source, v_source, key_scales, walk, who,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    KEYS: tl.constexpr, ACCESS: tl.constexpr, PRECISION: tl.constexpr,
    PRECISE: tl.constexpr, SHARP: tl.constexpr, WHOLE: tl.constexpr, MASKED: tl.constexpr,
    DESCRIBED: tl.constexpr, PASS: tl.constexpr,
):  # fmt: skip
    """The key tiles of a pass, added to sums = (sums of weights, values)."""
    total, mixed = sums
    row, high, b, h, masks = who
    for i in range(count):
        at, key_stop = key_tile(i, PASS, walk, 0, KEYS)
        key = at + tl.arange(0, KEYS)
        k_tile = load_rows(k_source, at, KEYS, WIDTH, D, ACCESS)
        scores = tl.dot(q_tile, k_tile.T, input_precision=PRECISION) * row_scale[:, None]
        if key_scales[0] is not None:
            scores *= load_scales(key_scales, at, key_stop, KEYS, DESCRIBED)[None, :]
        if PASS > 0:
            seen = visible(
                row[:, None], key[None, :], 0, high[:, None], b, h, key_stop, None, masks, False,
                False,
            )  # fmt: skip
            scores = tl.where(seen, scores, -float("inf"))
        weights = soft(scores, PRECISE)
        if SHARP:
            weights = tl.maximum(weights * gain[:, None] - cut[:, None], 0.0)
            if PASS > 0:
                weights = tl.where(seen, weights, 0.0)
            weights = raised(weights, power, WHOLE)
        total += tl.sum(weights, axis=1)
        v_tile = load_rows(v_source, at, KEYS, WIDTH_V, DV, ACCESS)
        if MASKED and PASS > 0:
            # What no row sees may be NaN, and 0 * NaN is NaN.
            used = tl.max(seen.to(tl.int32), axis=0) > 0
            v_tile = tl.where(used[:, None], v_tile, 0.0)
        mixed = tl.dot(weights.to(v_tile.dtype), v_tile, mixed, input_precision=PRECISION)
    return total, mixed


STAGES = ["scales_stride", "factor", "eps", "power", "warm", "second_eps", "dead", "row_numbers"]
"""Numbers of the stages and of tensors, whose values never lead to another compilation."""


@triton.jit(do_not_specialize=[*VARYING, *STAGES])
def softplus_forward_kernel(
    q, k, v, out, rows, counts, key_scales,
    q_stride_b, q_stride_h, q_stride_t, q_stride_d,
    k_stride_b, k_stride_h, k_stride_t, k_stride_d,
    v_stride_b, v_stride_h, v_stride_t, v_stride_d,
    key_mask, key_bounds, key_mask_stride_b, key_mask_stride_k,
    mask, mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k,
    q_tokens, k_tokens, scales_stride, tiles, sequences, section,
    factor, eps, power, warm, second_eps, dead, row_numbers,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    CAUSAL: tl.constexpr, ACCESS: tl.constexpr, ALL_EDGE: tl.constexpr, PRECISION: tl.constexpr,
    PRECISE: tl.constexpr, SHARP: tl.constexpr, WHOLE: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
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
    k_source = (k, b, h // GROUP, 0, k_tokens, k_stride_b, k_stride_h, k_stride_t, k_stride_d)
    v_source = (v, b, h // GROUP, 0, k_tokens, v_stride_b, v_stride_h, v_stride_t, v_stride_d)
    row = first + tl.arange(0, ROWS)
    inside = row < stop
    q_tile = load_rows(q_source, first, ROWS, WIDTH, D, ACCESS)
    count = tl.load(counts + b.to(tl.int64) * all_rows + row, mask=inside, other=0.0)
    row_scale = tl.log2(tl.maximum(count, 1.0)) * factor
    key_scales = (key_scales, b * (HEADS // GROUP) + h // GROUP, 0, scales_stride)
    if key_scales[0] is not None:
        wide = q_tile.to(tl.float32)
        row_scale /= tl.maximum(tl.sqrt(tl.sum(wide * wide, axis=1)), 1e-12)
    high = end_key(row, 0, stop, shift, k_tokens, None, CAUSAL)
    who = (row, high, b, h, masks)
    zeros = tl.zeros([ROWS], tl.float32)
    sums = (zeros, tl.full([ROWS], -float("inf"), tl.float32))
    gain, cut = zeros, zeros
    if SHARP:
        for PASS in tl.static_range(ALL_EDGE, 2):
            sums = measure_tiles(
                lengths[PASS], sums, q_tile, row_scale, k_source, key_scales, walk, who,
                D, WIDTH, KEYS, ACCESS, PRECISION, PRECISE, DESCRIBED, PASS,
            )  # fmt: skip
    first_total, peak = sums
    most = zeros
    if SHARP:
        gain, cut, most = second_terms(first_total, peak, count, eps, warm, dead, PRECISE)
    weighed = (zeros, tl.zeros([ROWS, WIDTH_V], tl.float32))
    for PASS in tl.static_range(ALL_EDGE, 2):
        weighed = attend_tiles(
            lengths[PASS], weighed, q_tile, row_scale, gain, cut, power, k_source, v_source,
            key_scales, walk, who,
            D, DV, WIDTH, WIDTH_V, KEYS, ACCESS, PRECISION, PRECISE, SHARP, WHOLE, MASKED,
            DESCRIBED, PASS,
        )  # fmt: skip
    total, mixed = weighed
    at_row = (b * HEADS + h).to(tl.int64) * all_rows + row
    if SHARP:
        mass = total + added_eps(most, second_eps, power)
        some = total > 0.0
        inverse = tl.where(some, 1.0 / tl.where(some, mass, 1.0), 0.0)
        tl.store(rows + 2 * row_numbers.to(tl.int64) + at_row, peak, mask=inside)
        tl.store(rows + 3 * row_numbers.to(tl.int64) + at_row, inverse, mask=inside)
    else:
        first_total = total
        inverse = first_terms(total, eps)
    tl.store(rows + at_row, row_scale, mask=inside)
    tl.store(rows + row_numbers.to(tl.int64) + at_row, first_total, mask=inside)
    store_rows(out, mixed * inverse[:, None], at_row, inside, WIDTH_V, DV)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    factor: float,
    normalise: bool,
    eps: float,
    causal: bool,
    key_mask: Tensor | None,
    mask: Tensor | None,
    power: float,
    warm: int,
    second_eps: float,
    dead: float,
) -> tuple[Tensor, Tensor]:
    """The output in q's dtype and the four numbers of each row, (4, batch, heads, q_tokens)."""
    batch, heads, q_tokens, _ = q.shape
    out = q.new_empty(batch, heads, q_tokens, v.shape[3])
    rows = torch.empty(4, batch, heads, q_tokens, dtype=torch.float32, device=q.device)
    # A mask passes values through registers, for which eight warps have room.
    masked = key_mask is not None or mask is not None
    chosen = host.choose_config("sharp" if power or masked else "forward", q, v)
    walked = k.shape[2] * (q.shape[3] + v.shape[3]) * q.element_size()
    operands = host.operands(q, k, v, chosen)
    scales = host.inverse_norms(k) if normalise else None
    arguments: dict[str, Any] = {
        **operands,
        **host.scale_arguments(scales, chosen.keys, operands["ACCESS"] == 2),
        **host.rule_arguments(causal, key_mask, mask),
        **host.shape_arguments(q, k, v, chosen),
        **host.stage_arguments(q, eps, power, warm, second_eps, dead),
        **host.grid(q_tokens, chosen.rows, batch * heads, walked),
        "factor": factor,
        "out": out,
        "rows": rows,
        "counts": counts,
        "key_bounds": host.key_bounds(key_mask),
    }
    host.launch(softplus_forward_kernel, arguments["tiles"] * batch * heads, chosen, arguments)
    return out, rows
