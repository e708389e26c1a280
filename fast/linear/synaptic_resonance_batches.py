"""Synaptic Resonance over sequences laid end to end, each with a memory and a trace of its own.

On Triton offsets go into the kernels. On the CPU the memory and its trace are packed scans, as they
are scans for one sequence: all queries are moved one token on, the last of a sequence asks nothing,
and its first one the state that came in.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnspec.fast.backend import FLOATS, check_tensor, choose_by_dtype, product, wide
from attnspec.fast.engines.scan import constant_decay, scan
from attnspec.fast.linear.lightning_attention_2_chunks import as_state
from attnspec.fast.linear.synaptic_resonance_decode import check_softmax
from attnspec.fast.linear.synaptic_resonance_memory import check_memory, check_number, cosine, unit
from attnspec.fast.linear.synaptic_resonance_whole import attend_real, resonance
from attnspec.fast.packing import check_offsets


def synaptic_resonance_packed(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, S0: Tensor | None = None,
    c0: Tensor | None = None, *, eta: float = 0.1, lam: float = 0.99, mu: float = 0.9,
    beta: float = 0.5, window: int | None = None, backend: str | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:  # fmt: skip
    """y (heads, total, dv), and the states: S (sequences, kv_heads, d, dv), c (sequences, kv_heads,
    d), both float32.

    q (heads, total, d), k (kv_heads, total, d), v (kv_heads, total, dv); offsets int (sequences +
    1), increasing from 0 to the total, which is checked on CPU tensors only: a check on a CUDA
    device would wait for it. S0 and c0 are states, in any float dtype. d and dv up to 256.
    Differentiable in q, k, v, S0 and c0.
    """
    for name, x, axes in (
        ("q", q, ("heads", "total", "d")),
        ("k", k, ("kv_heads", "total", "d")),
        ("v", v, ("kv_heads", "total", "dv")),
    ):
        check_tensor(name, x, axes, FLOATS)
    q, k, v = q[None], k[None], v[None]
    check_memory(q, k, v, eta, lam, None)
    check_number("mu", mu, 0.0, 1.0, below=True)
    check_softmax(beta, window)
    shape = (check_offsets(offsets, "q", q, q.shape[2]), k.shape[1], k.shape[3])
    S0 = as_state("S0", S0, (*shape, v.shape[3]), k)
    c0 = as_state("c0", c0, shape, k)
    offsets = offsets.to(torch.int64).contiguous()
    if choose_by_dtype(backend, "q", q) == "triton":
        numbers: dict[str, Any] = {"eta": eta, "lam": lam, "mu": mu, "beta": beta}
        y, state = resonance(q, k, v, S0, c0, None, **numbers, window=window, offsets=offsets)
        return y[0], state
    places = _places(offsets, q.shape[2])
    rho, c = _resonate(k, mu, places, c0, backend)
    o, _ = attend_real(q, k, v, None, window, backend, offsets)
    m, S = _remember(q, k, v, rho, eta, lam, places, S0, backend)
    return torch.add(o, m, alpha=beta)[0], (S, c)


class _Places(NamedTuple):
    """Where packed sequences lie: `offsets`, the `sequence` (total,) of each token, and which are
    the `first` and the `last` of theirs.
    """

    offsets: Tensor
    sequence: Tensor
    first: Tensor
    last: Tensor


def _places(offsets: Tensor, total: int) -> _Places:
    token = torch.arange(total, device=offsets.device)
    sequence = torch.searchsorted(offsets[1:].contiguous(), token, right=True)
    first, last = token == offsets[sequence], token + 1 == offsets[sequence + 1]
    return _Places(offsets, sequence, first, last)


def _resonate(
    k: Tensor, mu: float, at: _Places, c0: Tensor | None, backend: str | None
) -> tuple[Tensor, Tensor]:
    """rho (1, kv_heads, total) and the last traces (sequences, kv_heads, d)."""
    kh = unit(k)
    one = kh.new_ones(()).expand(*kh.shape[:3], 1)
    slopes, _ = constant_decay(mu, kh, kh.shape[1], None)
    state = None if c0 is None else c0[:, :, None]
    traces, c = scan(
        one, one * (1 - mu), kh, slopes=slopes, state=state, offsets=at.offsets, backend=backend
    )
    before = _one_later(traces)
    entering = torch.zeros_like(before) if c0 is None else _by_token(c0, at)
    before = torch.where(at.first[:, None], entering, before)
    return cosine(kh, before), c[:, :, 0]


def _remember(
    q: Tensor, k: Tensor, v: Tensor, rho: Tensor, eta: float, lam: float, at: _Places,
    S0: Tensor | None, backend: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """m (1, heads, total, dv) and the last states (sequences, kv_heads, d, dv)."""
    qh, heads = unit(q).to(v.dtype), q.shape[1]
    group = heads // k.shape[1]
    gated = (eta * rho[..., None] * unit(k)).to(v.dtype)
    state = None if S0 is None else S0.repeat_interleave(group, 1)
    slopes, _ = constant_decay(lam, wide(qh), heads, None)
    later = torch.cat([qh[:, :, 1:], qh.new_zeros(qh[:, :, :1].shape)], 2)
    later = torch.where(at.last[:, None], 0.0, later)
    out, S = scan(later, gated, v, slopes=slopes, state=state, offsets=at.offsets, backend=backend)
    m = _one_later(out)
    asked = torch.zeros_like(m)
    if state is not None and q.shape[2]:
        begin, end = at.offsets[:-1], at.offsets[1:]
        rows = qh[0].index_select(1, begin.clamp(max=q.shape[2] - 1)).transpose(0, 1)[:, :, None]
        # A sequence without tokens asks nothing: the row found there is another's.
        rows = torch.where((end > begin)[:, None, None, None], rows, 0.0)
        asked = _by_token(product(rows.to(state.dtype), state)[:, :, 0].to(v.dtype), at)
    return torch.where(at.first[:, None], asked, m), S[:, ::group]


def _one_later(x: Tensor) -> Tensor:
    """x (1, heads, total, d) moved one token on, zeros first."""
    return torch.cat([x.new_zeros(*x.shape[:2], 1, x.shape[3]), x], 2)[:, :, : x.shape[2]]


def _by_token(x: Tensor, at: _Places) -> Tensor:
    """x (sequences, heads, d) as (1, heads, total, d), each sequence's for all of its tokens."""
    return x.index_select(0, at.sequence).transpose(0, 1)[None]
