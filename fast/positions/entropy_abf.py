"""Entropy-ABF on the flash engine: queries are rotated, scaled and rounded once, then it is dense.

One launch of the rows engine turns queries and keys. Angles are float64 and sines and cosines
float32: at position 16000 a float32 angle is off by 1e-3.
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
    check_bool,
    check_device,
    check_integer,
    check_size,
    check_tensor,
    product,
    wide_dtype,
)
from attnspec.fast.engines.flash import SPECIALISED_CONFIGS, flash
from attnspec.fast.engines.flash.checks import check_masks
from attnspec.fast.engines.rows import turn
from attnspec.fast.engines.weights import average
from attnspec.fast.positions.entropy_abf_probe import attention_entropy, entropy_growth

__all__ = [
    "CLAIMS",
    "attend",
    "attention_entropy",
    "entropy_growth",
    "extended_attention",
    "layer_is_exempt",
    "logits",
    "rope_frequencies",
    "rope_rotate",
    "row_scale",
]
CLAIMS = {
    "rope_frequencies": {"launches": None},
    "rope_rotate": {"gradient": True},
    "row_scale": {"launches": None},
    "layer_is_exempt": {"launches": None},
    "logits": {"launches": None},
    "attend": {"launches": None},
    "attention_entropy": {"launches": None},
    "entropy_growth": {"launches": None},
    "extended_attention": {
        "gradient": True,
        "triton": {
            "draws": {"d": (16, 64, 80), "dv": (16, 64, 96), "group": (1, 2, 3)},
            "configs": SPECIALISED_CONFIGS,
        },
    },
}


def rope_frequencies(d: int, base: float = 500000.0, *, backend: str | None = None) -> Tensor:
    """Frequencies (d/2), float64 on the CPU, of an even head size `d`."""
    check_integer("d", d, least=2)
    if d % 2:
        raise ValueError(f"d: got {d}, expected an even head size")
    check_above("base", base, 1)
    return float(base) ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)


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
    return turn(x, None, positions, None, freqs, backend=backend)[0]


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
    _check_scale(c, floor)
    rows = positions.clamp(min=0).double() + 1
    return (rows.log() / math.log(c)).clamp(min=float(floor))


def layer_is_exempt(layer: int, n_exempt: int = 2, *, backend: str | None = None) -> bool:
    """Whether `layer`, counted from 0, leaves the logits unscaled."""
    check_integer("layer", layer, least=0)
    check_integer("n_exempt", n_exempt, least=0)
    return layer < n_exempt


def logits(
    q: Tensor,
    k: Tensor,
    pq: Tensor | None = None,
    pk: Tensor | None = None,
    *,
    layer: int,
    base: float = 500000.0,
    c: float = 4096,
    n_exempt: int = 2,
    floor: float = 1.0,
    freqs: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Logits (batch, heads, T, S), not masked, all of which are stored.

    Arguments as in `extended_attention`.
    """
    check_attention_inputs(q, k, k, FLOATS)
    options = layer, base, c, n_exempt, floor, freqs
    return _scores(*_turned(q, k, pq, pk, *options, wide_dtype(q), backend)).to(q.dtype)


def attend(
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
    """Output (batch, heads, T, dv) and weights P (batch, heads, T, S), all of which are stored.

    For a few queries, such as the last one that the probe asks for. Arguments as in
    `extended_attention`, which stores no weights.
    """
    check_attention_inputs(q, k, v, FLOATS)
    check_bool("causal", causal)
    check_masks(q, k, key_mask, None)
    options = layer, base, c, n_exempt, floor, freqs
    z = _scores(*_turned(q, k, pq, pk, *options, wide_dtype(q), backend))
    if causal:
        z = torch.where(_in_order(q, k, pq, pk), z, -math.inf)
    if key_mask is not None:
        z = torch.where(key_mask[:, None, None], z, -math.inf)
    out, P = average(z, v.repeat_interleave(q.shape[1] // v.shape[1], 1))
    return out, P.to(q.dtype)


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
    check_bool("causal", causal)
    check_masks(q, k, key_mask, None)
    options = layer, base, c, n_exempt, floor, freqs
    turned, keys = _turned(q, k, pq, pk, *options, q.dtype, backend)
    plain = pq is None and pk is None
    return flash(
        turned,
        keys,
        v,
        causal=causal and plain,
        key_mask=key_mask,
        mask=_in_order(q, k, pq, pk) if causal and not plain else None,
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


def _turned(
    q: Tensor, k: Tensor, pq: Tensor | None, pk: Tensor | None, layer: int, base: float, c: float,
    n_exempt: int, floor: float, freqs: Tensor | None, dtype: torch.dtype, backend: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q rotated and scaled and k rotated, rounded to `dtype`.

    Everything but q and k is checked here, before it is used.
    """
    check_above("base", base, 1)
    exempt = layer_is_exempt(layer, n_exempt)
    d = q.shape[3]
    for name, p, x in (("pq", pq, q), ("pk", pk, k)):
        if p is not None:
            check_positions(name, p, x)
    if d < 2 or d % 2:
        raise ValueError(f"q: got d {d}, expected an even head size")
    if freqs is not None:
        check_tensor("freqs", freqs, ("d/2",), FLOATS)
        check_device("freqs", freqs, "q", q)
        check_size("freqs", 2 * freqs.shape[0], d, "d, as in q")
    _check_scale(c, floor)
    warmth = None if exempt else (c, floor)
    return turn(
        q, k, pq, pk, freqs, base=base, warmth=warmth, dtype=dtype, backend=backend
    )  # fmt: skip


def _check_scale(c: Any, floor: Any) -> None:
    check_above("c", c, 1, infinite=True)
    check_above("floor", floor, 0)


def _in_order(q: Tensor, k: Tensor, pq: Tensor | None, pk: Tensor | None) -> Tensor:
    """bool (..., 1, T, S): keys that stand at or before queries."""
    T, S = q.shape[2], k.shape[2]
    pq = torch.arange(S - T, S, device=q.device) if pq is None else pq
    pk = torch.arange(S, device=q.device) if pk is None else pk
    return pk[..., None, None, :] <= pq[..., None, :, None]


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """Scaled dot products (batch, heads, T, S) of queries and the keys of their groups."""
    grouped = q.unflatten(1, (k.shape[1], q.shape[1] // k.shape[1]))
    return product(grouped, k.mT[:, :, None]).flatten(1, 2) / math.sqrt(q.shape[3])
