"""Pointer networks: greedy and beam decoding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnspec.reference.scores.pointer_networks_decoding import (
    beam_decode,
    constraint_mask,
    greedy_decode,
    step_limit,
)
from attnspec.reference.scores.pointer_networks_metrics import is_permutation, tour_length
from attnspec.reference.scores.pointer_networks_tasks import from_slots, make_points
from attnspec.reference.scores.pointer_networks_tours import tsp_target

Slots = tuple[int, ...]
quick = settings(deadline=None, derandomize=True, max_examples=20)


def random_model(seed: int, n: int) -> Callable[[Slots, int], tuple[np.ndarray, Slots]]:
    """A model whose distribution depends on the whole path, so that a mixed-up state shows."""

    def step_fn(state: Slots, last: int) -> tuple[np.ndarray, Slots]:
        state = (*state, last)
        scores = np.random.default_rng([seed, *state]).normal(size=n + 1)
        return scores - np.log(np.sum(np.exp(scores))), state

    return step_fn


def all_sequences(
    step_fn: Any, n: int, constraint: str | None, max_steps: int
) -> dict[Slots, float]:
    """Every sequence a decoder may return, with its log-probability, by exhaustion."""
    finished: dict[Slots, float] = {}

    def extend(slots: Slots, score: float, state: Slots) -> None:
        if len(slots) == max_steps or slots[-1:] == (0,):
            finished[slots] = score
            return
        logp, state = step_fn(state, slots[-1] if slots else 0)
        if constraint is None:
            allowed = list(range(n + 1))
        else:
            allowed = [j for j in range(1, n + 1) if j not in slots]
            if constraint == "hull" or not allowed:
                allowed = [0, *allowed]
        p = np.exp(logp[allowed])
        for slot, share in zip(allowed, p / np.sum(p), strict=True):
            extend((*slots, slot), score + float(np.log(share)), state)

    extend((), 0.0, ())
    return finished


@quick
@given(
    seed=st.integers(0, 999), n=st.integers(1, 4), constraint=st.sampled_from([None, "hull", "tsp"])
)
def test_width_one_is_greedy_and_full_width_is_exact(
    seed: int, n: int, constraint: str | None
) -> None:
    step_fn, max_steps = random_model(seed, n), n
    slots, score = greedy_decode(step_fn, (), n, constraint, max_steps)
    ((beam_slots, beam_score),) = beam_decode(step_fn, (), n, 1, constraint, max_steps)
    assert beam_slots == slots
    assert beam_score == pytest.approx(score)

    truth = all_sequences(step_fn, n, constraint, max_steps)
    found = beam_decode(step_fn, (), n, (n + 1) ** n, constraint, max_steps)
    assert [slots for slots, _ in found] == sorted(truth, key=lambda slots: -truth[slots])
    for slots, score in found:
        assert score == pytest.approx(truth[slots])
    assert sum(np.exp(score) for _, score in found) == pytest.approx(1)

    scores = [score for _, score in beam_decode(step_fn, (), n, 2, constraint, max_steps)]
    assert scores == sorted(scores, reverse=True)


@quick
@given(seed=st.integers(0, 999), n=st.integers(1, 7), size=st.floats(0, 1e3))
def test_constrained_tours_are_tours(seed: int, n: int, size: float) -> None:
    rng = np.random.default_rng(seed)
    points = make_points(rng, n)

    def step_fn(state: None, last: int) -> tuple[np.ndarray, None]:
        return size * rng.normal(size=n + 1), None

    limit = step_limit("tsp", n)
    slots, _ = greedy_decode(step_fn, None, n, "tsp", limit)
    for found in (slots, *(slots for slots, _ in beam_decode(step_fn, None, n, 3, "tsp", limit))):
        tour = from_slots(np.array(found))
        assert is_permutation(tour, n)
        length = tour_length(points, tour)
        assert length <= n * np.sqrt(2)
        assert length >= tour_length(points, tsp_target(points)) - 1e-12


def test_the_end_of_a_tour_comes_last_and_is_certain() -> None:
    logp = np.log(np.array([0.9, 0.05, 0.05]))
    slots, score = greedy_decode(lambda state, last: (logp, state), None, 2, "tsp", 3)
    assert slots == (1, 2, 0)
    assert score == pytest.approx(np.log(0.5))


def test_masking_comes_before_the_softmax() -> None:
    logp = np.log(np.array([0.1, 0.6, 0.3]))
    slots, score = greedy_decode(lambda state, last: (logp, state), None, 2, "hull", 3)
    assert slots == (1, 2, 0)
    assert score == pytest.approx(np.log(0.6) + np.log(0.75))


def test_ties_and_the_first_input() -> None:
    seen: list[int] = []

    def step_fn(state: None, last: int) -> tuple[np.ndarray, None]:
        seen.append(last)
        return np.log(np.full(3, 1 / 3)), None

    assert greedy_decode(step_fn, None, 2, None, 4)[0] == (0,)
    assert greedy_decode(step_fn, None, 2, "tsp", 2)[0] == (1, 2)
    assert seen == [0, 0, 1]
    beam = beam_decode(step_fn, None, 2, 2, "tsp", 2)
    assert [slots for slots, _ in beam] == [(1, 2), (2, 1)]


def test_finished_hypotheses_keep_competing_and_a_zero_is_never_taken() -> None:
    first = np.log(np.array([0.4, 0.6]))
    with np.errstate(divide="ignore"):
        later = np.log(np.array([0.0, 1.0]))

    def step_fn(state: int, last: int) -> tuple[np.ndarray, int]:
        return (first if state == 0 else later), state + 1

    beam = beam_decode(step_fn, 0, 1, 5, None, 3)
    assert [slots for slots, _ in beam] == [(1, 1, 1), (0,)]
    np.testing.assert_allclose([score for _, score in beam], np.log([0.6, 0.4]))


def test_step_limits() -> None:
    assert [step_limit(task, 10) for task in ("hull", "tsp", "delaunay")] == [11, 10, 46]


def uniform(state: Any, last: int) -> tuple[np.ndarray, Any]:
    return np.log(np.full(4, 0.25)), state


def constant(values: list[float]) -> Callable[[Any, int], tuple[np.ndarray, Any]]:
    return lambda state, last: (np.array(values), state)


@pytest.mark.parametrize(
    ("call", "error", "argument"),
    [
        (lambda: step_limit("knapsack", 5), ValueError, "task"),
        (lambda: step_limit("delaunay", 2), ValueError, "n"),
        (lambda: constraint_mask((), 3, "any"), ValueError, "constraint"),
        (lambda: constraint_mask((), 0, None), ValueError, "n"),
        (lambda: constraint_mask((4,), 3, "tsp"), ValueError, "slots"),
        (lambda: constraint_mask((-1,), 3, "hull"), ValueError, "slots"),
        (lambda: greedy_decode(uniform, None, 3, "any", 3), ValueError, "constraint"),
        (lambda: greedy_decode(uniform, None, 3.0, None, 3), TypeError, "n"),
        (lambda: greedy_decode(uniform, None, 3, None, 0), ValueError, "max_steps"),
        (lambda: greedy_decode(uniform, None, 3, "tsp", 2), ValueError, "max_steps"),
        (lambda: greedy_decode(uniform, None, 4, None, 2), ValueError, "step_fn"),
        (lambda: greedy_decode(constant([np.nan, 0]), None, 1, None, 2), ValueError, "step_fn"),
        (lambda: greedy_decode(constant([0, -np.inf]), None, 1, "tsp", 2), ValueError, "step_fn"),
        (lambda: beam_decode(uniform, None, 3, 0, None, 3), ValueError, "width"),
        (lambda: beam_decode(uniform, None, 3, 2, "tsp", 2), ValueError, "max_steps"),
    ],
)
def test_bad_input(call: Callable[[], Any], error: type[Exception], argument: str) -> None:
    with pytest.raises(error, match=f"^{argument}: got"):
        call()
