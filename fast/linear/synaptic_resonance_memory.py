"""Synaptic Resonance, the memory on the scan engine: two recurrences with a constant decay.

On Triton both are operations of the engine: keys and queries go in as they are. On the CPU the
trace is a scan whose queries and keys are one number: its output is the moving average itself. The
memory reads before it writes, the scan writes before it reads: so queries are moved one token on,
as a view, the first of them asks the state that came in, and the last write is added behind.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import (
    FLOATS,
    check_attention_inputs,
    check_device,
    check_integer,
    check_size,
    check_tensor,
    choose_by_dtype,
    product,
    wide,
)
from attnspec.fast.engines.scan import FLOOR, constant_decay, hebbian, scan, trace
from attnspec.fast.linear.lightning_attention_2_chunks import as_state


def relevance(
    k: Tensor, mu: float = 0.9, valid: Tensor | None = None, c0: Tensor | None = None, *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """rho (batch, kv_heads, T) and the last trace c (batch, kv_heads, d), both float32.

    k (batch, kv_heads, T, d) without positions; `valid` bool (batch, T), True at real tokens; c0
    (batch, kv_heads, d) in any float dtype. Differentiable in k and c0.
    """
    check_tensor("k", k, ("batch", "kv_heads", "tokens", "d"), FLOATS)
    check_number("mu", mu, 0.0, 1.0, below=True)
    check_valid(valid, k)
    c0 = as_state("c0", c0, (*k.shape[:2], k.shape[3]), k)
    return resonate(k, mu, valid, c0, backend)


def resonate(
    k: Tensor, mu: float, valid: Tensor | None, c0: Tensor | None, backend: str | None
) -> tuple[Tensor, Tensor]:
    """`relevance` of checked arguments; c0 is float32 or wider."""
    if choose_by_dtype(backend, "k", k) == "triton":
        return trace(k, mu, valid, c0)
    kh = unit(blank(k, valid))
    one = kh.new_ones(()).expand(*kh.shape[:3], 1)
    state = None if c0 is None else c0[:, :, None]
    slopes, steps = constant_decay(mu, kh, kh.shape[1], valid)
    traces, c = scan(
        one, one * (1 - mu), kh, slopes=slopes, log_decay=steps, state=state, backend=backend
    )
    first = kh[:, :, :1]
    begun = first.new_ones(first.shape[:3]) if state is None else cosine(first, state)
    rho = torch.cat([begun, cosine(kh[:, :, 1:], traces[:, :, :-1])], 2)
    return rho if valid is None else torch.where(valid[:, None], rho, 0.0), c[:, :, 0]


def memory_recurrent(
    q: Tensor, k: Tensor, v: Tensor, rho: Tensor, eta: float = 0.1, lam: float = 0.99,
    S0: Tensor | None = None, valid: Tensor | None = None, *, backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `memory_chunked`, which it is: the two forms compute the same."""
    return memory_chunked(q, k, v, rho, eta, lam, S0, valid, backend=backend)


