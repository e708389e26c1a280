"""Pointer networks: what the model steps refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from attnspec.reference.scores.pointer_networks import (
    pointer_cross_entropy,
    pointer_log_probs,
    pointer_loss,
    pointer_scores,
)
from attnspec.reference.scores.pointer_networks_glimpse import glimpse, glimpse_backward
from attnspec.reference.scores.pointer_networks_gradients import (
    pointer_log_probs_backward,
    pointer_loss_backward,
    pointer_scores_backward,
)

RNG = np.random.default_rng(0)
STATES = {
    "e": RNG.normal(size=(5, 4)),
    "d": RNG.normal(size=(3, 4)),
    "W1": RNG.normal(size=(6, 4)),
    "W2": RNG.normal(size=(6, 4)),
    "v": RNG.normal(size=6),
}
LOGP, TARGETS = np.zeros((3, 5)), np.array([0, 1, 2])


def scores_with(**changes: Any) -> Callable[[], Any]:
    return lambda: pointer_scores(**{**STATES, **changes})


@pytest.mark.parametrize(
    ("call", "error", "argument"),
    [
        (scores_with(e=[[1.0]]), TypeError, "e"),
        (scores_with(e=np.ones(4)), ValueError, "e"),
        (scores_with(d=np.ones((3, 4), np.float32)), TypeError, "d"),
        (scores_with(d=np.ones((2, 3, 4))), ValueError, "d"),
        (scores_with(W1=np.ones((6, 3))), ValueError, "W1"),
        (scores_with(W1=np.ones((1, 6, 4))), ValueError, "W1"),
        (scores_with(W2=np.ones((5, 4))), ValueError, "W2"),
        (scores_with(v=np.ones(5)), ValueError, "v"),
        (scores_with(b1=np.ones(5)), ValueError, "b1"),
        (scores_with(b2=np.ones((6, 1))), ValueError, "b2"),
        (
            lambda: pointer_scores_backward(*STATES.values(), np.ones((5, 3))),
            ValueError,
            "dout",
        ),
        (lambda: pointer_log_probs(np.zeros(3), None), ValueError, "scores"),
        (lambda: pointer_log_probs(np.zeros((3, 0)), None), ValueError, "scores"),
        (lambda: pointer_log_probs(LOGP, np.ones(5)), TypeError, "mask"),
        (lambda: pointer_log_probs(LOGP, np.ones(4, bool)), ValueError, "mask"),
        (lambda: pointer_log_probs(LOGP, np.zeros(5, bool)), ValueError, "mask"),
        (lambda: pointer_log_probs_backward(LOGP, None, np.ones(5)), ValueError, "dout"),
        (lambda: pointer_loss(LOGP, np.zeros(3), None), TypeError, "targets"),
        (lambda: pointer_loss(LOGP, np.array([0, 1, 5]), None), ValueError, "targets"),
        (lambda: pointer_loss(LOGP, np.array([0, 1]), None), ValueError, "targets"),
        (lambda: pointer_loss(LOGP, TARGETS, np.zeros(3, bool)), ValueError, "target_mask"),
        (lambda: pointer_loss(LOGP, TARGETS, np.ones(2, bool)), ValueError, "target_mask"),
        (lambda: pointer_loss_backward(LOGP, TARGETS, None, np.ones(3)), ValueError, "dout"),
        (
            lambda: pointer_cross_entropy(**STATES, targets=TARGETS[:2]),
            ValueError,
            "targets",
        ),
        (lambda: glimpse(STATES["e"], LOGP[:, :4], STATES["W1"]), ValueError, "logp"),
        (lambda: glimpse(STATES["e"], LOGP, np.ones((6, 3))), ValueError, "W1"),
        (lambda: glimpse(STATES["e"], LOGP, STATES["W1"], b1=np.ones(2)), ValueError, "b1"),
        (
            lambda: glimpse_backward(STATES["e"], LOGP, STATES["W1"], np.ones((3, 2))),
            ValueError,
            "dout",
        ),
    ],
)
def test_bad_input(call: Callable[[], Any], error: type[Exception], argument: str) -> None:
    with pytest.raises(error, match=rf"^{argument}( axes)?: got"):
        call()
