"""Pointer networks: the recurrent encoder and decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from attnspec.reference.scores.pointer_networks_model import (
    LSTMState,
    decode_forced,
    decode_step,
    encode,
    init_parameters,
    lstm_step,
    make_step_fn,
)

NET = init_parameters(np.random.default_rng(0), hidden=4)
POINTS = np.random.default_rng(1).random((4, 2))


def test_lstm_step_against_the_formula() -> None:
    rng = np.random.default_rng(9)
    x, h, c = rng.normal(size=(3, 2))
    weight, bias = rng.normal(size=(8, 4)), rng.normal(size=8)
    a, f, g, o = (weight @ np.append(x, h) + bias).reshape(4, 2)
    cell = c / (1 + np.exp(-f)) + np.tanh(g) / (1 + np.exp(-a))
    after = lstm_step(x, LSTMState(h, c), weight, bias)
    np.testing.assert_allclose(after.c, cell)
    np.testing.assert_allclose(after.h, np.tanh(cell) / (1 + np.exp(-o)))


@pytest.mark.parametrize("with_glimpse", [False, True])
def test_model_step_by_step_padded_and_for_any_size(with_glimpse: bool) -> None:
    rng = np.random.default_rng(10)
    parameters = init_parameters(rng, hidden=5, attention=3, glimpse=with_glimpse)
    assert all(np.max(np.abs(x)) <= 0.08 for x in parameters if x is not None)
    weights = {name: 10 * x for name, x in parameters._asdict().items() if x is not None}
    parameters = parameters._replace(**weights)
    targets = np.array([[2, 1, 3, 0], [4, 1, 0, 0]])
    points = rng.random((2, 4, 2))
    mask = np.array([[True, True, True, False], [True] * 4])
    points[0, 3] = np.nan
    logp = decode_forced(points, targets, parameters, mask=mask)
    assert logp.shape == (2, 4, 5)
    assert np.all(logp[0, :, 4] == -np.inf)
    for n, size in ((0, 3), (1, 4)):
        step_fn, state = make_step_fn(points[n, :size], parameters)
        last = 0
        for i in range(4):
            alone, state = step_fn(state, last)
            np.testing.assert_allclose(logp[n, i, : size + 1], alone, rtol=1e-10)
            last = int(targets[n, i])


@pytest.mark.parametrize(
    ("call", "error", "argument"),
    [
        (lambda: init_parameters(np.random.default_rng(0), hidden=0), ValueError, "hidden"),
        (lambda: init_parameters(np.random.default_rng(0), attention=0), ValueError, "attention"),
        (lambda: encode(np.ones((4, 3)), NET), ValueError, "points"),
        (lambda: encode(POINTS, NET, mask=np.ones(3, bool)), ValueError, "mask"),
        (lambda: make_step_fn(POINTS[None], NET), ValueError, "points"),
        (lambda: decode_forced(POINTS, np.array([5]), NET), ValueError, "targets"),
        (lambda: decode_forced(POINTS, np.array([[1]]), NET), ValueError, "targets"),
        (lambda: decode_forced(POINTS, np.zeros(0, int), NET), ValueError, "targets"),
        (
            lambda: decode_step(np.ones(3), encode(POINTS, NET)[1], np.ones((5, 4)), NET),
            ValueError,
            "weight",
        ),
    ],
)
def test_bad_input(call: Callable[[], Any], error: type[Exception], argument: str) -> None:
    with pytest.raises(error, match=rf"^{argument}( axes)?: got"):
        call()
