"""Synaptic Resonance as kernels compute it: see `Contract.form`.

A kernel may walk single tokens where the chapter has products of chunks, and rounds the state then
at every one of them. It may also raise a decay to the n as the exponential of n times its
logarithm: that exponent is rounded to float32, an error that grows with n.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.dtypes import EPS
from attnspec.reference.dense.attention import attend
from attnspec.reference.linear.synaptic_resonance_decode import State, recent_tokens
from attnspec.reference.linear.synaptic_resonance_memory import (
    memory_chunked,
    memory_recurrent,
    relevance,
)


def held(decay: float) -> float:
    """A decay whose powers are off by as much as those from an exponent rounded to float32."""
    return float(decay ** (1.0 + EPS["float32"] / 2))


def trace_held(k: Any, mu: float = 0.9, valid: Any = None, c0: Any = None) -> Any:
    return relevance(k, held(mu), valid, c0)


def memory_in_chunks(
    q: Any, k: Any, v: Any, rho: Any, eta: float = 0.1, lam: float = 0.99, S0: Any = None,
    valid: Any = None,
) -> Any:  # fmt: skip
    return memory_chunked(q, k, v, rho, eta, held(lam), S0, valid)


def memory_by_token(
    q: Any, k: Any, v: Any, rho: Any, eta: float = 0.1, lam: float = 0.99, S0: Any = None,
    valid: Any = None, *, chunk: int = 64,
) -> Any:  # fmt: skip
    return memory_recurrent(q, k, v, rho, eta, held(lam), S0, valid)


def whole_by_token(
    q: Any, k: Any, v: Any, S0: Any = None, c0: Any = None, *, eta: float = 0.1, lam: float = 0.99,
    mu: float = 0.9, beta: float = 0.5, window: int | None = None, valid: Any = None,
) -> Any:  # fmt: skip
    rho, c = relevance(k, held(mu), valid, c0)
    m, S = memory_recurrent(q, k, v, rho, eta, held(lam), S0, valid)
    return attend(q, k, v, mask=recent_tokens(k, window, valid))[0] + beta * m, (S, c)


def step_by_token(
    state: State, q: Any, k: Any, v: Any, *, eta: float = 0.1, lam: float = 0.99, mu: float = 0.9,
    beta: float = 0.5, window: int | None = None,
) -> Any:  # fmt: skip
    keys = np.concatenate([state.k, k], axis=-2)
    values = np.concatenate([state.v, v], axis=-2)
    rho, c = relevance(k, held(mu), None, state.c)
    m, S = memory_recurrent(q, k, v, rho, eta, held(lam), state.S)
    mask = recent_tokens(keys, window, None)[..., state.k.shape[-2] :, :]
    return attend(q, keys, values, mask=mask)[0] + beta * m, State(keys, values, S, c)
