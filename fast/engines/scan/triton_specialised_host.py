"""The scan's specialised kernels on the host: descriptors and launches."""

from __future__ import annotations

from torch import Tensor

from attnspec.fast.engines.flash.triton_specialised_host import tiles_of
from attnspec.fast.engines.scan.triton_plan import SPECIALISED_COLUMNS, Call, consumed
from attnspec.fast.engines.scan.triton_specialised import specialised_walk_kernel
from attnspec.fast.engines.scan.triton_specialised_states import specialised_states_kernel
from attnspec.fast.engines.sizes import tile_width

LEAST_STAGES, STATES_STAGES = 2, 4
"""For which there is always room in shared memory, in a walk and in a sum."""


def walk(
    call: Call, q: Tensor, k: Tensor, v: Tensor, entering: Tensor | None, *,
    final: Tensor | None, product: Tensor | None, backward: bool, transposed: bool,
    inner: Tensor | None, outer: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`triton_plan.walk` of a call that its `specialises` has found fit."""
    rows, columns = q.shape[3], v.shape[3]
    out = call.rows(columns, call.dtype)
    each, length, tokens, heads = call.place()
    products, w, w_tiles = out, v, None
    if product is not None:
        products = call.empty(consumed(columns), call.batch, heads, tokens)
        w, w_tiles = product, tiles_of(product, call.block, SPECIALISED_COLUMNS)
    shared = call.shares(q, k, columns)
    call.recorder.launch(
        specialised_walk_kernel,
        call.segments.total * call.walkers(columns),
        tiles_of(q, call.block), tiles_of(k, call.block),
        tiles_of(v, call.block, SPECIALISED_COLUMNS), w_tiles,
        tiles_of(out, call.block, SPECIALISED_COLUMNS),
        *call.gate_arguments(q), *call.weight_arguments(inner, q),
        *call.weight_arguments(outer, q), q if entering is None else entering, products,
        q if final is None else final, call.scale, each, length, tokens, heads, call.batch,
        *(heads // x.shape[1] for x in (q, k, v, w)), call.shared_by(inner), call.shared_by(outer),
        R=rows, V=columns, WIDTH=tile_width(rows, 64), C=call.block,
        STAGES=call.cfg.specialised if shared and product is None else LEAST_STAGES,
        DECAY=call.decay, BACKWARD=backward, TRANSPOSED=transposed, ENTERING=entering is not None,
        FINAL=final is not None, PRODUCTS=product is not None, INNER=inner is not None,
        OUTER=outer is not None, SHARED=shared, num_warps=4,
    )  # fmt: skip
    return out, products


def sum_segments(
    call: Call, a: Tensor, b: Tensor, states: Tensor, decays: Tensor, *, backward: bool,
    every: bool, inner: Tensor | None,
) -> None:  # fmt: skip
    """`triton_plan.sum_segments` of a call that its `specialises` has found fit."""
    each, length, tokens, heads = call.place()
    call.recorder.launch(
        specialised_states_kernel,
        call.segments.total * call.walkers(call.dv),
        tiles_of(a, call.block), tiles_of(b, call.block, SPECIALISED_COLUMNS),
        *call.gate_arguments(a), *call.weight_arguments(inner, a), states, decays,
        call.scale, each, length, tokens, heads, heads // a.shape[1], heads // b.shape[1],
        call.shared_by(inner),
        D=call.d, DV=call.dv, WIDTH=tile_width(call.d, 64), C=call.block, STAGES=STATES_STAGES,
        DECAY=call.decay, BACKWARD=backward, EVERY=every, INNER=inner is not None,
        SHARED=call.shares(a, a, call.dv), num_warps=4,
    )  # fmt: skip
