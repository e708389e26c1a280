"""Synaptic Resonance with its memory written token by token: see `Contract.form`.

A kernel may walk single tokens where the chapter has products of chunks, and rounds the state then
at every one of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.dense.attention import attend
from attnspec.reference.linear.synaptic_resonance_decode import State, recent_tokens
from attnspec.reference.linear.synaptic_resonance_memory import memory_recurrent, relevance


def memory_by_token(
    q: Any, k: Any, v: Any, rho: Any, *args: Any, chunk: int = 64, **rest: Any
) -> Any:
    return memory_recurrent(q, k, v, rho, *args, **rest)


def whole_by_token(
    q: Any, k: Any, v: Any, S0: Any = None, c0: Any = None, *, eta: float = 0.1, lam: float = 0.99,
    mu: float = 0.9, beta: float = 0.5, window: int | None = None, valid: Any = None,
) -> Any:  # fmt: skip
    rho, c = relevance(k, mu, valid, c0)
    m, S = memory_recurrent(q, k, v, rho, eta, lam, S0, valid)
    return attend(q, k, v, mask=recent_tokens(k, window, valid))[0] + beta * m, (S, c)


def step_by_token(
    state: State, q: Any, k: Any, v: Any, *, eta: float = 0.1, lam: float = 0.99, mu: float = 0.9,
    beta: float = 0.5, window: int | None = None,
) -> Any:  # fmt: skip
    keys = np.concatenate([state.k, k], axis=-2)
    values = np.concatenate([state.v, v], axis=-2)
    rho, c = relevance(k, mu, None, state.c)
    m, S = memory_recurrent(q, k, v, rho, eta, lam, state.S)
    mask = recent_tokens(keys, window, None)[..., state.k.shape[-2] :, :]
    return attend(q, keys, values, mask=mask)[0] + beta * m, State(keys, values, S, c)
