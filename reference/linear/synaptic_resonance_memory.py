"""Synaptic Resonance, the memory: relevance of a token, and two forms of the matrix memory.

Clauses S1 to S5, S8, S9, S11 and S12 of `synaptic_resonance`. The relevance depends on keys alone,
so it is known for a whole sequence before the memory is touched; what is left is linear attention
with a constant decay and a gate for every write, read before the write.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from attnspec.reference.conventions import (
    check_array,
    check_attention_inputs,
    check_integer,
    check_shaped,
    check_size,
    repeat_heads,
)

FLOOR = 1e-6
"""S1, S3: the norm below which a row is not brought to length 1."""


def unit(x: np.ndarray) -> np.ndarray:
    """S1: rows of x (..., d) divided by their norm, or by 1e-6 if that is larger.

    >>> unit(np.array([[3.0, 4.0], [0.0, 0.0]]))
    array([[0.6, 0.8],
           [0. , 0. ]])
    """
    check_array("x", x, ("d",))
    return x / np.maximum(norm_of(x), FLOOR)[..., None]


def relevance(
    k: np.ndarray, mu: float = 0.9, valid: np.ndarray | None = None, c0: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """S1, S3, S5, S8: rho (..., kv_heads, T) and the last trace c (..., kv_heads, d).

    k (..., kv_heads, T, d) without positions; `valid` bool (..., T), without heads, True at real
    tokens; c0 (..., kv_heads, d) is the trace before the first token, zeros by default.

    >>> rho, c = relevance(np.array([[[1.0, 0.0], [3.0, 4.0], [-1.0, 0.0]]]), mu=0.5)
    >>> rho, c
    (array([[1. , 0.6, 0. ]]), array([[-0.225,  0.2  ]]))
    """
    keys, real = check_keys(k, mu, valid)
    c = first_state("c0", c0, (*k.shape[:-2], k.shape[-1]), k)
    kh = unit(keys)
    rows = []
    for t in range(k.shape[-2]):
        cosine = np.sum(kh[..., t, :] * c, axis=-1) / np.maximum(norm_of(c), FLOOR)
        rho = np.where(np.any(c != 0, axis=-1), np.maximum(cosine, 0.0), np.ones_like(cosine))
        rows.append(np.where(real[..., t], rho, np.zeros_like(rho)))
        c = np.where(real[..., t, None], mu * c + (1 - mu) * kh[..., t, :], c)
    return stack(rows, np.zeros_like(k, shape=k.shape[:-1]), -1), c


def memory_recurrent(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, rho: np.ndarray, eta: float = 0.1,
    lam: float = 0.99, S0: np.ndarray | None = None, valid: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """S2, S4, S8, S9: m (..., heads, T, dv) and the last state S (..., kv_heads, d, dv), token by
    token.

    q (..., heads, T, d), k (..., kv_heads, T, d), v (..., kv_heads, T, dv), rho (..., kv_heads, T),
    S0 (..., kv_heads, d, dv), `valid` bool (..., T).

    >>> x, rho = np.ones((1, 3, 1)), np.ones((1, 3))
    >>> m, S = memory_recurrent(x, x, x, rho, eta=1.0, lam=0.5)
    >>> m.ravel(), S.ravel()
    (array([0. , 1. , 1.5]), array([1.75]))
    """
    qh, kh, v, rho, real, S = check_memory(q, k, v, rho, eta, lam, S0, valid)
    heads, rows = q.shape[-3], []
    for t in range(q.shape[-2]):
        read = (qh[..., t, None, :] @ repeat_heads(S, heads))[..., 0, :]
        rows.append(np.where(repeat_rows(real, heads)[..., t, None], read, np.zeros_like(read)))
        written = (eta * rho[..., t, None] * kh[..., t, :])[..., None] * v[..., t, None, :]
        S = np.where(real[..., t, None, None], lam * S + written, S)
    return stack(rows, np.zeros_like(v, shape=(*q.shape[:-1], v.shape[-1])), -2), S


def memory_chunked(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, rho: np.ndarray, eta: float = 0.1,
    lam: float = 0.99, S0: np.ndarray | None = None, valid: np.ndarray | None = None, *,
    chunk: int = 64,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """S11: `memory_recurrent` by products of `chunk` tokens; the result does not depend on it.

    >>> x, rho = np.ones((1, 3, 1)), np.ones((1, 3))
    >>> memory_chunked(x, x, x, rho, eta=1.0, lam=0.5, chunk=2)[0].ravel()
    array([0. , 1. , 1.5])
    """
    qh, kh, v, rho, real, S = check_memory(q, k, v, rho, eta, lam, S0, valid)
    check_integer("chunk", chunk, least=1)
    heads, T = q.shape[-3:-1]
    gated = eta * rho[..., None] * kh
    outputs = [np.zeros_like(v, shape=(*q.shape[:-2], 0, v.shape[-1]))]
    for start in range(0, T, chunk):
        rows = slice(start, min(start + chunk, T))
        Q, K, V, here = qh[..., rows, :], gated[..., rows, :], v[..., rows, :], real[..., rows]
        older = np.cumsum(here, axis=-1) - here  # real tokens of the chunk before each
        total = np.sum(here, axis=-1)
        gap = older[..., :, None] - older[..., None, :] - 1
        within = np.where(np.tri(here.shape[-1], k=-1, dtype=bool), _power(lam, gap, q), 0.0)
        within = repeat_heads(within.astype(q.dtype), heads)
        scores = Q @ np.swapaxes(repeat_heads(K, heads), -1, -2)
        carried = repeat_rows(_power(lam, older, q), heads)[..., None] * (
            Q @ repeat_heads(S, heads)
        )
        m = carried + (scores * within) @ repeat_heads(V, heads)
        outputs.append(np.where(repeat_rows(here, heads)[..., None], m, np.zeros_like(m)))
        to_end = _power(lam, total[..., None] - older - 1, q)[..., None]
        S = _power(lam, total, q)[..., None, None] * S + np.swapaxes(to_end * K, -1, -2) @ V
    return np.concatenate(outputs, axis=-2), S


def check_memory(
    q: Any, k: Any, v: Any, rho: Any, eta: Any, lam: Any, S0: Any, valid: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """S1, S8, K14: qh, kh, v and rho with 0 at padding, the real tokens and the first state.

    >>> x = np.ones((1, 2, 1))
    >>> check_memory(x, x, x, np.ones((1, 2)), 0.1, 1.5, None, None)
    Traceback (most recent call last):
    ValueError: lam: got 1.5, expected a number from 0 to 1
    """
    check_attention_inputs(q, k, v)
    check_size("q", q.shape[-2], k.shape[-2], "tokens, as in k")
    check_shaped("rho", rho, k.shape[:-1])
    check_number("eta", eta, 0.0, math.inf)
    check_number("lam", lam, 0.0, 1.0)
    real = real_tokens(k, valid)
    S = first_state("S0", S0, (*k.shape[:-2], k.shape[-1], v.shape[-1]), k)
    asking = repeat_rows(real, q.shape[-3])[..., None]
    qh, kh = unit(np.where(asking, q, 0)), unit(np.where(real[..., None], k, 0))
    return qh, kh, np.where(real[..., None], v, 0), np.where(real, rho, 0), real, S


def check_keys(k: Any, mu: Any, valid: Any) -> tuple[np.ndarray, np.ndarray]:
    """S8, K14: k with 0 at padding, and the real tokens bool (..., kv_heads, T).

    >>> check_keys(np.ones((1, 2, 1)), 1.0, None)
    Traceback (most recent call last):
    ValueError: mu: got 1.0, expected a number from 0 to 1, below 1
    """
    check_array("k", k, ("kv_heads", "T", "d"))
    check_number("mu", mu, 0.0, 1.0, below=True)
    real = real_tokens(k, valid)
    return np.where(real[..., None], k, 0), real


def real_tokens(k: np.ndarray, valid: Any) -> np.ndarray:
    """S8, K14: bool (..., kv_heads, T), True at real tokens.

    >>> real_tokens(np.ones((2, 2, 1)), np.array([True, False])).astype(int)
    array([[1, 0],
           [1, 0]])
    """
    if valid is None:
        return np.ones(k.shape[:-1], bool)
    check_array("valid", valid, ("tokens",), dtype="bool")
    expected = (*k.shape[:-3], k.shape[-2])
    if valid.shape != expected:
        raise ValueError(f"valid: got shape {valid.shape}, expected {expected}")
    return np.broadcast_to(valid[..., None, :], k.shape[:-1])


def check_number(name: str, value: Any, least: float, most: float, below: bool = False) -> None:
    """K14: `value` is a finite number, not a bool, in this range.

    >>> check_number("eta", -1.0, 0.0, math.inf)
    Traceback (most recent call last):
    ValueError: eta: got -1.0, expected a finite number >= 0
    """
    wanted = f"a number from {least:g} to {most:g}" + (f", below {most:g}" if below else "")
    if math.isinf(most):
        wanted = "a finite number" + ("" if math.isinf(least) else f" >= {least:g}")
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer)):
        raise TypeError(f"{name}: got {value!r}, expected {wanted}")
    if not (math.isfinite(value) and least <= value <= most) or (below and value == most):
        raise ValueError(f"{name}: got {value}, expected {wanted}")


def first_state(name: str, state: Any, shape: tuple[int, ...], like: np.ndarray) -> np.ndarray:
    """K14: `state` after a check of shape and dtype, or zeros if there is none.

    >>> first_state("c0", None, (1, 1), np.ones(1))
    array([[0.]])
    """
    if state is None:
        return np.zeros_like(like, shape=shape)
    check_shaped(name, state, shape)
    if state.dtype != like.dtype:
        raise TypeError(f"{name}: got dtype {state.dtype}, expected {like.dtype}, as k")
    return np.asanyarray(state)


def repeat_rows(x: np.ndarray, heads: int) -> np.ndarray:
    """S9: (..., kv_heads, T) to (..., heads, T), each kv head for its group (K7).

    >>> repeat_rows(np.array([[1], [2]]), 4).ravel()
    array([1, 1, 2, 2])
    """
    return repeat_heads(x[..., None], heads)[..., 0]


def norm_of(x: np.ndarray) -> np.ndarray:
    """S1: norms (...) of rows x (..., d).

    >>> norm_of(np.array([3.0, 4.0]))
    np.float64(5.0)
    """
    return np.sqrt(np.sum(x * x, axis=-1))


def stack(rows: list[np.ndarray], empty: np.ndarray, axis: int) -> np.ndarray:
    """Rows of tokens along `axis`, or `empty` if there is no token.

    >>> stack([], np.zeros((2, 0)), -1).shape
    (2, 0)
    """
    return np.stack(rows, axis=axis) if rows else empty


def _power(lam: float, ages: np.ndarray, like: np.ndarray) -> np.ndarray:
    """lam^age in the dtype of `like`, with 0^0 = 1; ages below 0 are not used and count as 0."""
    return np.power(float(lam), np.maximum(ages, 0)).astype(like.dtype)
