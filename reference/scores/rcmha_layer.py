"""What surrounds the attention of RCMHA: the state of its decoding (S9), and a whole layer (S7)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from attnspec.reference.conventions import check_array, check_integer, check_size
from attnspec.reference.scores.rcmha_scores import check_heads
from attnspec.reference.scores.rcmha_steps import check_like, check_memory


class State(NamedTuple):
    """S9: the last K - 1 rows before the convolutions, (..., heads, K - 1, dk), and the cache of
    convolved keys and values, (..., heads, tokens so far, dk).
    """

    q_rows: np.ndarray
    k_rows: np.ndarray
    v_rows: np.ndarray
    k: np.ndarray
    v: np.ndarray


def init_state(p: np.ndarray, K: int) -> State:
    """S9: the state before the first token, for rows like p (..., heads, T, dk) and `K` taps.

    >>> init_state(np.ones((2, 5, 4)), 3).k_rows.shape
    (2, 2, 4)
    """
    check_array("p", p, ("heads", "T", "dk"))
    check_integer("K", K, least=1)
    rows = np.zeros_like(p, shape=(*p.shape[:-2], K - 1, p.shape[-1]))
    return State(rows, rows.copy(), rows.copy(), p[..., :0, :].copy(), p[..., :0, :].copy())


def check_filters_of(w: Any, c: Any, tokens: np.ndarray, dk: int) -> None:
    """K14: the filters w (3, dk, K) and c (3, dk) of q, k and v."""
    check_array("w", w, ("qkv", "dk", "K"))
    check_like("w", w, tokens, (3, dk, w.shape[-1]))
    check_like("c", c, tokens, (3, dk))


def check_segment(x: Any, memory: Any, W: Any, biases: Any, w: Any, c: Any, u: Any) -> None:
    """K14: the arguments of `attend_segment` that its steps do not check for it."""
    check_array("x", x, ("T", "D"))
    check_array("u", u, ("heads", "dk"))
    D = x.shape[-1]
    check_like("W", W, x, (4, D, D))
    check_like("biases", biases, x, (2, D))
    check_like("u", u, x, u.shape[-2:])
    check_size("u", u.shape[0] * u.shape[1], D, "heads times dk, as in x")
    check_filters_of(w, c, x, u.shape[1])
    if memory is not None:
        check_memory("memory", memory, x)


def check_step(q: Any, k: Any, v: Any, w: Any, c: Any, state: Any) -> None:
    """K14: the arguments of `step` that its steps do not check for it."""
    check_array("q", q, ("heads", "T", "dk"))
    for name, x in (("k", k), ("v", v)):
        check_like(name, x, q, q.shape)
    check_filters_of(w, c, q, q.shape[-1])
    if not isinstance(state, State):
        raise TypeError(f"state: got {type(state).__name__}, expected a State")
    for cache in (state.k, state.v):
        check_heads("state", cache, q)
        check_like("state", cache, q, (*q.shape[:-2], state.k.shape[-2], q.shape[-1]))
