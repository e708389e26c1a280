"""The kill matrix: which law catches which mutant, with the laws in a mutant's reach."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from attnspec.conformance.laws import laws_for
from attnspec.conformance.mutants import Mutant
from attnspec.conformance.runner import Profile, Task, run_task

PROFILE = Profile("mutants", examples=60, derandomize=True, shrink=False)


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
        if run_task(Task(kernel, law, dtype), profile).failure is not None:
            killers.append(law.name)
    return Kill(mutant, tuple(killers), tuple(tried))


def kill_all(
    mutants: Iterable[Mutant],
    every_law: bool = False,
    progress: Callable[[Mutant], None] | None = None,
) -> list[Kill]:
    """`kill` for each of `mutants`."""
    kills = []
    for mutant in mutants:
        if progress:
            progress(mutant)
        kills.append(kill(mutant, every_law))
    return kills
