"""Attention and state space models of `dsf` over sequences laid end to end. Clauses S5, S8, S9, S16
and S18 are those of `dsf`.

Each sequence starts from a state of its own, so its results and its gradients are those it has
alone. What sequences share, a rate or a skip, gathers the gradients of all.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.conventions import check_array, check_offsets, check_shaped
from attnspec.reference.linear.dsf_mixers import (
    Pair,
    check_tokens,
    linear_attention,
    linear_attention_backward,
)
from attnspec.reference.linear.dsf_recurrence import check_given
from attnspec.reference.linear.dsf_ssm import (
    check_s6_scan,
    s6_scan,
    s6_scan_backward,
    ssd_as_attention,
    ssd_scan,
    ssd_scan_backward,
)


def linear_attention_packed(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    offsets: np.ndarray,
    state: Pair | None = None,
) -> tuple[np.ndarray, Pair]:
    """S5, S18: y (..., heads, total, dv) and the states: h (..., sequences, heads, dv, d), sums of
    features (..., sequences, heads, d).

    q, k (..., heads, total, d), v (..., heads, total, dv), offsets int (sequences + 1), increasing
    from 0 to the total.

    >>> v = np.array([[[2.0], [4.0], [8.0]]])
    >>> y, (h, z) = linear_attention_packed(*np.zeros((2, 1, 3, 1)), v, np.array([0, 2, 3]))
    >>> y.ravel(), h.ravel(), z.ravel()
    (array([2., 3., 8.]), array([6., 8.]), array([2., 1.]))
    """
    check_tokens(q, k, v)
    sequences = check_offsets("offsets", offsets, q.shape[-2])
    parts = []
    for rows, own in zip(sequences, _pairs(state, q, v, len(sequences)), strict=True):
        Q, K, V = (x[..., rows, :] for x in (q, k, v))
        y, pair = linear_attention(Q, K, V, own)
        parts.append((y, stacked(pair[0], 3), stacked(pair[1], 2)))
    y, h, z = gathered(parts, (-2, -4, -3))
    return y, (h, z)


def linear_attention_packed_backward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    offsets: np.ndarray,
    state: Pair | None,
    dy: np.ndarray,
    dh: np.ndarray | None = None,
    dz: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Pair | None]:
    """S16, S18: dq, dk, dv and the pair dstate of `linear_attention_packed`, None without a state.

    >>> x = np.ones((1, 3, 1))
    >>> linear_attention_packed_backward(x, x, x, np.array([0, 1, 3]), None, x)[2].ravel()
    array([1. , 1.5, 0.5])
    """
    check_tokens(q, k, v)
    check_shaped("dy", dy, v.shape)
    sequences = check_offsets("offsets", offsets, q.shape[-2])
    many = len(sequences)
    pairs = _pairs(state, q, v, many)
    lead, heads, d = q.shape[:-3], q.shape[-3], q.shape[-1]
    dhs = states("dh", dh, many, lead, (heads, v.shape[-1], d))
    dzs = states("dz", dz, many, lead, (heads, d))
    parts = []
    for n, rows in enumerate(sequences):
        Q, K, V, up = (x[..., rows, :] for x in (q, k, v, dy))
        *made, pair = linear_attention_backward(Q, K, V, pairs[n], up, dhs[n], dzs[n])
        first, last = (None, None) if pair is None else pair
        parts.append((*made, stacked(first, 3), stacked(last, 2)))
    dq, dk, dv, dh0, dz0 = gathered(parts, (-2, -2, -2, -4, -3))
    return dq, dk, dv, None if state is None else (dh0, dz0)


def s6_packed(
    Delta: np.ndarray,
    A: np.ndarray,
    b: np.ndarray,
    c: np.ndarray,
    u: np.ndarray,
    offsets: np.ndarray,
    D: np.ndarray | None = None,
    h0: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """S8, S18: y (..., total, dv) and the last h (..., sequences, dv, n).

    Delta >= 0 (..., total, dv), A >= 0 (dv, n), b, c (..., total, n), u (..., total, dv), offsets
    int (sequences + 1), increasing from 0 to the total, D (dv,) or None, h0 (..., sequences, dv, n)
    or None.

    >>> one = np.ones((3, 1))
    >>> rate = np.log(2 * one[:1])
    >>> y, h = s6_packed(one, rate, one, one, one, np.array([0, 2, 3]))
    >>> y.ravel(), h.ravel()
    (array([1. , 1.5, 1. ]), array([1.5, 1. ]))
    """
    check_s6_scan(Delta, A, b, c, u, D, None)
    parts = []
    for rows, first in starting(offsets, Delta.shape[-2], h0, Delta.shape[:-2], A.shape):
        d, B, C, U = (x[..., rows, :] for x in (Delta, b, c, u))
        y, h = s6_scan(d, A, B, C, U, D, first)
        parts.append((y, stacked(h, 2)))
    return gathered(parts, (-2, -3))


def s6_packed_backward(
    Delta: np.ndarray,
    A: np.ndarray,
    b: np.ndarray,
    c: np.ndarray,
    u: np.ndarray,
    offsets: np.ndarray,
    D: np.ndarray | None,
    h0: np.ndarray | None,
    dy: np.ndarray,
    dh: np.ndarray | None = None,
) -> tuple[np.ndarray | None, ...]:
    """S16, S18: dDelta, dA, db, dc, du, dD, dh0 of `s6_packed`; None where the argument was None.

    >>> one = np.ones((3, 1))
    >>> s6_packed_backward(
    ...     one, 0 * one[:1], one, one, one, np.array([0, 1, 3]), None, None, one)[4].ravel()
    array([1., 2., 1.])
    """
    check_s6_scan(Delta, A, b, c, u, D, None)
    check_shaped("dy", dy, u.shape)
    lead = Delta.shape[:-2]
    begun = starting(offsets, Delta.shape[-2], h0, lead, A.shape)
    ends = states("dh", dh, len(begun), lead, A.shape)
    parts = []
    for (rows, first), last in zip(begun, ends, strict=True):
        d, B, C, U, up = (x[..., rows, :] for x in (Delta, b, c, u, dy))
        *made, dh0 = s6_scan_backward(d, A, B, C, U, D, first, up, last)
        parts.append((*made, stacked(dh0, 2)))
    return gathered(parts, (-2, None, -2, -2, -2, None, -3))


def ssd_packed(
    Delta: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    c: np.ndarray,
    u: np.ndarray,
    offsets: np.ndarray,
    h0: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """S9, S18: y (..., heads, total, dv) and the last h (..., sequences, heads, dv, n).

    Delta >= 0 (..., heads, total), a >= 0 (heads,), b, c (..., heads, total, n), u (..., heads,
    total, dv), offsets int (sequences + 1), increasing from 0 to the total, h0 (..., sequences,
    heads, dv, n) or None.

    >>> one = np.ones((1, 3, 1))
    >>> y, h = ssd_packed(one[..., 0], np.log([2.0]), one, one, one, np.array([0, 2, 3]))
    >>> y.ravel(), h.ravel()
    (array([1. , 1.5, 1. ]), array([1.5, 1. ]))
    """
    ssd_as_attention(Delta, a, b, c, u)
    shape = Delta.shape[-2], u.shape[-1], b.shape[-1]
    parts = []
    for rows, first in starting(offsets, Delta.shape[-1], h0, Delta.shape[:-2], shape):
        B, C, U = (x[..., rows, :] for x in (b, c, u))
        y, h = ssd_scan(Delta[..., rows], a, B, C, U, first)
        parts.append((y, stacked(h, 3)))
    return gathered(parts, (-2, -4))


def ssd_packed_backward(
    Delta: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    c: np.ndarray,
    u: np.ndarray,
    offsets: np.ndarray,
    h0: np.ndarray | None,
    dy: np.ndarray,
    dh: np.ndarray | None = None,
) -> tuple[np.ndarray | None, ...]:
    """S16, S18: dDelta, da, db, dc, du, dh0 of `ssd_packed`; dh0 is None without an h0.

    >>> one = np.ones((1, 3, 1))
    >>> ssd_packed_backward(
    ...     one[..., 0], np.zeros(1), one, one, one, np.array([0, 1, 3]), None, one)[4].ravel()
    array([1., 2., 1.])
    """
    ssd_as_attention(Delta, a, b, c, u)
    check_shaped("dy", dy, u.shape)
    lead, shape = Delta.shape[:-2], (Delta.shape[-2], u.shape[-1], b.shape[-1])
    begun = starting(offsets, Delta.shape[-1], h0, lead, shape)
    ends = states("dh", dh, len(begun), lead, shape)
    parts = []
    for (rows, first), last in zip(begun, ends, strict=True):
        B, C, U, up = (x[..., rows, :] for x in (b, c, u, dy))
        *made, dh0 = ssd_scan_backward(Delta[..., rows], a, B, C, U, first, up, last)
        parts.append((*made, stacked(dh0, 3)))
    return gathered(parts, (-1, None, -2, -2, -2, -4))


def states(
    name: str, x: Any, many: int, lead: tuple[int, ...], shape: tuple[int, ...]
) -> list[np.ndarray | None]:
    """S18, K14: the state of each sequence, of axes `lead` and `shape`, out of x, which has the
    sequences between the two; or None.

    >>> states("h0", np.zeros((3, 1)), 2, (), (1,))
    Traceback (most recent call last):
    ValueError: h0: got shape (3, 1), expected (2, 1)
    """
    if check_given(name, x, (*lead, many, *shape)) is None:
        return [None] * many
    return list(np.moveaxis(x, len(lead), 0))


def starting(
    offsets: np.ndarray, total: int, h0: Any, lead: tuple[int, ...], shape: tuple[int, ...]
) -> list[tuple[slice, np.ndarray | None]]:
    """S18, K14: the rows of each sequence, and the state it starts from.

    >>> starting(np.array([0, 3]), 3, None, (), (1,))
    [(slice(0, 3, None), None)]
    """
    rows = check_offsets("offsets", offsets, total)
    return list(zip(rows, states("h0", h0, len(rows), lead, shape), strict=True))


def stacked(state: np.ndarray | None, axes: int) -> np.ndarray | None:
    """One sequence's state, of so many axes, with an axis of sequences in front of them.

    >>> stacked(np.zeros((5, 3, 2)), 2).shape
    (5, 1, 3, 2)
    """
    return None if state is None else np.expand_dims(state, -axes - 1)


def gathered(parts: list[tuple[Any, ...]], axes: tuple[int | None, ...]) -> tuple[Any, ...]:
    """Each result of all sequences, end to end along its axis, or added where that is None.

    >>> gathered([(np.ones(1), np.ones(1)), (np.ones(1), np.ones(1))], (0, None))
    (array([1., 1.]), array([2.]))
    """
    together: list[Any] = []
    for pieces, axis in zip(zip(*parts, strict=True), axes, strict=True):
        if pieces[0] is None:
            together.append(None)
        else:
            added = axis is None
            together.append(sum(pieces) if added else np.concatenate(pieces, axis=axis))
    return tuple(together)


def _pairs(state: Any, q: np.ndarray, v: np.ndarray, many: int) -> list[Pair | None]:
    """K14: the state of each of `many` sequences, or None."""
    if state is None:
        return [None] * many
    if not isinstance(state, tuple) or len(state) != 2:
        raise TypeError(f"state: got {type(state).__name__}, expected (h, z)")
    lead, heads, d = q.shape[:-3], q.shape[-3], q.shape[-1]
    for part in state:
        check_array("state", part, ())
    h = states("state", state[0], many, lead, (heads, v.shape[-1], d))
    z = states("state", state[1], many, lead, (heads, d))
    return list(zip(h, z, strict=True))  # type: ignore[arg-type]
