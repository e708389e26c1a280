"""The flash engine's forward kernel: one program owns a tile of rows of one query head."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnspec.fast.engines.flash import triton_launch as host
from attnspec.fast.engines.flash.configs import FlashConfig
from attnspec.fast.engines.flash.rules import Rules
from attnspec.fast.engines.flash.triton_tiles import (
    VARYING,
    key_tile,
    load_rows,
    plan_rows,
    store_rows,
)
from attnspec.fast.engines.flash.triton_visible import (
    LOG2E,
    add_bias,
    end_key,
    finite_rows,
    has_nan,
    lowest_key,
    positions,
    visible,
)

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def online_softmax(scores, top, total, factor):
    """One more tile of base-2 logits ``scores * factor``: weights, new maximum, sum and rescale."""
    new_top = tl.maximum(top, tl.max(scores, axis=1) * factor)
    # A row that has seen nothing keeps -inf; subtracting 0 there gives weights 0, not NaN.
    safe = tl.where(new_top == -float("inf"), 0.0, new_top)
    weights = tl.exp2(scores * factor - safe[:, None])
    rescale = tl.exp2(top - safe)
    return weights, new_top, total * rescale + tl.sum(weights, axis=1), rescale


@triton.jit
def finish(sums, sink_logit, h):
    """lse and output of the rows from their maxima, denominators and values."""
    top, total, mixed = sums
    if sink_logit is not None:
        sink = tl.load(sink_logit + h).to(tl.float32) * LOG2E
        new_top = tl.maximum(top, sink)
        safe = tl.where(new_top == -float("inf"), 0.0, new_top)
        rescale = tl.exp2(top - safe)
        total = total * rescale + tl.exp2(sink - safe)
        mixed = mixed * rescale[:, None]
        top = new_top
    empty = total == 0.0
    filled = tl.where(empty, 1.0, total)
    log_total = tl.where(empty, -float("inf"), (top + tl.log2(filled)) * LN2)
    return log_total, mixed / filled[:, None]


@triton.jit
def attend_tiles(
    count, sums, q_tile, k_source, v_source, walk, who, factor, tainted,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    KEYS: tl.constexpr, K_BLOCK: tl.constexpr, RANGED: tl.constexpr,
    WHOLE: tl.constexpr, ACCESS: tl.constexpr, PRECISION: tl.constexpr, PASS: tl.constexpr,
    CAREFUL: tl.constexpr,
):  # fmt: skip
    """The first `count` key tiles of a pass, added to sums = (maxima, denominators, values).

    PASS 2 walks over full tiles and then edges. CAREFUL leaves out values that are not finite, and
    adds the rows that see one to `tainted`.
    """
    CUT: tl.constexpr = K_BLOCK % KEYS > 0
    top, total, mixed = sums
    row, low, high, position, b, h, stop, sinks, slopes, masks = who
    for i in range(count):
        at, key_stop = key_tile(i, PASS, walk, K_BLOCK, KEYS)
        key = at + tl.arange(0, KEYS)
        k_tile = load_rows(k_source, at, KEYS, WIDTH, D, ACCESS)
        scores = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)
        scores, factor_now = add_bias(scores, factor, key[None, :], position[:, None], h, slopes)
        if PASS == 1 or CAREFUL:
            seen = visible(
                row[:, None], key[None, :], low[:, None], high[:, None], b, h, key_stop, sinks,
                masks, RANGED, CUT,
            )  # fmt: skip
            if PASS == 2 and WHOLE:
                seen |= (i < walk[5]) & (row < stop)[:, None] & (key < key_stop)[None, :]
            scores = tl.where(seen, scores, -float("inf"))
        elif PASS == 2 and i >= walk[5]:
            seen = visible(
                row[:, None], key[None, :], low[:, None], high[:, None], b, h, key_stop, sinks,
                masks, RANGED, CUT,
            )  # fmt: skip
            scores = tl.where(seen, scores, -float("inf"))
        weights, top, total, rescale = online_softmax(scores, top, total, factor_now)
        v_tile = load_rows(v_source, at, KEYS, WIDTH_V, DV, ACCESS)
        if CAREFUL:
            v_tile, finite = finite_rows(v_tile)
            tainted |= tl.max((seen & (finite == 0)[None, :]).to(tl.int32), axis=1) > 0
        weights = weights.to(v_tile.dtype)
        mixed = tl.dot(weights, v_tile, mixed * rescale[:, None], input_precision=PRECISION)
    return (top, total, mixed), tainted


@triton.jit(do_not_specialize=VARYING)
def flash_forward_kernel(
    q, k, v, out, lse,
    q_stride_b, q_stride_h, q_stride_t, q_stride_d,
    k_stride_b, k_stride_h, k_stride_t, k_stride_d,
    v_stride_b, v_stride_h, v_stride_t, v_stride_d,
    key_mask, key_bounds, key_mask_stride_b, key_mask_stride_k,
    mask, mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k,
    block_index, block_count, block_full,
    index_stride_b, index_stride_h, index_stride_q, count_stride_b, count_stride_h,
    table, q_offsets, k_offsets, row_start, row_end, sink_logit, slopes, slope_positions,
    q_tokens, k_tokens, tiles, sequences, section, lead, window, sinks, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, CAUSAL: tl.constexpr,
    ACCESS: tl.constexpr, ALL_EDGE: tl.constexpr, PRECISION: tl.constexpr, JOINED: tl.constexpr,
):  # fmt: skip
    RANGED: tl.constexpr = window is not None or row_start is not None
    WHOLE: tl.constexpr = block_full is not None
    all_rows = q_tokens
    place, walk, lengths = plan_rows(
        tl.program_id(0), tiles, sequences, section, lead, table, q_offsets, k_offsets, q_tokens,
        k_tokens,
        window, sinks, row_start, row_end, key_bounds, block_index, block_count, block_full,
        index_stride_b, index_stride_h, index_stride_q, count_stride_b, count_stride_h,
        HEADS, ROWS, KEYS, Q_BLOCK, K_BLOCK, CAUSAL, ALL_EDGE,
    )  # fmt: skip
    b, h, q_begin, k_begin, k_tokens, first, stop, shift = place
    masks = (
        key_mask, key_mask_stride_b, key_mask_stride_k,
        mask, mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k,
    )  # fmt: skip
    k_end = k_begin + k_tokens
    q_source = (
        q, b, h, q_begin, q_begin + stop, q_stride_b, q_stride_h, q_stride_t, q_stride_d
    )  # fmt: skip
    k_source = (
        k, b, h // GROUP, k_begin, k_end, k_stride_b, k_stride_h, k_stride_t, k_stride_d
    )  # fmt: skip
    v_source = (
        v, b, h // GROUP, k_begin, k_end, v_stride_b, v_stride_h, v_stride_t, v_stride_d
    )  # fmt: skip
    row = first + tl.arange(0, ROWS)
    low = lowest_key(row, q_begin, stop, shift, window, row_start)
    high = end_key(row, q_begin, stop, shift, k_tokens, row_end, CAUSAL)
    position = positions(row, q_begin, stop, shift, slope_positions)
    q_tile = load_rows(q_source, first, ROWS, WIDTH, D, ACCESS)
    who = (row, low, high, position, b, h, stop, sinks, slopes, masks)
    factor = scale * LOG2E
    top = tl.full([ROWS], -float("inf"), tl.float32)
    sums = (top, tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, WIDTH_V], tl.float32))
    tainted = row >= stop
    for PASS in tl.static_range(2 if JOINED else ALL_EDGE, 3 if JOINED else 2):
        count = lengths[0] + lengths[1] if JOINED else lengths[PASS]
        sums, tainted = attend_tiles(
            count, sums, q_tile, k_source, v_source, walk, who, factor, tainted,
            D, DV, WIDTH, WIDTH_V, KEYS, K_BLOCK, RANGED, WHOLE, ACCESS, PRECISION, PASS, False,
        )  # fmt: skip
    log_total, mixed = finish(sums, sink_logit, h)
    at_row = (b * HEADS + h).to(tl.int64) * all_rows + q_begin + row
    tl.store(lse + at_row, log_total, mask=row < stop)
    store_rows(out, mixed, at_row, row < stop, WIDTH_V, DV)
    if has_nan(mixed):
        # The product spreads 0 * NaN to rows that do not see the NaN's key: these are done again.
        fresh = (top, tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, WIDTH_V], tl.float32))
        redone, left_out = attend_tiles(
            lengths[0] + lengths[1], fresh, q_tile, k_source, v_source, walk, who, factor, tainted,
            D, DV, WIDTH, WIDTH_V, KEYS, K_BLOCK, RANGED, WHOLE, ACCESS, PRECISION, 2, True,
        )  # fmt: skip
        _, mixed_again = finish(redone, sink_logit, h)
        store_rows(out, mixed_again, at_row, left_out == 0, WIDTH_V, DV)


class Forward:
    """The forward pass of calls of one kind: tensors of the same shapes, strides and dtypes, at
    multiples of 16 bytes alike, and the same options.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, rules: Rules, chosen: FlashConfig) -> None:
        batch, heads, q_tokens, _ = q.shape
        self.out_shape, self.lse_shape = (batch, heads, q_tokens, v.shape[3]), q.shape[:3]
        self.copies = not host.readable_as_they_are(q, k, v)
        q, k, v = host.readable(q, k, v)
        self.tiles = host.Tiles("forward", chosen, q, k, rules)
        how = host.access(q, k, v)
        place = host.grid_arguments("forward", chosen, q, k, v, rules, heads)
        arguments = {
            **host.operand("q", q, chosen.rows, how),
            **host.operand("k", k, chosen.keys, how),
            **host.operand("v", v, chosen.keys, how),
            **host.rule_arguments(rules),
            **host.list_arguments(host.readable_lists(*rules[8:11])),
            **place,
            "out": q,
            "lse": q,
            "sink_logit": rules.sink_logit,
            "key_bounds": rules.key_mask,
            **host.shape_arguments(q, k, v, chosen),
            "ACCESS": how,
            "ALL_EDGE": host.all_key_edges(rules, chosen),
            "JOINED": chosen.joined and not host.all_key_edges(rules, chosen),
        }
        self.bounds = None if rules.key_mask is None else host.KeyBounds(rules.key_mask)
        programs = place["tiles"] * batch * heads
        self.launch = host.prepare(flash_forward_kernel, programs, chosen, arguments, q.device)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        """out (batch, heads, q_tokens, dv) in q's dtype, lse (batch, heads, q_tokens) float32."""
        rules = Rules(*options)
        out = q.new_empty(self.out_shape)
        lse = q.new_empty(self.lse_shape, dtype=torch.float32)
        if self.copies:
            q, k, v = host.readable(q, k, v)
        index, count, full = host.readable_lists(*rules[8:11])
        key_bounds = None
        if self.bounds is not None and rules.key_mask is not None:
            key_bounds = self.bounds(rules.key_mask)
        self.launch(
            q=q, k=k, v=v, out=out, lse=lse, **host.changing(rules),
            block_index=index, block_count=count, block_full=full, sink_logit=rules.sink_logit,
            key_bounds=key_bounds,
            table=self.tiles(rules),
        )  # fmt: skip
        return out, lse


def prepare_forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Any:
    """What computes every call of the kind of this one."""
    rules = Rules(*options)
    chosen = host.choose_config("forward", q, v, rules)
    if chosen.specialised:
        # Not every Triton has what this module is written in.
        from attnspec.fast.engines.flash.triton_specialised_host import Specialised

        return Specialised(q, k, v, rules, chosen)
    return Forward(q, k, v, rules, chosen)
