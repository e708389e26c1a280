"""Lean attention: exact attention whose key tiles are shared evenly among the workers of a device.

`attend` runs on the decode engine, which works the schedule out on the device.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from attnspec.fast.backend import check_integer, check_size, choose_backend, product, wide_dtype
from attnspec.fast.engines.decode import CANDIDATES, decode, use_config
from attnspec.fast.parallel.lean_attention_schedule import (
    Segment,
    block_rows,
    check_kind,
    check_lengths,
    grid_size,
    helpers,
    lean_schedule,
    line_order,
    segments,
    split_bound,
    tile_size,
    tiles_per_output,
)

__all__ = [
    "Segment",
    "Triple",
    "attend",
    "finalize",
    "grid_size",
    "helpers",
    "lean_schedule",
    "line_order",
    "merge",
    "partial",
    "segments",
    "split_bound",
    "tile_size",
    "tiles_per_output",
]

CLAIMS = {
    "attend": {
        "blocks": (16, 64),
        "compiled": True,
        "triton": {
            "graph": True,
            "configs": {str(c): functools.partial(use_config, c) for c in CANDIDATES},
        },
    },
    **{name: {"launches": None} for name in __all__ if name != "attend"},
}
"""Only `attend` launches a kernel: the other steps are arithmetic on a triple or on integers."""
LARGEST_TILE = {"numba": 1024, "triton": 64}
LARGEST_BLOCK = 128


class Triple(NamedTuple):
    """S1: maximum m (..., rows), sum l (..., rows), output o (..., rows, dv) before division."""

    m: Tensor
    l: Tensor
    o: Tensor


def partial(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lo: int,
    hi: int,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Triple:
    """S1: the triple of keys lo .. hi - 1 for q (..., rows, d), k (..., Tk, d), v (..., Tk, dv).

    `mask` bool (..., rows, Tk), True = visible. A value no row sees is not read (K11). Half
    precision is computed, and returned, in float32.
    """
    check_kind("q", q, ("rows", "d"))
    check_kind("k", k, ("Tk", "d"))
    check_kind("v", v, ("Tk", "dv"))
    check_size("k", k.shape[-1], q.shape[-1], "d, as in q")
    check_size("v", v.shape[-2], k.shape[-2], "Tk, as in k")
    check_integer("lo", lo, least=0)
    check_integer("hi", hi, least=lo)
    if hi > k.shape[-2]:
        raise ValueError(f"hi: got {hi}, expected an integer <= {k.shape[-2]} (Tk)")
    wide = wide_dtype(q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    x = scale * (product(q.to(wide), k[..., lo:hi, :].to(wide).transpose(-1, -2)))
    values = v[..., lo:hi, :].to(wide)
    if mask is not None:
        check_kind("mask", mask, ("rows", "Tk"), "bool")
        check_size("mask", mask.shape[-1], k.shape[-2], "Tk, as in k")
        if mask.shape[-2] != 1:
            check_size("mask", mask.shape[-2], q.shape[-2], "rows, as in q")
        seen = mask[..., lo:hi]
        x = torch.where(seen, x, -torch.inf)
        values = torch.where(seen.any(dim=-2)[..., None], values, 0.0)
    m = torch.nn.functional.pad(x, (1, 0), value=-torch.inf).amax(-1)
    weights = torch.exp(x - _finite(m)[..., None])
    return Triple(m, weights.sum(-1), product(weights, values))


def merge(a: Triple, b: Triple) -> Triple:
    """S2: the triple of the union of two disjoint sets of keys, rounded once."""
    for name, triple in (("a", a), ("b", b)):
        for field, x in zip(Triple._fields, triple, strict=True):
            check_kind(f"{name}.{field}", x, ())
        _check_triple(*triple, f"{name}.")
    for field, x, y in zip(Triple._fields, a, b, strict=True):
        if y.shape != x.shape:
            raise ValueError(
                f"b.{field}: got shape {tuple(y.shape)}, expected {tuple(x.shape)}, as a.{field}"
            )
    m = torch.maximum(a.m, b.m)
    wide = wide_dtype(a.o)
    top = _finite(m).to(wide)
    scale_a, scale_b = torch.exp(a.m.to(wide) - top), torch.exp(b.m.to(wide) - top)
    total = scale_a * a.l + scale_b * b.l
    o = scale_a[..., None] * a.o + scale_b[..., None] * b.o
    return Triple(m, total.to(a.l.dtype), o.to(a.o.dtype))


def finalize(m: Tensor, l: Tensor, o: Tensor) -> tuple[Tensor, Tensor]:
    """S2: out (..., rows, dv) and lse (..., rows), float32 for half precision, of a triple."""
    check_kind("m", m, ("rows",))
    check_kind("l", l, ("rows",))
    check_kind("o", o, ("rows", "dv"))
    _check_triple(m, l, o)
    wide = wide_dtype(o)
    mass = l.to(wide)
    empty = mass == 0
    total = torch.where(empty, 1.0, mass)
    out = torch.where(empty[..., None], 0.0, o.to(wide) / total[..., None])
    return out.to(o.dtype), m.to(wide) + torch.log(total)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    N: int,
    G: int,
    scale: float | None = None,
    causal: bool = False,
    M: int | None = None,
    order: str = "natural",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """S1-S12: out (B, H, Tq, dv) and lse (B, H, Tq) float32, computed by G workers.

    q (B, H, Tq, d), k (B, Hkv, Tk, d), v (B, Hkv, Tk, dv); `lengths` int (B,) on their device:
    the first so many keys of a sequence exist, and the last query stands at the last of them.
    N keys a tile (at most 1024, or for Triton the next power of two from 16 to 64), M queries a
    block (of at most 128 packed rows; all if None). They change the result by rounding alone.
    """
    check_integer("N", N, least=1)
    check_integer("G", G, least=1)
    backend = choose_backend(backend, q) if isinstance(q, Tensor) else backend
    check_kind("lengths", lengths, ("batch",), "int")
    tile = min(N, LARGEST_TILE.get(str(backend), N))
    if backend == "triton":
        tile = max(16, 1 << (tile - 1).bit_length())
    rows = None
    if isinstance(q, Tensor) and isinstance(k, Tensor) and q.dim() == 4 and k.dim() == 4:
        check_lengths(lengths, k.shape[2])
        group = q.shape[1] // max(k.shape[1], 1)
        rows = max(1, min(block_rows(M, q.shape[2]) * group, LARGEST_BLOCK))
    return decode(
        q, k, v, lengths=lengths, scale=scale, causal=causal, rows=rows, tile=tile, workers=G,
        order=order, backend=backend,
    )  # fmt: skip


def _check_triple(m: Tensor, l: Tensor, o: Tensor, prefix: str = "") -> None:
    """The sums and outputs have the rows of the maxima."""
    for field, x, rows in (("l", l, l.shape), ("o", o, o.shape[:-1])):
        if rows != m.shape:
            raise ValueError(
                f"{prefix}{field}: got shape {tuple(x.shape)}, expected rows {tuple(m.shape)}, "
                f"as in {prefix}m"
            )


def _finite(m: Tensor) -> Tensor:
    """m, with 0 for -inf: a reference that makes every factor e^(-inf - m) zero, never NaN."""
    return torch.where(torch.isneginf(m), 0.0, m)
