"""The recurrences of `dsf` over sequences laid end to end: offsets in the kernels of their scans.

There is no axis of a batch: packing is one. What offsets hold is checked on the CPU only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import FLOATS, check_tensor, wide
from attnspec.fast.engines.rows import positive
from attnspec.fast.engines.scan import elementwise, gated_scan, scan, selective
from attnspec.fast.linear.dsf_mixers import Pair, check_tokens, computed
from attnspec.fast.linear.dsf_rnn import check_gates, check_rg_lru, rg_lru_gates
from attnspec.fast.linear.dsf_ssm import check_s6, check_ssd
from attnspec.fast.linear.lightning_attention_2_chunks import as_state, check_upstream
from attnspec.fast.packing import check_offsets


def linear_attention_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    state: Pair | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Pair]:
    """y (heads, total, dv) and the float32 states: h (sequences, heads, dv, d), z (sequences,
    heads, d).

    q, k (heads, total, d), v (heads, total, dv), offsets int (sequences + 1), increasing from 0 to
    the total; differentiable, in the states too.
    """
    Q, K, V = (_one(name, x, ("heads", "total", "d")) for name, x in (("q", q), ("k", k), ("v", v)))
    check_tokens(Q, K, V)
    many = check_offsets(offsets, "q", q, q.shape[1])
    h0, z0 = _pairs(state, many, q, v)
    dtype = computed(q)
    phi, psi = (positive(x, dtype, backend=backend) for x in (Q, K))
    ones = psi.new_ones(*psi.shape[:3], 1)
    eta, z = scan(phi, psi, ones, state=z0, offsets=offsets, backend=backend)
    nothing = eta[..., 0] == 0
    reads = torch.where(nothing, 0.0, 1 / torch.where(nothing, 1.0, wide(eta[..., 0])))
    y, h = scan(phi, psi, V.to(dtype), reads=reads, state=h0, offsets=offsets, backend=backend)
    return y[0].to(v.dtype), (h.mT.contiguous(), z[..., 0].clone())


def s6_packed(
    Delta: Tensor,
    A: Tensor,
    b: Tensor,
    c: Tensor,
    u: Tensor,
    offsets: Tensor,
    D: Tensor | None = None,
    h0: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """y (total, dv) and the last h, float32 (sequences, dv, n).

    Delta >= 0 and u (total, dv), b, c (total, n) of one dtype; A >= 0 (dv, n), D (dv,), h0
    (sequences, dv, n) of any; offsets int (sequences + 1), increasing from 0 to the total.
    Differentiable in all but the offsets.
    """
    axes = ("total", "dv")
    d, B, C, U = (
        _one(name, x, axes) for name, x in (("Delta", Delta), ("b", b), ("c", c), ("u", u))
    )
    check_s6(d, A, B, C, D)
    check_upstream("u", u, tuple(Delta.shape), Delta)
    many = check_offsets(offsets, "u", u, u.shape[0])
    h0 = as_state("h0", h0, (many, *A.shape), u)
    y, last = selective(d, A, B, C, U, D, h0, offsets=offsets, backend=backend)
    return y[0], last


def ssd_packed(
    Delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    u: Tensor,
    offsets: Tensor,
    h0: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """y (heads, total, dv) and the last h, float32 (sequences, heads, dv, n).

    Delta >= 0 (heads, total), a >= 0 (heads,) of any float dtype, b, c (heads, total, n), u (heads,
    total, dv), offsets int (sequences + 1), increasing from 0 to the total. Differentiable in all
    but the offsets.
    """
    d = _one("Delta", Delta, ("heads", "total"))
    B, C, U = (_one(name, x, ("heads", "total", "n")) for name, x in (("b", b), ("c", c), ("u", u)))
    check_ssd(d, a, B, C)
    check_upstream("u", u, (*Delta.shape, u.shape[2]), Delta)
    many = check_offsets(offsets, "u", u, u.shape[1])
    start = as_state("h0", h0, (many, u.shape[0], u.shape[2], b.shape[2]), u)
    dtype = computed(u)
    y, h = scan(
        C.to(dtype), B.to(dtype), U.to(dtype), log_decay=-wide(a)[:, None] * wide(d), writes=d,
        state=None if start is None else start.mT, offsets=offsets, backend=backend,
    )  # fmt: skip
    return y[0].to(u.dtype), h.mT.contiguous()


def qlstm_packed(
    f: Tensor,
    i: Tensor,
    o: Tensor,
    z: Tensor,
    offsets: Tensor,
    alpha: float = 1.0,
    reversed: bool = False,
    h0: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """y (total, N) and the last h, float32 (sequences, N), of f, i, o and z (total, N).

    offsets int (sequences + 1), increasing from 0 to the total. Differentiable, also in an `alpha`
    that is a tensor of no axes.
    """
    F, I, O, Z = (
        _one(name, x, ("total", "N")) for name, x in (("f", f), ("i", i), ("o", o), ("z", z))
    )
    check_gates(F, I, O, alpha, reversed)
    check_upstream("z", z, tuple(f.shape), f)
    many = check_offsets(offsets, "z", z, z.shape[0])
    h0 = as_state("h0", h0, (many, z.shape[1]), z)
    y, last = gated_scan(F, I, O, Z, alpha, reversed, h0, offsets=offsets, backend=backend)
    return y[0], last


def rg_lru_packed(
    u: Tensor,
    r: Tensor,
    g: Tensor,
    lam: Tensor,
    offsets: Tensor,
    *,
    c: float = 8.0,
    h0: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """y (total, N) and the last h, float32 (sequences, N); u, r, g (total, N), lam (N,), offsets
    int (sequences + 1), increasing from 0 to the total, h0 (sequences, N). Differentiable.
    """
    U, R, G = (_one(name, x, ("total", "N")) for name, x in (("u", u), ("r", r), ("g", g)))
    check_rg_lru(R, G, lam, c, U)
    many = check_offsets(offsets, "u", u, u.shape[0])
    h0 = as_state("h0", h0, (many, u.shape[1]), u)
    log_decay, strength = rg_lru_gates(R, G, lam, c)
    x = strength * wide(U)
    y, last = elementwise(torch.exp(log_decay), x, h0, offsets=offsets, backend=backend)
    return y[0].to(u.dtype), last


def _one(name: str, x: Any, axes: tuple[str, ...]) -> Tensor:
    """A batch of one out of x with these axes."""
    check_tensor(name, x, axes, FLOATS)
    batch: Tensor = x[None]
    return batch


def _pairs(state: Any, many: int, q: Tensor, v: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The states as the scan engine takes them, (d, dv) and (d, 1), or None and None."""
    if state is None:
        return None, None
    if not isinstance(state, tuple) or len(state) != 2:
        raise TypeError(f"state: got {type(state).__name__}, expected (h, z)")
    heads, _, d = q.shape
    h = as_state("state", state[0], (many, heads, v.shape[2], d), q)
    z = as_state("state", state[1], (many, heads, d), q)
    if h is None or z is None:
        raise TypeError("state: got NoneType, expected (h, z)")
    return h.mT, z[..., None]
