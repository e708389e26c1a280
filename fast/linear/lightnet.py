"""LightNet on Numba and Triton: gates, then the scan engine with a decay for every channel.

The causal form is the engine's vector-decay scan under its additive gates; without a causal order,
one read of keys and values leaves their summary and a small product answers every query. Both are
differentiable. Grouped heads of k and v are repeated, because gates belong to query heads. Values
of states and log decays are checked on the CPU only: on a GPU the check would stall it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import (
    FLOATS,
    check_attention_inputs,
    check_same,
    check_shape,
    check_size,
    check_tensor,
    choose_backend,
    choose_by_dtype,
    wide,
)
from attnspec.fast.engines.scan import (
    CANDIDATES,
    additive_scan,
    read_summary,
    scan,
    step,
    time_summary,
    use_config,
)
from attnspec.fast.engines.scan import additive_gates as gates
from attnspec.fast.linear.lightnet_batches import lightnet_packed, vector_decay_packed
from attnspec.fast.linear.lightnet_checks import (
    check_channels,
    check_scale,
    given_state,
    repeated,
)
from attnspec.fast.linear.lightnet_positions import md_angles, md_lrpe, md_tpe, tpe
from attnspec.fast.linear.lightning_attention_2_chunks import as_state

__all__ = [
    "additive_gates",
    "additive_rule",
    "decode_step",
    "lightnet_causal",
    "lightnet_noncausal",
    "lightnet_packed",
    "md_angles",
    "md_lrpe",
    "md_tpe",
    "tpe",
    "vector_decay_attend",
    "vector_decay_packed",
]

CLAIMS = {
    "md_angles": {"launches": None},
    "md_lrpe": {"gradient": True, "launches": None},
    **{name: {"gradient": True} for name in ("additive_rule", "tpe", "md_tpe")},
    "vector_decay_attend": {
        "gradient": True,
        "compiled": True,
        "triton": {
            "graph": True,
            "exact_prefix": False,
            "configs": {str(c): functools.partial(use_config, c) for c in CANDIDATES},
        },
    },
    "lightnet_causal": {
        "gradient": True,
        "compiled": True,
        "triton": {"graph": True, "exact_prefix": False},
    },
    **{
        name: {"gradient": True, "compiled": True, "triton": {"exact_prefix": False}}
        for name in ("vector_decay_packed", "lightnet_packed")
    },
    "lightnet_noncausal": {"gradient": True, "compiled": True, "triton": {"graph": True}},
    "decode_step": {"triton": {"graph": True}},
}
"""What the suite is told beyond the defaults; the first two are tables of cosines and their use."""


def additive_gates(
    k: Tensor, z0: Tensor | None = None, *, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """kbar (batch, heads, T, d) in the dtype of k, log_decay likewise and the last z (batch, heads,
    d) in float32, of logits k; z0 (batch, heads, d), in any float dtype, precedes the first token.
    """
    check_tensor("k", k, ("batch", "heads", "T", "d"), FLOATS)
    check_channels("k", k)
    z0 = as_state("z0", z0, (*k.shape[:2], k.shape[3]), k)
    return gates(k, z0, backend=choose_backend(backend, k))


def additive_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    state: tuple[Tensor, Tensor, Tensor] | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """o (batch, heads, T, e) and the state (s, Delta, m), float32, of keys k under gates g.

    q, k, g (batch, heads, T, d), v (batch, heads, T, e); s (batch, heads, d, e), Delta and m
    (batch, heads, d), in any float dtype. Computed in float32 at least: keys that carry weights
    have no room for them in 16 bits. Differentiable, in the state too; the last m, to which the
    other two are relative, counts as a constant.
    """
    _check_tokens(q, k, v)
    check_tensor("g", g, ("batch", "heads", "T", "d"), FLOATS)
    check_same("g", g, "q", q)
    check_shape("g", g, tuple(q.shape))
    shape = (*q.shape[:2], q.shape[3])
    top, S0, z0 = g.new_full(shape, -torch.inf, dtype=wide(q).dtype), None, None
    if state is not None:
        if not isinstance(state, tuple) or len(state) != 3:
            raise TypeError(f"state: got {type(state).__name__}, expected (s, Delta, m)")
        s, Delta, top = (
            given_state("state", x, expected, q)
            for x, expected in zip(state, ((*shape, v.shape[3]), shape, shape), strict=True)
        )
        empty = Delta == 0
        total = torch.where(empty, 1.0, Delta)
        S0 = torch.where(empty[..., None], 0.0, s / total[..., None])
        z0 = torch.where(empty, -torch.inf, top + total.log())
    weights, log_decay, z = gates(wide(g), z0, backend=choose_backend(backend, q))
    o, S = scan(wide(q), weights * k, wide(v), log_decay=log_decay, state=S0, backend=backend)
    m = top.detach()
    if g.shape[2]:
        m = torch.maximum(m, wide(g.detach()).amax(2))
    Delta = torch.where(z == -torch.inf, 0.0, torch.exp(z - torch.where(m == -torch.inf, 0.0, m)))
    return o.to(q.dtype), (Delta[..., None] * S, Delta, m)


def vector_decay_attend(
    q: Tensor,
    kbar: Tensor,
    v: Tensor,
    log_decay: Tensor,
    S0: Tensor | None = None,
    *,
    scale: float = 1.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """o (batch, heads, T, e) and the last S, float32 (batch, heads, d, e).

    q, kbar, log_decay (batch, heads, T, d), v (batch, heads, T, e); log decays at most 0, in any
    float dtype, S0 (batch, heads, d, e) likewise. Differentiable in all but scale.
    """
    _check_tokens(q, kbar, v, "kbar")
    check_tensor("log_decay", log_decay, ("batch", "heads", "T", "d"), FLOATS)
    check_shape("log_decay", log_decay, tuple(q.shape))
    check_scale(scale)
    S0 = as_state("S0", S0, (*q.shape[:2], q.shape[3], v.shape[3]), q)
    return scan(q, kbar, v, log_decay=log_decay, state=S0, scale=scale, backend=backend)


def lightnet_causal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: tuple[Tensor, Tensor] | None = None,
    *,
    scale: float = 1.0,
    backend: str | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """o (batch, heads, T, e) and the float32 state: S (batch, heads, d, e) and z (batch, heads, d).

    q (batch, heads, T, d), k (batch, kv_heads, T, d), v (batch, kv_heads, T, e). Differentiable, in
    the state too.
    """
    S0, z0 = _check_causal(q, k, v, state, scale)
    k, v = (repeated(x, q.shape[1]) for x in (k, v))
    o, S, z = additive_scan(q, k, v, S0, z0, scale=scale, backend=backend)
    return o, (S, z)


def lightnet_noncausal(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float = 1.0, backend: str | None = None
) -> Tensor:
    """o (batch, heads, q_tokens, e) of all keys, in any order; differentiable.

    q (batch, heads, q_tokens, d), k (batch, kv_heads, T, d), v (batch, kv_heads, T, e).
    """
    check_attention_inputs(q, k, v, FLOATS)
    check_scale(scale)
    for name, x in (("k", k), ("v", v)):
        check_channels(name, x)
    backend = choose_by_dtype(backend, "q", q)
    KV, _ = time_summary(k, v, backend=backend)
    small = repeated((scale * KV).to(q.dtype), q.shape[1])
    return read_summary(q, small, backend=backend)


def decode_step(
    state: tuple[Tensor, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float = 1.0,
    backend: str | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """o (batch, heads, 1, e) of one new token and a new state; the first has S = 0 and z = -inf.

    Not differentiable; nothing waits for the GPU.
    """
    check_attention_inputs(q, k, v, FLOATS)
    check_size("q", q.shape[2], 1, "one token")
    if state is None:
        raise TypeError("state: got NoneType, expected (S, z)")
    S, z = _check_causal(q, k, v, state, scale)
    assert S is not None
    assert z is not None
    k, v = (repeated(x, q.shape[1]) for x in (k, v))
    new = k[:, :, 0].to(z.dtype)
    last = torch.logaddexp(z, new)
    base = torch.where(last == -torch.inf, 0.0, last)
    kbar = torch.exp(new - base).to(k.dtype)[:, :, None]
    log_decay = torch.where(z == -torch.inf, 0.0, z - base)[:, :, None]
    o, S = step(S, q, kbar, v, log_decay=log_decay, scale=scale, backend=backend)
    return o, (S, last)


def _check_causal(
    q: Any, k: Any, v: Any, state: Any, scale: Any
) -> tuple[Tensor | None, Tensor | None]:
    """S and z of a state, or None and None, once all arguments fit one another."""
    check_attention_inputs(q, k, v, FLOATS)
    check_size("q", q.shape[2], k.shape[2], "tokens, as in k")
    check_channels("k", k)
    check_scale(scale)
    if state is None:
        return None, None
    if not isinstance(state, tuple) or len(state) != 2:
        raise TypeError(f"state: got {type(state).__name__}, expected (S, z)")
    S, z = state
    shape = (*q.shape[:2], q.shape[3])
    return given_state("state", S, (*shape, v.shape[3]), q), given_state("state", z, shape, q)


def _check_tokens(q: Any, k: Any, v: Any, name: str = "k") -> None:
    check_tensor(name, k, ("batch", "heads", "T", "d"), FLOATS)
    check_attention_inputs(q, k, v, FLOATS)
    check_size(name, k.shape[1], q.shape[1], "heads, as in q")
    check_size(name, k.shape[2], q.shape[2], "tokens, as in q")
