"""Titans beside attention on the fast path: MAC, MAG and MAL from the flash and memory engines.

One head, with an explicit batch axis. A prefix that is always seen is a sink of the flash engine.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import (
    FLOATS,
    check_integer,
    check_same,
    check_size,
    check_tensor,
    product,
    wide,
)
from attnspec.fast.engines.flash import flash
from attnspec.fast.engines.memory import memory
from attnspec.fast.linear.titans_checks import Layers, check_memory_inputs, check_states
from attnspec.fast.linear.titans_memory import mlp_memory

EPSILON = 1e-6


def persistent_prefix(P: Tensor, x: Tensor, *, backend: str | None = None) -> Tensor:
    """Rows (..., N_p + T, D) of P (N_p, D), then x (..., T, D). Differentiable."""
    _check_rows("x", x)
    check_tensor("P", P, ("N_p", "D"), FLOATS)
    check_size("P", P.shape[1], x.shape[-1], "D, as in x")
    check_same("P", P, "x", x)
    return torch.cat([P.expand(*x.shape[:-2], *P.shape), x], -2)


def titans_mask_mac(T: int, C: int, N_p: int, tokenwise: bool = False) -> Tensor:
    """bool (T, N_p + 2 T) on the CPU, True where a row may look; [P | memory rows | x]."""
    check_integer("T", T, least=0)
    check_integer("C", C, least=1)
    check_integer("N_p", N_p, least=0)
    return _mac_mask(T, C, N_p, tokenwise, torch.device("cpu"))


def titans_mask_mag(T: int, w: int, N_p: int) -> Tensor:
    """bool (N_p + T, N_p + T) on the CPU, rows and columns [P | x]; the last w tokens, and P."""
    check_integer("T", T, least=0)
    check_integer("w", w, least=1)
    check_integer("N_p", N_p, least=0)
    row, column = torch.arange(N_p + T)[:, None], torch.arange(N_p + T)
    return (column <= row) & ((row - column < w) | (column < N_p))


def gate(
    y: Tensor, h: Tensor, gains: tuple[Tensor, Tensor], *, backend: str | None = None
) -> Tensor:
    """Rows (..., T, D) of attention y, gated by what the memory says, h; gains (D,) each.
    Differentiable.
    """
    _check_rows("y", y)
    _check_rows("h", h)
    if h.shape != y.shape:
        raise ValueError(f"h: got shape {tuple(h.shape)}, expected {tuple(y.shape)}, as y")
    check_gains(gains, y)
    opened = torch.sigmoid(_rms(wide(h)) * wide(gains[1]))
    return (_rms(wide(y)) * wide(gains[0]) * opened).to(y.dtype)


def mac_segment(
    seg: Tensor, P: Tensor, W: Any, S: Any, attn: Any, mem: Any, rates: Any, gains: Any, b: int, *,
    loss_scale: float = 2.0, tokenwise: bool = False, normalise: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Layers, Layers]:  # fmt: skip
    """o (batch, C, D) of one segment seg (batch, C, D), and the memory that has stored it.

    P (N_p, D); W, S tuples of layers that lead back to D, (batch, inputs, outputs) or without the
    batch; attn and mem three matrices each; rates of the C rows stored, numbers or (batch, C).
    """
    check_tensor("seg", seg, ("batch", "C", "D"), FLOATS)
    prefixed = persistent_prefix(P, seg)
    check_matrices("attn", attn, seg)
    check_matrices("mem", mem, seg)
    query = directed(projected(seg, mem[0]), normalise)
    layers, momentum = check_states(W, S, query)
    h = mlp_memory(layers, query)
    check_size("W", h.shape[-1], seg.shape[-1], "D, the width of the segment's rows")
    N_p, C = P.shape[0], seg.shape[1]
    z = torch.cat([prefixed[:, :N_p], h, seg], 1)
    q, k, v = (projected(rows, m)[:, None] for rows, m in zip((seg, z, z), attn, strict=True))
    # Without `tokenwise` the order of [P | h | x] alone says what a row sees.
    mask = _mac_mask(C, max(C, 1), N_p, True, seg.device) if tokenwise else None
    if mask is not None:
        y = flash(q, k, v, mask=mask[None, None], backend=backend)[0][:, 0]
    else:
        y = flash(q, k, v, causal=True, backend=backend)[0][:, 0]
    check_gains(gains, y)
    read, layers, momentum = _memory(
        y, layers, momentum, mem, rates, b, loss_scale, normalise, backend
    )
    if not tokenwise:
        read = mlp_memory(layers, directed(projected(y, mem[0]), normalise))
    return gate(y, read, gains), layers, momentum


def mag(
    x: Tensor, P: Tensor, W: Any, S: Any, attn: Any, mem: Any, rates: Any, gains: Any, w: int,
    b: int, *, loss_scale: float = 2.0, normalise: bool = False, backend: str | None = None,
) -> tuple[Tensor, Layers, Layers]:  # fmt: skip
    """o (batch, T, dv) of x (batch, T, D), and the memory; rates of the N_p + T rows stored."""
    check_tensor("x", x, ("batch", "T", "D"), FLOATS)
    xt = persistent_prefix(P, x)
    check_matrices("attn", attn, x)
    check_matrices("mem", mem, x)
    check_integer("w", w, least=1)
    y = _windowed(xt, attn, w, P.shape[0], backend)
    check_gains(gains, y)
    h, layers, momentum = _memory(xt, W, S, mem, rates, b, loss_scale, normalise, backend)
    check_size("W", h.shape[-1], y.shape[-1], "the width of the attention's rows")
    return gate(y, h, gains)[:, P.shape[0] :], layers, momentum


def mal(
    x: Tensor, P: Tensor, W: Any, S: Any, attn: Any, mem: Any, rates: Any, w: int, b: int, *,
    loss_scale: float = 2.0, normalise: bool = False, backend: str | None = None,
) -> tuple[Tensor, Layers, Layers]:  # fmt: skip
    """o (batch, T, dv) of x (batch, T, D), and the memory; rates of the N_p + T rows stored."""
    check_tensor("x", x, ("batch", "T", "D"), FLOATS)
    xt = persistent_prefix(P, x)
    check_matrices("mem", mem, x)
    check_integer("w", w, least=1)
    y, layers, momentum = _memory(xt, W, S, mem, rates, b, loss_scale, normalise, backend)
    check_matrices("attn", attn, y)
    return _windowed(y, attn, w, 0, backend)[:, P.shape[0] :], layers, momentum


def _windowed(x: Tensor, attn: Any, w: int, sinks: int, backend: str | None) -> Tensor:
    """Attention of rows x (batch, rows, D) to the last w, and to the first `sinks` of them."""
    q, k, v = (projected(x, matrix)[:, None] for matrix in attn)
    return flash(q, k, v, causal=True, window=w, sinks=sinks, backend=backend)[0][:, 0]


def _memory(
    x: Tensor, W: Any, S: Any, mem: Any, rates: Any, b: int, loss_scale: float, normalise: bool,
    backend: str | None,
) -> tuple[Tensor, Layers, Layers]:  # fmt: skip
    """The memory over rows x (batch, rows, D), stored and read in order."""
    q, k = (directed(projected(x, matrix), normalise)[:, None] for matrix in mem[:2])
    # Values enter no product: they need not be rounded to the dtype of the rows.
    v = product(wide(x), wide(mem[2]))[:, None]
    layers, momentum = check_states(W, S, k[:, 0])
    if isinstance(rates, (tuple, list)):
        rates = tuple(r[:, None] if isinstance(r, Tensor) and r.dim() else r for r in rates)
    first, second = (tuple(w[:, None] for w in y) for y in (layers, momentum))
    _, _, full = check_memory_inputs(
        first, second, k, v.to(k.dtype), q, rates, b, loss_scale, "inclusive", None
    )
    y, last_W, last_S = memory(
        first, second, k, v, q, full, b, loss_scale=loss_scale, backend=backend
    )
    return y[:, 0], tuple(w[:, 0] for w in last_W), tuple(s[:, 0] for s in last_S)


def directed(x: Tensor, normalise: bool) -> Tensor:
    """Rows x, of norm 1 if `normalise`."""
    if not normalise:
        return x
    rows = wide(x)
    return (rows * torch.rsqrt((rows * rows).sum(-1, keepdim=True) + EPSILON)).to(x.dtype)


def projected(x: Tensor, matrix: Tensor) -> Tensor:
    """Rows x (..., rows, width) through a matrix, in their dtype."""
    return product(wide(x), wide(matrix)).to(x.dtype)


def _rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPSILON)


def _mac_mask(T: int, C: int, N_p: int, tokenwise: bool, device: torch.device) -> Tensor:
    row, column = torch.arange(T, device=device)[:, None], torch.arange(T, device=device)
    together, before = row // C == column // C, column <= row
    asked = together & before if tokenwise else together
    prefix = torch.ones(T, N_p, dtype=torch.bool, device=device)
    return torch.cat([prefix, asked, together & before], 1)


def _check_rows(name: str, x: Any) -> None:
    if isinstance(x, Tensor) and x.dim() < 2:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected (..., T, D)")
    check_tensor(name, x, ("...",) * x.dim() if isinstance(x, Tensor) else (), FLOATS)


def check_matrices(name: str, matrices: Any, x: Tensor) -> None:
    """Three matrices (D, width) for rows x (..., T, D)."""
    if not isinstance(matrices, (tuple, list)):
        raise TypeError(f"{name}: got {type(matrices).__name__}, expected three matrices")
    if len(matrices) != 3:
        raise ValueError(f"{name}: got {len(matrices)}, expected three matrices")
    for matrix in matrices:
        check_tensor(name, matrix, ("D", "width"), FLOATS)
        check_size(name, matrix.shape[0], x.shape[-1], "D, the width of the rows")
        check_same(name, matrix, "the rows", x)
    check_size(name, matrices[1].shape[1], matrices[0].shape[1], "columns for keys, as for queries")


def check_gains(gains: Any, y: Tensor) -> None:
    """Two vectors as wide as the rows y."""
    if not isinstance(gains, (tuple, list)):
        raise TypeError(f"gains: got {type(gains).__name__}, expected two vectors")
    if len(gains) != 2:
        raise ValueError(f"gains: got {len(gains)}, expected two vectors")
    for gain in gains:
        check_tensor("gains", gain, ("D",), FLOATS)
        if gain.shape != y.shape[-1:]:
            raise ValueError(f"gains: got shape {tuple(gain.shape)}, expected ({y.shape[-1]},)")
        check_same("gains", gain, "the rows", y)
