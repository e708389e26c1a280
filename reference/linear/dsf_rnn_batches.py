"""Gated RNNs of `dsf` over sequences laid end to end, as in `dsf_batches`. Clauses S11, S12, S16
and S18 are those of `dsf`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.conventions import check_array, check_shaped
from attnspec.reference.linear.dsf_batches import gathered, stacked, starting, states
from attnspec.reference.linear.dsf_rnn import (
    check_gates,
    check_rg_lru,
    qlstm,
    qlstm_backward,
    rg_lru,
    rg_lru_backward,
)


def qlstm_packed(
    f: np.ndarray,
    i: np.ndarray,
    o: np.ndarray,
    z: np.ndarray,
    offsets: np.ndarray,
    alpha: float = 1.0,
    reversed: bool = False,
    h0: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """S11, S18: y (..., total, N) and the last h (..., sequences, N), of pre-activations f, i, o
    and inputs z (..., total, N).

    offsets int (sequences + 1), increasing from 0 to the total; h0 (..., sequences, N) or None.
    `alpha`, a number or an array of no axes, is only used by the reversed gate.

    >>> zero = np.zeros((3, 1))
    >>> y, h = qlstm_packed(zero, zero, zero, 4 + zero, np.array([0, 2, 3]))
    >>> y.ravel(), h.ravel()
    (array([1. , 1.5, 1. ]), array([3., 2.]))
    """
    check_gates(f, i, o, alpha, reversed)
    check_shaped("z", z, f.shape)
    parts = []
    for rows, first in starting(offsets, f.shape[-2], h0, f.shape[:-2], f.shape[-1:]):
        F, I, O, Z = (x[..., rows, :] for x in (f, i, o, z))
        y, h = qlstm(F, I, O, Z, alpha, reversed, first)
        parts.append((y, stacked(h, 1)))
    y, h = gathered(parts, (-2, -2))
    return y, h


def qlstm_packed_backward(
    f: np.ndarray,
    i: np.ndarray,
    o: np.ndarray,
    z: np.ndarray,
    offsets: np.ndarray,
    h0: np.ndarray | None,
    dy: np.ndarray,
    dh: np.ndarray | None = None,
    *,
    alpha: float = 1.0,
    reversed: bool = False,
) -> tuple[Any, ...]:
    """S16, S18: df, di, do, dz, dalpha, dh0 of `qlstm_packed`; dh0 is None without an h0.

    >>> zero = np.zeros((3, 1))
    >>> made = qlstm_packed_backward(zero, zero, zero, zero, np.array([0, 1, 3]), None, 4 + zero)
    >>> made[3].ravel()
    array([1. , 1.5, 1. ])
    """
    check_gates(f, i, o, alpha, reversed)
    check_shaped("z", z, f.shape)
    check_shaped("dy", dy, z.shape)
    lead, width = f.shape[:-2], f.shape[-1:]
    begun = starting(offsets, f.shape[-2], h0, lead, width)
    ends = states("dh", dh, len(begun), lead, width)
    parts = []
    for (rows, first), last in zip(begun, ends, strict=True):
        F, I, O, Z, up = (x[..., rows, :] for x in (f, i, o, z, dy))
        *made, dh0 = qlstm_backward(F, I, O, Z, first, up, last, alpha=alpha, reversed=reversed)
        parts.append((*made, stacked(dh0, 1)))
    return gathered(parts, (-2, -2, -2, -2, None, -2))


def rg_lru_packed(
    u: np.ndarray,
    r: np.ndarray,
    g: np.ndarray,
    lam: np.ndarray,
    offsets: np.ndarray,
    *,
    c: float = 8.0,
    h0: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """S12, S18: y (..., total, N) and the last h (..., sequences, N).

    u, r, g (..., total, N): inputs, pre-activations of the decay and of the input gate; lam (N,),
    offsets int (sequences + 1), increasing from 0 to the total, h0 (..., sequences, N) or None.

    >>> zero = np.zeros((2, 1))
    >>> never = np.full(1, -50.0)
    >>> first = np.array([[3.0], [5.0]])
    >>> y, h = rg_lru_packed(zero, zero, zero, never, np.array([0, 1, 2]), h0=first)
    >>> y.round(3).ravel(), h.round(3).ravel()
    (array([3., 5.]), array([3., 5.]))
    """
    check_array("u", u, ("T", "N"))
    check_rg_lru(r, g, lam, c, u)
    parts = []
    for rows, first in starting(offsets, u.shape[-2], h0, u.shape[:-2], u.shape[-1:]):
        U, R, G = (x[..., rows, :] for x in (u, r, g))
        y, h = rg_lru(U, R, G, lam, c=c, h0=first)
        parts.append((y, stacked(h, 1)))
    y, h = gathered(parts, (-2, -2))
    return y, h


def rg_lru_packed_backward(
    u: np.ndarray,
    r: np.ndarray,
    g: np.ndarray,
    lam: np.ndarray,
    offsets: np.ndarray,
    dy: np.ndarray,
    dh: np.ndarray | None = None,
    *,
    c: float = 8.0,
    h0: np.ndarray | None = None,
) -> tuple[Any, ...]:
    """S16, S18: du, dr, dg, dlam, dh0 of `rg_lru_packed`; dh0 is None without an h0.

    >>> zero = np.zeros((2, 1))
    >>> never = np.full(1, -50.0)
    >>> rg_lru_packed_backward(
    ...     zero, zero, zero, never, np.array([0, 1, 2]), 1 + zero, h0=zero)[4].round(3).ravel()
    array([1., 1.])
    """
    check_array("u", u, ("T", "N"))
    check_rg_lru(r, g, lam, c, u)
    check_shaped("dy", dy, u.shape)
    lead, width = u.shape[:-2], u.shape[-1:]
    begun = starting(offsets, u.shape[-2], h0, lead, width)
    ends = states("dh", dh, len(begun), lead, width)
    parts = []
    for (rows, first), last in zip(begun, ends, strict=True):
        U, R, G, up = (x[..., rows, :] for x in (u, r, g, dy))
        *made, dh0 = rg_lru_backward(U, R, G, lam, up, last, c=c, h0=first)
        parts.append((*made, stacked(dh0, 1)))
    return gathered(parts, (-2, -2, -2, None, -2))
