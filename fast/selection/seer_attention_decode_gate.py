"""SeerAttention-R's gate on Numba and Triton: compressed keys, and a pooled query's scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnspec.fast.backend import (
    check_choice,
    check_integer,
    check_same,
    check_size,
    check_tensor,
    product,
)
from attnspec.fast.selection.seer_attention_gate import check_kinds, pool_blocks, rope

MODES = ("Qproj", "Qavg", "Qavgproj", "Qorig")


class GateCache(NamedTuple):
    """Raw keys `rest` (batch, kv_heads, < b, d) of the incomplete block and the compressed keys
    `gk` (batch, kv_heads, complete blocks, dg).
    """

    rest: Tensor
    gk: Tensor


def init_cache(k_t: Tensor, Wk: Tensor, *, backend: str | None = None) -> GateCache:
    """An empty cache for keys shaped as k_t (batch, kv_heads, d)."""
    check_tensor("k_t", k_t, ("batch", "kv_heads", "d"))
    check_tensor("Wk", Wk, ("kv_heads", "nk * d", "dg"))
    rest = k_t[:, :, None][:, :, :0]
    return GateCache(rest, rest.new_empty(*rest.shape[:3], Wk.shape[2]))


def compress_step(
    cache: GateCache,
    k_t: Tensor,
    Wk: Tensor,
    b: int,
    kinds: Sequence[str],
    base: float = 10000.0,
    norm: Tensor | None = None,
    *,
    backend: str | None = None,
) -> GateCache:
    """A new cache that includes the key k_t (batch, kv_heads, d) before its rotation.

    Wk (kv_heads, len(kinds) d, dg); `norm` (dg,) is the weight of an RMS norm, None for none.
    """
    check_tensor("k_t", k_t, ("batch", "kv_heads", "d"))
    check_tensor("Wk", Wk, ("kv_heads", "nk * d", "dg"))
    check_kinds(kinds)
    rest, gk = cache.rest, cache.gk
    check_integer("b", b, least=rest.shape[2] + 1)
    check_same("k_t", k_t, "the cache's keys", rest)
    check_same("Wk", Wk, "k_t", k_t)
    expected = (*rest.shape[:2], rest.shape[3])
    if tuple(k_t.shape) != expected:
        raise ValueError(f"k_t: got shape {tuple(k_t.shape)}, expected {expected}")
    projection = (k_t.shape[1], len(kinds) * k_t.shape[2], gk.shape[3])
    if tuple(Wk.shape) != projection:
        raise ValueError(f"Wk: got shape {tuple(Wk.shape)}, expected {projection}")
    rest = torch.cat([rest, k_t[:, :, None]], dim=2)
    if rest.shape[2] < b:
        return GateCache(rest, gk)
    start = torch.full((1,), gk.shape[2] * b, device=k_t.device)
    row = _rms_norm(product(pool_blocks(rest, b, kinds, backend=backend), Wk), norm)
    row, _ = rope(row, None, start, base, backend)
    return GateCache(rest[:, :, :0], torch.cat([gk, row], dim=2))


def decode_gate(
    q_t: Tensor,
    cache: GateCache,
    pos: int,
    Wq: Tensor | None,
    mode: str,
    base: float = 10000.0,
    norm: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Scores float32 (batch, kv_heads, nb) of the query q_t (batch, heads, d), before its rotation,
    at position `pos`; the cache holds its own token already.

    Wq (kv_heads, group, d, dg) for "Qproj", (kv_heads, d, dg) for "Qavgproj", None for "Qavg" and
    "Qorig", which need dg = d; `norm` (dg,) as in `compress_step`.
    """
    check_tensor("q_t", q_t, ("batch", "heads", "d"))
    check_integer("pos", pos, least=0)
    check_choice("mode", mode, MODES)
    rest, gk = cache.rest, cache.gk
    check_size("q_t", q_t.shape[0], gk.shape[0], "batch, as in the cache")
    kv_heads, dg, d = gk.shape[1], gk.shape[3], q_t.shape[2]
    if kv_heads < 1 or q_t.shape[1] % kv_heads:
        raise ValueError(
            f"q_t: got {q_t.shape[1]} query heads, expected a multiple of the {kv_heads} kv heads"
        )
    group = q_t.shape[1] // kv_heads
    _check_projection(Wq, {"Qproj": (kv_heads, group, d, dg), "Qavgproj": (kv_heads, d, dg)}, mode)
    check_same("q_t", q_t, "the cache", gk)
    if Wq is not None:
        check_same("Wq", Wq, "q_t", q_t)
    else:
        check_size("q_t", d, dg, "dg, as there is no Wq")
    gq = q_t.reshape(-1, kv_heads, group, d)
    if mode == "Qproj" and Wq is not None:
        gq = product(gq.flatten(2)[:, :, None], Wq.flatten(1, 2))
    elif mode != "Qorig":
        gq = gq.float().mean(2, keepdim=True).to(q_t.dtype)
        gq = gq if Wq is None else product(gq, Wq)
    at = torch.full((gq.shape[2],), pos, device=q_t.device)
    gq, _ = rope(_rms_norm(gq, norm), None, at, base, backend)
    scores = product(gq.float(), gk.float().transpose(2, 3)).mean(2) / math.sqrt(dg)
    # An incomplete block counts as a compressed key of zeros.
    return torch.nn.functional.pad(scores, (0, 1)) if rest.shape[2] else scores


def _rms_norm(x: Tensor, weight: Tensor | None) -> Tensor:
    """x (..., dg) divided by its root mean square (eps 1e-6), times weight (dg,), in float32."""
    if weight is None:
        return x
    check_tensor("norm", weight, ("dg",))
    check_same("norm", weight, "the projected x", x)
    check_size("norm", weight.shape[0], x.shape[-1], "dg")
    wide = x.float()
    mean = (wide * wide).mean(-1, keepdim=True)
    return (wide * torch.rsqrt(mean + 1e-6) * weight.float()).to(x.dtype)


def _check_projection(Wq: Any, shapes: dict[str, tuple[int, ...]], mode: str) -> None:
    if mode not in shapes:
        if Wq is not None:
            raise ValueError(f"Wq: got a tensor, expected None for mode {mode!r}")
        return
    if not isinstance(Wq, Tensor):
        raise TypeError(f"Wq: got {type(Wq).__name__}, expected torch.Tensor for mode {mode!r}")
    if tuple(Wq.shape) != shapes[mode]:
        raise ValueError(
            f"Wq: got shape {tuple(Wq.shape)}, expected {shapes[mode]} for mode {mode!r}"
        )
