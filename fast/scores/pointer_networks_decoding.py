"""Greedy and beam decoding of a pointer network, a batch at a time and without host stalls.

``step_fn(state, last)`` takes the slots last pointed at, int64 (rows), and returns the
log-probabilities (rows, n + 1) and the next state. A state is a tensor, or a nest of lists, tuples
and dictionaries of tensors, whose first axis is rows; None means one row. Where the chapter returns
one sequence, a row of slots is padded with -1 behind its end. On the CPU decoding stops when all
rows are finished; elsewhere it takes `max_steps` steps, and what comes after an end is dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from attnspec.fast.backend import check_choice, check_integer
from attnspec.fast.growing import checkable

CONSTRAINTS = (None, "hull", "tsp")
StepFn = Callable[[Any, Tensor], tuple[Tensor, Any]]


def step_limit(task: str, n: int, *, backend: str | None = None) -> int:
    """The most steps a decoder may take for `n` points; task "hull", "tsp" or "delaunay"."""
    check_choice("task", task, ("hull", "tsp", "delaunay"))
    check_integer("n", n, least=3 if task == "delaunay" else 1)
    return {"hull": n + 1, "tsp": n, "delaunay": 3 * (2 * n - 5) + 1}[task]


def constraint_mask(
    slots: tuple[int, ...], n: int, constraint: str | None, *, backend: str | None = None
) -> Tensor:
    """bool (n + 1) on the CPU, True where the next slot may be, after `slots`.

    ValueError for another constraint or for what is no slot of `n` points.
    """
    check_integer("n", n, least=1)
    check_choice("constraint", constraint, CONSTRAINTS)
    for slot in slots:
        check_integer("slots", slot, least=0)
        if slot > n:
            raise ValueError(f"slots: got {slot}, expected 0 to {n}")
    visited = torch.zeros(1, n + 1, dtype=torch.bool)
    visited[0, list(slots)] = True
    return _open_slots(visited, constraint)[0]


def greedy_decode(
    step_fn: StepFn,
    state: Any,
    n: int,
    constraint: str | None,
    max_steps: int,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Slots int64 (rows, max_steps) and their log-probabilities float64 (rows).

    The most probable slot at each step, the lowest on ties; a constraint, "hull" or "tsp", masks
    before the log-probabilities are normalised again.
    """
    _check_search(n, constraint, max_steps)
    rows, device = _rows(state)
    slots = torch.full((rows, max_steps), -1, device=device)
    total = torch.zeros(rows, dtype=torch.float64, device=device)
    visited = torch.zeros(rows, n + 1, dtype=torch.bool, device=device)
    last = torch.zeros(rows, dtype=torch.int64, device=device)
    finished = torch.zeros(rows, dtype=torch.bool, device=device)
    for place in range(max_steps):
        logp, state = _next(step_fn, state, last, visited, finished, n, constraint)
        best = logp.amax(-1)
        number = torch.arange(n + 1, device=device)
        last = torch.where(logp == best[:, None], number, n).amin(-1)
        slots[:, place] = last.masked_fill(finished, -1)
        total = total + best.masked_fill(finished, 0)
        visited = visited.scatter(1, last[:, None], True)
        finished = finished | (last == 0)
        if checkable(finished) and bool(finished.all()):
            break
    return slots, total


