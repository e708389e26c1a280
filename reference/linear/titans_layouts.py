"""Titans beside attention: persistent tokens, masks, MAC, MAG and MAL. Clauses S12 to S17.

One head. Weights and momentum have the leading axes of the rows or none; `attn` and `mem` are
three matrices each, for queries, keys and values.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.conventions import check_array, check_integer, check_size
from attnspec.reference.dense.attention import attend
from attnspec.reference.linear.titans_chunks import Layers, check_states
from attnspec.reference.linear.titans_deep import titans_chunk_mlp
from attnspec.reference.linear.titans_memory import mlp_memory

EPSILON = 1e-6
Three = tuple[np.ndarray, np.ndarray, np.ndarray]


def persistent_prefix(P: np.ndarray, x: np.ndarray) -> np.ndarray:
    """S12: rows (..., N_p + T, D) of P (N_p, D), then x (..., T, D).

    >>> persistent_prefix(np.zeros((1, 2)), np.ones((1, 2)))
    array([[0., 0.],
           [1., 1.]])
    """
    check_array("x", x, ("T", "D"))
    check_array("P", P, ("N_p", "D"))
    if P.ndim != 2:
        raise ValueError(f"P: got shape {P.shape}, expected (N_p, D)")
    check_size("P", P.shape[-1], x.shape[-1], "D, as in x")
    if P.dtype != x.dtype:
        raise TypeError(f"P: got dtype {P.dtype}, expected {x.dtype}, as x")
    prefix = np.broadcast_to(P, (*x.shape[:-2], *P.shape), subok=True)
    return np.concatenate([prefix, x], axis=-2)


def titans_mask_mac(T: int, C: int, N_p: int, tokenwise: bool = False) -> np.ndarray:
    """S13: bool (T, N_p + 2 T), True where a row may look; columns are [P | memory rows | x].

    >>> titans_mask_mac(2, 2, 1).astype(int)
    array([[1, 1, 1, 1, 0],
           [1, 1, 1, 1, 1]])
    """
    check_integer("T", T, least=0)
    check_integer("C", C, least=1)
    check_integer("N_p", N_p, least=0)
    row, column = np.arange(T)[:, None], np.arange(T)
    together, before = row // C == column // C, column <= row
    asked = together & before if tokenwise else together
    return np.concatenate([np.ones((T, N_p), bool), asked, together & before], axis=1)


def titans_mask_mag(T: int, w: int, N_p: int) -> np.ndarray:
    """S13, K8: bool (N_p + T, N_p + T), rows and columns [P | x]; the last w tokens, and P.

    >>> titans_mask_mag(2, 1, 1).astype(int)
    array([[1, 0, 0],
           [1, 1, 0],
           [1, 0, 1]])
    """
    check_integer("T", T, least=0)
    check_integer("w", w, least=1)
    check_integer("N_p", N_p, least=0)
    return _window(T + N_p, w) | np.tri(T + N_p, dtype=bool) & (np.arange(T + N_p) < N_p)


def gate(y: np.ndarray, h: np.ndarray, gains: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """S17: rows (..., T, D) of attention y, gated by what the memory says, h; gains (D,) each.

    >>> gate(np.array([[2.0]]), np.array([[0.0]]), (np.ones(1), np.ones(1))).round(4)
    array([[0.5]])
    """
    check_array("y", y, ("T", "D"))
    check_array("h", h, ("T", "D"))
    if h.shape != y.shape:
        raise ValueError(f"h: got shape {h.shape}, expected {y.shape}, as y")
    check_gains(gains, y)
    pushed = _rms(h) * gains[1]
    small = np.exp(-np.abs(pushed))
    opened = np.where(pushed >= 0, 1 / (1 + small), small / (1 + small)).astype(y.dtype)
    return _rms(y) * gains[0] * opened


def mac_segment(
    seg: np.ndarray, P: np.ndarray, W: Any, S: Any, attn: Three, mem: Three, rates: Any,
    gains: tuple[np.ndarray, np.ndarray], b: int, *, loss_scale: float = 2.0,
    tokenwise: bool = False, normalise: bool = False,
) -> tuple[np.ndarray, Layers, Layers]:  # fmt: skip
    """S14: o (..., C, D) of one segment seg (..., C, D), and the memory that has stored it.

    P (N_p, D); W, S tuples of layers that lead back to D; rates of the C rows stored.

    >>> one = np.ones((1, 1))
    >>> o, W, S = mac_segment(one, one[:0], (0 * one,), None, (one,) * 3, (one,) * 3,
    ...                       (0.5, 0.0, 0.0), (one[0], one[0]), 1)
    >>> W[0].round(4)
    array([[0.5344]])
    """
    check_array("seg", seg, ("C", "D"))
    prefixed = persistent_prefix(P, seg)
    check_matrices("attn", attn, seg)
    check_matrices("mem", mem, seg)
    asking = directed(seg @ mem[0], normalise)
    layers, momentum = check_states(W, S, asking)
    h = mlp_memory(layers, asking)
    check_size("W", h.shape[-1], seg.shape[-1], "D, the width of the segment's rows")
    N_p, C = P.shape[0], seg.shape[-2]
    z = np.concatenate([prefixed[..., :N_p, :], h, seg], axis=-2)
    y = attend_rows(seg, z, attn, titans_mask_mac(C, max(C, 1), N_p, tokenwise))
    check_gains(gains, y)
    read, layers, momentum = _memory(y, layers, momentum, mem, rates, b, loss_scale, normalise)
    if not tokenwise:
        read = mlp_memory(layers, directed(y @ mem[0], normalise))
    return gate(y, read, gains), layers, momentum


def mag(
    x: np.ndarray, P: np.ndarray, W: Any, S: Any, attn: Three, mem: Three, rates: Any,
    gains: tuple[np.ndarray, np.ndarray], w: int, b: int, *, loss_scale: float = 2.0,
    normalise: bool = False,
) -> tuple[np.ndarray, Layers, Layers]:  # fmt: skip
    """S15: o (..., T, dv) of x (..., T, D), and the memory; rates of the N_p + T rows stored.

    >>> one = np.ones((1, 1))
    >>> mag(one, one[:0], (0 * one,), None, (one,) * 3, (one,) * 3, (0.0, 0.0, 0.0),
    ...     (one[0], one[0]), 1, 1)[0].round(4)
    array([[0.5]])
    """
    xt = persistent_prefix(P, x)
    check_matrices("attn", attn, x)
    check_matrices("mem", mem, x)
    y = attend_rows(xt, xt, attn, titans_mask_mag(x.shape[-2], w, P.shape[0]))
    check_gains(gains, y)
    h, layers, momentum = _memory(xt, W, S, mem, rates, b, loss_scale, normalise)
    check_size("W", h.shape[-1], y.shape[-1], "the width of the attention's rows")
    return gate(y, h, gains)[..., P.shape[0] :, :], layers, momentum


def mal(
    x: np.ndarray, P: np.ndarray, W: Any, S: Any, attn: Three, mem: Three, rates: Any, w: int,
    b: int, *, loss_scale: float = 2.0, normalise: bool = False,
) -> tuple[np.ndarray, Layers, Layers]:  # fmt: skip
    """S16, K8: o (..., T, dv) of x (..., T, D), and the memory; rates of the N_p + T rows stored.

    >>> one = np.ones((1, 1))
    >>> mal(one, one[:0], (0 * one,), None, (one,) * 3, (one,) * 3, (0.5, 0.0, 0.0), 1, 1)[0]
    array([[1.]])
    """
    xt = persistent_prefix(P, x)
    check_matrices("mem", mem, x)
    check_integer("w", w, least=1)
    y, layers, momentum = _memory(xt, W, S, mem, rates, b, loss_scale, normalise)
    check_matrices("attn", attn, y)
    o = attend_rows(y, y, attn, _window(y.shape[-2], w))
    return o[..., P.shape[0] :, :], layers, momentum


def _memory(
    x: np.ndarray, W: Any, S: Any, mem: Three, rates: Any, b: int, loss_scale: float,
    normalise: bool,
) -> tuple[np.ndarray, Layers, Layers]:  # fmt: skip
    """The memory over rows x (..., T, D), stored and read in order; one head is one axis more."""
    q, k, v = ((x @ matrix)[..., None, :, :] for matrix in mem)
    q, k = directed(q, normalise), directed(k, normalise)
    W, S = check_states(W, S, k[..., 0, :, :])
    y, W, S = titans_chunk_mlp(
        tuple(w[..., None, :, :] for w in W), tuple(s[..., None, :, :] for s in S), k, v, q,
        by_head(rates), b, loss_scale=loss_scale,
    )  # fmt: skip
    return y[..., 0, :, :], tuple(w[..., 0, :, :] for w in W), tuple(s[..., 0, :, :] for s in S)


def directed(x: np.ndarray, normalise: bool) -> np.ndarray:
    """S14: rows x, of norm 1 if `normalise`.

    >>> directed(np.array([[3.0, 4.0]]), True).round(3)
    array([[0.6, 0.8]])
    """
    return x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + EPSILON) if normalise else x


def by_head(rates: Any) -> Any:
    """S14: rates (..., T) with an axis of heads; numbers stay as they are.

    >>> by_head((np.ones(2), 0.5, 0.5))[0].shape
    (1, 2)
    """
    if not isinstance(rates, (tuple, list)):
        return rates
    return tuple(r[..., None, :] if isinstance(r, np.ndarray) and r.ndim else r for r in rates)


def attend_rows(x: np.ndarray, z: np.ndarray, attn: Three, mask: np.ndarray) -> np.ndarray:
    """S14: softmax attention of rows x to rows z (..., rows, D), one head.

    >>> one = np.ones((1, 1))
    >>> attend_rows(one, 2 * one, (one,) * 3, np.ones((1, 1), bool))
    array([[2.]])
    """
    q, k, v = (rows[..., None, :, :] for rows in (x @ attn[0], z @ attn[1], z @ attn[2]))
    return attend(q, k, v, mask=mask)[0][..., 0, :, :]


def _window(T: int, w: int) -> np.ndarray:
    age = np.arange(T)[:, None] - np.arange(T)
    return (age >= 0) & (age < w)


def _rms(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPSILON)


def check_matrices(name: str, matrices: Any, x: np.ndarray) -> None:
    """S14, K14: three matrices (D, width) for rows x (..., T, D).

    >>> check_matrices("attn", (np.ones((1, 1)),) * 2, np.ones((1, 1)))
    Traceback (most recent call last):
    ValueError: attn: got 2, expected three matrices
    """
    if not isinstance(matrices, (tuple, list)):
        raise TypeError(f"{name}: got {type(matrices).__name__}, expected three matrices")
    if len(matrices) != 3:
        raise ValueError(f"{name}: got {len(matrices)}, expected three matrices")
    for matrix in matrices:
        check_array(name, matrix, ("D", "width"))
        if matrix.ndim != 2:
            raise ValueError(f"{name}: got shape {matrix.shape}, expected (D, width)")
        check_size(name, matrix.shape[0], x.shape[-1], "D, the width of the rows")
        if matrix.dtype != x.dtype:
            raise TypeError(f"{name}: got dtype {matrix.dtype}, expected {x.dtype}, as the rows")
    check_size(name, matrices[1].shape[1], matrices[0].shape[1], "columns for keys, as for queries")


def check_gains(gains: Any, y: np.ndarray) -> None:
    """S17, K14: two vectors as wide as the rows y.

    >>> check_gains((np.ones(2), np.ones(1)), np.ones((1, 2)))
    Traceback (most recent call last):
    ValueError: gains: got shape (1,), expected (2,)
    """
    if not isinstance(gains, (tuple, list)):
        raise TypeError(f"gains: got {type(gains).__name__}, expected two vectors")
    if len(gains) != 2:
        raise ValueError(f"gains: got {len(gains)}, expected two vectors")
    for gain in gains:
        check_array("gains", gain, ("D",))
        if gain.shape != y.shape[-1:]:
            raise ValueError(f"gains: got shape {gain.shape}, expected {y.shape[-1:]}")
        if gain.dtype != y.dtype:
            raise TypeError(f"gains: got dtype {gain.dtype}, expected {y.dtype}, as the rows")
