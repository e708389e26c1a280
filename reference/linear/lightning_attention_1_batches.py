"""TransNormerLLM's token mixer over batches of unequal sequences: the clauses S12 and S14 of
`lightning_attention_1`.

Packed sequences are the mixer applied to each by itself. Padded ones keep the places of all tokens,
so that the mixer is told which of them are real.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from attnspec.reference.conventions import (
    check_array,
    check_integer,
    check_offsets,
    check_shaped,
    check_size,
)
from attnspec.reference.linear.lightning_attention_1_checks import (
    Params,
    check_gla,
    state_shape,
)
from attnspec.reference.linear.lightning_attention_1_layers import mix, mix_backward


def tnl_gla_packed(
    x: np.ndarray,
    params: Params,
    offsets: np.ndarray,
    states: np.ndarray | None = None,
    starts: np.ndarray | None = None,
    *,
    v_activation: bool = False,
    gate: str = "linear",
    norm: str = "srms",
    eps: float = 1e-6,
) -> tuple[np.ndarray, np.ndarray]:
    """S12: y (..., total, D) and the states (..., sequences, H, d', d) of sequences end to end.

    offsets int (sequences + 1), increasing from 0 to the total; `starts` int (sequences,) are the
    positions of their first tokens, 0 by default.

    >>> weights = {"Wqkvu": np.ones((1, 4)), "Wo": np.ones((1, 1)), "slopes": np.zeros(1)}
    >>> tnl_gla_packed(np.ones((3, 1)), weights, np.array([0, 1, 3]))[1].ravel().round(4)
    array([0.7311, 1.4621])
    """
    check_gla(x, params, None, 0, v_activation, gate, norm, eps)
    outputs, last = [], []
    for rows, state, start in _sequences(x, params, offsets, states, starts):
        y, state = mix(
            x[..., rows, :],
            params,
            state,
            start,
            v_activation=v_activation,
            gate=gate,
            norm=norm,
            eps=eps,
        )
        outputs.append(y)
        last.append(state[..., None, :, :, :])
    return np.concatenate(outputs, axis=-2), np.concatenate(last, axis=-4)


def tnl_gla_packed_backward(
    x: np.ndarray,
    params: Params,
    offsets: np.ndarray,
    states: np.ndarray | None,
    starts: np.ndarray | None,
    dy: np.ndarray,
    dstates: np.ndarray | None = None,
    *,
    v_activation: bool = False,
    gate: str = "linear",
    norm: str = "srms",
    eps: float = 1e-6,
) -> tuple[np.ndarray, dict[str, Any], np.ndarray]:
    """S14: dx, the gradients of `params` by name and those of the states, of `tnl_gla_packed`.

    >>> weights = {"Wqkvu": np.ones((1, 4)), "Wo": np.ones((1, 1)), "slopes": np.zeros(1)}
    >>> x, ends = np.ones((2, 1)), np.array([0, 1, 2])
    >>> tnl_gla_packed_backward(x, weights, ends, None, None, x, eps=0.0)[1]["Wo"]
    array([[2.]])
    """
    check_gla(x, params, None, 0, v_activation, gate, norm, eps)
    check_shaped("dy", dy, x.shape)
    sequences = list(_sequences(x, params, offsets, states, starts))
    shape = state_shape(params, x.shape[-1])
    if dstates is not None:
        check_shaped("dstates", dstates, (*x.shape[:-2], len(sequences), *shape))
    dx, weights, first = np.zeros_like(x), [], []
    for n, (rows, state, start) in enumerate(sequences):
        dx[..., rows, :], own, dstate = mix_backward(
            x[..., rows, :],
            params,
            state,
            start,
            dy[..., rows, :],
            None if dstates is None else dstates[..., n, :, :, :],
            v_activation=v_activation,
            gate=gate,
            norm=norm,
            eps=eps,
        )
        weights.append(own)
        first.append(dstate)
    dparams = {
        name: None if of_one is None else sum(own[name] for own in weights)
        for name, of_one in weights[0].items()
    }
    return dx, dparams, np.stack(first, axis=-4)


def tnl_gla_padded(
    x: np.ndarray,
    params: Params,
    valid: np.ndarray,
    state: np.ndarray | None = None,
    offset: int = 0,
    *,
    v_activation: bool = False,
    gate: str = "linear",
    norm: str = "srms",
    eps: float = 1e-6,
) -> tuple[np.ndarray, np.ndarray]:
    """S12: y (..., T, D), 0 where `valid` (..., T) is False, and the state of the real tokens.

    >>> weights = {"Wqkvu": np.ones((1, 4)), "Wo": np.ones((1, 1)), "slopes": np.zeros(1)}
    >>> tnl_gla_padded(np.ones((2, 1)), weights, np.array([False, True]), eps=0.0)[0].ravel()
    array([0., 1.])
    """
    check_gla(x, params, state, offset, v_activation, gate, norm, eps)
    check_valid(valid, x)
    y, state = mix(
        _real(x, valid), params, state, offset, valid, v_activation=v_activation, gate=gate,
        norm=norm, eps=eps,
    )  # fmt: skip
    return _real(y, valid), state


def tnl_gla_padded_backward(
    x: np.ndarray,
    params: Params,
    valid: np.ndarray,
    state: np.ndarray | None,
    offset: int,
    dy: np.ndarray,
    dstate: np.ndarray | None = None,
    *,
    v_activation: bool = False,
    gate: str = "linear",
    norm: str = "srms",
    eps: float = 1e-6,
) -> tuple[np.ndarray, dict[str, Any], np.ndarray]:
    """S14: dx, 0 where `valid` is False, the gradients of `params` by name and that of the state.

    >>> weights = {"Wqkvu": np.ones((1, 4)), "Wo": np.ones((1, 1)), "slopes": np.zeros(1)}
    >>> x, valid = np.ones((2, 1)), np.array([False, True])
    >>> tnl_gla_padded_backward(x, weights, valid, None, 0, x, eps=0.0)[1]["Wo"]
    array([[1.]])
    """
    check_gla(x, params, state, offset, v_activation, gate, norm, eps)
    check_valid(valid, x)
    check_shaped("dy", dy, x.shape)
    dx, dparams, dS0 = mix_backward(
        _real(x, valid), params, state, offset, _real(dy, valid), dstate, valid,
        v_activation=v_activation, gate=gate, norm=norm, eps=eps,
    )  # fmt: skip
    return _real(dx, valid), dparams, dS0


def check_valid(valid: Any, x: np.ndarray) -> None:
    """K14: a truth value for each token of x (..., T, D).

    >>> check_valid(np.array([True]), np.ones((2, 1)))
    Traceback (most recent call last):
    ValueError: valid: got shape (1,), expected (2,)
    """
    check_array("valid", valid, ("T",), dtype="bool")
    if valid.shape != x.shape[:-1]:
        raise ValueError(f"valid: got shape {valid.shape}, expected {x.shape[:-1]}")


def _real(x: np.ndarray, valid: np.ndarray) -> np.ndarray:
    return np.where(valid[..., None], x, np.zeros_like(x))


def _sequences(
    x: np.ndarray,
    params: Params,
    offsets: np.ndarray,
    states: np.ndarray | None,
    starts: np.ndarray | None,
) -> Iterator[tuple[slice, np.ndarray | None, int]]:
    """S12, K14: the rows, the state before and the first position of each sequence."""
    rows = check_offsets("offsets", offsets, x.shape[-2])
    sequences, shape = len(rows), state_shape(params, x.shape[-1])
    if states is not None:
        check_shaped("states", states, (*x.shape[:-2], sequences, *shape))
    if starts is None:
        starts = np.zeros(sequences, int)
    check_array("starts", starts, ("sequences",), dtype="int")
    check_size("starts", starts.size, sequences, "sequences, as in offsets")
    for start in starts:
        check_integer("starts", start, least=0)
    for n, own in enumerate(rows):
        state = None if states is None else states[..., n, :, :, :]
        yield own, state, int(starts[n])
