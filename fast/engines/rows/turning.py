"""The rotation of queries and keys to their positions: one custom op, which is its own gradient's.

A rotation is linear and its transpose is the rotation back, so the gradient of a turn is a turn
with `inverse` the other way round, by the same amplitudes and scales; nothing but positions and
frequencies is kept for it.
"""

from __future__ import annotations

import math
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnspec.fast.backend import choose_backend, load
from attnspec.fast.engines.operation import Operation


class Turn(NamedTuple):
    """How tokens are turned; `turn` says what the fields mean."""

    first: int
    half: int
    neighbours: bool
    inverse: bool
    log_base: float
    decay: float
    centre: int
    log_c: float
    floor: float
    dtype: torch.dtype


@cache
def _kernels(backend: str) -> ModuleType:
    """The implementation on `backend`, imported on first use."""
    return load(f"attnspec.fast.engines.rows.{backend}_turn")


def run_turn(
    q: Tensor,
    k: Tensor | None,
    pq: Tensor | None,
    pk: Tensor | None,
    f: Tensor | None,
    first: int,
    half: int,
    neighbours: bool,
    inverse: bool,
    log_base: float,
    decay: float,
    centre: int,
    log_c: float,
    floor: float,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """q and k turned, contiguous; without k the second result is empty."""
    how = Turn(
        first, half, neighbours, inverse, log_base, decay, centre, log_c, floor, dtype
    )  # fmt: skip
    if q.numel() == 0 and (k is None or k.numel() == 0):
        return _made(q, k, dtype)
    with torch.cuda.device_of(q):
        turned: tuple[Tensor, Tensor] = _kernels(backend).turn(q, k, pq, pk, f, how)
    return turned


turn_op = Operation("attnspec::turn", run_turn)


def _made(q: Tensor, k: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = (0,) if k is None else k.shape
    return q.new_empty(q.shape, dtype=dtype), q.new_empty(shape, dtype=dtype)


@turn_op.register_fake
def _(
    q: Tensor,
    k: Tensor | None,
    pq: Tensor | None,
    pk: Tensor | None,
    f: Tensor | None,
    *how: Any,
) -> tuple[Tensor, Tensor]:
    return _made(q, k, how[-2])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, *tensors = inputs[:5]
    ctx.save_for_backward(*tensors)
    ctx.how, ctx.dtype, ctx.paired = Turn(*inputs[5:-1]), q.dtype, k is not None
    ctx.backend = inputs[-1]


def _gradient(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    how = ctx.how._replace(inverse=not ctx.how.inverse, dtype=ctx.dtype)
    dk_given = dk if ctx.paired else None
    dq, dk = turn_op(dq, dk_given, *ctx.saved_tensors, *how, ctx.backend)
    return dq, dk if ctx.paired else None, *[None] * 14


turn_op.register_autograd(_gradient, setup_context=_setup)


def turn(
    q: Tensor,
    k: Tensor | None = None,
    pq: Tensor | None = None,
    pk: Tensor | None = None,
    f: Tensor | None = None,
    *,
    base: float = 10000.0,
    rotary_dims: int | None = None,
    neighbours: bool = False,
    decay: tuple[int, float] | None = None,
    warmth: tuple[float, float] | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """q (batch, heads, T, d) and k (batch, kv_heads, S, d), turned to their positions.

    `pq` (T) or (batch, T), `pk` (S) or (batch, S), of any numbers; keys stand at 0..S-1 and queries
    at the last T of them if not told. `f` (pairs) are angles for a step of one position, base^(-2m
    / `rotary_dims`) if None. The first `rotary_dims` channels turn, all d if None, channels m and
    m + pairs a pair, or 2m and 2m + 1 with `neighbours`; the others are copied.

    `decay` = (N, b) multiplies pair m of a query at p by zeta_m ^ ((p - N // 2) / b), with zeta_m =
    (2m + 0.4 d) / (1.4 d), and divides that of a key. `warmth` = (c, floor) multiplies queries
    at p by the larger of ln(p + 1) / ln c and `floor`.

    Angles, amplitudes and scales are float64, the rotation float32 (float64 for float64), and the
    results, contiguous, are rounded once, to `dtype` or that of q. Without k the second is empty.
    Differentiable in q and k. A mechanism has checked the arguments.
    """
    half = (q.shape[3] if rotary_dims is None else rotary_dims) // 2
    first = 0 if k is None else k.shape[2] - q.shape[2]
    centre, b = (0, math.inf) if decay is None else (decay[0] // 2, decay[1])
    c, floor = (1.0, 0.0) if warmth is None else warmth
    return turn_op(
        q, k, pq, pk, f, first, half, neighbours, False, math.log(base), 1 / b, centre,
        math.log(c), float(floor), q.dtype if dtype is None else dtype, choose_backend(backend, q),
    )  # fmt: skip
