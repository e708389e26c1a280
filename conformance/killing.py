"""The kill matrix: which law catches which mutant, with the laws in a mutant's reach."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from attnspec.conformance.laws import laws_for
from attnspec.conformance.mutants import Mutant
from attnspec.conformance.mutants import mutants as all_mutants
from attnspec.conformance.runner import Profile, Task, run_task

PROFILE = Profile("mutants", examples=60, derandomize=True, shrink=False)
SLIPS = tuple(
    f"raised {error.__name__}"
    for error in (AttributeError, ImportError, NameError, RecursionError, UnboundLocalError)
)
"""How a mutant fails that is broken in another way than its bug: that kills nothing."""


@dataclass(frozen=True)
class Kill:
    """What happened to one mutant: the laws that caught it, and whether its own law did."""

    mutant: Mutant
    killers: tuple[str, ...]
    tried: tuple[str, ...]

    @property
    def killed(self) -> bool:
        return self.mutant.law in self.killers

    @property
    def survived(self) -> bool:
        return not self.killed and not self.mutant.equivalent

    def to_dict(self) -> dict[str, Any]:
        return {
            "mutant": self.mutant.name,
            "operation": self.mutant.operation,
            "bug": self.mutant.bug,
            "claimed_by": self.mutant.law,
            "killed": self.killed,
            "killers": list(self.killers),
            "tried": list(self.tried),
            "equivalent": self.mutant.equivalent,
        }


def kill(mutant: Mutant, every_law: bool = False, profile: Profile = PROFILE) -> Kill:
    """Try the law that claims `mutant`, or every law that applies to it."""
    kernel = mutant.kernel
    dtype = kernel.dtypes[0]
    killers, tried = [], []
    task = Task(kernel, None, dtype)  # type: ignore[arg-type]
    for law in laws_for(task.contract, kernel):
        if not every_law and law.name != mutant.law:
            continue
        tried.append(law.name)
        failure = run_task(Task(kernel, law, dtype), profile).failure
        if failure is not None and not failure.violation.message.startswith(SLIPS):
            killers.append(law.name)
    return Kill(mutant, tuple(killers), tuple(tried))


def kill_all(mutants: Sequence[Mutant], every_law: bool = False, jobs: int = 1) -> Iterator[Kill]:
    """`kill` for each of `mutants`, one by one, in so many processes."""
    if jobs == 1:
        yield from (kill(mutant, every_law) for mutant in mutants)
        return
    # A mutant holds functions that do not travel: its name does.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        laws = pool.map(partial(_laws_of, every_law), [mutant.name for mutant in mutants])
        for mutant, (killers, tried) in zip(mutants, laws, strict=True):
            yield Kill(mutant, killers, tried)


def _laws_of(every_law: bool, name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The laws that kill the mutant of this name, and those that were tried."""
    outcome = kill(next(m for m in all_mutants() if m.name == name), every_law)
    return outcome.killers, outcome.tried
