"""Lightning Attention-2, block by block: states, outputs and gradients from log decays."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import (
    FLOATS,
    check_attention_inputs,
    check_device,
    check_integer,
    check_same,
    check_tensor,
    wide_dtype,
)
from attnspec.fast.engines.scan import scan_backward, segment_outputs, segment_states
from attnspec.fast.growing import checkable


def chunk_states(
    k: Tensor,
    v: Tensor,
    g: Tensor,
    block: int,
    S0: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The states (batch, heads, ceil(T/block), d, e) entering each block, and the last state.

    k (batch, kv_heads, T, d), v (batch, kv_heads, T, e), log decays g <= 0 (batch, heads, T), whose
    heads are those of the states, S0 (batch, heads, d, e). States are float32.
    """
    check_log_decays(k, v, g)
    check_integer("block", block, least=1)
    S0 = as_state("S0", S0, (*g.shape[:2], k.shape[3], v.shape[3]), k)
    return segment_states(k, v, block, heads=g.shape[1], log_decay=g, state=S0, backend=backend)


def chunk_output(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    S_entering: Tensor,
    block: int,
    *,
    backend: str | None = None,
) -> Tensor:
    """o (batch, heads, T, e) from the states that `chunk_states` returns first."""
    check_log_decays(k, v, g)
    check_integer("block", block, least=1)
    _check_queries(q, k, v, g)
    shape = (*g.shape[:2], (g.shape[2] + block - 1) // block, k.shape[3], v.shape[3])
    entering = as_state("S_entering", S_entering, shape, k)
    if entering is None:
        raise TypeError("S_entering: got NoneType, expected torch.Tensor")
    return segment_outputs(q, k, v, entering, block, log_decay=g, backend=backend)


def backward_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    do: Tensor,
    dS_final: Tensor | None = None,
    block: int = 64,
    S0: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dg (batch, heads, T), dS0 (batch, heads, d, e) of `chunk_output` after
    `chunk_states`; `block` is a hint for the kernels here.
    """
    check_log_decays(k, v, g)
    check_integer("block", block, least=1)
    _check_queries(q, k, v, g)
    check_upstream("do", do, (*g.shape, v.shape[3]), q)
    shape = (*g.shape[:2], k.shape[3], v.shape[3])
    return scan_backward(
        q, k, v, do, as_state("dS_final", dS_final, shape, k), log_decay=g,
        state=as_state("S0", S0, shape, k), block=block, backend=backend,
    )  # fmt: skip


def as_state(name: str, S: Any, shape: tuple[int, ...], like: Tensor) -> Tensor | None:
    """A state of this shape in the dtype of states, float32 (float64 for float64 inputs)."""
    if S is None:
        return None
    check_upstream(name, S, shape, like, dtypes=FLOATS)
    return S.to(wide_dtype(like))


def check_upstream(
    name: str,
    x: Any,
    shape: tuple[int, ...],
    like: Tensor,
    dtypes: tuple[torch.dtype, ...] | None = None,
) -> None:
    """`x` has this shape, the device of `like` and, unless `dtypes` are given, its dtype."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, expected torch.Tensor")
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected {tuple(shape)}")
    if dtypes is not None and x.dtype not in dtypes:
        raise TypeError(f"{name}: got dtype {x.dtype}, expected a float dtype")
    if dtypes is None:
        check_same(name, x, "the others", like)
    else:
        check_device(name, x, "the others", like)


def check_slopes(s: Any, heads: int | None = None, name: str = "s") -> None:
    """`name` (heads,) holds finite slopes >= 0, one for each query head; values on the CPU only."""
    check_tensor(name, s, ("heads",), FLOATS)
    if heads is not None and s.shape[0] != heads:
        raise ValueError(f"{name}: got shape {tuple(s.shape)}, expected ({heads},)")
    if checkable(s) and not bool((torch.isfinite(s) & (s >= 0)).all()):
        raise ValueError(f"{name}: got {s.tolist()}, expected finite slopes >= 0")


def check_log_decays(k: Any, v: Any, g: Any) -> None:
    """g (batch, heads, T) fits k and v, and is finite and <= 0; values on the CPU only."""
    check_tensor("k", k, ("batch", "kv_heads", "tokens", "d"), FLOATS)
    check_attention_inputs(k, k, v, FLOATS)
    check_tensor("g", g, ("batch", "heads", "tokens"), FLOATS)
    if g.shape[0] != k.shape[0] or g.shape[2] != k.shape[2]:
        raise ValueError(
            f"g: got shape {tuple(g.shape)}, expected ({k.shape[0]}, heads, {k.shape[2]})"
        )
    heads, kv_heads = g.shape[1], k.shape[1]
    if heads % kv_heads:
        raise ValueError(
            f"k: got {kv_heads} kv heads for {heads} query heads, expected a divisor of {heads}"
        )
    if checkable(g) and not bool((torch.isfinite(g) & (g <= 0)).all()):
        raise ValueError(f"g: got log decays up to {float(g.max())}, expected finite values <= 0")


def _check_queries(q: Any, k: Tensor, v: Tensor, g: Tensor) -> None:
    check_upstream("q", q, (*g.shape, k.shape[3]), k)
    check_attention_inputs(q, k, v, FLOATS)
