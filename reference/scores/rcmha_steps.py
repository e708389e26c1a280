"""The steps around the scores of RCMHA (S1, S2, S5, S7): heads, convolutions, weights, memory."""

from __future__ import annotations

import numpy as np

from attnspec.reference.conventions import check_array, check_integer
from attnspec.reference.dense.attention import combine
from attnspec.reference.primitives.softmax import softmax


def project_heads(x: np.ndarray, W: np.ndarray, b: np.ndarray | None, heads: int) -> np.ndarray:
    """S1: x (..., T, D) times W (D, D) plus b (D,) if any, as heads (..., heads, T, D / heads).

    Head h takes columns h dk .. (h + 1) dk - 1.

    >>> project_heads(np.array([[1.0, 2.0]]), np.eye(2), np.array([0.0, 1.0]), 2)
    array([[[1.]],
    <BLANKLINE>
           [[3.]]])
    """
    check_array("x", x, ("T", "D"))
    check_matrix("W", W, x)
    check_integer("heads", heads, least=1)
    D = x.shape[-1]
    if D % heads:
        raise ValueError(f"heads: got {heads}, expected a divisor of D = {D}")
    if b is not None:
        check_like("b", b, x, (D,))
    y = x @ W if b is None else x @ W + b
    return np.swapaxes(y.reshape(*y.shape[:-1], heads, D // heads), -2, -3)


def check_like(name: str, x: np.ndarray, other: np.ndarray, shape: tuple[int, ...]) -> None:
    """K14: `x` has exactly this shape, and the dtype of `other`."""
    check_array(name, x, ("size",) * len(shape))
    if x.dtype != other.dtype:
        raise TypeError(f"{name}: got dtype {x.dtype}, expected {other.dtype}, as the tokens")
    if x.shape != shape:
        raise ValueError(f"{name}: got shape {x.shape}, expected {shape}")


def check_matrix(name: str, W: np.ndarray, x: np.ndarray) -> None:
    check_like(name, W, x, (x.shape[-1], x.shape[-1]))


def check_filters(w: np.ndarray, b: np.ndarray, p: np.ndarray) -> int:
    """K14: filters w (dk, K) and biases b (dk,) for the channels of p; returns K."""
    check_array("w", w, ("dk", "K"))
    if w.shape[-1] < 1:
        raise ValueError("w: got 0 taps, expected at least 1")
    check_like("w", w, p, (p.shape[-1], w.shape[-1]))
    check_like("b", b, p, (p.shape[-1],))
    return int(w.shape[-1])


def depthwise_causal_conv(
    p: np.ndarray, w: np.ndarray, b: np.ndarray, state: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """S2: each channel of p (..., heads, T, dk) mixed with its K - 1 predecessors.

    w (dk, K) and b (dk,) serve all heads; w[c, K - 1] is the tap of the token itself. `state`
    (..., heads, K - 1, dk) holds the rows before p, None zeros. Returns y as p, and the state after
    it: the last K - 1 rows put in, older ones included if p has fewer.

    >>> p = np.array([[[1.0], [2.0], [4.0]]])
    >>> y, state = depthwise_causal_conv(p, np.array([[0.5, 1.0]]), np.zeros(1))
    >>> y.ravel(), state.ravel()
    (array([1. , 2.5, 5. ]), array([4.]))
    """
    check_array("p", p, ("heads", "T", "dk"))
    K = check_filters(w, b, p)
    rows = _with_history(p, K, state)
    T = p.shape[-2]
    y = b + np.zeros_like(p)
    for u in range(K):
        y = y + w[:, u] * rows[..., u : u + T, :]
    return y, rows[..., T:, :].copy()


def depthwise_causal_conv_backward(
    p: np.ndarray,
    w: np.ndarray,
    b: np.ndarray,
    state: np.ndarray | None,
    dy: np.ndarray,
    dnew_state: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """S2: gradients dp, dw, db and dstate of `depthwise_causal_conv`.

    No `dnew_state` means the new state is not used; dstate is there without a state, too.

    >>> p, w = np.array([[[1.0], [2.0]]]), np.array([[0.5, 1.0]])
    >>> [g.ravel() for g in depthwise_causal_conv_backward(p, w, np.zeros(1), None, 0 * p + 1)]
    [array([1.5, 1. ]), array([1., 3.]), array([2.]), array([0.5])]
    """
    K = check_filters(w, b, p)
    rows = _with_history(p, K, state)
    check_like("dy", dy, p, p.shape)
    *_, T, dk = p.shape
    flat = dy.reshape(-1, dk)
    drows, dw = np.zeros_like(rows), np.zeros_like(w)
    for u in range(K):
        drows[..., u : u + T, :] += w[:, u] * dy
        met = rows[..., u : u + T, :].reshape(-1, dk)
        dw[:, u] = np.einsum("tc,tc->c", flat, met)
    if dnew_state is not None:
        check_like("dnew_state", dnew_state, p, (*p.shape[:-2], K - 1, dk))
        drows[..., T:, :] += dnew_state
    return drows[..., K - 1 :, :], dw, np.sum(flat, axis=0), drows[..., : K - 1, :]


def _with_history(p: np.ndarray, K: int, state: np.ndarray | None) -> np.ndarray:
    shape = (*p.shape[:-2], K - 1, p.shape[-1])
    if state is None:
        state = np.zeros_like(p, shape=shape)
    check_like("state", state, p, shape)
    return np.concatenate([state, p], axis=-2)


def memory_mask(T: int, M: int) -> np.ndarray:
    """S5: bool (T, M + T), True = visible: all of the memory, and j - M <= i.

    >>> memory_mask(2, 1).astype(int)
    array([[1, 1, 0],
           [1, 1, 1]])
    """
    check_integer("T", T, least=0)
    check_integer("M", M, least=0)
    return np.arange(M + T)[None, :] - M <= np.arange(T)[:, None]


def attend(
    scores: np.ndarray, mask: np.ndarray | None, v: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """S5: outputs (..., heads, T, dv) and weights P (..., heads, T, S) of scaled scores.

    `mask` is bool (T, S), True = visible, None all; v (..., heads, S, dv).

    >>> attend(np.zeros((1, 2, 2)), memory_mask(2, 0), np.eye(2)[None])[0]
    array([[[1. , 0. ],
            [0.5, 0.5]]])
    """
    check_array("scores", scores, ("heads", "T", "S"))
    check_array("v", v, ("heads", "S", "dv"))
    check_like("v", v, scores, (*scores.shape[:-2], scores.shape[-1], v.shape[-1]))
    if mask is not None:
        check_array("mask", mask, ("T", "S"), dtype="bool")
        if mask.shape != scores.shape[-2:]:
            raise ValueError(f"mask: got shape {mask.shape}, expected {scores.shape[-2:]}")
    P = softmax(scores, mask)
    return combine(P, v), P


def update_memory(old: np.ndarray | None, new: np.ndarray, mem_len: int) -> np.ndarray:
    """S7: the last `mem_len` tokens of old (..., M, D), or none, and new (..., T, D).

    >>> update_memory(np.array([[1.0], [2.0]]), np.array([[3.0]]), 2).ravel()
    array([2., 3.])
    """
    check_array("new", new, ("T", "D"))
    check_integer("mem_len", mem_len, least=0)
    kept = new
    if old is not None:
        check_memory("old", old, new)
        kept = np.concatenate([old, new], axis=-2)
    return kept[..., max(kept.shape[-2] - mem_len, 0) :, :].copy()


def check_memory(name: str, memory: np.ndarray, x: np.ndarray) -> None:
    """K14: earlier tokens (..., M, D) for tokens x (..., T, D)."""
    check_array(name, memory, ("M", "D"))
    check_like(name, memory, x, (*x.shape[:-2], memory.shape[-2], x.shape[-1]))
