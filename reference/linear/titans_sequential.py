"""Titans token by token: the rule itself, and the step that decodes. Clauses S3 to S5, S18, S19."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from attnspec.reference.conventions import (
    check_attention_inputs,
    check_choice,
    check_integer,
    check_size,
)
from attnspec.reference.linear.titans_chunks import (
    READS,
    Layers,
    check_memory_inputs,
    check_states,
    fold,
    token_rates,
)
from attnspec.reference.linear.titans_memory import (
    check_layers,
    check_scale,
    memory_grad,
    mlp_memory,
)


class MemoryState(NamedTuple):
    """S18: what decoding carries: the gradient's weights, weights and momentum of every layer, and
    how many tokens the current gradient chunk has."""

    W_base: Layers  # (..., kv_heads, inputs, outputs)
    W: Layers
    S: Layers
    pos: int = 0


def titans_sequential(
    W0: Any, S0: Any, k: np.ndarray, v: np.ndarray, q: np.ndarray, rates: Any, b: int, *,
    loss_scale: float = 2.0, read: str = "inclusive", valid: np.ndarray | None = None,
) -> tuple[np.ndarray, Layers, Layers]:  # fmt: skip
    """S3-S5, S19: y (..., heads, T, dv) and the last W and S, one token after the other.

    Arguments as those of `titans_chunk_mlp`, whose results are these.

    >>> x, none = np.ones((1, 2, 1)), (np.zeros((1, 1)),)
    >>> titans_sequential(none, None, x, x, x, (0.5, 0.0, 0.0), 1)[0].ravel()
    array([1., 1.])
    """
    W, S, _ = check_memory_inputs(W0, S0, k, v, q, rates, b, loss_scale, read, valid)
    theta, eta, alpha = token_rates(rates, k, valid)
    base, kv_heads, rows = W, k.shape[-3], []
    pos = np.zeros(k.shape[:-3], int)
    for t in range(k.shape[-2]):
        real = np.ones(pos.shape, bool) if valid is None else valid[..., t]
        seen = real[..., None, None, None]
        key, value, query = (np.where(seen, x[..., t : t + 1, :], 0.0).astype(x.dtype)
                             for x in (k, v, q))  # fmt: skip
        renew = (real & (pos % b == 0))[..., None, None, None]
        base = tuple(np.where(renew, w, old) for w, old in zip(W, base, strict=True))
        step = [np.where(seen[..., 0, 0], x[..., t], 0.0)[..., None, None].astype(x.dtype)
                for x in (theta, eta, alpha)]  # fmt: skip
        W_new, S_new = _update(base, W, S, key, value, step, loss_scale)
        old = W
        W = tuple(np.where(seen, new, w) for new, w in zip(W_new, W, strict=True))
        S = tuple(np.where(seen, new, s) for new, s in zip(S_new, S, strict=True))
        y = mlp_memory(old if read == "exclusive" else W, fold(query, kv_heads))
        rows.append(np.where(seen, y.reshape(*q.shape[:-2], 1, v.shape[-1]), 0.0).astype(y.dtype))
        pos = pos + real
    return np.concatenate([np.zeros_like(v, shape=(*q.shape[:-2], 0, v.shape[-1])), *rows],
                          axis=-2), W, S  # fmt: skip


def decode_step(
    state: MemoryState, q: np.ndarray, k: np.ndarray, v: np.ndarray, rates: Any, b: int, *,
    loss_scale: float = 2.0, read: str = "inclusive",
) -> tuple[np.ndarray, MemoryState]:  # fmt: skip
    """S18: y (..., heads, 1, dv) of one new token, and the state with it.

    q (..., heads, 1, d), k (..., kv_heads, 1, d), v (..., kv_heads, 1, dv), rates of one token.

    >>> one = np.ones((1, 1, 1))
    >>> state = MemoryState((0 * one,), (0 * one,), (0 * one,))
    >>> y, state = decode_step(state, one, one, one, (0.5, 0.0, 0.0), 2)
    >>> y.ravel(), state.W_base[0].ravel(), state.pos
    (array([1.]), array([0.]), 1)
    """
    check_attention_inputs(q, k, v)
    check_size("q", q.shape[-2], 1, "one token")
    check_size("k", k.shape[-2], 1, "one token")
    check_integer("b", b, least=1)
    check_scale(loss_scale)
    check_choice("read", read, READS)
    check_state(state, k, v)
    theta, eta, alpha = token_rates(rates, k)
    if state.pos > b:
        raise ValueError(f"state.pos: got {state.pos}, expected at most {b} (b)")
    base, pos = (state.W, 0) if state.pos in (0, b) else (state.W_base, state.pos)
    step = [x[..., None] for x in (theta, eta, alpha)]
    W, S = _update(base, state.W, state.S, k, v, step, loss_scale)
    y = mlp_memory(state.W if read == "exclusive" else W, fold(q, k.shape[-3]))
    return y.reshape(*q.shape[:-1], v.shape[-1]), MemoryState(base, W, S, pos + 1)


def _update(
    base: Layers, W: Layers, S: Layers, k: np.ndarray, v: np.ndarray, step: list[np.ndarray],
    loss_scale: float,
) -> tuple[Layers, Layers]:  # fmt: skip
    """S3: weights and momentum with one more token; the rates in `step` are (..., 1, 1)."""
    theta, eta, alpha = step
    H, Delta = memory_grad(base, k, v, loss_scale)
    gradients = [np.swapaxes(h, -1, -2) * e for h, e in zip(H, Delta, strict=True)]
    S = tuple(eta * s - theta * u for s, u in zip(S, gradients, strict=True))
    return tuple((1 - alpha) * w + s for w, s in zip(W, S, strict=True)), S


def check_state(state: Any, k: np.ndarray, v: np.ndarray) -> None:
    """S18, K14: the state fits the new token's k and v.

    >>> check_state(None, np.ones((1, 1, 1)), np.ones((1, 1, 1)))
    Traceback (most recent call last):
    TypeError: state: got NoneType, expected MemoryState
    """
    if not isinstance(state, MemoryState):
        raise TypeError(f"state: got {type(state).__name__}, expected MemoryState")
    check_integer("state.pos", state.pos, least=0)
    check_layers("state.W", state.W, k, "k")
    check_size("v", v.shape[-1], state.W[-1].shape[-1], "dv, the width of the last layer")
    try:
        check_states(state.W, state.S, k)
        check_states(state.W, state.W_base, k)
    except (TypeError, ValueError) as error:
        raise type(error)(f"state: {error}") from None
