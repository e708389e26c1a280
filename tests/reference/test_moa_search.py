"""MoA's rules and the choice among them: their properties and bad input."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnspec.reference.patterns import moa

quick = settings(max_examples=20, deadline=None, derandomize=True)


def problem(seed: int, heads: int = 4, R: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    cost = np.sort(random.uniform(1, 10, (3, heads, R)), axis=-1)
    loss = np.sort(random.uniform(0, 5, (2, heads, R)), axis=-1)[..., ::-1].copy()
    return loss, cost, 0.6 * cost.max(axis=-1).sum(axis=-1)


def totals(values: np.ndarray, plan: np.ndarray) -> np.ndarray:
    return values[:, np.arange(len(plan)), plan].sum(axis=-1)


def test_the_rule_space_keeps_what_fits_and_is_sorted() -> None:
    alphas, betas, rules = moa.rule_space(2048, 8192, 16384)
    assert (len(alphas), alphas[0], alphas[-1]) == (11, -2048, 8192)
    np.testing.assert_array_equal(betas, np.arange(9) / 8)
    ends = rules[:, 0] + rules[:, 1] * 16384
    assert (np.diff(ends) >= 0).all()
    assert (rules.sum(axis=1) != 0).all()
    for alpha, beta in product(alphas, betas):
        fits = all(alpha + beta * N <= N for N in (8192, 16384)) and alpha + beta * 2048 > 0
        assert fits == bool((rules == (alpha, beta)).all(axis=1).any())


def test_layouts_floor_alpha_and_cut_the_sum() -> None:
    for alpha, beta, n in ((-65.0, 0.5, 2), (-1.0, 0.0, 1), (127.0, 0.3, 3), (0.0, 1.0, 8)):
        kept = moa.layout((alpha, beta), 512, 64)
        row, column = np.nonzero(kept)
        assert ((column == 0) | (row - column < n)).all()
        assert kept[-1].sum() == min(n + 1, 8)


@quick
@given(st.integers(0, 99))
def test_loss_and_density_are_monotone_in_the_span(seed: int) -> None:
    I = np.tril(np.random.default_rng(seed).random((2, 6, 6)))
    layouts = np.stack([moa.layout((64.0 * n, 0.0), 384) for n in range(8)])
    loss = moa.predicted_loss(I, layouts)
    assert (np.diff(loss, axis=-1) <= 1e-12).all()
    assert (loss[:, -1] == 0).all()
    density = moa.density(layouts)
    assert (np.diff(density) >= 0).all()
    assert density[-1] == 1


@quick
@given(st.integers(0, 99), st.sampled_from([None, 1, 2]), st.sampled_from([0.0, 0.5, 0.9]))
def test_plans_are_feasible_undominated_and_reach_each_optimum(
    seed: int, most: int | None, lower: float
) -> None:
    loss, cost, bounds = problem(seed)
    plans = moa.search(loss, cost, bounds, lower, most, heads_per_layer=2)
    possible = []
    for rules in product(range(3), repeat=4):
        plan = np.array(rules)
        K = totals(cost, plan)
        few = most is None or max(len(set(rules[:2])), len(set(rules[2:]))) <= most
        slack = 1e-4 * bounds
        if few and (bounds + slack >= K).all() and (lower * (bounds - slack) <= K).all():
            possible.append(rules)
    assert {tuple(plan) for plan in plans} <= set(possible)
    assert bool(len(plans)) == bool(possible)
    if not possible:
        return
    every = np.array([totals(loss, np.array(plan)) for plan in possible])
    found = np.array([totals(loss, plan) for plan in plans])
    np.testing.assert_allclose(found.min(axis=0), every.min(axis=0))
    assert moa.pareto(found).all()


@quick
@given(st.integers(0, 99))
def test_a_higher_bound_never_hurts_if_the_lower_one_stays(seed: int) -> None:
    loss, cost, bounds = problem(seed)
    free = np.full(2, np.inf)
    tight = moa.solve(loss, cost, bounds, 0, -free, free, 0.5, None)
    if tight[0] < 0:
        return
    wide = moa.solve(loss, cost, 1.5 * bounds, 0, -free, free, 0.5 / 1.5, None)
    assert totals(loss, wide)[0] <= totals(loss, tight)[0]


def test_a_lower_bound_tied_to_the_upper_one_can_hurt() -> None:
    loss = np.array([[[100.0, 0.0], [1.0, 0.0]]])
    cost = np.array([[[0.0, 10.0], [0.0, 11.0]]])
    for bound, best in ((10.0, 1.0), (12.0, 100.0)):
        plans = moa.search(loss, cost, np.array([bound]))
        assert totals(loss, plans[0])[0] == best


def test_equal_points_stay_and_the_dominated_go() -> None:
    points = np.array([[1.0, 2.0], [1.0, 2.0], [1.0, 3.0], [0.0, 4.0]])
    assert moa.pareto(points).tolist() == [True, True, False, True]
    assert moa.pareto(np.zeros((0, 2))).shape == (0,)


LOSS, COST, BOUNDS = problem(0)
FREE = np.full(2, np.inf)
GRID = np.ones((3, 3))
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: moa.rule_space(0, 4, 8), ValueError, "N_min"),
    (lambda: moa.rule_space(5, 4, 8), ValueError, "N_prof_max"),
    (lambda: moa.rule_space(2, 9, 8), ValueError, "N_max"),
    (lambda: moa.rule_space(2, 4, 8, n_alpha=0), ValueError, "n_alpha"),
    (lambda: moa.rule_space(2, 4, 8, n_beta=1.5), TypeError, "n_beta"),  # type: ignore[arg-type]
    (lambda: moa.layout((1.0,), 128), ValueError, "rule"),
    (lambda: moa.layout((1.0, np.nan), 128), ValueError, "beta"),
    (lambda: moa.layout((1.0, 0.5), 100), ValueError, "N"),
    (lambda: moa.layout((1.0, 0.5), 128, 0), ValueError, "b"),
    (lambda: moa.predicted_loss(GRID, np.ones((2, 3, 3))), TypeError, "layouts"),
    (lambda: moa.predicted_loss(GRID, np.ones((2, 2, 2), bool)), ValueError, "layouts"),
    (lambda: moa.density(np.ones((3, 2), bool)), ValueError, "layout"),
    (lambda: moa.density(GRID), TypeError, "layout"),
    (lambda: moa.solve(LOSS, COST, BOUNDS, 2, -FREE, FREE), ValueError, "primary"),
    (lambda: moa.solve(LOSS, COST, BOUNDS, 0, -FREE[:1], FREE), ValueError, "low"),
    (lambda: moa.solve(LOSS, COST[:, :3], BOUNDS, 0, -FREE, FREE), ValueError, "cost"),
    (lambda: moa.solve(LOSS.repeat(4, 1), COST.repeat(4, 1), BOUNDS, 0, -FREE, FREE), ValueError,
     "loss"),
    (lambda: moa.search(LOSS[0], COST, BOUNDS), ValueError, "loss"),
    (lambda: moa.search(LOSS, COST, BOUNDS[:2]), ValueError, "bounds"),
    (lambda: moa.search(LOSS, COST, BOUNDS, 1.5), ValueError, "lower"),
    (lambda: moa.search(LOSS, COST, BOUNDS, 0.5, 0), ValueError, "max_rules_per_layer"),
    (lambda: moa.search(LOSS, COST, BOUNDS, heads_per_layer=3), ValueError, "heads_per_layer"),
    (lambda: moa.search(LOSS, COST, BOUNDS, points=1), ValueError, "points"),
    (lambda: moa.pareto(np.ones(3)), ValueError, "points"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "name"), BAD)
def test_bad_input_is_named(call: Callable[[], Any], error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(name)}: got .*expected"):
        call()
