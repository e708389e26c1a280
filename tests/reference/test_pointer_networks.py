"""Pointer networks: the model steps and their gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnspec.reference.scores import pointer_networks as ptr
from attnspec.reference.scores.pointer_networks import (
    glimpse,
    pointer_cross_entropy,
    pointer_cross_entropy_backward,
    pointer_log_probs,
    pointer_loss,
    pointer_scores,
)
from attnspec.reference.scores.pointer_networks_gradients import (
    pointer_log_probs_backward,
    pointer_loss_backward,
    pointer_scores_backward,
)
from tests.differences import differences

Arrays = dict[str, np.ndarray]


def draw(
    seed: int = 0, *, leading: tuple[int, ...] = (2,), slots: int = 5, dtype: Any = np.float64
) -> Arrays:
    rng = np.random.default_rng(seed)
    steps, D, A = 3, 4, 6
    shapes = {
        "e": (*leading, slots, D),
        "d": (*leading, steps, D),
        "W1": (A, D),
        "W2": (A, D),
        "v": (A,),
        "b1": (A,),
        "b2": (A,),
    }
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def test_golden_additive_attention(golden: Callable[[str], dict[str, Any]]) -> None:
    case = golden("pointer_networks__additive_n11_masked")
    scores = pointer_scores(
        case["context"],
        case["query"][:, None],
        case["W_c"],
        case["W_q"],
        case["v"],
        b1=case["b_c"],
        b2=case["b_q"],
    )
    logp = pointer_log_probs(scores, ~case["mask"])
    np.testing.assert_allclose(np.exp(logp[:, 0]), case["alpha"], rtol=1e-10)
    mixed = glimpse(case["context"], logp, case["W_c"], b1=case["b_c"])
    np.testing.assert_allclose(mixed[:, 0], case["glimpse"], rtol=1e-10)


def test_the_tanh_is_of_the_sum() -> None:
    case = draw()
    scores = pointer_scores(**case)
    for n, i, j in itertools.product(range(2), range(3), range(5)):
        hidden = case["W1"] @ case["e"][n, j] + case["W2"] @ case["d"][n, i]
        expected = case["v"] @ np.tanh(hidden + case["b1"] + case["b2"])
        np.testing.assert_allclose(scores[n, i, j], expected, rtol=1e-12)


@settings(deadline=None, derandomize=True, max_examples=20)
@given(seed=st.integers(0, 1000), slots=st.integers(1, 9))
def test_probabilities(seed: int, slots: int) -> None:
    case = draw(seed, slots=slots)
    rng = np.random.default_rng(seed)
    scores = pointer_scores(**case)
    bound = np.sum(np.abs(case["v"]))
    assert np.all(np.abs(scores) <= bound + 1e-12)
    assert np.all(np.exp(pointer_log_probs(scores, None)) >= np.exp(-2 * bound) / slots - 1e-12)

    mask = rng.random(scores.shape) < 0.5
    mask[..., rng.integers(slots)] = True
    p = np.exp(pointer_log_probs(scores, mask))
    np.testing.assert_allclose(np.sum(p, axis=-1), 1, rtol=1e-12)
    assert np.all(p[~mask] == 0)

    order = rng.permutation(slots)
    permuted = pointer_scores(**{**case, "e": case["e"][:, order]})
    np.testing.assert_allclose(permuted, scores[..., order], rtol=1e-12)


def test_padding_and_poison_leave_the_rest_alone() -> None:
    case = draw()
    mask = np.array([[True] * 5 + [False]] * 2)
    padded = {**case, "e": np.append(case["e"], np.full((2, 1, 4), np.nan), axis=1)}
    logp = pointer_log_probs(pointer_scores(**padded), mask)
    np.testing.assert_array_equal(
        logp[..., :5], pointer_log_probs(pointer_scores(**case), mask[:, :5])
    )
    assert np.all(logp[..., 5] == -np.inf)
    assert np.all(np.isfinite(glimpse(padded["e"], logp, case["W1"])))

    padded["d"][1, 2] = np.nan
    targets, real = np.array([[1, 2, 0], [4, 0, -7]]), np.array([[True] * 3, [True, True, False]])
    options = {"targets": targets, "mask": mask, "target_mask": real}
    assert np.isfinite(pointer_cross_entropy(**padded, **options))
    for gradient in pointer_cross_entropy_backward(**padded, **options, dout=1.0):
        assert np.all(np.isfinite(gradient))


def test_no_weights_give_a_uniform_pointer_and_log_of_the_slots() -> None:
    case = {name: np.zeros_like(x) for name, x in draw().items()}
    targets = np.array([[0, 1, 2], [3, 4, 0]])
    np.testing.assert_allclose(pointer_cross_entropy(**case, targets=targets), np.log(5))
    mask = np.array([[True, True, True, False, False], [True, False, False, True, True]])
    loss = pointer_cross_entropy(**case, targets=targets, mask=mask)
    np.testing.assert_allclose(loss, np.log(3))


def test_loss_is_a_mean_over_steps_not_of_means() -> None:
    logp = np.log(np.array([[[0.5, 0.5], [0.25, 0.75]], [[0.1, 0.9], [0.5, 0.5]]]))
    targets, real = np.array([[0, 0], [1, 9]]), np.array([[True, True], [True, False]])
    expected = -(np.log(0.5) + np.log(0.25) + np.log(0.9)) / 3
    np.testing.assert_allclose(pointer_loss(logp, targets, real), expected)
    assert pointer_loss(np.array([[0.0, -np.inf]]), np.array([1]), None) == np.inf


@pytest.mark.parametrize("biased", [True, False])
def test_gradient_of_the_scores(biased: bool) -> None:
    case = draw(3)
    if not biased:
        case["b1"], case["b2"] = np.zeros(6), np.zeros(6)
    dout = np.random.default_rng(4).normal(size=(2, 3, 5))
    given_biases = {"b1": case["b1"], "b2": case["b2"]} if biased else {}
    five = [case[name] for name in ("e", "d", "W1", "W2", "v")]
    gradients = pointer_scores_backward(*five, dout, **given_biases)
    for (name, x), gradient in zip(case.items(), gradients, strict=True):
        numeric = differences(lambda: np.sum(dout * pointer_scores(**case)), x, 1e-6)
        np.testing.assert_allclose(gradient, numeric, atol=1e-7, err_msg=name)


def test_gradients_of_the_other_steps() -> None:
    rng = np.random.default_rng(5)
    scores, dout = rng.normal(size=(2, 3, 5)), rng.normal(size=(2, 3, 5))
    mask = np.array([[True, False, True, True, True], [True] * 5])
    safe = np.where(mask[:, None], dout, 0)

    def through_log_probs() -> Any:
        return np.sum(safe * np.where(mask[:, None], pointer_log_probs(scores, mask), 0))

    numeric = differences(through_log_probs, scores, 1e-6)
    gradient = pointer_log_probs_backward(scores, mask, dout)
    np.testing.assert_allclose(gradient, numeric, atol=1e-8)
    assert np.all(gradient[0, :, 1] == 0)

    logp, targets = pointer_log_probs(scores, None), np.array([[0, 1, 2], [3, 4, -1]])
    real = targets >= 0
    numeric = differences(lambda: 3 * pointer_loss(logp, targets, real), logp, 1e-6)
    np.testing.assert_allclose(pointer_loss_backward(logp, targets, real, 3.0), numeric, atol=1e-8)

    case = {name: x for name, x in draw(6).items() if name in ("e", "W1", "b1")}
    upstream = rng.normal(size=(2, 3, 6))
    found = ptr.glimpse_backward(case["e"], logp, case["W1"], upstream, b1=case["b1"])
    inputs = (case["e"], logp, case["W1"], case["b1"])
    for x, gradient in zip(inputs, found, strict=True):
        numeric = differences(lambda: np.sum(upstream * glimpse(logp=logp, **case)), x, 1e-6)
        np.testing.assert_allclose(gradient, numeric, atol=1e-7)


def test_gradient_of_the_whole() -> None:
    case = draw(7)
    options = {
        "targets": np.array([[1, 2, 0], [4, 0, -1]]),
        "target_mask": np.array([[True] * 3, [True, True, False]]),
        "mask": np.array([[True, True, True, False, True], [True] * 5]),
    }
    gradients = pointer_cross_entropy_backward(**case, **options, dout=2.0)
    for (name, x), gradient in zip(case.items(), gradients, strict=True):
        numeric = differences(lambda: 2 * pointer_cross_entropy(**case, **options), x, 1e-6)
        np.testing.assert_allclose(gradient, numeric, atol=1e-8, err_msg=name)


@pytest.mark.parametrize("leading", [(), (2,), (2, 3)])
def test_leading_axes_and_float32(leading: tuple[int, ...]) -> None:
    case = draw(8, leading=leading, dtype=np.float32)
    targets = np.zeros((*leading, 3), dtype=int)
    scores = pointer_scores(**case)
    logp = pointer_log_probs(scores, np.ones((*leading, 5), dtype=bool))
    assert scores.shape == logp.shape == (*leading, 3, 5)
    assert scores.dtype == logp.dtype == np.float32
    assert glimpse(case["e"], logp, case["W1"]).dtype == np.float32
    assert pointer_loss(logp, targets, None).dtype == np.float32
    gradients = pointer_cross_entropy_backward(**case, targets=targets, dout=1.0)
    for x, gradient in zip(case.values(), gradients, strict=True):
        assert (gradient.shape, gradient.dtype) == (x.shape, np.float32)


def test_record() -> None:
    assert {operation.slug for operation in ptr.MECHANISM.operations} == {"pointer_networks"}
    assert ptr.MECHANISM.family == "scores"
