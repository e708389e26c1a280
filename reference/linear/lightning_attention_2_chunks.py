r"""Lightning Attention-2, block by block: the clauses S3 to S7 of `lightning_attention_2`.

A block of rows reads the state that enters it and its own rows by a masked product, then hands the
next state on. The decay is given as one log decay g <= 0 a token and head, so the same three
functions serve a constant slope and a decay that depends on the data.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from attnspec.reference.conventions import (
    check_array,
    check_attention_inputs,
    check_integer,
    check_shaped,
    group_size,
    repeat_heads,
)
from attnspec.reference.dense.attention_gradient import sum_groups


def chunk_states(
    k: np.ndarray, v: np.ndarray, g: np.ndarray, block: int, S0: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """S4: the states (..., heads, ceil(T/block), d, e) entering each block of `block` rows, and the
    state (..., heads, d, e) behind the last one.

    k (..., kv_heads, T, d), v (..., kv_heads, T, e); g (..., heads, T) are the log decays of S3,
    and their heads are the heads of the states. ValueError for a g that is not finite and <= 0.

    >>> x = np.ones((1, 3, 1))
    >>> [S.ravel() for S in chunk_states(x, x, np.zeros((1, 3)), 2)]
    [array([0., 2.]), array([3.])]
    """
    check_log_decays(k, v, g)
    check_integer("block", block, least=1)
    heads, T = g.shape[-2:]
    keys, values = repeat_heads(k, heads), repeat_heads(v, heads)
    S = first_state(S0, (*g.shape[:-1], k.shape[-1], v.shape[-1]), k)
    entering = [S[..., None, :, :][..., :0, :, :]]
    for rows in _blocks(T, block):
        entering.append(S[..., None, :, :])
        decay = _decays(g[..., rows], k.dtype)
        written = np.swapaxes(decay.to_end * keys[..., rows, :], -1, -2) @ values[..., rows, :]
        S = decay.through * S + written
    return np.concatenate(entering, axis=-3), S


def chunk_output(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, g: np.ndarray, S_entering: np.ndarray, block: int
) -> np.ndarray:
    """S4: o (..., heads, T, e) from the states that `chunk_states` returns first.

    >>> x = np.ones((1, 3, 1))
    >>> chunk_output(x, x, x, np.zeros((1, 3)), np.array([[[[0.0]], [[2.0]]]]), 2).ravel()
    array([1., 2., 3.])
    """
    check_log_decays(k, v, g)
    check_integer("block", block, least=1)
    check_shaped("q", q, (*g.shape, k.shape[-1]))
    heads, T = g.shape[-2:]
    shape = (*g.shape[:-1], -(-T // block), k.shape[-1], v.shape[-1])
    check_shaped("S_entering", S_entering, shape)
    keys, values = repeat_heads(k, heads), repeat_heads(v, heads)
    outputs = [np.zeros_like(v, shape=(*g.shape[:-1], 0, v.shape[-1]))]
    for c, rows in enumerate(_blocks(T, block)):
        decay = _decays(g[..., rows], q.dtype)
        Q, K, V = (x[..., rows, :] for x in (q, keys, values))
        carried = (decay.from_start * Q) @ S_entering[..., c, :, :]
        scores = Q @ np.swapaxes(K, -1, -2)
        outputs.append(carried + (scores * decay.within) @ V)
    return np.concatenate(outputs, axis=-2)


def backward_chunk(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    g: np.ndarray,
    do: np.ndarray,
    dS_final: np.ndarray | None = None,
    block: int = 64,
    S0: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """S6, S7: dq, dk, dv, dg, dS0 of `chunk_output` after `chunk_states`.

    do (..., heads, T, e); dS_final (..., heads, d, e) is the gradient of the last state, None if it
    is not used. No S0 means zeros, for which dS0 is returned all the same.

    >>> x = np.ones((1, 2, 1))
    >>> [gradient.ravel() for gradient in backward_chunk(x, x, x, np.zeros((1, 2)), x, block=1)]
    [array([1., 2.]), array([2., 1.]), array([2., 1.]), array([0., 1.]), array([2.])]
    """
    S_entering, S = chunk_states(k, v, g, block, S0)
    check_shaped("q", q, (*g.shape, k.shape[-1]))
    check_shaped("do", do, (*g.shape, v.shape[-1]))
    R = np.zeros_like(S) if dS_final is None else dS_final
    check_shaped("dS_final", R, S.shape)
    heads, T = g.shape[-2:]
    keys, values = repeat_heads(k, heads), repeat_heads(v, heads)
    dq, dk, dv = np.zeros_like(q), np.zeros_like(keys), np.zeros_like(values)
    dG = np.zeros_like(q, shape=g.shape)
    dG[..., -1:] += np.sum(S * R, axis=(-1, -2))[..., None]
    for c, rows in reversed(list(enumerate(_blocks(T, block)))):
        decay = _decays(g[..., rows], q.dtype)
        Q, K, V, dO = (x[..., rows, :] for x in (q, keys, values, do))
        weights = (Q @ np.swapaxes(K, -1, -2)) * decay.within
        dscores = (dO @ np.swapaxes(V, -1, -2)) * decay.within
        S_T, R_T = np.swapaxes(S_entering[..., c, :, :], -1, -2), np.swapaxes(R, -1, -2)
        dq[..., rows, :] = dscores @ K + (decay.from_start * dO) @ S_T
        dk[..., rows, :] = np.swapaxes(dscores, -1, -2) @ Q + decay.to_end * (V @ R_T)
        dv[..., rows, :] = np.swapaxes(weights, -1, -2) @ dO + decay.to_end * (K @ R)
        R = decay.through * R + np.swapaxes(decay.from_start * Q, -1, -2) @ dO
    dG = dG + np.sum(q * dq, axis=-1) - np.sum(keys * dk, axis=-1)
    dg = np.flip(np.cumsum(np.flip(dG, axis=-1), axis=-1), axis=-1).astype(g.dtype)
    return dq, sum_groups(dk, k.shape[-3]), sum_groups(dv, k.shape[-3]), dg, R


def _blocks(T: int, block: int) -> list[slice]:
    return [slice(start, min(start + block, T)) for start in range(0, T, block)]


class _Decays(NamedTuple):
    """S4: the factors of one block of m rows."""

    from_start: np.ndarray  # e^G (..., m, 1)
    to_end: np.ndarray  # e^(G_m - G) (..., m, 1)
    through: np.ndarray  # e^G_m (..., 1, 1)
    within: np.ndarray  # D (..., m, m)


def _decays(g: np.ndarray, dtype: np.dtype) -> _Decays:
    G = np.cumsum(g, axis=-1)
    lower = np.tri(G.shape[-1], dtype=bool)
    # Above the diagonal the exponent is positive: it is dropped before it can overflow.
    gap = np.where(lower, G[..., :, None] - G[..., None, :], 0.0)
    return _Decays(
        from_start=np.exp(G)[..., None].astype(dtype),
        to_end=np.exp(G[..., -1:] - G)[..., None].astype(dtype),
        through=np.exp(G[..., -1])[..., None, None].astype(dtype),
        within=np.where(lower, np.exp(gap), 0.0).astype(dtype),
    )


def first_state(S0: np.ndarray | None, shape: tuple[int, ...], like: np.ndarray) -> np.ndarray:
    """S2, K14: S0 after a check of shape and dtype, or zeros if there is none.

    >>> first_state(None, (1, 1), np.ones(1))
    array([[0.]])
    """
    if S0 is None:
        return np.zeros_like(like, shape=shape)
    check_shaped("S0", S0, shape)
    if S0.dtype != like.dtype:
        raise TypeError(f"S0: got dtype {S0.dtype}, expected {like.dtype}, as k")
    return S0


def constant_log_decays(q: np.ndarray, s: np.ndarray) -> np.ndarray:
    """S3: g (..., heads, T) = -s for every token of q, in the dtype of s (heads,).

    >>> constant_log_decays(np.ones((1, 2, 4)), np.array([0.5]))
    array([[-0.5, -0.5]])
    """
    check_slopes(s, q.shape[-3])
    return np.zeros_like(s, shape=q.shape[:-1]) - s[:, None]


def check_slopes(s: np.ndarray, heads: int | None = None, name: str = "s") -> None:
    """S1, K14: `name` (heads,) holds finite slopes >= 0, one for each query head.

    >>> check_slopes(np.array([-1.0]))
    Traceback (most recent call last):
    ValueError: s: got [-1.], expected finite slopes >= 0
    """
    check_array(name, s, ("heads",))
    if s.ndim != 1 or heads not in (None, s.shape[0]):
        wanted = "heads" if heads is None else heads
        raise ValueError(f"{name}: got shape {s.shape}, expected ({wanted},)")
    if not np.all(np.isfinite(s) & (s >= 0)):
        raise ValueError(f"{name}: got {s}, expected finite slopes >= 0")


def check_log_decays(k: np.ndarray, v: np.ndarray, g: np.ndarray) -> None:
    """S3, K14: g (..., heads, T) fits k and v, and is finite and <= 0.

    >>> check_log_decays(np.ones((1, 1, 1)), np.ones((1, 1, 1)), np.ones((1, 1)))
    Traceback (most recent call last):
    ValueError: g: got log decays up to 1.0, expected finite values <= 0
    """
    check_array("k", k, ("kv_heads", "T", "d"))
    check_attention_inputs(k, k, v)
    check_array("g", g, ("heads", "tokens"))
    if g.shape[:-2] != k.shape[:-3] or g.shape[-1] != k.shape[-2]:
        expected = ", ".join(map(str, (*k.shape[:-3], "heads", k.shape[-2])))
        raise ValueError(f"g: got shape {g.shape}, expected ({expected})")
    group_size(g.shape[-2], k.shape[-3])
    if not np.all(np.isfinite(g) & (g <= 0)):
        raise ValueError(f"g: got log decays up to {np.max(g)}, expected finite values <= 0")
