r"""Pointer networks, continued: greedy and beam decoding, with constraints.

Definition
----------
S10. **Constrain.** A constraint forbids slots *before* the softmax: the log-probabilities are
normalised again over the slots left. "hull" forbids visited points; "tsp" forbids visited points
and forbids the end until every point is visited, so that any finite scores give a valid tour; None
forbids nothing (triangulations repeat points). Step limits: n + 1 for a hull, n for a tour (which
then has no end step), 3 (2n - 5) + 1 for a triangulation.

S11. **Greedy.** Take the most probable slot, the lowest on ties (K6); stop after the end or at the
limit. The first `last` handed to the model is slot 0, the start symbol.

S12. **Beam.** A hypothesis scores the sum of its log-probabilities, its end step included, without
division by length. Each round every unfinished hypothesis is extended by every allowed slot; the
finished ones stay in the list and compete. The best `width` survive, ties by the lexicographically
lower sequence, each with the state of its own parent. Stop when all are finished, or at the limit.
Width 1 is greedy; a width that covers all sequences is an exact search; in between, a wider beam
may end with a lower score.

Paper and code
--------------
The paper constrains its beam for large tours only (above about 20 points, unverified) and otherwise
counts invalid ones. Constrained tours are the intended default for reported lengths; without a
constraint, report the share of valid permutations too (S19). The width of the paper's beam is
unverified; independent implementations go up to n.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from attnspec.reference.conventions import check_choice, check_integer
from attnspec.reference.primitives.softmax import log_softmax

CONSTRAINTS = (None, "hull", "tsp")
StepFn = Callable[[Any, int], tuple[np.ndarray, Any]]


def step_limit(task: str, n: int) -> int:
    """S10: the most steps a decoder may take for `n` points; task "hull", "tsp" or "delaunay".

    >>> [step_limit(task, 5) for task in ("hull", "tsp", "delaunay")]
    [6, 5, 16]
    """
    check_choice("task", task, ("hull", "tsp", "delaunay"))
    check_integer("n", n, least=3 if task == "delaunay" else 1)
    return {"hull": n + 1, "tsp": n, "delaunay": 3 * (2 * n - 5) + 1}[task]


def constraint_mask(slots: tuple[int, ...], n: int, constraint: str | None) -> np.ndarray:
    """S10: bool (n + 1), True where the next slot may be, after `slots`.

    ValueError for another constraint or for what is no slot of `n` points.

    >>> constraint_mask((2,), 3, "tsp").astype(int)
    array([0, 1, 0, 1])
    >>> constraint_mask((2, 1, 3), 3, "tsp").astype(int)
    array([1, 0, 0, 0])
    """
    check_integer("n", n, least=1)
    check_choice("constraint", constraint, CONSTRAINTS)
    for slot in slots:
        check_integer("slots", slot, least=0)
        if slot > n:
            raise ValueError(f"slots: got {slot}, expected 0 to {n}")
    allowed = np.ones(n + 1, dtype=bool)
    if constraint is None:
        return allowed
    allowed[list(slots)] = False
    allowed[0] = constraint == "hull" or not np.any(allowed[1:])
    return allowed


def greedy_decode(
    step_fn: StepFn, state: Any, n: int, constraint: str | None, max_steps: int
) -> tuple[tuple[int, ...], float]:
    """S11: the slots pointed at, the end included if it was reached, and their log-probability.

    ``step_fn(state, last)`` returns log-probabilities (n + 1) and the next state. ValueError if
    `max_steps` is too small for a tour or if the model allows no slot.

    >>> logp = np.log(np.array([0.1, 0.2, 0.7]))
    >>> slots, _ = greedy_decode(lambda state, last: (logp, state), None, 2, "tsp", 2)
    >>> slots
    (2, 1)
    """
    _check_search(n, constraint, max_steps)
    slots: tuple[int, ...] = ()
    total = 0.0
    while len(slots) < max_steps and slots[-1:] != (0,):
        logp, state = _next_log_probs(step_fn, state, slots, n, constraint)
        best = int(np.argmax(logp))
        slots, total = (*slots, best), total + float(logp[best])
    return slots, total


def beam_decode(
    step_fn: StepFn, state: Any, n: int, width: int, constraint: str | None, max_steps: int
) -> list[tuple[tuple[int, ...], float]]:
    """S12: up to `width` pairs of slots and log-probability, best first.

    Arguments as in `greedy_decode`; `width` an integer >= 1.

    >>> logp = np.log(np.array([0.5, 0.3, 0.2]))
    >>> beam = beam_decode(lambda state, last: (logp, state), None, 2, 2, None, 3)
    >>> [slots for slots, _ in beam]
    [(0,), (1, 0)]
    """
    check_integer("width", width, least=1)
    _check_search(n, constraint, max_steps)
    beam = [_Hypothesis((), 0.0, state)]
    for _ in range(max_steps):
        if all(hypothesis.finished for hypothesis in beam):
            break
        candidates = []
        for hypothesis in beam:
            if hypothesis.finished:
                candidates.append(hypothesis)
                continue
            logp, after = _next_log_probs(
                step_fn, hypothesis.state, hypothesis.slots, n, constraint
            )
            candidates += [
                _Hypothesis((*hypothesis.slots, slot), hypothesis.score + float(logp[slot]), after)
                for slot in map(int, np.flatnonzero(np.isfinite(logp)))
            ]
        beam = sorted(candidates, key=lambda found: (-found.score, found.slots))[:width]
    return [(hypothesis.slots, hypothesis.score) for hypothesis in beam]


class _Hypothesis(NamedTuple):
    slots: tuple[int, ...]
    score: float
    state: Any

    @property
    def finished(self) -> bool:
        return self.slots[-1:] == (0,)


def _next_log_probs(
    step_fn: StepFn, state: Any, slots: tuple[int, ...], n: int, constraint: str | None
) -> tuple[np.ndarray, Any]:
    """S10: the model's next log-probabilities, normalised over the allowed slots, and state."""
    logp, state = step_fn(state, slots[-1] if slots else 0)
    if np.shape(logp) != (n + 1,):
        raise ValueError(f"step_fn: got shape {np.shape(logp)}, expected ({n + 1},)")
    allowed = constraint_mask(slots, n, constraint)
    seen = logp[allowed]
    if np.any(np.isnan(seen) | np.isposinf(seen)) or np.all(np.isneginf(seen)):
        raise ValueError(
            f"step_fn: got {seen.tolist()} at the allowed slots, expected a finite one"
        )
    return log_softmax(logp, allowed), state


def _check_search(n: int, constraint: str | None, max_steps: int) -> None:
    check_integer("n", n, least=1)
    check_choice("constraint", constraint, CONSTRAINTS)
    check_integer("max_steps", max_steps, least=n if constraint == "tsp" else 1)
