"""Flowformer over sequences laid end to end: the clause S15 of `flowformer`.

Each sequence starts from a state of its own, so its results and its gradients are those it has
alone.
"""

from __future__ import annotations

import numpy as np

from attnspec.reference.conventions import check_offsets, check_shaped
from attnspec.reference.linear.flowformer_causal import (
    FlowState,
    check_causal,
    empty_state,
    flow_attend_causal,
    flow_causal_backward,
)
from attnspec.reference.linear.flowformer_flows import Clamp


def flow_attend_packed(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    offsets: np.ndarray,
    state: FlowState | None = None,
    *,
    eps: float = 1e-6,
    kind: str = "sigmoid",
    clamp: Clamp = (-1.0, 1.0),
) -> tuple[np.ndarray, FlowState]:
    """S7-S11, S15: out (heads, total, dv) and the states, whose parts have an axis of sequences in
    front, behind the last token of each.

    q (heads, total, d), k (kv_heads, total, d), v (kv_heads, total, dv), offsets int (sequences +
    1) increasing from 0 to total; `state` is likewise.

    >>> x, v = np.zeros((1, 3, 1)), np.array([[[1.0], [1.0], [3.0]]])
    >>> out, state = flow_attend_packed(x, x, v, np.array([0, 1, 3]), eps=0.0)
    >>> out.round(3).ravel(), state.N.ravel()
    (array([0.731, 0.731, 1.462]), array([1., 2.]))
    """
    sequences = _sequences(q, k, v, offsets, eps)
    first = _first(q, v, len(sequences), state)
    outputs, states = [], []
    for rows, before in zip(sequences, first, strict=True):
        out, after = flow_attend_causal(
            q[:, rows], k[:, rows], v[:, rows], before, eps=eps, kind=kind, clamp=clamp
        )
        outputs.append(out)
        states.append(after)
    return np.concatenate(outputs, axis=1), _stacked(states)


def flow_packed_backward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    offsets: np.ndarray,
    state: FlowState | None,
    dout: np.ndarray,
    dsb: np.ndarray | None = None,
    dsa: np.ndarray | None = None,
    dsbO: np.ndarray | None = None,
    dsaI: np.ndarray | None = None,
    dse: np.ndarray | None = None,
    dKV: np.ndarray | None = None,
    dN: np.ndarray | None = None,
    *,
    eps: float = 1e-6,
    kind: str = "sigmoid",
    clamp: Clamp = (-1.0, 1.0),
) -> tuple[np.ndarray, np.ndarray, np.ndarray, FlowState]:
    """S13, S15: dq, dk, dv of `flow_attend_packed` and the gradients of the states before, from
    those of its outputs as `flow_causal_backward` takes them.

    >>> x, offsets = np.zeros((1, 3, 1)), np.array([0, 1, 3])
    >>> flow_packed_backward(x, x, x, offsets, None, x + 1)[2].ravel().round(3)
    array([0.731, 1.097, 0.366])
    """
    sequences = _sequences(q, k, v, offsets, eps)
    first = _first(q, v, len(sequences), state)
    check_shaped("dout", dout, (*q.shape[:-1], v.shape[-1]))
    given = (dsb, dsa, dsbO, dsaI, dse, dKV, dN)
    for name, dx, x in zip(FlowState._fields, given, _stacked(first), strict=True):
        if dx is not None:
            check_shaped(f"d{name}", dx, x.shape)
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    states = []
    for n, (rows, before) in enumerate(zip(sequences, first, strict=True)):
        own = (None if dx is None else dx[n] for dx in given)
        dq[:, rows], dk[:, rows], dv[:, rows], dstate = flow_causal_backward(
            q[:, rows], k[:, rows], v[:, rows], before, dout[:, rows], *own,
            eps=eps, kind=kind, clamp=clamp,
        )  # fmt: skip
        states.append(dstate)
    return dq, dk, dv, _stacked(states)


def _sequences(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, offsets: np.ndarray, eps: float
) -> list[slice]:
    """K14: the rows of each sequence, once the arguments fit one another."""
    check_causal(q, k, v, eps)
    return check_offsets("offsets", offsets, q.shape[-2])


def _first(
    q: np.ndarray, v: np.ndarray, sequences: int, state: FlowState | None
) -> list[FlowState]:
    """K14: the state before each sequence."""
    empty = empty_state(q, v)
    if state is None:
        return [empty] * sequences
    if not isinstance(state, tuple) or len(state) != len(empty):
        raise TypeError(f"state: got {type(state).__name__}, expected FlowState")
    for name, x, one in zip(FlowState._fields, state, empty, strict=True):
        check_shaped(f"state.{name}", x, (sequences, *one.shape))
    return [FlowState(*(x[n] for x in state)) for n in range(sequences)]


def _stacked(states: list[FlowState]) -> FlowState:
    return FlowState(*(np.stack(parts) for parts in zip(*states, strict=True)))
