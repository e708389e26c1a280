"""Wrong kernels of pointer networks at decode: constraints that forbid too much or too little."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, right

MASK = right("pointer_networks.constraint_mask")


def end_at_any_time(slots: tuple[int, ...], n: int, constraint: Any) -> np.ndarray:
    allowed = MASK(slots, n, constraint)
    allowed[0] = True
    return allowed


def end_like_padding(slots: tuple[int, ...], n: int, constraint: Any) -> np.ndarray:
    """The end is never allowed under a constraint, unless nothing else is left of a hull."""
    allowed = MASK(slots, n, constraint)
    if constraint is not None and np.any(allowed[1:]):
        allowed[0] = False
    return allowed


def last_visit_only(slots: tuple[int, ...], n: int, constraint: Any) -> np.ndarray:
    """What was visited before the last step may be visited again."""
    MASK(slots, n, constraint)
    return MASK(slots[-1:], n, constraint)


def off_by_the_end(slots: tuple[int, ...], n: int, constraint: Any) -> np.ndarray:
    """Slots are taken for the indices of points."""
    MASK(slots, n, constraint)
    return MASK(tuple(min(slot + 1, n) for slot in slots), n, constraint)


def mutant(name: str, bug: str, call: Any) -> Mutant:
    operation = "pointer_networks.constraint_mask"
    return Mutant(f"pointer_networks.{name}", operation, "agreement", bug, call)


MUTANTS = (
    mutant("end-at-any-time", "a tour may end before it is complete", end_at_any_time),
    mutant("end-like-padding", "a hull may not end", end_like_padding),
    mutant("last-visit-only", "only the last point visited is forbidden", last_visit_only),
    mutant("off-by-the-end", "slots are taken for points", off_by_the_end),
)
