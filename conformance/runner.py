"""Search for a counterexample to one law on one kernel in one dtype."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky

from attnspec.conformance.case import Case, SavedCase
from attnspec.conformance.contract import Contract, find_contract
from attnspec.conformance.explain import conditions
from attnspec.conformance.kernel import Kernel
from attnspec.conformance.laws import laws, laws_for
from attnspec.conformance.laws.base import Law
from attnspec.conformance.report import Failure, Result
from attnspec.conformance.trial import Refused, Trial
from attnspec.conformance.violation import Violation


@dataclass(frozen=True)
class Profile:
    """How hard to search: examples a law and dtype, whether the search is repeatable, and whether
    a counterexample is made smaller and explained.
    """

    name: str
    examples: int
    derandomize: bool = True
    shrink: bool = True


PROFILES = {
    "smoke": Profile("smoke", examples=12),
    "ci": Profile("ci", examples=60),
    "thorough": Profile("thorough", examples=600, derandomize=False),
}

PATIENCE = 30.0
"""Seconds spent on making a counterexample smaller, and as many on finding what it needs."""

Progress = Callable[[str], None]


class _Enough(BaseException):
    """Ends a search: not an Exception, which Hypothesis would take for another failure."""


@dataclass(frozen=True)
class Task:
    """One law on one kernel in one dtype: the unit of work, of isolation and of the report."""

    kernel: Kernel
    law: Law
    dtype: str

    @property
    def contract(self) -> Contract:
        return find_contract(self.kernel.operation)

    def __str__(self) -> str:
        return f"{self.kernel.name} {self.kernel.operation} {self.law.name} {self.dtype}"


def plan(
    kernels: Iterable[Kernel],
    dtypes: Sequence[str] | None = None,
    only: Sequence[str] | None = None,
) -> list[Task]:
    """The tasks that certify `kernels`; `only` names laws, `dtypes` narrows the claimed ones."""
    tasks = []
    for kernel in kernels:
        contract = find_contract(kernel.operation)
        for law in laws_for(contract, kernel):
            if only and law.name not in only:
                continue
            for dtype in kernel.dtypes:
                if dtypes and dtype not in dtypes:
                    continue
                tasks.append(Task(kernel, law, dtype))
    return tasks


def run_task(
    task: Task, profile: Profile, saved: Sequence[SavedCase] = (), notice: Progress | None = None
) -> Result:
    """Replay the saved cases of a task, then search; the smallest counterexample comes back."""
    started = time.perf_counter()
    count = 0
    used: dict[str, float] = {}

    def check(case: Case) -> None:
        nonlocal count
        if any(k.quarantine and k.law == task.law.name and k.when(case) for k in task.kernel.known):
            return
        count += 1
        if notice:
            notice(case.to_json())
        trial = Trial(task.kernel, task.contract, case)
        try:
            check_case(task.law, trial)
        finally:
            for stage, share in trial.used.items():
                used[stage] = max(share, used.get(stage, 0.0))

    failure = _replay(task, check, saved) or _search(task, check, profile)
    seconds = time.perf_counter() - started
    verdict = "pass" if failure is None else "fail"
    if failure is not None and _is_known(task, failure.case):
        verdict = "known"
    headroom = {} if verdict == "fail" else used
    return Result(
        task.kernel.name,
        task.kernel.operation,
        task.law.name,
        task.dtype,
        verdict,
        count,
        seconds,
        headroom,
        failure,
    )


def check_case(law: Law, trial: Trial) -> None:
    """`law` on one case; an error of the kernel that no law foresaw is a violation too."""
    try:
        law.check(trial)
    except Refused as refusal:
        raise Violation(trial.contract.operation, f"refused a case it claims: {refusal}") from None


def _replay(
    task: Task, check: Callable[[Case], None], saved: Sequence[SavedCase]
) -> Failure | None:
    for item in saved:
        if (item.kernel, item.law) != (task.kernel.name, task.law.name):
            continue
        if (item.case.operation, item.case.dtype) == (task.kernel.operation, task.dtype):
            try:
                check(item.case)
            except Violation as violation:
                return _failure(task, item.case, violation)
    return None


def _search(task: Task, check: Callable[[Case], None], profile: Profile) -> Failure | None:
    found: list[tuple[Case, Violation]] = []
    deadline = math.inf
    strategy: st.SearchStrategy[Case] = task.law.cases(task.contract, task.kernel, task.dtype)

    def attempt(case: Case) -> None:
        nonlocal deadline
        if time.monotonic() > deadline:
            raise _Enough
        try:
            check(case)
        except Violation as violation:
            found.append((case, violation))
            deadline = min(deadline, time.monotonic() + PATIENCE)
            if not profile.shrink:
                # Hypothesis would only run it again.
                raise _Enough from None
            raise

    phases = [Phase.explicit, Phase.generate] + ([Phase.shrink] if profile.shrink else [])
    search = settings(
        max_examples=max(1, round(profile.examples * task.law.examples)),
        database=None,
        derandomize=False,
        deadline=None,
        phases=phases,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )(given(strategy)(attempt))
    if profile.derandomize:
        # The task's own seed: what Hypothesis derives from the test's source changes with it.
        search = seed(zlib.crc32(str(task).encode()))(search)
    try:
        search()
    except Violation:
        return _failure(task, *found[-1], explain=profile.shrink)
    except (_Enough, Flaky):
        if not found:
            raise
        smallest = min(found, key=lambda item: sum(item[0].sizes.values()))
        return _failure(task, *smallest, explain=profile.shrink)
    return None


def _failure(task: Task, case: Case, violation: Violation, explain: bool = True) -> Failure:
    deadline = time.monotonic() + PATIENCE

    def fails(other: Case) -> bool:
        if time.monotonic() > deadline:
            return True
        try:
            check_case(task.law, Trial(task.kernel, task.contract, other))
        except Violation:
            return True
        except Exception:
            return False
        return False

    return Failure(
        kernel=task.kernel.name,
        operation=task.kernel.operation,
        law=task.law.name,
        promise=task.law.promise,
        case=case,
        violation=violation,
        when=conditions(task.contract, case, fails) if explain else "wrong on a case like this",
    )


def _is_known(task: Task, case: Case) -> bool:
    return any(known.law == task.law.name and known.when(case) for known in task.kernel.known)


def replay(kernel: Kernel, saved: SavedCase) -> Failure | None:
    """Run one counterexample on `kernel`; None if it passes by now."""
    task = Task(kernel, laws()[saved.law], saved.case.dtype)
    try:
        check_case(task.law, Trial(kernel, task.contract, saved.case))
    except Violation as violation:
        return _failure(task, saved.case, violation)
    return None
