"""LightNet over sequences laid end to end: the scan engine, told where they begin."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnspec.fast.backend import (
    FLOATS,
    check_attention_inputs,
    check_shape,
    check_size,
    check_tensor,
)
from attnspec.fast.engines.scan import additive_scan, scan
from attnspec.fast.linear.lightnet_checks import (
    check_channels,
    check_scale,
    given_state,
    repeated,
)
from attnspec.fast.linear.lightning_attention_2_chunks import as_state
from attnspec.fast.packing import check_offsets


def vector_decay_packed(
    q: Tensor,
    kbar: Tensor,
    v: Tensor,
    log_decay: Tensor,
    offsets: Tensor,
    S0: Tensor | None = None,
    *,
    scale: float = 1.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """o (heads, total, e) and the last states S, float32 (sequences, heads, d, e).

    q, kbar, log_decay (heads, total, d), v (heads, total, e), offsets int (sequences + 1)
    increasing from 0 to total; log decays at most 0, in any float dtype, S0 as S likewise.
    Differentiable in all but offsets and scale.
    """
    _check_tokens(q, kbar, v, offsets, "kbar")
    check_size("kbar", kbar.shape[0], q.shape[0], "heads, as in q")
    check_tensor("log_decay", log_decay, ("heads", "total", "d"), FLOATS)
    check_shape("log_decay", log_decay, tuple(q.shape))
    check_scale(scale)
    S0 = as_state("S0", S0, _state_shapes(q, v, offsets)[0], q)
    o, S = scan(
        q[None], kbar[None], v[None], log_decay=log_decay[None], state=S0, scale=scale,
        offsets=offsets, backend=backend,
    )  # fmt: skip
    return o[0], S


def lightnet_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    state: tuple[Tensor, Tensor] | None = None,
    *,
    scale: float = 1.0,
    backend: str | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """o (heads, total, e) and the float32 states: S (sequences, heads, d, e) and z (sequences,
    heads, d).

    q (heads, total, d), k (kv_heads, total, d), v (kv_heads, total, e), offsets int (sequences + 1)
    increasing from 0 to total. Differentiable, in the state too.
    """
    _check_tokens(q, k, v, offsets)
    check_channels("k", k)
    check_scale(scale)
    S0 = z0 = None
    if state is not None:
        if not isinstance(state, tuple) or len(state) != 2:
            raise TypeError(f"state: got {type(state).__name__}, expected (S, z)")
        S0, z0 = (
            given_state("state", x, shape, q)
            for x, shape in zip(state, _state_shapes(q, v, offsets), strict=True)
        )
    keys, values = (repeated(x[None], q.shape[0]) for x in (k, v))
    o, S, z = additive_scan(
        q[None], keys, values, S0, z0, scale=scale, offsets=offsets, backend=backend
    )
    return o[0], (S, z)


def _check_tokens(q: Any, k: Any, v: Any, offsets: Any, name: str = "k") -> None:
    for which, x in (("q", q), (name, k), ("v", v)):
        check_tensor(which, x, ("heads", "total", "d"), FLOATS)
    check_attention_inputs(q[None], k[None], v[None], FLOATS)
    check_size(name, k.shape[1], q.shape[1], "tokens, as in q")
    check_offsets(offsets, "q", q, q.shape[1])


def _state_shapes(q: Tensor, v: Tensor, offsets: Tensor) -> tuple[tuple[int, ...], ...]:
    """Those of S and of z."""
    shape = (offsets.shape[0] - 1, q.shape[0], q.shape[2])
    return (*shape, v.shape[2]), shape
