"""Synaptic Resonance, one step at a time: the memory's state beside a growing cache."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnspec.fast.backend import FLOATS, check_integer, check_same, check_tensor, wide
from attnspec.fast.dense.attention import MOST_DECODED
from attnspec.fast.engines.decode import decode
from attnspec.fast.engines.flash import flash
from attnspec.fast.growing import Room, append
from attnspec.fast.linear.lightning_attention_2_chunks import as_state
from attnspec.fast.linear.synaptic_resonance_memory import (
    check_memory,
    check_number,
    remember,
    resonate,
)


class State(NamedTuple):
    """Keys (batch, kv_heads, tokens, d) and values (batch, kv_heads, tokens, dv) so far, the memory
    S (batch, kv_heads, d, dv) and the trace c (batch, kv_heads, d), both float32.

    A step writes its tokens **in place** into the spare `room` behind the keys and values and
    returns a new state; the old one still sees its own tokens. S and c are new tensors every time.
    """

    k: Tensor
    v: Tensor
    S: Tensor
    c: Tensor
    room: Room | None = None


def init_state(k: Tensor, v: Tensor, *, backend: str | None = None) -> State:
    """The state before the first of tokens shaped as `k` and `v`."""
    check_tensor("k", k, ("batch", "kv_heads", "tokens", "d"), FLOATS)
    check_tensor("v", v, ("batch", "kv_heads", "tokens", "dv"), FLOATS)
    k, v = k.detach(), v.detach()
    zeros = torch.zeros(
        *k.shape[:2], k.shape[3], v.shape[3], dtype=wide(k[..., :0]).dtype, device=k.device
    )
    return State(k[:, :, :0], v[:, :, :0], zeros, zeros.new_zeros(*k.shape[:2], k.shape[3]))


def step(
    state: State, q: Tensor, k: Tensor, v: Tensor, *, eta: float = 0.1, lam: float = 0.99,
    mu: float = 0.9, beta: float = 0.5, window: int | None = None, backend: str | None = None,
) -> tuple[Tensor, State]:  # fmt: skip
    """y (batch, heads, tokens, dv) of new tokens, and the state that includes them (see `State`).

    q (batch, heads, tokens, d), k (batch, kv_heads, tokens, d), v (batch, kv_heads, tokens, dv).
    For inference: there is no gradient. A window reads the end of the cache only.
    """
    check_memory(q, k, v, eta, lam, None)
    check_number("mu", mu, 0.0, 1.0, below=True)
    check_softmax(beta, window)
    for name, cached, new in (("state.k", state.k, k), ("state.v", state.v, v)):
        check_same(name, cached, "k and v", new)
        if cached.shape[:2] != new.shape[:2] or cached.shape[3] != new.shape[3]:
            raise ValueError(
                f"{name}: got shape {tuple(cached.shape)}, expected that of {tuple(new.shape)}"
            )
    S = as_state("state.S", state.S, (*k.shape[:2], k.shape[3], v.shape[3]), k)
    c = as_state("state.c", state.c, (*k.shape[:2], k.shape[3]), k)
    q, k, v = q.detach(), k.detach(), v.detach()
    room = getattr(state, "room", None)
    (keys, values), room = append(room, (state.k, state.v), (k, v))
    rho, c = resonate(k, mu, None, c, backend)
    tokens = q.shape[2]
    first = 0 if window is None else max(keys.shape[2] - window - tokens + 1, 0)
    seen = (keys[:, :, first:], values[:, :, first:])
    # One token sees all that is left of the cache; of several, each has a window of its own.
    if tokens == 1 or (window is None and tokens <= MOST_DECODED):
        o, _ = decode(q, *seen, causal=True, backend=backend)
    else:
        o, _ = flash(q, *seen, causal=True, window=window, backend=backend)
    y, S = remember(q, k, v, rho, eta, lam, S, None, backend, onto=o, share=beta)
    return y, State(keys, values, S, c, room)


def check_softmax(beta: Any, window: Any) -> None:
    """A finite beta, and a window of 1 or more, if any."""
    check_number("beta", beta, -math.inf, math.inf)
    if window is not None:
        check_integer("window", window, least=1)
