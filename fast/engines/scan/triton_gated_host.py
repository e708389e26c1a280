"""Launches of the scan between gates. See `triton_gated.py` for the kernels."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from attnspec.fast.backend import interpreting
from attnspec.fast.engines.prepared import launch
from attnspec.fast.engines.scan.configs import lanes
from attnspec.fast.engines.scan.segments import marked_tiles
from attnspec.fast.engines.scan.triton_elementwise import Cut
from attnspec.fast.engines.scan.triton_gated import gated_totals_kernel, gated_walk_kernel
from attnspec.fast.engines.scan.triton_gated_gradient import gated_gradient_kernel


def in_pairs(cut: Cut, *tensors: Tensor) -> bool:
    """Whether a thread may take two neighbouring channels at once, with all their rows: a warp has
    them, and they lie together at even places.
    """
    if cut.width < 64 or cut.channels % 2:
        return False
    for x in tensors:
        batch, tokens, channels = x.stride()
        if channels != 1 or batch % 2 or tokens % 2 or x.data_ptr() % 16:
            return False
    return True


def forward(
    f: Tensor, z: Tensor, i: Tensor, o: Tensor, alpha: Tensor | None, power: float, reversed: bool,
    h0: Tensor | None, offsets: Tensor | None, rows: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y in the dtype of z, the last state, and the state before every tile of `rows` rows (batch,
    tiles, channels); none of these if `rows` is 0.
    """
    chosen = lanes("gated")
    cut = Cut(z, replace(chosen, rows=max(chosen.rows, rows)), offsets)
    y = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    tiles = marked_tiles(cut.tokens, rows, offsets)
    last, marks = cut.empty(cut.sequences, cut.channels), cut.empty(cut.batch, tiles, cut.channels)
    if z.numel() == 0:
        return y, last.zero_() if h0 is None else last.copy_(h0), marks
    h0 = None if h0 is None else h0.contiguous()
    gate = (z if alpha is None else alpha, power)
    options = {
        **cut.options, "REVERSED": reversed, "LEARNED": alpha is not None,
        "PAIRS": in_pairs(cut, f, z, i, o), "NATIVE": not interpreting(),
    }  # fmt: skip
    inputs = (f, *f.stride(), z, *z.stride(), i, *i.stride())
    behind = last
    if cut.chained:
        own = cut.own()
        launch(
            gated_totals_kernel, cut.programs,
            *inputs, *gate, *own[:2], *cut.where, BACK=False, **options,
        )  # fmt: skip
        behind = cut.meet(own, h0, last, back=False)
    launch(
        gated_walk_kernel, cut.programs,
        *inputs, o, *o.stride(), *gate, last if h0 is None else h0, behind, y, last, marks,
        cut.table, cut.tokens, cut.length, cut.segments, tiles, cut.channels,
        STARTED=h0 is not None, MARKED=rows, **options,
    )  # fmt: skip
    return y, last, marks


def backward(
    dy: Tensor, dlast: Tensor, f: Tensor, z: Tensor, i: Tensor, o: Tensor, alpha: Tensor | None,
    power: float, reversed: bool, marks: Tensor, offsets: Tensor | None, rows: int, slope: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """df, dz, di, do, the gradient of alpha if `slope`, and that of the state before the first
    token.
    """
    cut = Cut(z, replace(lanes("gated gradient"), rows=rows), offsets)
    df, dz, di, do = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (f, z, i, o))
    if z.numel() == 0:
        return df, dz, di, do, cut.empty().zero_(), dlast.clone()
    dlast = dlast.contiguous()
    dh0 = cut.empty(cut.sequences, cut.channels)
    gate = (z if alpha is None else alpha, power)
    shared = {"REVERSED": reversed, "LEARNED": alpha is not None, "NATIVE": not interpreting()}
    behind = dh0
    if cut.chained:
        own = cut.own()
        options = {**cut.options, "ROWS": max(rows, lanes("gated").rows)}
        launch(
            gated_totals_kernel, cut.programs,
            f, *f.stride(), dy, *dy.stride(), o, *o.stride(), *gate, *own[:2], *cut.where,
            BACK=True, PAIRS=in_pairs(cut, f, dy, o), **shared, **options,
        )  # fmt: skip
        behind = cut.meet(own, dlast, dh0, back=True)
    dalpha = dh0
    if slope:
        dalpha = cut.empty(cut.batch, cut.segments, cut.channels)
        # Segments in excess write nothing.
        dalpha = dalpha.zero_() if cut.packed else dalpha
    launch(
        gated_gradient_kernel, cut.programs,
        f, *f.stride(), z, *z.stride(), i, *i.stride(), o, *o.stride(), dy, *dy.stride(),
        *gate, marks, dlast, behind, df, dz, di, do, dalpha, dh0,
        cut.table, cut.tokens, cut.length, cut.segments, marks.shape[1], cut.channels,
        SLOPE=slope, PAIRS=in_pairs(cut, f, z, i, o, dy), **shared, **cut.options,
    )  # fmt: skip
    return df, dz, di, do, dalpha.sum() if slope else cut.empty().zero_(), dh0
