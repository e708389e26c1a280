r"""The gradient of Flowformer's causal outputs, as one op beside the forward that keeps its sums.

With A = a + eps, B = b + eps, i = 1 / I, o = 1 / O, p = Ih, r = Oh, e = exp(clip r), E the running
sum of e, c = N e / E, g = sigmoid(p), KV the running state, and primes for gradients: let R_t be
KV' behind the last token and the sum of g_s i_s a_s out'_s^T over s >= t. Then

    v'_t = c_t R_t^T b_t,   c'_t = b_t . R_t v_t,   x_t = a_t . KV_t out'_t,
    p'_t = x_t i_t g_t (1 - g_t) / N_t,
    r'_t = (c'_t c_t + e_t (E'_T - sum_{s >= t} c'_s c_s / E_s)) / N_t  (0 where r is clamped),

x being the gradient of the gate g i. What was summed up to a token is summed from it on in the
gradient: with y_t = sbO'_T + sum_{s >= t} p'_s A_s and z_t = saI'_T + sum_{s >= t} r'_s B_s,

    I'_t = -i_t^2 (x_t g_t + N_t z_t . a_t),   O'_t = -o_t^2 N_t y_t . b_t,
    a'_t = g_t i_t KV_t out'_t + p'_t (sbO_t + eps) + I'_t (sb_t + eps) + N_t i_t z_t
           + sa'_T + sum_{s >= t} O'_s B_s,
    b'_t = c_t R_t v_t + r'_t (saI_t + eps) + O'_t (sa_t + eps) + N_t o_t y_t
           + sb'_T + sum_{s >= t} I'_s A_s.

p' and r' are the gradients of N p and N r, dot products of A and B with what precedes. The forward
keeps a few numbers a token, and its sums before every segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import load
from attnspec.fast.engines.scan.replay import kind as kind_of
from attnspec.fast.engines.scan.replay import known
from attnspec.fast.engines.scan.triton_widths import tiled

FLOW_PROGRAMS, STATE_PROGRAMS = 4096, 528
"""About how many segments all lines are cut in, for a large device."""
OUTPUTS, KEPT = 8, 8


def kept_lengths(lines: Any, tokens: Any) -> tuple[Any, Any]:
    """Tokens of a segment of flows and of one of states. They follow from the shapes alone, so that
    a tracer without the device knows the shapes of what is kept.
    """
    many = max(1, min(1024, FLOW_PROGRAMS // lines))
    few = max(1, min(256, STATE_PROGRAMS // lines))
    return -(-tokens // (64 * many)) * 64, -(-tokens // (128 * few)) * 128


def state_shapes(q: Tensor, v: Tensor, offsets: Tensor | None = None) -> list[tuple[int, ...]]:
    """Those of the parts of a state behind tokens like q and v, or behind each of the sequences
    that `offsets` packs.
    """
    sequences = q.shape[0] if offsets is None else offsets.shape[0] - 1
    heads, d = (sequences, q.shape[1]), q.shape[3]
    return [(*heads, d)] * 4 + [heads, (*heads, d, v.shape[3]), heads]


def _kept_shapes(q: Tensor, v: Tensor, offsets: Tensor | None) -> list[tuple[int, ...]]:
    """1 / I and 1 / O, Ih and Oh, gates, weights, the sums of e; before every segment the sums of a
    and b, and of their shares; and the states.
    """
    batch, heads, tokens, d = q.shape
    lines = batch * heads
    lengths = kept_lengths(lines, tokens)
    flows, states = (-(-tokens // length) for length in lengths)
    if offsets is not None:
        # As many segments as `segments.cut` makes room for.
        flows, states = (tokens // length + offsets.shape[0] - 1 for length in lengths)
    return [
        (2, lines, tokens), (2, lines, tokens), (lines, tokens), (lines, tokens), (lines, tokens),
        (2 * lines, flows, d), (2 * lines, flows, d), (lines * states, v.shape[3], d),
    ]  # fmt: skip


@cache
def _kernels(name: str) -> ModuleType:
    """The implementation, imported on first use."""
    return load(f"attnspec.fast.engines.scan.{name}")


Made = tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
    Tensor, Tensor, Tensor, Tensor,
]  # fmt: skip


@torch.library.custom_op("attnspec::kept_flows", mutates_args=())
def kept_flows_op(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor | None, first: Sequence[Tensor], eps: float,
    kind: int, low: float, high: float, clamped: bool,
) -> Made:  # fmt: skip
    """out, the parts of the last state, and what is kept."""
    tensors = (q, k, v, *first)
    key = kind_of(tensors, ("kept flows", eps, kind, low, high, clamped))
    replay = known(key) if offsets is None else None
    if replay is not None:
        return replay(tensors)  # type: ignore[return-value]
    bounds = (low, high) if clamped else None
    with torch.cuda.device_of(q):
        return _kernels("triton_flows_host").attend_in_order(
            tensors, eps, kind, bounds, key, True, offsets
        )


@kept_flows_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor | None, first: Sequence[Tensor], eps: float,
    kind: int, low: float, high: float, clamped: bool,
) -> Made:  # fmt: skip
    shapes = state_shapes(q, v, offsets) + _kept_shapes(q, v, offsets)
    made = (q.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return q.new_empty(*q.shape[:3], v.shape[3]), *made  # type: ignore[return-value]


@torch.library.custom_op("attnspec::kept_flows_backward", mutates_args=())
def kept_flows_backward_op(
    do: Tensor, last: Sequence[Tensor], q: Tensor, k: Tensor, v: Tensor, offsets: Tensor | None,
    first: Sequence[Tensor], kept: Sequence[Tensor], eps: float, kind: int, low: float, high: float,
    clamped: bool,
) -> list[Tensor]:  # fmt: skip
    """The gradients of q, k and v, and of the parts of the first state if there is one, from those
    of out and, if `last` is not empty, of the parts of the last state.
    """
    (do,) = tiled(do)
    last = [x.contiguous() for x in last]
    start = [x.contiguous() for x in first[-1:]]
    tensors = (q, k, v, do, *kept, *start, *last)
    options = (len(start), len(last), eps, kind, low, high, clamped)
    key = kind_of(tensors, ("kept flows backward", *options))
    replay = known(key) if offsets is None else None
    with torch.cuda.device_of(q):
        if replay is not None:
            made = replay(tensors)
        else:
            bounds = (low, high) if clamped else None
            made = _kernels("triton_flows_gradient_host").backward(
                q, k, v, do, kept, start, last, eps, kind, bounds, key, offsets
            )
        dq, dk, dv, *sums, masses, counts = made
        grads = [dq, *(_sum_groups(x, like) for x, like in ((dk, k), (dv, v)))]
        if first:
            dse, dN = (x.view(first[4].shape) for x in (-masses.sum(1), counts.sum((0, 2))))
            if last:
                dse, dN = dse + last[4], dN + last[6]
            grads += [*sums[:4], dse, sums[4], dN]
    return grads


@kept_flows_backward_op.register_fake
def _(
    do: Tensor, last: Sequence[Tensor], q: Tensor, k: Tensor, v: Tensor, offsets: Tensor | None,
    first: Sequence[Tensor], kept: Sequence[Tensor], eps: float, kind: int, low: float, high: float,
    clamped: bool,
) -> list[Tensor]:  # fmt: skip
    return [x.new_empty(x.shape) for x in (q, k, v, *first)]


def _sum_groups(x: Tensor, like: Tensor) -> Tensor:
    """x (batch, heads, tokens, width) summed over the query heads of each head of `like`."""
    if x.shape[1] != like.shape[1]:
        x = x.unflatten(1, (like.shape[1], -1)).sum(2).to(like.dtype)
    return x


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, offsets, first, *ctx.options = inputs
    kept = output[OUTPUTS:]
    ctx.parts = len(first)
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, offsets, *first, *kept)


def _gradient(ctx: Any, do: Tensor | None, *others: Tensor | None) -> tuple[Any, ...]:
    q, k, v, offsets, *rest = ctx.saved_tensors
    first, kept = rest[: ctx.parts], rest[ctx.parts :]
    last: list[Tensor] = []
    states = others[: OUTPUTS - 1]
    if any(x is not None for x in states):
        last = [
            q.new_zeros(shape, dtype=torch.float32) if x is None else x
            for x, shape in zip(states, state_shapes(q, v, offsets), strict=True)
        ]
    if do is None:
        do = q.new_zeros(*q.shape[:3], v.shape[3])
    grads = kept_flows_backward_op(do, last, q, k, v, offsets, list(first), kept, *ctx.options)
    return *grads[:3], None, list(grads[3:]), None, None, None, None, None


kept_flows_op.register_autograd(_gradient, setup_context=_setup)
