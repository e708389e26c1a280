"""Entropy-ABF on the flash engine: queries are rotated, scaled and rounded once, then it is dense.

Angles are float64 and sines and cosines float32: at position 16000 a float32 angle is off by 1e-3.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import (
    FLOATS,
    INTEGERS,
    check_attention_inputs,
    check_device,
    check_integer,
    check_size,
    check_tensor,
    wide_dtype,
)
from attnspec.fast.engines.flash import flash

CLAIMS = {
    "rope_rotate": {"gradient": True, "launches": None},
    "row_scale": {"launches": None},
    "layer_is_exempt": {"launches": None},
    "extended_attention": {
        "gradient": True,
        "triton": {"draws": {"d": (16, 64, 80), "dv": (16, 64, 96), "group": (1, 2, 3)}},
    },
}


def rope_rotate(
    x: Tensor, positions: Tensor, freqs: Tensor, *, backend: str | None = None
) -> Tensor:
    """`x` (batch, heads, tokens, d) turned to `positions`, int (tokens) or (batch, tokens).

    `freqs` (d/2) are angles for a step of one position. Differentiable in x.
    """
    check_tensor("x", x, ("batch", "heads", "tokens", "d"), FLOATS)
    check_positions("positions", positions, x)
    check_tensor("freqs", freqs, ("d/2",), FLOATS)
    check_device("freqs", freqs, "x", x)
    if 2 * freqs.shape[0] != x.shape[3]:
        raise ValueError(f"freqs: got {freqs.shape[0]}, expected half of the {x.shape[3]} channels")
    return _turn(x, positions, freqs).to(x.dtype)


def row_scale(
    positions: Tensor, c: float = 4096, floor: float = 1.0, *, backend: str | None = None
) -> Tensor:
    """The scale, float64 and shaped as `positions` (..., tokens), of queries standing there."""
    if not isinstance(positions, Tensor):
        raise TypeError(f"positions: got {type(positions).__name__}, expected torch.Tensor")
    if positions.dtype not in INTEGERS:
        raise TypeError(f"positions: got dtype {positions.dtype}, expected int32 or int64")
    if positions.dim() < 1:
        raise ValueError("positions: got shape (), expected (..., tokens)")
    check_above("c", c, 1, infinite=True)
    check_above("floor", floor, 0)
    rows = positions.clamp(min=0).double() + 1
    return (rows.log() / math.log(c)).clamp(min=float(floor))


def layer_is_exempt(layer: int, n_exempt: int = 2, *, backend: str | None = None) -> bool:
    """Whether `layer`, counted from 0, leaves the logits unscaled."""
    check_integer("layer", layer, least=0)
    check_integer("n_exempt", n_exempt, least=0)
    return layer < n_exempt


def extended_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pq: Tensor | None = None,
    pk: Tensor | None = None,
    *,
    layer: int,
    base: float = 500000.0,
    c: float = 4096,
    n_exempt: int = 2,
    floor: float = 1.0,
    freqs: Tensor | None = None,
    causal: bool = True,
    key_mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Output (batch, heads, T, dv) and lse (batch, heads, T), float32, of the scaled logits.

    q (batch, heads, T, d), k (batch, kv_heads, S, d), v (batch, kv_heads, S, dv), d even, not yet
    rotated; `pq` int (T) or (batch, T), `pk` int (S) or (batch, S); `key_mask` bool (batch, S),
    True = a real key. A key is visible if its position is at most the query's. Without positions
    that is the causal order of the engine; with them it costs a mask (batch, 1, T, S), unless
    ``causal=False``. `freqs` (d/2) takes the place of those of `base`. Differentiable in q, k, v.
    """
    check_attention_inputs(q, k, v, FLOATS)
    check_above("base", base, 1)
    in_order = pq is None and pk is None
    T, S, d = q.shape[2], k.shape[2], q.shape[3]
    pq = torch.arange(S - T, S, device=q.device) if pq is None else pq
    pk = torch.arange(S, device=q.device) if pk is None else pk
    check_positions("pq", pq, q)
    check_positions("pk", pk, k)
    if freqs is None:
        if d % 2:
            raise ValueError(f"q: got d {d}, expected an even head size")
        steps = torch.arange(0, d, 2, device=q.device, dtype=torch.float64)
        freqs = float(base) ** (-steps / d)
    else:
        check_tensor("freqs", freqs, ("d/2",), FLOATS)
        check_device("freqs", freqs, "q", q)
        check_size("freqs", 2 * freqs.shape[0], d, "d, as in q")
    lam = row_scale(pq, c, floor)
    turned = _turn(q, pq, freqs)
    if not layer_is_exempt(layer, n_exempt):
        turned = turned * lam.to(turned.dtype)[..., None, :, None]
    mask = None
    if causal and not in_order:
        mask = pk[..., None, None, :] <= pq[..., None, :, None]
    return flash(
        turned.to(q.dtype),
        _turn(k, pk, freqs).to(k.dtype),
        v,
        causal=causal and in_order,
        key_mask=key_mask,
        mask=mask,
        backend=backend,
    )


def check_above(name: str, value: Any, least: float, infinite: bool = False) -> None:
    """`value` is a number above `least`, finite unless `infinite`."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: got {value!r}, expected a number > {least}")
    if not float(value) > least or (math.isinf(value) and not infinite):
        raise ValueError(f"{name}: got {value}, expected a number > {least}")


def check_positions(name: str, positions: Any, x: Tensor) -> None:
    """`positions` are int (tokens) or (batch, tokens) for `x` (batch, heads, tokens, d)."""
    if not isinstance(positions, Tensor):
        raise TypeError(f"{name}: got {type(positions).__name__}, expected torch.Tensor")
    if positions.dtype not in INTEGERS:
        raise TypeError(f"{name}: got dtype {positions.dtype}, expected int32 or int64")
    whole = (x.shape[0], x.shape[2])
    if tuple(positions.shape) not in (whole, whole[1:]):
        raise ValueError(
            f"{name}: got shape {tuple(positions.shape)}, expected {whole} or {whole[1:]}"
        )
    check_device(name, positions, "the tokens", x)


def _turn(x: Tensor, positions: Tensor, freqs: Tensor) -> Tensor:
    """`x` rotated, in float32 or wider."""
    wide = wide_dtype(x)
    angles = positions.double()[..., None, :, None] * freqs.double()
    cos, sin = angles.cos().to(wide), angles.sin().to(wide)
    first, second = x.to(wide).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