def memory_chunked(
    q: Tensor, k: Tensor, v: Tensor, rho: Tensor, eta: float = 0.1, lam: float = 0.99,
    S0: Tensor | None = None, valid: Tensor | None = None, *, chunk: int = 64,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """m (batch, heads, T, dv) and the last state S, float32 (batch, kv_heads, d, dv).

    q (batch, heads, T, d), k (batch, kv_heads, T, d), v (batch, kv_heads, T, dv), rho (batch,
    kv_heads, T) and S0 (batch, kv_heads, d, dv) in any float dtype, `valid` bool (batch, T). The
    result does not depend on `chunk`, which is a hint for the kernels. Differentiable in q, k, v,
    rho and S0.
    """
    check_memory(q, k, v, eta, lam, valid)
    check_integer("chunk", chunk, least=1)
    wide_rho = as_state("rho", rho, tuple(k.shape[:3]), k)
    if wide_rho is None:
        raise TypeError("rho: got NoneType, expected torch.Tensor")
    S0 = as_state("S0", S0, (*k.shape[:2], k.shape[3], v.shape[3]), k)
    v = blank(v, valid)
    return remember(q, k, v, wide_rho, eta, lam, S0, valid, backend, chunk=chunk)


def remember(
    q: Tensor, k: Tensor, v: Tensor, rho: Tensor, eta: float, lam: float, S0: Tensor | None,
    valid: Tensor | None, backend: str | None, *, chunk: int | None = None,
    onto: Tensor | None = None, share: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """m, of which a `share` is added to `onto` if that is given, and S, of checked arguments; rho
    and S0 are float32 or wider, v is 0 at padding.
    """
    if choose_by_dtype(backend, "q", q) == "triton":
        return hebbian(
            q, k, v, rho, eta=eta, lam=lam, scale=share, state=S0, valid=valid, onto=onto,
            block=chunk,
        )  # fmt: skip
    m, S = _remember(q, k, v, rho, eta, lam, S0, valid, chunk, backend)
    return m if onto is None else blank(torch.add(onto, m, alpha=share), valid), S


def _remember(
    q: Tensor, k: Tensor, v: Tensor, rho: Tensor, eta: float, lam: float, S0: Tensor | None,
    valid: Tensor | None, chunk: int | None, backend: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """m and S by a scan and rows of torch."""
    qh, kh = unit(blank(q, valid)), unit(blank(k, valid))
    if valid is not None:
        rho = torch.where(valid[:, None], rho, 0.0)
    heads, T = qh.shape[1], kh.shape[2]
    group = heads // kh.shape[1]
    gates = eta * rho[..., None] * kh
    state = None if S0 is None else S0.repeat_interleave(group, 1)
    slopes, steps = constant_decay(lam, kh, heads, valid)
    options: dict[str, Any] = {"slopes": slopes, "state": state}
    options |= {"block": chunk, "backend": backend}
    if T < 2:
        asked = qh.new_zeros(*qh.shape[:2], qh.shape[3], v.shape[3]) if state is None else state
        _, S = scan(qh, gates, wide(v), log_decay=steps, **options)
        return product(qh, asked).to(v.dtype), S[:, ::group]
    steps = None if steps is None else steps[:, :, :-1]
    queries, written = qh.to(v.dtype), gates[:, :, :-1].to(v.dtype)
    rest, S = scan(queries[:, :, 1:], written, v[:, :, :-1], log_decay=steps, **options)
    first = torch.zeros_like(rest[:, :, :1])
    if state is not None:
        first = product(queries[:, :, :1].to(state.dtype), state).to(v.dtype)
    S = S[:, ::group]
    last = lam * S + gates[:, :, -1, :, None] * wide(v[:, :, -1, None])
    if valid is not None:
        last = torch.where(valid[:, -1, None, None, None], last, S)
    return blank(torch.cat([first, rest], 2), valid), last


def unit(x: Tensor) -> Tensor:
    """Rows of x (..., d) divided by their norm, or by the floor if that is larger; in float32."""
    # Widened first: the two terms of the gradient cancel, and are added before they are rounded.
    x = wide(x)
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=FLOOR)


def blank(x: Tensor, valid: Tensor | None) -> Tensor:
    """x (batch, heads, tokens, d) with 0 in the rows of padded tokens."""
    return x if valid is None else torch.where(valid[:, None, :, None], x, 0.0)


def check_memory(q: Any, k: Any, v: Any, eta: Any, lam: Any, valid: Any) -> None:
    """Tokens that fit one another, and numbers in their range."""
    check_attention_inputs(q, k, v, FLOATS)
    check_size("q", q.shape[2], k.shape[2], "tokens, as in k")
    check_number("eta", eta, 0.0, math.inf)
    check_number("lam", lam, 0.0, 1.0)
    check_valid(valid, k)


def check_valid(valid: Any, k: Tensor) -> None:
    """`valid` bool (batch, tokens), on the device of k, or None."""
    if valid is None:
        return
    check_tensor("valid", valid, ("batch", "tokens"), (torch.bool,))
    expected = (k.shape[0], k.shape[2])
    if tuple(valid.shape) != expected:
        raise ValueError(f"valid: got shape {tuple(valid.shape)}, expected {expected}")
    check_device("valid", valid, "k", k)


def check_number(name: str, value: Any, least: float, most: float, below: bool = False) -> None:
    """`value` is a finite number, not a bool, in this range."""
    wanted = f"a number from {least:g} to {most:g}" + (f", below {most:g}" if below else "")
    if math.isinf(most):
        wanted = "a finite number" + ("" if math.isinf(least) else f" >= {least:g}")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {value!r}, expected {wanted}")
    if not (math.isfinite(value) and least <= value <= most) or (below and value == most):
        raise ValueError(f"{name}: got {value}, expected {wanted}")


def cosine(kh: Tensor, c: Tensor) -> Tensor:
    """rho (batch, kv_heads, tokens) of unit keys and the traces before them."""
    norm = torch.linalg.vector_norm(c, dim=-1)
    rho = torch.relu((kh * c).sum(-1) / norm.clamp(min=FLOOR))
    return torch.where((c == 0).all(-1), 1.0, rho)
