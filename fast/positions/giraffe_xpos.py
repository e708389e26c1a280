"""Giraffe's xPos: queries and keys are turned and given their amplitudes, then it is dense.

Amplitudes are computed in float64 and applied in float32 by the launch that turns. bfloat16 has the
range of float32, so the products are rounded to it once, as any rotation is; float16 has not, and
is attended in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import (
    FLOATS,
    check_attention_inputs,
    check_bool,
    check_integer,
    check_same,
    check_size,
    check_tensor,
    wide_dtype,
)
from attnspec.fast.engines.flash import flash
from attnspec.fast.engines.flash.checks import check_masks
from attnspec.fast.engines.rows import turn
from attnspec.fast.positions.giraffe_rotation import (
    AXES,
    check_number,
    check_places,
    check_positions,
    check_width,
)


def xpos_scale(d: int, p: Tensor, N: int, b: float = 512, *, backend: str | None = None) -> Tensor:
    """The amplitudes (..., d/2), float64, of queries at `p` (...); keys have their inverse.

    `N` is the length of the model's position table, not of a cache, and `b` the scale base.
    """
    check_integer("d", d, least=2)
    check_width("d", d)
    check_places("p", p)
    check_integer("N", N, least=1)
    check_number("b", b, 0, strict=True)
    return _amplitudes(d, p, N, b)


def xpos(
    q: Tensor,
    k: Tensor,
    pq: Tensor,
    pk: Tensor,
    *,
    N: int,
    b: float = 512,
    base: float = 10000.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """q (batch, heads, T, d) and k (batch, kv_heads, S, d), turned and given their amplitudes.

    `pq` (T) or (batch, T), `pk` (S) or (batch, S). The results are float32, or float64 for float64
    inputs: half precision would not hold float16 amplitudes. Differentiable in q and k.
    """
    check_tensor("q", q, AXES, FLOATS)
    check_tensor("k", k, AXES, FLOATS)
    check_same("k", k, "q", q)
    check_size("k", k.shape[0], q.shape[0], "batch, as in q")
    check_size("k", k.shape[3], q.shape[3], "d, as in q")
    if k.shape[1] < 1 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"k: got {k.shape[1]} kv heads for {q.shape[1]} query heads, "
            f"expected a divisor of {q.shape[1]}"
        )
    _check_options(q, N, b, base)
    check_positions("pq", pq, q)
    check_positions("pk", pk, k)
    return _grown(q, k, pq, pk, N, b, base, wide_dtype(q), backend)


def xpos_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pq: Tensor | None = None,
    pk: Tensor | None = None,
    *,
    N: int,
    b: float = 512,
    base: float = 10000.0,
    causal: bool = True,
    key_mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Output (batch, heads, T, dv) and lse (batch, heads, T), float32.

    q (batch, heads, T, d), k (batch, kv_heads, S, d), v (batch, kv_heads, S, dv), d even, not yet
    turned; positions as in `xpos`, keys at 0..S-1 and queries at the last T of them by default;
    causal by index; `key_mask` bool (batch, S), True = a real key. Differentiable in q, k, v.
    """
    check_attention_inputs(q, k, v, FLOATS)
    _check_options(q, N, b, base)
    check_given(q, k, pq, pk)
    check_bool("causal", causal)
    check_masks(q, k, key_mask, None)
    within = torch.float32 if q.dtype == torch.float16 else q.dtype
    turned, keys = _grown(q, k, pq, pk, N, b, base, within, backend)
    out, lse = flash(
        turned, keys, v.to(within), causal=causal, key_mask=key_mask, backend=backend
    )  # fmt: skip
    return out.to(q.dtype), lse


def check_given(q: Tensor, k: Tensor, pq: Any, pk: Any) -> None:
    """Positions are what they should be, or None."""
    if pq is not None:
        check_positions("pq", pq, q)
    if pk is not None:
        check_positions("pk", pk, k)


def _check_options(q: Tensor, N: Any, b: Any, base: Any) -> None:
    check_width("q", q.shape[3])
    check_integer("N", N, least=1)
    check_number("b", b, 0, strict=True)
    check_number("base", base, 1, strict=True)


def _grown(
    q: Tensor, k: Tensor, pq: Tensor | None, pk: Tensor | None, N: int, b: float, base: float,
    dtype: torch.dtype, backend: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q and k turned, q multiplied by its amplitudes and k divided by them."""
    return turn(
        q, k, pq, pk, base=base, neighbours=True, decay=(N, b), dtype=dtype, backend=backend
    )


def _amplitudes(d: int, p: Tensor, N: int, b: float) -> Tensor:
    """Amplitudes (..., d/2), float64."""
    pairs = torch.arange(0, d, 2, device=p.device, dtype=torch.float64)
    # On CUDA torch turns division by a number into a product with its reciprocal, one unit off.
    width, scale = pairs.new_full((), 1.4 * d), pairs.new_full((), float(b))
    zeta = (pairs + 0.4 * d) / width
    return zeta ** ((p.double() - N // 2) / scale)[..., None]
