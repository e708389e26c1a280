"""Synaptic Resonance, the softmax beside the memory: what it sees, and decoding (S6, S8, S10).

The memory's state is two arrays of a fixed size; the softmax keeps the keys and values themselves.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from attnspec.reference.conventions import (
    causal_mask,
    check_attention_inputs,
    check_integer,
    check_size,
)
from attnspec.reference.dense.attention import attend
from attnspec.reference.linear.synaptic_resonance_memory import (
    check_number,
    memory_chunked,
    real_tokens,
    relevance,
)


def recent_tokens(k: np.ndarray, window: int | None, valid: np.ndarray | None) -> np.ndarray:
    """S6, S8: bool, broadcastable to (..., heads, T, T), True where a query may look.

    >>> recent_tokens(np.ones((1, 3, 1)), 2, np.array([True, False, True])).astype(int)
    array([[[1, 0, 0],
            [0, 0, 0],
            [1, 0, 1]]])
    """
    real = real_tokens(k, valid)[..., :1, :]
    place = np.cumsum(real, axis=-1)
    near = place[..., :, None] - place[..., None, :] < (window or k.shape[-2] + 1)
    return causal_mask(*2 * k.shape[-2:-1]) & near & real[..., :, None] & real[..., None, :]


class State(NamedTuple):
    """S10: keys (..., kv_heads, seen, d) and values (..., kv_heads, seen, dv) so far, S, c."""

    k: np.ndarray
    v: np.ndarray
    S: np.ndarray
    c: np.ndarray


def init_state(k: np.ndarray, v: np.ndarray) -> State:
    """S10: the state before the first of tokens shaped as `k` and `v`.

    >>> init_state(np.ones((1, 5, 4)), np.ones((1, 5, 2))).S.shape
    (1, 4, 2)
    """
    S = np.zeros_like(k, shape=(*k.shape[:-2], k.shape[-1], v.shape[-1]))
    return State(k[..., :0, :], v[..., :0, :], S, np.zeros_like(k, shape=S.shape[:-1]))


def step(
    state: State, q: np.ndarray, k: np.ndarray, v: np.ndarray, *, eta: float = 0.1,
    lam: float = 0.99, mu: float = 0.9, beta: float = 0.5, window: int | None = None,
) -> tuple[np.ndarray, State]:  # fmt: skip
    """S10: y (..., heads, tokens, dv) of new tokens, and the state that includes them.

    >>> x = np.ones((1, 1, 1))
    >>> y, state = step(init_state(x, x), x, x, x, eta=1.0, lam=0.5, beta=0.1)
    >>> y, state = step(state, x, x, x, eta=1.0, lam=0.5, beta=0.1)
    >>> y.ravel(), state.S.ravel()
    (array([1.1]), array([1.5]))
    """
    check_inputs(q, k, v, beta, window)
    for name, old, new in (("state.k", state.k, k), ("state.v", state.v, v)):
        if (*old.shape[:-2], old.shape[-1]) != (*new.shape[:-2], new.shape[-1]):
            raise ValueError(f"{name}: got shape {old.shape}, expected that of {new.shape}")
    keys = np.concatenate([state.k, k], axis=-2)
    values = np.concatenate([state.v, v], axis=-2)
    rho, c = relevance(k, mu, None, state.c)
    m, S = memory_chunked(q, k, v, rho, eta, lam, state.S)
    mask = recent_tokens(keys, window, None)[..., state.k.shape[-2] :, :]
    return attend(q, keys, values, mask=mask)[0] + beta * m, State(keys, values, S, c)


def check_inputs(q: Any, k: Any, v: Any, beta: Any, window: Any) -> None:
    """S6, S7, K14: tokens that fit one another, a finite beta and a window of 1 or more.

    >>> check_inputs(*(np.ones((1, 2, 1)),) * 3, 0.5, 0)
    Traceback (most recent call last):
    ValueError: window: got 0, expected an integer >= 1
    """
    check_attention_inputs(q, k, v)
    check_size("q", q.shape[-2], k.shape[-2], "tokens, as in k")
    check_number("beta", beta, -math.inf, math.inf)
    if window is not None:
        check_integer("window", window, least=1)
