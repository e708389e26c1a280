"""Attention of `dsf`: softmax on the flash engine, linear and normalised on the scan engine.

Sums that nothing normalises outgrow float16: such inputs are computed in float32. The normaliser of
linear attention is a second scan of one value channel, whose values are 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import FLOATS, check_attention_inputs, check_size, wide
from attnspec.fast.engines.flash import flash
from attnspec.fast.engines.rows import positive
from attnspec.fast.engines.scan import scan
from attnspec.fast.linear.lightning_attention_2_chunks import as_state, check_upstream

Pair = tuple[Tensor, Tensor]


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, *, backend: str | None = None) -> Tensor:
    """y (batch, heads, T, dv) of q, k (batch, heads, T, d), v (batch, heads, T, dv)."""
    check_tokens(q, k, v)
    return flash(q, k, v, causal=True, backend=backend)[0]


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, state: Pair | None = None, *, backend: str | None = None
) -> tuple[Tensor, Pair]:
    """y (batch, heads, T, dv) and the float32 state: h (batch, heads, dv, d), z (batch, heads, d).

    q, k (batch, heads, T, d), v (batch, heads, T, dv); differentiable, in the state too.
    """
    check_tokens(q, k, v)
    h0, z0 = check_pair(state, q, v)
    dtype = computed(q)
    phi, psi = (positive(x, dtype, backend=backend) for x in (q, k))
    ones = psi.new_ones(*psi.shape[:3], 1)
    eta, z = scan(phi, psi, ones, state=z0, backend=backend)
    nothing = eta[..., 0] == 0
    reads = torch.where(nothing, 0.0, 1 / torch.where(nothing, 1.0, wide(eta[..., 0])))
    y, h = scan(phi, psi, v.to(dtype), reads=reads, state=h0, backend=backend)
    return y.to(v.dtype), (h.mT.contiguous(), z[..., 0].clone())


def normalised_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    n: Tensor,
    h0: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """y (batch, heads, T, dv) and the last h, float32 (batch, heads, dv, d).

    q, k (batch, heads, T, d), v (batch, heads, T, dv), n (batch, heads, T); differentiable.
    """
    check_tokens(q, k, v)
    check_upstream("n", n, tuple(q.shape[:3]), q)
    start = as_state("h0", h0, (*q.shape[:2], v.shape[3], q.shape[3]), q)
    dtype = computed(q)
    y, h = scan(
        q.to(dtype), k.to(dtype), v.to(dtype), reads=torch.exp(-wide(n)),
        state=None if start is None else start.mT, backend=backend,
    )  # fmt: skip
    return y.to(v.dtype), h.mT.contiguous()


def computed(q: Tensor) -> torch.dtype:
    """The dtype in which unnormalised sums are computed."""
    return torch.float32 if q.dtype == torch.float16 else q.dtype


def check_tokens(q: Any, k: Any, v: Any) -> None:
    """One key and value for each query, no groups of heads."""
    check_attention_inputs(q, k, v, FLOATS)
    check_size("k", k.shape[1], q.shape[1], "heads, as in q")
    check_size("k", k.shape[2], q.shape[2], "tokens, as in q")


def check_pair(state: Any, q: Tensor, v: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The state as the scan engine takes it, (d, dv) and (d, 1), or None and None."""
    if state is None:
        return None, None
    if not isinstance(state, tuple) or len(state) != 2:
        raise TypeError(f"state: got {type(state).__name__}, expected (h, z)")
    shape = (*q.shape[:2], q.shape[3])
    h = as_state("state", state[0], (*q.shape[:2], v.shape[3], q.shape[3]), q)
    z = as_state("state", state[1], shape, q)
    if h is None or z is None:
        raise TypeError("state: got NoneType, expected (h, z)")
    return h.mT, z[..., None]
