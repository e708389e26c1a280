r"""MoA: the integer program that gives every head its rule.

Definition
----------
S14. **Problem.** A plan gives each head h one rule r(h); heads are numbered layer after layer. Its
loss at profile i is :math:`L_i = \sum_h loss_{i h r(h)}` and its cost at length j
:math:`K_j = \sum_h cost_{j h r(h)}`, where the lengths j are those of the profiles and some longer
ones. A plan is feasible if :math:`lower\, B_j \le K_j \le B_j` for every j, and if no layer has
more than a given number of different rules. One *problem* is to minimise the loss at one profile,
the primary, among the feasible plans whose losses :math:`L_i` lie in given closed intervals. All
bounds are widened by :math:`10^{-4}` of their size.

S15. **Search.** Each profile's loss is minimised alone. Over these solutions every loss has a
smallest and a largest value, and the range between them is divided evenly by a number of points
into cells. Then, for each primary and each combination of cells of the other losses, the problem
with the primary free and the others in their cells is solved. Of all solutions the dominated ones
are dropped: a plan is dominated if another is as good at every profile and better at one. The plan
to use is the one with the lowest loss measured at a length that was not profiled.

The bounds are :math:`B_j` = density bound (0.5) times length times heads, with costs as in S13.
A plan comes once, however many problems it solves; different plans of equal losses all stay. The
reference tries all plans of a problem, so it is for small ones.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np

from attnspec.reference.conventions import check_array, check_integer, check_size

SLACK = 1e-4
MOST_PLANS = 1 << 18


def solve(
    loss: np.ndarray,
    cost: np.ndarray,
    bounds: np.ndarray,
    primary: int,
    low: np.ndarray,
    high: np.ndarray,
    lower: float = 0.9,
    max_rules_per_layer: int | None = 2,
    *,
    heads_per_layer: int | None = None,
) -> np.ndarray:
    """S14: int (heads), the rules of the best plan of one problem, or -1s if none is feasible.

    `loss` (profiles, heads, R), `cost` (lengths, heads, R), `bounds` (lengths) in the unit of cost;
    `low` and `high` (profiles) bound the losses, -inf and inf where they are free.
    `max_rules_per_layer` None is no limit, `heads_per_layer` None one layer. Of plans that are
    equally good, the first in lexicographic order. ValueError if there are too many to try.

    >>> loss, cost = np.array([[[5.0, 0.0], [3.0, 0.0]]]), np.array([[[1.0, 2.0], [1.0, 2.0]]])
    >>> free = np.array([np.inf])
    >>> solve(loss, cost, np.array([3.0]), 0, -free, free)
    array([1, 0])
    """
    check_problem(loss, cost, bounds, lower, max_rules_per_layer, heads_per_layer)
    profiles, heads, R = loss.shape
    check_integer("primary", primary, least=0)
    if primary >= profiles:
        raise ValueError(f"primary: got {primary}, expected one of {profiles} profiles")
    for name, x in (("low", low), ("high", high)):
        check_array(name, x, ("profiles",))
        check_size(name, x.shape[0], profiles, "profiles, as in loss")
    if R**heads > MOST_PLANS:
        raise ValueError(f"loss: got {R}**{heads} plans, expected at most {MOST_PLANS}")
    plans = np.indices((R,) * heads).reshape(heads, -1).T
    losses = _totals(loss, plans)
    costs = _totals(cost, plans)
    possible = _within(costs, lower * bounds, bounds) & _within(losses, low, high)
    if max_rules_per_layer is not None:
        size = heads_per_layer or heads
        for first in range(0, heads, size):
            used = np.sort(plans[:, first : first + size], axis=1)
            different = 1 + np.sum(used[:, 1:] != used[:, :-1], axis=1)
            possible &= different <= max_rules_per_layer
    if not possible.any():
        return np.full(heads, -1)
    return plans[np.argmin(np.where(possible, losses[:, primary], np.inf))]


def search(
    loss: np.ndarray,
    cost: np.ndarray,
    bounds: np.ndarray,
    lower: float = 0.9,
    max_rules_per_layer: int | None = 2,
    *,
    heads_per_layer: int | None = None,
    points: int = 5,
) -> np.ndarray:
    """S15: int (n, heads), the plans that no other dominates; n is 0 if none is feasible.

    Arguments as in `solve`; `points` divide the range of a loss into cells.

    >>> loss = np.array([[[4.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [4.0, 0.0]]])
    >>> cost = np.array([[[1.0, 2.0], [1.0, 2.0]]])
    >>> search(loss, cost, np.array([3.0]))
    array([[1, 0],
           [0, 1]])
    """
    check_problem(loss, cost, bounds, lower, max_rules_per_layer, heads_per_layer)
    check_integer("points", points, least=2)
    profiles = len(loss)
    free = np.full_like(loss, np.inf, shape=profiles)

    def best(primary: int, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        return solve(
            loss, cost, bounds, primary, low, high, lower, max_rules_per_layer,
            heads_per_layer=heads_per_layer,
        )  # fmt: skip

    found = [best(i, -free, free) for i in range(profiles)]
    alone = np.stack(found)
    if (alone < 0).any():
        return np.zeros((0, loss.shape[1]), np.int64)
    ends = _totals(loss, alone)
    edges = np.linspace(ends.min(axis=0), ends.max(axis=0), points)
    for primary in range(profiles):
        others = [i for i in range(profiles) if i != primary]
        for cells in product(range(points - 1), repeat=len(others)):
            low, high = -free, free.copy()
            for i, cell in zip(others, cells, strict=True):
                low[i], high[i] = edges[cell, i], edges[cell + 1, i]
            found.append(best(primary, low, high))
    plans = np.stack(list(dict.fromkeys(tuple(plan) for plan in found if plan[0] >= 0)))
    return plans[pareto(_totals(loss, plans))]


def pareto(points: np.ndarray) -> np.ndarray:
    """S15: bool (n), True where no other of `points` (n, losses) is better.

    >>> pareto(np.array([[1.0, 2.0], [2.0, 1.0], [2.0, 2.0], [1.0, 2.0]]))
    array([ True,  True, False,  True])
    """
    check_array("points", points, ("n", "losses"))
    ours, theirs = points[:, None], points[None]
    dominated = np.all(theirs <= ours, axis=-1) & np.any(theirs < ours, axis=-1)
    return ~dominated.any(axis=1)


def _totals(values: np.ndarray, plans: np.ndarray) -> np.ndarray:
    """S14: (n, lengths), values (lengths, heads, R) summed over the heads of plans (n, heads)."""
    return values[:, np.arange(plans.shape[1]), plans].sum(axis=-1).T


def _within(totals: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """S14: bool (n), all of the totals (n, lengths) inside their widened bounds."""
    above = totals >= np.where(np.isinf(low), low, low - SLACK * np.abs(low))
    below = totals <= np.where(np.isinf(high), high, high + SLACK * np.abs(high))
    return np.all(above & below, axis=1)


def check_problem(
    loss: Any, cost: Any, bounds: Any, lower: Any, max_rules_per_layer: Any, heads_per_layer: Any
) -> None:
    """K14: the parts of the program fit one another."""
    check_array("loss", loss, ("profiles", "heads", "R"))
    check_array("cost", cost, ("lengths", "heads", "R"))
    check_array("bounds", bounds, ("lengths",))
    for name, x, axes in (("loss", loss, 3), ("cost", cost, 3), ("bounds", bounds, 1)):
        check_size(name, x.ndim, axes, "axes")
        if 0 in x.shape:
            raise ValueError(f"{name}: got shape {x.shape}, expected no empty axis")
    heads = loss.shape[1]
    check_size("cost", cost.shape[1], heads, "heads, as in loss")
    check_size("cost", cost.shape[2], loss.shape[2], "rules, as in loss")
    check_size("bounds", len(bounds), len(cost), "lengths, as in cost")
    if isinstance(lower, bool) or not isinstance(lower, (int, float, np.floating)):
        raise TypeError(f"lower: got {lower!r}, expected a number in [0, 1]")
    if not 0 <= lower <= 1:
        raise ValueError(f"lower: got {lower}, expected a number in [0, 1]")
    if max_rules_per_layer is not None:
        check_integer("max_rules_per_layer", max_rules_per_layer, least=1)
    if heads_per_layer is not None:
        check_integer("heads_per_layer", heads_per_layer, least=1)
        if heads % heads_per_layer:
            raise ValueError(
                f"heads_per_layer: got {heads_per_layer}, expected a divisor of {heads}"
            )
