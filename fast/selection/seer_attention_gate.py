"""SeerAttention's gate on Numba and Triton: pooled blocks, projected, rotated and compared."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnspec.fast.backend import (
    FLOATS,
    check_integer,
    check_same,
    check_size,
    check_tensor,
    product,
    wide_dtype,
)
from attnspec.fast.engines import select
from attnspec.fast.engines.rows import turn

KINDS = ("max", "min", "avg")
MASKED = -1e9


def gate_kinds(name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The poolings of q and of k that a gate type such as "Qavg_Kmaxminavg" names."""
    parts = re.fullmatch(r"Q(max)?(min)?(avg)?_K(max)?(min)?(avg)?", name)
    found = parts.groups() if parts else (None,) * 6
    q_kinds = tuple(kind for kind in found[:3] if kind)
    k_kinds = tuple(kind for kind in found[3:] if kind)
    if not q_kinds or not k_kinds:
        raise ValueError(
            f"name: got {name!r}, expected Q and K each with max, min, avg, as 'Qavg_Kmaxmin'"
        )
    return q_kinds, k_kinds


def pool_blocks(x: Tensor, b: int, kinds: Sequence[str], *, backend: str | None = None) -> Tensor:
    """x (..., T, d) pooled over blocks of b tokens: (..., ceil(T/b), len(kinds) * d).

    `kinds` is a choice of "max", "min" and "avg", concatenated along channels in the order given.
    Differentiable.
    """
    check_integer("b", b, least=1)
    check_kinds(kinds)
    return select.pool_blocks(x, b, kinds, backend=backend)


def gate_rope(
    nb: int, b: int, dg: int, base: float = 10000.0, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin (nb, dg), float64 on the CPU, of block n standing at position n b."""
    check_integer("nb", nb, least=0)
    check_integer("b", b, least=1)
    check_integer("dg", dg, least=1)
    if dg % 2:
        raise ValueError(f"dg: got {dg}, expected an even width for rotary positions")
    if not base > 0:
        raise ValueError(f"base: got {base!r}, expected a positive number")
    # In NumPy, whose powers and cosines differ from torch's in the last place, as the chapter.
    angles = (b * np.arange(nb))[:, None] * base ** (-np.arange(0, dg, 2) / dg)
    return (
        torch.from_numpy(np.tile(np.cos(angles), 2)),
        torch.from_numpy(np.tile(np.sin(angles), 2)),
    )


def gate_scores(
    pq: Tensor,
    pk: Tensor,
    Wq: Tensor | None,
    Wk: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """G (batch, heads, nb, nb), -1e9 where the key block C > the query block R; float32.

    pq (batch, heads, nb, nq d), pk (batch, kv_heads, nb, nk d), cos and sin (nb, dg). Wq (heads, nq
    d, dg) with Wk (kv_heads, nk d, dg), or no Wq, for nq = 1 and dg = d, with Wk (heads, nk d, dg).
    Differentiable in pq, pk, Wq and Wk.
    """
    _check_gate(pq, pk, Wq, Wk, cos, sin)
    wide = wide_dtype(pq)
    cos, sin = (table.to(pq.device, wide) for table in (cos, sin))
    if Wq is None:
        gq, keys = pq, pk.repeat_interleave(pq.shape[1] // pk.shape[1], dim=1)
    else:
        gq, keys = product(pq, Wq), pk
    gq, gk = rotate(gq, cos, sin), rotate(product(keys, Wk), cos, sin)
    scale = 1 / math.sqrt(Wk.shape[2])
    return select.block_scores(gq, gk, scale=scale, fill=MASKED, backend=backend)


def rope_tables(positions: Tensor, d: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin (tokens, d), float64, of `positions` int (tokens), half-split pairs."""
    _check_rotary(d, base)
    exponents = -torch.arange(0, d, 2, dtype=torch.float64, device=positions.device) / d
    angles = positions[:, None].double() * base**exponents
    return angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (..., tokens, d) rotated, in the tables' dtype at least, and rounded to its own."""
    first, second = x.chunk(2, dim=-1)
    half = x.shape[-1] // 2
    cos, sin = cos[:, :half], sin[:, :half]
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x.dtype)


def rope(
    q: Tensor, k: Tensor | None, at: Tensor | None, base: float, backend: str | None
) -> tuple[Tensor, Tensor]:
    """q (batch, heads, tokens, d) and k, empty if there is none, rotated to the positions `at` int
    (tokens), by default those of the text.
    """
    _check_rotary(q.shape[3], base)
    return turn(q, k, at, at, base=base, backend=backend)


def _check_rotary(d: int, base: float) -> None:
    if d % 2:
        raise ValueError(f"d: got {d}, expected an even head size for rotary positions")
    if not base > 0:
        raise ValueError(f"base: got {base!r}, expected a positive number")


def check_kinds(kinds: Any, name: str = "kinds") -> None:
    """`kinds`, the argument `name`, is a choice of different poolings, at least one."""
    if not kinds or len(set(kinds)) != len(kinds) or not set(kinds) <= set(KINDS):
        known = ", ".join(map(repr, KINDS))
        raise ValueError(f"{name}: got {kinds!r}, expected different ones of {known}")


def _check_gate(pq: Any, pk: Any, Wq: Any, Wk: Any, cos: Any, sin: Any) -> None:
    check_tensor("pq", pq, ("batch", "heads", "nb", "nq * d"), FLOATS)
    check_tensor("pk", pk, ("batch", "kv_heads", "nb", "nk * d"), FLOATS)
    check_tensor("Wk", Wk, ("heads", "nk * d", "dg"), FLOATS)
    check_same("pk", pk, "pq", pq)
    check_same("Wk", Wk, "pq", pq)
    heads, kv_heads, nb, dg = pq.shape[1], pk.shape[1], pq.shape[2], Wk.shape[2]
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(
            f"pk: got {kv_heads} kv heads for {heads} query heads, expected a divisor of {heads}"
        )
    check_size("pk", pk.shape[0], pq.shape[0], "batch, as in pq")
    check_size("pk", pk.shape[2], nb, "nb, as in pq")
    check_size("Wk", Wk.shape[1], pk.shape[3], "channels, as in pk")
    for name, table in (("cos", cos), ("sin", sin)):
        check_tensor(name, table, ("nb", "dg"), FLOATS)
        if tuple(table.shape) != (nb, dg):
            raise ValueError(f"{name}: got shape {tuple(table.shape)}, expected {(nb, dg)}")
    if Wq is None:
        check_size("pq", pq.shape[3], dg, "dg, as there is no Wq")
        check_size("Wk", Wk.shape[0], heads, "heads, as in pq")
        return
    check_tensor("Wq", Wq, ("heads", "nq * d", "dg"), FLOATS)
    check_same("Wq", Wq, "pq", pq)
    check_size("Wq", Wq.shape[0], heads, "heads, as in pq")
    check_size("Wq", Wq.shape[1], pq.shape[3], "channels, as in pq")
    check_size("Wq", Wq.shape[2], dg, "dg, as in Wk")
    check_size("Wk", Wk.shape[0], kv_heads, "kv_heads, as in pk")