def beam_decode(
    step_fn: StepFn,
    state: Any,
    n: int,
    width: int,
    constraint: str | None,
    max_steps: int,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Slots int64 (rows, width, max_steps) and log-probabilities float64 (rows, width), best first.

    Finished hypotheses keep their score and compete; ties go to the lexicographically lower
    sequence. Where there are fewer than `width` sequences the rest score -inf. `step_fn` is given
    rows * width rows, the hypotheses of a row one after the other.
    """
    check_integer("width", width, least=1)
    _check_search(n, constraint, max_steps)
    rows, device = _rows(state)
    state = pytree.tree_map_only(Tensor, lambda x: x.repeat_interleave(width, 0), state)
    number = torch.arange(width, device=device)
    first_row = torch.arange(rows, device=device)[:, None] * width
    slots = torch.full((rows, width, max_steps), -1, device=device)
    score = torch.full((rows, width), float("-inf"), dtype=torch.float64, device=device)
    score[:, 0] = 0
    # Places of the hypotheses in lexicographic order: candidates listed by it, and sorted stably
    # by score, come out with their ties in that order.
    order = number.repeat(rows, 1)
    visited = torch.zeros(rows * width, n + 1, dtype=torch.bool, device=device)
    last = torch.zeros(rows * width, dtype=torch.int64, device=device)
    # A hypothesis that does not exist scores -inf and counts as finished.
    finished = score.flatten() == float("-inf")
    for place in range(max_steps):
        logp, state = _next(step_fn, state, last, visited, finished, n, constraint)
        candidates = (score[:, :, None] + logp.view(rows, width, n + 1)).gather(
            1, order[:, :, None].expand(-1, -1, n + 1)
        )
        score, at = candidates.flatten(1).sort(stable=True, dim=1, descending=True)
        score, at = score[:, :width], at[:, :width]
        parent, slot = order.gather(1, at // (n + 1)), at % (n + 1)
        order = at.argsort(1)
        source = (first_row + parent).flatten()
        pick = partial(torch.index_select, dim=0, index=source)
        state = pytree.tree_map_only(Tensor, pick, state)
        slots = slots.gather(1, parent[:, :, None].expand_as(slots))
        finished = finished[source]
        slots[:, :, place] = slot.masked_fill(finished.view(rows, width), -1)
        last = slot.flatten()
        visited = visited[source].scatter(1, last[:, None], True)
        finished = finished | (last == 0) | (score.flatten() == float("-inf"))
        if checkable(finished) and bool(finished.all()):
            break
    return slots.masked_fill((score == float("-inf"))[:, :, None], -1), score


def _next(
    step_fn: StepFn,
    state: Any,
    last: Tensor,
    visited: Tensor,
    finished: Tensor,
    n: int,
    constraint: str | None,
) -> tuple[Tensor, Any]:
    """Log-probabilities float64 (rows, n + 1), normalised over the allowed slots, and the state.

    A finished row points at the end again, at no cost.
    """
    logp, state = step_fn(state, last)
    if tuple(logp.shape) != (len(last), n + 1):
        raise ValueError(f"step_fn: got shape {tuple(logp.shape)}, expected {(len(last), n + 1)}")
    allowed = _open_slots(visited, constraint)
    # A masked slot may hold anything, NaN too.
    scores = logp.double().masked_fill(~allowed, float("-inf"))
    if checkable(scores):
        best = scores.amax(-1)[~finished]
        if not bool(best.isfinite().all()):
            raise ValueError("step_fn: got no finite log-probability at the allowed slots of a row")
    scores = torch.log_softmax(scores, -1).masked_fill(finished[:, None], float("-inf"))
    scores[:, 0] = scores[:, 0].masked_fill(finished, 0)
    return scores, state


def _open_slots(visited: Tensor, constraint: str | None) -> Tensor:
    """Where each row may point next, shaped as what it `visited`, bool (rows, n + 1)."""
    if constraint is None:
        return torch.ones_like(visited)
    allowed = ~visited
    allowed[:, 0] = True if constraint == "hull" else visited[:, 1:].all(1)
    return allowed


def _rows(state: Any) -> tuple[int, torch.device]:
    """How many rows a state has, and where they are."""
    leaves = [x for x in pytree.tree_leaves(state) if isinstance(x, Tensor)]
    if not leaves:
        return 1, torch.device("cpu")
    return leaves[0].shape[0], leaves[0].device


def _check_search(n: Any, constraint: Any, max_steps: Any) -> None:
    check_integer("n", n, least=1)
    check_choice("constraint", constraint, CONSTRAINTS)
    check_integer("max_steps", max_steps, least=n if constraint == "tsp" else 1)
