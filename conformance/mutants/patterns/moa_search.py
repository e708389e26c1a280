"""Wrong kernels of MoA's rules and search: spans rounded the wrong way, limits left out."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import altering, replacing, right, spoiling
from attnspec.conformance.mutants.patterns.moa import of

LAYOUT = right("moa.layout")
RULES = right("moa.rule_space")
SEARCH = right("moa.search")
SIZES = right("moa.cache_sizes")
SOLVE = right("moa.solve")


def floors_span(alpha: Any, beta: Any, N: int) -> np.ndarray:
    """Negative spans are rounded down, not towards 0."""
    return np.floor(np.asarray(alpha) + np.multiply(beta, float(N))).astype(np.int64)


def span_of_prompt(arguments: dict[str, Any]) -> None:
    """The span is that of the prompt, without the tokens to come."""
    arguments["max_new"] = 0


def divides_last(rule: Any, N: int, b: int = 64) -> np.ndarray:
    """alpha is divided by b without rounding down."""
    alpha, beta = rule
    n = max(1, int(alpha / b + beta * (N // b)))
    return LAYOUT((n * b, 0.0), N, b)


def no_sink(rule: Any, N: int, b: int = 64) -> np.ndarray:
    """The first block is kept inside the window alone."""
    kept = LAYOUT(rule, N, b).copy()
    row = np.arange(len(kept))
    n = max(1, int(rule[0] // b + rule[1] * (N // b)))
    kept[row >= n, :1] = False
    return kept


def all_blocks(I: np.ndarray, layouts: np.ndarray) -> np.ndarray:
    """Blocks above the diagonal count as hidden."""
    return np.asarray(np.einsum("...ij,rij->...r", I, np.logical_not(layouts).astype(I.dtype)))


def mean_density(layout: np.ndarray) -> np.ndarray:
    """The mean over rows, not the fullest."""
    nb = max(layout.shape[-1], 1)
    return np.asarray(layout.sum(axis=(-1, -2)) / nb**2)


def unsorted(result: Any) -> Any:
    alphas, betas, rules = result
    return alphas, betas, rules[np.lexsort((rules[:, 1], rules[:, 0]))]


def no_layers(arguments: dict[str, Any]) -> None:
    """The limit of rules is one for the whole model."""
    arguments["heads_per_layer"] = None


def no_limit(arguments: dict[str, Any]) -> None:
    arguments["max_rules_per_layer"] = None


def no_lower_bound(arguments: dict[str, Any]) -> None:
    arguments["lower"] = 0.0


def one_interval(
    loss: Any, cost: Any, bounds: Any, primary: Any, low: Any, high: Any, *rest: Any,
    **options: Any,
) -> Any:  # fmt: skip
    """Of the other losses only the first is held in its interval."""
    others = np.delete(np.arange(len(low)), primary)[1:]
    low, high = low.copy(), high.copy()
    low[others], high[others] = -np.inf, np.inf
    return SOLVE(loss, cost, bounds, primary, low, high, *rest, **options)


def cut_plan(plan: np.ndarray) -> np.ndarray:
    """0.999999 becomes rule 0."""
    return np.where(plan > 0, plan - 1, plan)


def all_stay(points: np.ndarray) -> np.ndarray:
    return np.ones(len(points), bool)


def strictly(points: np.ndarray) -> np.ndarray:
    """Only what is worse everywhere is dropped."""
    ours, theirs = points[:, None], points[None]
    return np.logical_not(np.all(theirs < ours, axis=-1).any(axis=1))


def drops_equals(points: np.ndarray) -> np.ndarray:
    """Equal points drop each other."""
    ours, theirs = points[:, None], points[None]
    other = np.logical_not(np.eye(len(points), dtype=bool))
    return np.logical_not((np.all(theirs <= ours, axis=-1) & other).any(axis=1))


MUTANTS = (
    of("span", "floor", "agreement", "negative spans are rounded down", floors_span),
    of("cache_sizes", "prompt-only", "agreement", "the span is that of the prompt",
       altering(SIZES, span_of_prompt)),
    of("layout", "no-floor", "agreement", "alpha / b is not rounded down", divides_last),
    of("layout", "no-sink", "agreement", "the first block is not kept", no_sink),
    of("predicted_loss", "all-blocks", "poison", "blocks above the diagonal are read", all_blocks),
    of("density", "mean", "agreement", "the mean row counts, not the fullest", mean_density),
    of("rule_space", "unsorted", "agreement", "rules are sorted by alpha",
       spoiling(RULES, unsorted)),
    of("solve", "no-layers", "agreement", "the limit of rules holds for all layers together",
       altering(SOLVE, no_layers)),
    of("solve", "no-limit", "agreement", "a layer may have any number of rules",
       altering(SOLVE, no_limit)),
    of("solve", "no-lower", "agreement", "there is no lower bound",
       altering(SOLVE, no_lower_bound)),
    of("solve", "cut", "agreement", "the solver's 0.999 becomes rule 0",
       spoiling(SOLVE, cut_plan)),
    of("solve", "one-interval", "agreement", "of three losses only one is held in its interval",
       one_interval),
    of("search", "dominated", "agreement", "dominated plans stay",
       replacing(SEARCH, pareto=all_stay)),
    of("pareto", "strictly", "agreement", "a plan must be worse everywhere to go", strictly),
    of("pareto", "equals", "agreement", "plans of equal losses drop each other", drops_equals),
)  # fmt: skip
