"""Gradients of EE-MLLM's layers against finite differences."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from attnspec.reference.patterns.ee_mllm import layer_step
from attnspec.reference.patterns.ee_mllm_gradient import (
    aligner_update_backward,
    layer_step_backward,
)
from attnspec.reference.patterns.ee_mllm_layers import MODES, Layer, aligner_update
from tests.differences import differences

PLACES = np.array([4, 0, 2]), np.array([1, 3])


def make_layer(rope: float | None) -> Layer:
    random = np.random.default_rng(0)
    D, F, H, Hk, d, dv = 5, 4, 4, 2, 4, 3

    def weights(*shape: int) -> np.ndarray:
        return random.standard_normal(shape)

    return Layer(
        1 + 0.1 * weights(D), weights(D, H * d), weights(D, Hk * d), weights(D, Hk * dv),
        weights(H * dv, D), 1 + 0.1 * weights(D), (weights(D, F), weights(D, F), weights(F, D)),
        H, Hk, rope,
    )  # fmt: skip


def arrays(layer: Layer) -> list[np.ndarray]:
    return [*layer[:6], *layer.ffn]


def compare(
    loss: Callable[[], float], given: list[np.ndarray], gradients: list[np.ndarray]
) -> None:
    for x, gradient in zip(given, gradients, strict=True):
        np.testing.assert_allclose(gradient, differences(loss, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("rope", "visible"), [(100.0, "causal"), (None, "all")])
def test_a_layer_is_differentiated(mode: str, rope: float | None, visible: str) -> None:
    layer, random = make_layer(rope), np.random.default_rng(1)
    Xt, dXt = random.standard_normal((2, 2, 3, 5))
    Xv, dXv = random.standard_normal((2, 2, 2, 5))

    def loss() -> float:
        text, images = layer_step(Xt, Xv, layer, *PLACES, mode, image_visible=visible)
        return float(np.sum(text * dXt) + np.sum(images * dXv))

    *states, weights = layer_step_backward(
        Xt, Xv, layer, *PLACES, dXt, dXv, mode, image_visible=visible
    )
    assert weights[7:] == layer[7:]
    compare(loss, [Xt, Xv, *arrays(layer)], [*states, *arrays(weights)])


@pytest.mark.parametrize("mode", MODES)
def test_the_aligner_is_differentiated(mode: str) -> None:
    layer, random = make_layer(None), np.random.default_rng(2)
    Xv, dXv = random.standard_normal((2, 2, 3, 5))

    def loss() -> float:
        return float(np.sum(aligner_update(Xv, layer, mode) * dXv))

    dX, weights = aligner_update_backward(Xv, layer, dXv, mode)
    compare(loss, [Xv, *arrays(layer)], [dX, *arrays(weights)])


def test_upstream_shapes_are_checked() -> None:
    layer, X = make_layer(None), np.ones((1, 2, 5))
    with pytest.raises(ValueError, match="dXv: got shape"):
        aligner_update_backward(X, layer, X[:, :1])
    with pytest.raises(ValueError, match="dXt: got shape"):
        layer_step_backward(X, X, layer, np.arange(2), 2 + np.arange(2), X[:, :1], X)
