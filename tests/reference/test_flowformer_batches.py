"""Flowformer over packed sequences: those of each sequence alone."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from attnspec.reference.linear.flowformer import (
    flow_attend_causal,
    flow_attend_packed,
    flow_causal_backward,
    flow_packed_backward,
)
from attnspec.reference.linear.flowformer_causal import FlowState

OFFSETS = np.array([0, 0, 4, 5, 9, 9])


def tensors() -> tuple[np.ndarray, ...]:
    """q, k, v of all sequences."""
    random = np.random.default_rng(0)
    shapes = ((4, 9, 3), (2, 9, 3), (2, 9, 2))
    return tuple(random.standard_normal(shape) for shape in shapes)


def states(sequences: int = 5) -> FlowState:
    random = np.random.default_rng(1)
    q, k = random.standard_normal((2, sequences, 4, 3, 3))
    return flow_attend_causal(q, k, random.standard_normal((sequences, 4, 3, 2)))[1]


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("clamp", [None, (-0.5, 0.9)])
def test_packed_sequences_are_alone(started: bool, clamp: Any) -> None:
    q, k, v = tensors()
    state, options = states() if started else None, {"clamp": clamp, "eps": 1e-3}
    results = flow_attend_packed(q, k, v, OFFSETS, state, **options)
    random = np.random.default_rng(2)
    upstream = [random.standard_normal(x.shape) for x in (results[0], *results[1])]
    *tokens, before = flow_packed_backward(q, k, v, OFFSETS, state, *upstream, **options)
    for n, (start, end) in enumerate(pairwise(OFFSETS)):
        own = [x[:, start:end] for x in (q, k, v)]
        first = None if state is None else FlowState(*(x[n] for x in state))
        out, last = flow_attend_causal(*own, first, **options)
        up = [upstream[0][:, start:end], *(x[n] for x in upstream[1:])]
        *gradients, dfirst = flow_causal_backward(*own, first, *up, **options)
        pairs = [(results[0][:, start:end], out)]
        pairs += [(x[n], y) for x, y in zip(results[1], last, strict=True)]
        pairs += [(x[:, start:end], y) for x, y in zip(tokens, gradients, strict=True)]
        pairs += [(x[n], y) for x, y in zip(before, dfirst, strict=True)]
        for got, expected in pairs:
            np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


q0, k0, v0 = tensors()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: flow_attend_packed(q0, k0, v0, OFFSETS + 1), ValueError, "offsets"),
        (lambda: flow_attend_packed(q0, k0, v0, OFFSETS, states(4)), ValueError, "state.sb: got"),
        (lambda: flow_attend_packed(q0, k0, v0, OFFSETS, 3), TypeError, "state: got int"),  # type: ignore[arg-type]
        (lambda: flow_attend_packed(q0[:, 1:], k0, v0, OFFSETS), ValueError, "q: got 8"),
        (lambda: flow_packed_backward(q0, k0, v0, OFFSETS, None, q0), ValueError, "dout"),
        (
            lambda: flow_packed_backward(q0, k0, v0, OFFSETS, None, 0 * q0[..., :2], q0),
            ValueError,
            "dsb: got shape",
        ),
    ],
)
def test_bad_input_is_refused_by_name(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
