"""The integer program that gives every head its rule, by scipy's solver.

A search runs once for a model. It runs on the host, in float64.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnspec.fast.backend import FLOATS, check_integer, check_size, check_tensor

SLACK = 1e-4
OPTIMAL, INFEASIBLE = 0, 2
"""What the solver says of a problem."""


def solve(
    loss: Tensor,
    cost: Tensor,
    bounds: Tensor,
    primary: int,
    low: Tensor,
    high: Tensor,
    lower: float = 0.9,
    max_rules_per_layer: int | None = 2,
    *,
    heads_per_layer: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """int64 (heads), on the CPU: the rules of the best plan of one problem; -1s if there is none.

    `loss` (profiles, heads, R), `cost` (lengths, heads, R), `bounds` (lengths) in the unit of cost;
    `low` and `high` (profiles) bound the losses, -inf and inf where they are free. ImportError if
    scipy is missing.
    """
    check_problem(loss, cost, bounds, lower, max_rules_per_layer, heads_per_layer)
    profiles = loss.shape[0]
    check_integer("primary", primary, least=0)
    if primary >= profiles:
        raise ValueError(f"primary: got {primary}, expected one of {profiles} profiles")
    for name, x in (("low", low), ("high", high)):
        check_tensor(name, x, ("profiles",), FLOATS)
        check_size(name, x.shape[0], profiles, "profiles, as in loss")
    program = _Program(
        _array(loss), _array(cost), _array(bounds), lower, max_rules_per_layer, heads_per_layer
    )
    return torch.from_numpy(program.best(primary, _array(low), _array(high)))


def search(
    loss: Tensor,
    cost: Tensor,
    bounds: Tensor,
    lower: float = 0.9,
    max_rules_per_layer: int | None = 2,
    *,
    heads_per_layer: int | None = None,
    points: int = 5,
    backend: str | None = None,
) -> Tensor:
    """int64 (n, heads), on the CPU: the plans that no other dominates; n is 0 if there is none.

    Arguments as in `solve`; `points` divide the range of a loss into cells.
    """
    check_problem(loss, cost, bounds, lower, max_rules_per_layer, heads_per_layer)
    check_integer("points", points, least=2)
    losses = _array(loss)
    program = _Program(
        losses, _array(cost), _array(bounds), lower, max_rules_per_layer, heads_per_layer
    )
    profiles, heads, _ = losses.shape
    free = np.full(profiles, np.inf)
    found = [program.best(i, -free, free) for i in range(profiles)]
    alone = np.stack(found)
    if (alone < 0).any():
        return torch.zeros(0, heads, dtype=torch.int64)
    ends = _totals(losses, alone)
    edges = np.linspace(ends.min(axis=0), ends.max(axis=0), points)
    for primary in range(profiles):
        others = [i for i in range(profiles) if i != primary]
        for cells in product(range(points - 1), repeat=len(others)):
            low, high = -free, free.copy()
            for i, cell in zip(others, cells, strict=True):
                low[i], high[i] = edges[cell, i], edges[cell + 1, i]
            found.append(program.best(primary, low, high))
    plans = np.stack(list(dict.fromkeys(tuple(plan.tolist()) for plan in found if plan[0] >= 0)))
    return torch.from_numpy(plans)[pareto(torch.from_numpy(_totals(losses, plans)))]


def pareto(points: Tensor, *, backend: str | None = None) -> Tensor:
    """bool (n), True where no other of `points` (n, losses) is better."""
    check_tensor("points", points, ("n", "losses"), FLOATS)
    ours, theirs = points[:, None], points[None]
    dominated = (theirs <= ours).all(dim=-1) & (theirs < ours).any(dim=-1)
    return dominated.any(dim=1).logical_not()


class _Program:
    """The constraints that all problems of a search share, as matrices of the solver.

    The variables are x (heads, R), whether a head has a rule, and y (layers, R), whether a layer
    has: binary, head by head and layer by layer.
    """

    def __init__(
        self,
        loss: np.ndarray,
        cost: np.ndarray,
        bounds: np.ndarray,
        lower: float,
        most: int | None,
        heads_per_layer: int | None,
    ) -> None:
        try:
            from scipy import optimize, sparse
        except ModuleNotFoundError as error:
            raise ImportError(
                "scipy is not installed, whose solver a search needs: pip install scipy",
                name="scipy",
            ) from error
        self.optimize, self.sparse = optimize, sparse
        self.loss = loss
        heads, R = loss.shape[1:]
        size = heads_per_layer or heads
        layers = 0 if most is None else heads // size
        self.extra = layers * R
        one_rule = sparse.kron(sparse.eye(heads), np.ones((1, R)))
        self.constraints = [
            self._limit(one_rule, np.ones(heads), np.ones(heads)),
            self._limit(cost.reshape(len(cost), -1), *_widened(lower * bounds, bounds)),
        ]
        if most is not None:
            # x[h, r] <= y[layer of h, r], and the y of a layer sum to at most `most`.
            layer_of = sparse.kron(
                sparse.kron(sparse.eye(layers), np.ones((size, 1))), sparse.eye(R)
            )
            used = sparse.hstack([sparse.eye(heads * R), -layer_of])
            total = sparse.hstack(
                [
                    sparse.csr_array((layers, heads * R)),
                    sparse.kron(sparse.eye(layers), np.ones((1, R))),
                ]
            )
            self.constraints += [
                optimize.LinearConstraint(used, ub=np.zeros(heads * R)),
                optimize.LinearConstraint(total, ub=np.full(layers, most)),
            ]

    def _limit(self, matrix: Any, low: np.ndarray, high: np.ndarray) -> Any:
        """low <= matrix x <= high, the y left alone."""
        matrix = self.sparse.csr_array(matrix)
        rest = self.sparse.csr_array((matrix.shape[0], self.extra))
        whole = self.sparse.hstack([matrix, rest])
        return self.optimize.LinearConstraint(whole, lb=low, ub=high)

    def best(self, primary: int, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """int64 (heads), or -1s."""
        profiles, heads, R = self.loss.shape
        ends = _widened(low, high)
        limits = [*self.constraints, self._limit(self.loss.reshape(profiles, -1), *ends)]
        aim = np.concatenate([self.loss[primary].ravel(), np.zeros(self.extra)])
        # The solver's presolve fails on a few problems, which it solves without.
        for presolve in (True, False):
            result = self.optimize.milp(
                aim,
                integrality=np.ones(len(aim)),
                bounds=self.optimize.Bounds(0, 1),
                constraints=limits,
                options={"mip_rel_gap": 0.0, "presolve": presolve},
            )
            if result.status in (OPTIMAL, INFEASIBLE):
                break
        if result.status == INFEASIBLE:
            return np.full(heads, -1)
        if result.status != OPTIMAL:
            raise RuntimeError(f"the solver stopped without an answer: {result.message}")
        # The solver's ones may be 0.999999: cut to integers, they would be other rules.
        answer = np.rint(result.x)
        for limit in limits:
            total = limit.A @ answer
            slack = SLACK * (1 + np.abs(total))
            if (total < limit.lb - slack).any() or (total > limit.ub + slack).any():
                raise RuntimeError("the solver's answer breaks a bound when it is rounded")
        return np.argmax(answer[: heads * R].reshape(heads, R), axis=1)


def _array(x: Tensor) -> np.ndarray:
    return x.detach().cpu().double().numpy()


def _widened(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ends of intervals, those that are finite moved apart by the slack."""
    return (
        np.where(np.isinf(low), low, low - SLACK * np.abs(low)),
        np.where(np.isinf(high), high, high + SLACK * np.abs(high)),
    )


def _totals(values: np.ndarray, plans: np.ndarray) -> np.ndarray:
    """(n, lengths), values (lengths, heads, R) summed over the heads of plans (n, heads)."""
    return np.asarray(values[:, np.arange(plans.shape[1]), plans].sum(axis=-1).T)


def check_problem(
    loss: Any, cost: Any, bounds: Any, lower: Any, max_rules_per_layer: Any, heads_per_layer: Any
) -> None:
    """The parts of the program fit one another."""
    check_tensor("loss", loss, ("profiles", "heads", "R"), FLOATS)
    check_tensor("cost", cost, ("lengths", "heads", "R"), FLOATS)
    check_tensor("bounds", bounds, ("lengths",), FLOATS)
    for name, x in (("loss", loss), ("cost", cost), ("bounds", bounds)):
        if 0 in x.shape:
            raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected no empty axis")
    heads = loss.shape[1]
    check_size("cost", cost.shape[1], heads, "heads, as in loss")
    check_size("cost", cost.shape[2], loss.shape[2], "rules, as in loss")
    check_size("bounds", len(bounds), len(cost), "lengths, as in cost")
    if isinstance(lower, bool) or not isinstance(lower, (int, float)):
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
