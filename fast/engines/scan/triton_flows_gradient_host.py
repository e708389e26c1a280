"""Launches of the gradient of Flowformer's causal outputs, recorded for calls of the same kind."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from math import gcd, prod
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.engines.scan.configs import lanes
from attnspec.fast.engines.scan.flows_gradient import kept_lengths
from attnspec.fast.engines.scan.recorder import Recorder
from attnspec.fast.engines.scan.segments import Segments, cut
from attnspec.fast.engines.scan.triton_flows_causal import (
    ordered_read_kernel,
    prefix_kernel,
    source_states_kernel,
)
from attnspec.fast.engines.scan.triton_flows_gradient import (
    features_gradient_kernel,
    losses_kernel,
    rates_kernel,
    receive_kernel,
    return_kernel,
    turned_read_kernel,
)
from attnspec.fast.engines.scan.triton_flows_host import Plan
from attnspec.fast.engines.scan.triton_plan import Call
from attnspec.fast.engines.sizes import tile_width


def backward(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, kept: Sequence[Tensor], start: Sequence[Tensor],
    last: Sequence[Tensor], eps: float, kind: int, clamp: tuple[float, float] | None, key: Hashable,
    offsets: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of q, and of k and v for every query head (float32, if these share them); of
    the first sums of b, a, b N / O and a N / I, and state; and parts of those of the first sum of
    e, (lines, segments), and of N, (2, lines, segments), added up for each state if there are
    `offsets`.

    `kept` is what `attend_in_order` has kept, `start` the number of tokens before, if any, and
    `last` the gradients of the parts of the last state, if any.
    """
    plan = Plan.of(q, k, v, do)
    if offsets is not None:
        plan.recorder = Recorder()
    shares, conserved, gates, weights, sums, before, between, entering = kept
    lines, tokens, width = plan.lines, q.shape[2], tile_width(plan.d)
    length, states_length = kept_lengths(lines, tokens)
    pieces = cut(q.shape[0], tokens, length, offsets)
    segments, packed = pieces.each, {"PACKED": pieces.packed}
    tables = pieces.tables(q)
    many = (pieces.sequences, q.shape[1])
    shape: dict[str, Any] = {"D": plan.d, "KIND": kind, **packed}
    ended = {"STARTED": bool(last), "REVERSE": True, **packed, "num_warps": 1}
    # Where nothing is given, kernels take any tensor and leave it alone.
    dsb, dsa, dsbO, dsaI, dse, dKV, _ = last or [q] * 7
    launch, (N,) = plan.recorder.launch, start or (q,)

    dv, (part_q, gate_dots), (part_k, dots), dKV = _read_back(
        plan, do, gates, weights, entering, dKV, ended, shape,
        cut(q.shape[0], tokens, states_length, offsets),
    )  # fmt: skip
    scalar = {"TILE": 64, "TILES": dots.shape[0], **packed, "num_warps": 1}
    spans = (tokens, length, segments, lines)
    masses, counts = plan.empty(lines, segments), plan.empty(2, lines, segments)
    launch(losses_kernel, lines * segments, dots, weights, sums, masses, tables[0], *spans,
           **scalar)  # fmt: skip
    rates = plan.empty(3, lines, tokens)
    low, high = clamp or (0.0, 0.0)
    launch(
        rates_kernel, lines * segments, gate_dots, dots, shares, conserved, weights, sums, masses,
        dse, N, rates, counts, *tables, *spans, plan.heads[0], low, high, **scalar,
        STARTED=bool(start), ENDED=bool(last), CLAMPED=clamp is not None,
    )  # fmt: skip

    chosen = lanes("flows gradient")
    rows = min(chosen.rows, plan.rows(chosen))
    # A warp has whole rows: as many neighbouring channels a thread as that takes.
    unit = gcd(plan.d, max(1, width // 32)) if plan.unit > 1 else 1
    sides = (*plan.place(q, unit), *plan.place(k, unit))
    walks: dict[str, Any] = {
        **shape, "BD": width, "ROWS": rows, "UNIT": unit, "STARTED": bool(start), "num_warps": 1,
    }  # fmt: skip
    items = min(16, width)
    prefixes: dict[str, Any] = {
        "WIDTH": plan.d, "ROWS": 32, "ITEMS": items, "SHARED": False, "ACROSS": 0, **ended,
    }  # fmt: skip
    programs = 2 * prod(many) * -(-plan.d // items)
    chain = (tables[1], lines, prod(many), segments, *plan.heads)
    states = plan.empty(lines * segments, length // rows, 4, plan.d)
    parts = plan.empty(2 * lines, segments, plan.d)
    after, behind = (plan.empty(2 * lines, segments, plan.d) for _ in range(2))
    slopes = plan.empty(2, lines, tokens)
    first = [plan.empty(*many, plan.d) for _ in range(4)]
    where = (*tables, *spans, *plan.heads)
    launch(receive_kernel, lines * segments, *sides, N, shares, rates, before, between, states,
           parts, *where, eps, **walks)  # fmt: skip
    launch(prefix_kernel, programs, parts, dsbO, dsaI, after, first[2], first[3], *chain,
           **prefixes)  # fmt: skip
    launch(return_kernel, lines * segments, *sides, N, shares, rates, after, slopes, parts, counts,
           *where, eps, **walks)  # fmt: skip
    launch(prefix_kernel, programs, parts, dsb, dsa, behind, first[0], first[1], *chain,
           **prefixes)  # fmt: skip
    dq, dk = (plan.empty(*q.shape, dtype=dtype) for dtype in (q.dtype, _of_line(plan)))
    launch(features_gradient_kernel, lines * segments, *sides, N, shares, rates, slopes, states,
           after, behind, part_q, part_k, dq, dk, *where, plan.d // unit, eps, **walks)  # fmt: skip
    if offsets is not None:
        alone: dict[str, Any] = {**prefixes, "WIDTH": 1, "ITEMS": 2, "STARTED": False}
        room, one, two, three = plan.empty(2 * lines, segments), *plan.empty(3, prod(many), 1)
        launch(prefix_kernel, prod(many), masses, q, q, room, one, one, *chain, **alone)
        launch(prefix_kernel, 2 * prod(many), counts, q, q, room, two, three, *chain, **alone)
        masses, counts = one, torch.stack([two, three])
    made = (dq, dk, dv, *first, dKV, masses, counts)
    plan.keep(key, (q, k, v, do, *kept, *start, *last), made)
    return made


def _of_line(plan: Plan) -> torch.dtype:
    """The dtype of the gradients that a query head has of its keys and values."""
    heads, kv_heads = plan.heads
    return plan.q.dtype if heads == kv_heads else torch.float32


def _read_back(
    plan: Plan, do: Tensor, gates: Tensor, weights: Tensor, entering: Tensor, dKV: Tensor,
    ended: dict[str, Any], shape: dict[str, Any], pieces: Segments,
) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:  # fmt: skip
    """dv of every query head; what the features of q, and those of k, get by the state, with their
    products (tiles, lines, tokens); and the gradient of the first state.
    """
    q, k, v, cfg, launch = plan.q, plan.k, plan.v, plan.cfg, plan.recorder.launch
    tokens, lines, d, dv = q.shape[2], plan.lines, plan.d, plan.dv
    heads, kv_heads = plan.heads
    group, segments = heads // kv_heads, pieces.each
    where = lines * segments
    table, bounds = pieces.tables(q)
    many = (pieces.sequences, heads)
    at_q, at_k, at_v, at_do = (plan.place(x) for x in (q, k, v, do))
    cuts = (table, tokens, pieces.length, segments)
    shape = {
        **shape, "DV": dv, "ROWS": cfg.block, "UNIT": plan.unit, "PRODUCT": plan.product[1],
        "num_stages": cfg.walk_stages,
    }  # fmt: skip
    tile = Call.tile(cfg.states_items, d, dv)
    states, leaving = plan.empty(where, dv, d), plan.empty(where, dv, d)
    launch(
        source_states_kernel, where * -(-dv // tile), *at_q, *at_do, gates, states, *cuts, heads,
        heads, BD=tile_width(d), BV=tile, **shape, num_warps=plan.warps(tile, 4),
    )  # fmt: skip
    items = min(64, tile_width(d * dv))
    first = plan.empty(*many, d, dv)
    launch(
        prefix_kernel, prod(many) * -(-d * dv // items), states, dKV, dKV, leaving, first, first,
        bounds, lines, prod(many), segments, *plan.heads, WIDTH=d * dv, SHARED=False, ACROSS=d,
        ROWS=16, ITEMS=items, **ended,
    )  # fmt: skip
    tile = Call.tile(cfg.walk_items, d, dv)
    out = plan.empty(*q.shape[:3], dv, dtype=_of_line(plan))
    launch(
        ordered_read_kernel, where * -(-dv // tile), *at_k, *at_q, *at_do, weights, gates, leaving,
        out, *cuts, heads, group, 1, BD=tile_width(d), BV=tile, **shape, BACKWARD=True,
        num_warps=plan.warps(tile, cfg.walk_warps),
    )  # fmt: skip
    tile = Call.tile(cfg.walk_items, dv, d)
    tiles = -(-d // tile)
    made = []
    for read, summed, source, scale, weight, state, groups, back in (
        (at_do, at_v, at_k, gates, weights, entering, (1, group), False),
        (at_v, at_do, at_q, weights, gates, leaving, (group, 1), True),
    ):
        part = plan.empty(*q.shape[:3], d, dtype=plan.product[0])
        dots = plan.empty(tiles, lines, tokens)
        launch(
            turned_read_kernel, where * tiles, *read, *summed, *source,
            *(at_k if back else at_q), scale, weight, state, part, dots, *cuts, lines, heads,
            *groups, BT=tile, BV=tile_width(dv), **shape, BACKWARD=back,
            num_warps=plan.warps(tile, cfg.walk_warps),
        )  # fmt: skip
        made.append((part, dots))
    return out, made[0], made[1], first
